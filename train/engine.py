"""One optimizer step on every rank: global counts, micro-batches, global sums, health, step.

    counts of the global batch (all-reduce) -> per micro-batch: forward, loss over global counts, backward
      -> sums of the losses (all-reduce) -> gradient norm (DeepSpeed's, global) -> apply or skip, alike on all
      ranks

Loss: the weighted sum of the recipe's terms (model/losses), each a sum / its count in the global batch.
DeepSpeed averages gradients over ranks, so the loss is multiplied by the number of ranks: the gradient is
that of the global batch, however it is split.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch.profiler import record_function

from core.distributed import Ranks
from core.keys import signed_key64
from model.batch import Batch
from model.rows import probe
from model.soundwave import Output, Soundwave
from recipe.config import Recipe
from recipe.stages import Stage, losses_of
from train import deepspeed_config, optim
from train.deepspeed_fixes import zero3
from train.deepspeed_fixes.step_gate import hide_overflow_lines, install_step_gate
from train.health import Health
from train.step_counts import StepCounts, StepFlags, StreamSums, all_reduce, reduce_step_counts
from train.weight_average import WeightAverage

logger = logging.getLogger("soundwave")


@dataclass
class StepResult:
    step: int
    loss: float
    losses: dict[str, float]  # each term per unit of its denominator, without its weight
    grad_norm: float | None
    skipped: str | None  # why the step was not applied
    lr: dict[str, float]
    sums: dict[str, float]  # over all ranks
    seconds: dict[str, float]  # of this rank


def weighted_sum(losses: dict[str, float], weights: dict[str, float]) -> float:
    """Return the loss that terms and their weights make."""
    loss = 0.0
    for name, weight in weights.items():
        loss = loss + weight * losses[name]
    return loss


class Engine:
    """DeepSpeed's engine around the model, with the step above.

    Args:
        model: a Soundwave whose trainable parts are chosen by `set_stage`.
        config: resolved DeepSpeed configuration (train/deepspeed_config.py).
    """

    def __init__(self, model: Soundwave, recipe: Recipe, stage: Stage, config: dict, ranks: Ranks):
        self.recipe, self.stage, self.ranks = recipe, stage, ranks
        self.zero_stage = deepspeed_config.stage_number(config)
        self.losses = losses_of(recipe)
        if self.zero_stage == 3:
            zero3.prepare_modules(model)
        if recipe.optim.activation_checkpointing:
            model.enable_activation_checkpointing()
        if self.zero_stage == 3 and recipe.model.dtype == "bfloat16":
            zero3.cast_new_parameters(model)
        groups = optim.parameter_groups(model.parameter_groups(), recipe.optim)
        optimizer = optim.build(groups, recipe.optim, offload=deepspeed_config.offloads_optimizer(config))
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model = model
        self.average: WeightAverage | None = None
        if recipe.optim.ema_decay is not None:
            self.average = WeightAverage(self.optimizer, self.zero_stage, recipe.optim.ema_decay)
        self.health = Health(recipe.health)
        self._loss: float = 0.0
        self._skip_reason: str | None = None
        self._is_probing = False
        install_step_gate(self.optimizer, self.zero_stage, ranks.device, self._rejects)
        hide_overflow_lines(lambda: self._skip_reason is not None)
        self._try_rows()

    def _try_rows(self) -> None:
        """Decide on all ranks alike whether this LLM's rows may be joined. Errors: SourceError for one that
        cannot be trained."""
        llm = self.model.llm
        if llm is None:
            return
        self.deepspeed.train()
        rows = probe(llm, self.model.audio_id)
        (kept_apart,) = all_reduce([float(rows.kept_apart)], self.ranks)
        joins_rows = kept_apart == self.ranks.world_size
        cast(Any, llm).joins_rows = joins_rows  # model.language_model looks for it
        if self.ranks.is_main:
            elsewhere = "padded: on another rank they do not stay apart when they are joined"
            logger.info("rows of a micro-batch are %s", rows if joins_rows == rows.kept_apart else elsewhere)

    def _reason_to_skip(self, norm: float) -> str | None:
        return "a memory probe" if self._is_probing else self.health.reason_to_skip(self._loss, norm)

    def _rejects(self, norm: float) -> bool:
        self._skip_reason = self._reason_to_skip(norm)
        return self._skip_reason is not None

    def weighted_loss(self, output: Output, counts: dict[str, float]) -> torch.Tensor:
        """Return a micro-batch's part of the loss of the global batch."""
        loss: Any = 0.0  # a tensor once the first term is added
        for name, weight in self.losses.items():
            loss = loss + weight * output.sums[name] / max(counts[name], 1.0)
        return loss

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights, where the recipe asks for them. Collective."""
        return self.average.in_use() if self.average is not None else nullcontext()

    @contextmanager
    def whole_model(self) -> Iterator[bool]:
        """The model for inference; yields whether ranks must run in step (`synced_gpus`).

        Under ZeRO-3 the weights are gathered once (every rank then holds the whole model), unless
        log.gather_to_validate is off: gathering each layer for each generated token costs more than all else.
        """
        self.deepspeed.eval()
        with torch.no_grad():
            if self.zero_stage == 3 and self.recipe.log.gather_to_validate:
                with deepspeed.zero.unwrap_model_for_generation(self.deepspeed):
                    yield False
            else:
                yield self.zero_stage == 3

    def reduce_step_counts(
        self, micro_batches: list[Batch], flags: StepFlags = StepFlags(), streamed: StreamSums = StreamSums()
    ) -> StepCounts:
        """The collective that opens a step: denominators of the global batch, and what ranks report."""
        return reduce_step_counts(tuple(self.losses), micro_batches, self.ranks, flags, streamed)

    def probe_memory(self, batch: Batch) -> None:
        """Run one micro-batch up to the update, which is refused, to measure peak memory. Collective.

        DeepSpeed's own way to skip a step clears the gradients; its counters are put back.
        """
        counters = {
            name: getattr(self.deepspeed, name)
            for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        }
        self._is_probing = True
        self.step(0, [batch], self.reduce_step_counts([batch]))
        self._is_probing = False
        vars(self.deepspeed).update(counters)

    def step(self, step: int, micro_batches: list[Batch], counts: StepCounts) -> StepResult:
        """One optimizer step. Every rank brings the same number of micro-batches (the stream deals them
        so)."""
        started = time.perf_counter()
        number = len(micro_batches)
        self.deepspeed.train()
        names = tuple(self.losses)
        sums = torch.zeros(len(names) + 3, dtype=torch.float64, device=self.ranks.device)
        dropout_key = signed_key64("step", self.recipe.seed, step)
        for i, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == number - 1)
            with record_function("forward"):
                output = self.deepspeed(batch.to(self.ranks.device).at_step(dropout_key), losses=names)
                loss = self.weighted_loss(output, counts.losses)
            with record_function("backward"):
                self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
            sums += torch.stack(
                [
                    torch.as_tensor(x, dtype=torch.float64, device=self.ranks.device).detach()
                    for x in (*output.sums.values(), output.frames, output.kept, output.llm_tokens)
                ]
            )
        computed = time.perf_counter()
        dist.all_reduce(sums)
        *loss_sums, frames, kept, llm_tokens = sums.tolist()
        losses = {
            name: value / max(counts.losses[name], 1.0) for name, value in zip(names, loss_sums, strict=True)
        }
        self._loss = weighted_sum(losses, self.losses)
        rates = optim.set_lr(self.optimizer, self.recipe.optim, step)
        self._skip_reason, judged = None, (self.health.skipped, len(self.health.norms))
        with record_function("update"):
            self.deepspeed.step()
        if self.optimizer.overflow and self._skip_reason is None:
            assert judged == (self.health.skipped, len(self.health.norms))
            self._skip_reason = self._reason_to_skip(float("nan"))
        if self.average is not None and self._skip_reason is None:
            self.average.update()
        norm = None if self._skip_reason else float(self.deepspeed.get_global_grad_norm())
        return StepResult(
            step=step,
            loss=self._loss,
            losses=losses,
            grad_norm=norm,
            skipped=self._skip_reason,
            lr=rates,
            sums={
                "frames": frames,
                "kept": kept,
                "llm_tokens": llm_tokens,
                "target_tokens": counts.target_tokens,
                "micro_batches": number,
            },
            seconds={"compute": computed - started, "update": time.perf_counter() - computed},
        )
