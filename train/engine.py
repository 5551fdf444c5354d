"""One optimizer step on every rank: global counts, micro-batches, global sums, health, step.

    counts of the global batch (all-reduce) -> per micro-batch: forward, loss over global counts, backward
      -> sums of the losses (all-reduce) -> gradient norm (DeepSpeed's, global) -> apply or skip, alike on all
      ranks

Loss: CE = sum over target tokens / their number in the global batch; CTC = sum over transcribed utterances of
loss / target length, over their number in the global batch. DeepSpeed averages gradients over ranks, so the
loss is multiplied by the number of ranks: the gradient is that of the global batch, however it is split.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors
from torch.profiler import record_function

from core.distributed import Ranks
from core.keys import signed_key64
from model.batch import Batch
from model.language_model import base_of
from model.rows import probe
from recipe.config import Recipe
from recipe.stages import Stage
from train import optim, zero
from train.health import Health

logger = logging.getLogger("soundwave")


@dataclass
class StepResult:
    step: int
    loss: float
    ce: float | None  # per target token
    ctc: float | None  # per transcribed utterance, divided by its target length
    grad_norm: float | None
    skipped: str | None  # why the step was not applied
    lr: dict[str, float]
    # Sums over all ranks.
    sums: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of this rank


def all_reduce(values: list[float], ranks: Ranks) -> list[float]:
    """Sums over ranks in float64, in one collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


class Engine:
    """DeepSpeed's engine around the model, with the step above.

    Args:
        model: a Soundwave whose trainable parts are chosen by `set_stage`.
        config: resolved DeepSpeed configuration (train/zero.py).
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, stage: Stage, config: dict, ranks: Ranks):
        self.recipe, self.stage, self.ranks = recipe, stage, ranks
        self.zero_stage = zero.stage_number(config)
        if self.zero_stage == 3:
            for module, parameter in model.shared_parameters():
                if not any(
                    own is parameter for own in module.parameters(recurse=False)
                ):  # else its own hooks gather it
                    deepspeed.zero.register_external_parameter(module, parameter)
            leaves = {
                type(layer)
                for module in model.modules()
                if isinstance(module, torch.nn.ModuleList)
                for layer in module
            }
            # Gather a Transformer layer at once: hooks on each Linear and LoRA matrix of it (some 30) cost
            # more than they save.
            if leaves:
                deepspeed.utils.set_z3_leaf_modules(model, sorted(leaves, key=lambda c: c.__name__))
            if model.llm is not None:
                # DeepSpeed collects such a layer's gradients when the gradient of its input is there. In
                # stage III the first layer's input would have none, and the hook would fire before the
                # gradients of its LoRA exist.
                base_of(model.llm).enable_input_require_grads()
        if recipe.optim.activation_checkpointing:
            model.enable_activation_checkpointing()
        if self.zero_stage == 3 and recipe.model.dtype == "bfloat16":
            # DeepSpeed (0.19.8) casts a model to bf16, but not one that was sharded while it was loaded, as
            # the LLM is here: what is new would compute in fp32, slower than it need be and unlike ZeRO-2.
            # The optimizer keeps fp32 masters of it.
            for parameter in model.parameters():
                if parameter.requires_grad and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(torch.bfloat16)
        groups = optim.parameter_groups(model.parameter_groups(), stage.trains, recipe.optim)
        optimizer = optim.build(groups, recipe.optim, offload=zero.offloads_optimizer(config))
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model = model
        self.health = Health(recipe.health)
        self._loss, self._skip_reason, self._rehearsing = 0.0, None, False
        self._install_gate()
        self._try_rows()
        # What the gate refuses DeepSpeed takes for an overflow, and says so; the reason is told by the loop.
        deepspeed.utils.logger.addFilter(
            lambda record: not (self._skip_reason and "OVERFLOW" in record.getMessage())
        )

    def _try_rows(self) -> None:
        """Decide on all ranks alike whether this LLM's rows may be joined. Errors: SourceError for one that
        cannot be trained."""
        llm = self.model.llm
        if llm is None:
            return
        self.deepspeed.train()
        rows = probe(llm, self.model.audio_id)
        (kept_apart,) = all_reduce([float(rows.kept_apart)], self.ranks)
        llm.joins_rows = kept_apart == self.ranks.world_size
        if self.ranks.is_main:
            elsewhere = "padded: on another rank they do not stay apart when they are joined"
            logger.info(
                "rows of a micro-batch are %s", rows if llm.joins_rows == rows.kept_apart else elsewhere
            )

    def _install_gate(self) -> None:
        """Judge the step where DeepSpeed has just computed the global norm and nothing has moved yet.

        A norm of -1 is DeepSpeed's own sign for a gradient that is not finite: it then clears the gradients
        and leaves weights and optimizer states alone, which is what skipping a step means.
        """
        inner = self.optimizer
        if self.zero_stage == 3:
            from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

            norms = inner._get_norm_groups

            def gated_groups():
                groups = norms()
                return (
                    [torch.tensor(-1.0)] if self._rejects(float(combine_grad_norm_groups(groups))) else groups
                )

            inner._get_norm_groups = gated_groups
        elif isinstance(inner, BF16_Optimizer):  # ZeRO-1 in bf16 with fp32 gradients
            gradients = inner.get_grads_for_norm

            def gated_gradients(for_clipping=False):
                found = gradients(for_clipping=for_clipping)
                if not for_clipping and self._rejects(
                    float(get_global_norm_of_tensors(found[0], mpu=inner.mpu))
                ):
                    return [torch.full((1,), float("nan"), device=self.ranks.device)], {}
                return found

            inner.get_grads_for_norm = gated_gradients
        else:
            total = inner.scaled_global_norm

            def gated_total(*args, **kwargs):
                norm = total(*args, **kwargs)
                return torch.tensor(-1.0) if self._rejects(float(norm)) else norm

            inner.scaled_global_norm = gated_total

    def _reason_to_skip(self, norm: float) -> str | None:
        return "a rehearsal" if self._rehearsing else self.health.reason_to_skip(self._loss, norm)

    def _rejects(self, norm: float) -> bool:
        self._skip_reason = self._reason_to_skip(norm)
        return self._skip_reason is not None

    def _micro_loss(self, output, ce_count: float, ctc_count: float) -> torch.Tensor:
        loss = 0.0
        if "ce" in self.stage.losses:
            loss = loss + output.ce_sum / max(ce_count, 1.0)
        if "ctc" in self.stage.losses:
            weight = self.recipe.loss.ctc_weight if "ce" in self.stage.losses else 1.0
            loss = loss + weight * output.ctc_sum / max(ctc_count, 1.0)
        return loss

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

    def agree(self, micro_batches: list[Batch], flags: list[float]) -> tuple[float, float, list[float]]:
        """The collective that opens a step: (target tokens, transcribed utterances) of the global batch, and
        `flags` summed over ranks; wishes to stop, finished saves and broken data travel so. A rank with
        broken data may come with no micro-batches.
        """
        local = [
            float(sum(b.ce_count for b in micro_batches)),
            float(sum(b.ctc_count for b in micro_batches)),
        ]
        ce_count, ctc_count, *flags = all_reduce(local + flags, self.ranks)
        return ce_count, ctc_count, flags

    def rehearse(self, batch: Batch) -> None:
        """One micro-batch all the way to the update, which is refused: memory is asked for, and no state
        moves.

        On all ranks alike. DeepSpeed's own way to skip a step clears the gradients; its counters are put
        back.
        """
        counters = {
            name: getattr(self.deepspeed, name)
            for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        }
        self._rehearsing = True
        self.step(0, [batch], *self.agree([batch], [])[:2])
        self._rehearsing = False
        vars(self.deepspeed).update(counters)

    def step(self, step: int, micro_batches: list[Batch], ce_count: float, ctc_count: float) -> StepResult:
        """One optimizer step. Every rank brings the same number of micro-batches (the stream deals them
        so)."""
        started = time.perf_counter()
        number = len(micro_batches)
        self.deepspeed.train()
        sums = torch.zeros(5, dtype=torch.float64, device=self.ranks.device)
        dropout_key = signed_key64("step", self.recipe.seed, step)
        for i, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == number - 1)
            with record_function("forward"):
                output = self.deepspeed(
                    batch.to(self.ranks.device).at_step(dropout_key), losses=self.stage.losses
                )
                loss = self._micro_loss(output, ce_count, ctc_count)
            with record_function("backward"):
                self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
            sums += torch.stack(
                [
                    torch.as_tensor(x, dtype=torch.float64, device=self.ranks.device).detach()
                    for x in (output.ce_sum, output.ctc_sum, output.frames, output.kept, output.llm_tokens)
                ]
            )
        computed = time.perf_counter()
        dist.all_reduce(sums)
        ce_sum, ctc_sum, frames, kept, llm_tokens = sums.tolist()
        ce = ce_sum / max(ce_count, 1.0) if "ce" in self.stage.losses else None
        ctc = ctc_sum / max(ctc_count, 1.0) if "ctc" in self.stage.losses else None
        if ce is None:
            self._loss = ctc
        else:
            self._loss = ce + (self.recipe.loss.ctc_weight * ctc if ctc is not None else 0.0)
        rates = optim.set_lr(self.optimizer, self.recipe.optim, step)
        # DeepSpeed finds NaN and infinity itself before it asks for the norm in some modes; then the gate is
        # not asked.
        self._skip_reason, judged = None, (self.health.skipped, len(self.health.norms))
        with record_function("update"):
            self.deepspeed.step()
        if self.optimizer.overflow and self._skip_reason is None:
            assert judged == (self.health.skipped, len(self.health.norms))
            self._skip_reason = self._reason_to_skip(float("nan"))
        norm = None if self._skip_reason else float(self.deepspeed.get_global_grad_norm())
        result = StepResult(step, self._loss, ce, ctc, norm, self._skip_reason, rates)
        result.sums = {
            "frames": frames,
            "kept": kept,
            "llm_tokens": llm_tokens,
            "ce_count": ce_count,
            "ctc_count": ctc_count,
            "micro_batches": number,
        }
        result.seconds = {"compute": computed - started, "update": time.perf_counter() - computed}
        return result
