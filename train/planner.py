"""Price of a stage on named GPUs: memory, largest micro-batch, time, checkpoints, network, epochs.

Printed by `train.run RECIPE --dry-run --gpus 16 --gpu a100-80`. Everything is computed from sizes; what is
assumed is printed as an assumption.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from core.console import duration
from core.options import RecipeError
from model.losses import LOSSES
from model.soundwave import Soundwave
from recipe.config import Recipe
from recipe.stages import losses_of, stage_of
from train import deepspeed_config
from train.flops import Flops, numel
from train.gathers import Limits, gathered_elements
from train.gpus import GIB, GPUS, gpu_named
from train.memory import RankMemory, activation_bytes, offloads_weights, rank_memory

UTILISATION = 0.4  # of the GPU's peak, assumed
RESERVE = 0.9  # of the GPU's memory is used at most: CUDA's context, NCCL and fragmentation take the rest
WRITE_SPEED = 1e9  # bytes a second and node to the shared file system, assumed
GPUS_PER_NODE = 8
EPOCHS = (1, 20)  # fewer leave data unused, more repeat it often
# What a rank sends in a collective over R ranks, in units of (R - 1) / R of the tensor's bytes. NCCL by rings
# (nccl-tests, PERFORMANCE.md); PyTorch's gloo makes a reduce-scatter of an all-reduce (ProcessGroupGloo.cpp).
NCCL = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
GLOO = {"all_reduce": 2, "reduce_scatter": 2, "all_gather": 1}
CLIP_SECONDS = 10.0
WORDS_A_SECOND_TO_POSITIONS = 9  # speech has about 3 words a second; prompt and answer three times that


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage and the micro-batch that fits under it."""

    zero_stage: int
    micro_batch_seconds: float  # 0: not even one clip fits
    memory: RankMemory  # at that micro-batch
    offload: bool = False  # weights and optimizer states in host memory

    @property
    def config(self) -> str:
        return f"ds_configs/zero{self.zero_stage}{'_offload' if self.offload else ''}.json"

    @property
    def fits(self) -> bool:
        return self.micro_batch_seconds > 0


class Planner:
    """One stage on `count` GPUs of a kind."""

    def __init__(self, recipe: Recipe, model: Soundwave, count: int, gpu: str):
        self.recipe, self.model, self.count, self.name = recipe, model, count, gpu
        self.gpu, self.stage = gpu_named(gpu), stage_of(recipe)
        self.width = model.ctc_head.weight.shape[1]
        self.weight_bytes = 2 if recipe.model.dtype == "bfloat16" else 4
        sizes = [(numel(p), p.requires_grad) for p in model.parameters()]
        self.trained = sum(n for n, learns in sizes if learns)
        self.frozen = sum(n for n, learns in sizes if not learns)
        self.encoder = 0 if model.encoder is None else sum(numel(p) for p in model.encoder.parameters())
        self.flops = Flops.of(model)
        self._traced: dict[tuple[float, bool], float] = {}

    # ---- memory

    def tokens(self, seconds: float) -> int:
        """LLM positions beside that much audio, in the recipe's proportion."""
        data = self.recipe.data
        return max(
            1, round(data.micro_batch_tokens * seconds / max(data.micro_batch_seconds, data.max_seconds))
        )

    def activations(self, seconds: float, zero_stage: int) -> float:
        key = seconds, zero_stage == 3
        if key not in self._traced:
            self._traced[key] = activation_bytes(
                self.model,
                self.recipe,
                micro_batch_seconds=seconds,
                tokens=self.tokens(seconds) if self.stage.needs_llm else 0,
                zero_stage=zero_stage,
            )
        return self._traced[key]

    def useful_seconds(self) -> float:
        """A larger micro-batch than a GPU's part of the global batch has no effect."""
        return max(self.recipe.data.batch_seconds / self.count, self.recipe.data.max_seconds)

    def with_zero_stage(self, zero_stage: int, offload: bool = False) -> tuple[Recipe, dict]:
        """The recipe under a ZeRO stage, and its DeepSpeed configuration."""
        recipe = copy.copy(self.recipe)
        given = deepspeed_config.resolve(recipe, self.width)
        if (zero_stage, offload) != (deepspeed_config.stage_number(given), offloads_weights(given)):
            recipe.deepspeed = f"ds_configs/zero{zero_stage}{'_offload' if offload else ''}.json"
        return recipe, deepspeed_config.resolve(recipe, self.width)

    def memory(self, zero_stage: int, activations: float, offload: bool = False) -> RankMemory:
        recipe, config = self.with_zero_stage(zero_stage, offload)
        return rank_memory(self.model, recipe, self.count, zero_stage, config, activations)

    def choice(self, zero_stage: int, offload: bool = False) -> Choice:
        """The largest micro-batch, in whole clips of data.max_seconds, that fits."""
        limit, rest = RESERVE * self.gpu.memory * GIB, self.memory(zero_stage, 0, offload)
        budget = limit - rest.states - rest.gathered - rest.buckets
        seconds = self._largest(budget, zero_stage) if rest.total <= limit else 0.0
        activations = self.activations(seconds, zero_stage) if seconds else 0
        return Choice(zero_stage, seconds, self.memory(zero_stage, activations, offload), offload)

    def _largest(self, budget: float, zero_stage: int) -> float:
        """Seconds of the largest micro-batch whose activations need at most `budget` bytes; 0: none.

        Activations grow nearly in proportion to the micro-batch, so each guess is a linear interpolation
        between what fits and what does not.
        """
        clip, most = self.recipe.data.max_seconds, self.useful_seconds()
        if self.activations(most, zero_stage) <= budget:
            return most
        fits, too_many = 0, math.ceil(most / clip)
        low, high = 0.0, self.activations(most, zero_stage)
        while too_many - fits > 1:
            guess = fits + round((too_many - fits) * (budget - low) / (high - low))
            guess = min(max(guess, fits + 1), too_many - 1)
            size = self.activations(guess * clip, zero_stage)
            if size <= budget:
                fits, low = guess, size
            else:
                too_many, high = guess, size
        return fits * clip

    def choices(self) -> list[Choice]:
        if self.recipe.model.llm.quantization != "none":  # which ZeRO-3 cannot shard
            return [self.choice(zero_stage) for zero_stage in (1, 2)]
        return [*(self.choice(zero_stage) for zero_stage in (1, 2, 3)), self.choice(3, offload=True)]

    def host_bytes(self) -> float:
        """Bytes of host memory for each GPU under offload: all weights in parts, fp32 masters, two moments,
        gradients."""
        return (self.weight_bytes * (self.trained + self.frozen) + 16 * self.trained) / self.count

    def proposal(self, choices: list[Choice]) -> Choice | None:
        """Of the ZeRO stages that take the recipe's micro-batch the one that sends the fewest bytes (of equal
        ones the one with less memory), or else the one that takes most; offload, which is slower, where no
        other fits. None where nothing fits."""
        offloaded = [choice for choice in choices if choice.offload]
        choices = [choice for choice in choices if not choice.offload]
        seconds = min(self.recipe.data.micro_batch_seconds, self.useful_seconds())
        enough = [choice for choice in choices if choice.micro_batch_seconds >= seconds]
        if enough:
            return min(enough, key=lambda choice: (self.bytes_sent(choice), choice.memory.total))
        best = max(choices, key=lambda choice: choice.micro_batch_seconds)
        return next((choice for choice in [best, *offloaded] if choice.fits), None)

    def bytes_sent(self, choice: Choice) -> float:
        return self.network_bytes(choice.zero_stage, self.micro_batches(choice.micro_batch_seconds))

    # ---- time and volume

    def step_flops(self) -> float:
        """FLOPs of a global batch, layers that are computed again in backward included; clips of 10 s."""
        return sum(self.flops_by_part(self.recipe.data.batch_seconds).values())

    def flops_by_part(self, seconds: float, with_attention: bool = True) -> dict[str, float]:
        """FLOPs of that much audio, in clips of 10 s. Without attention: products with weights alone."""
        positions = self.positions(seconds)
        clips = seconds / CLIP_SECONDS if with_attention else math.inf  # of no length
        parts = self.flops.step(positions["alignment"], clips, positions["llm"], clips, positions["lm_head"])
        if self.recipe.optim.activation_checkpointing and "llm" in parts:
            parts["recomputed"] = parts["llm"] / 2  # one more forward pass; frozen weights: 1 of 2
        return parts

    def positions(self, seconds: float) -> dict[str, float]:
        """Rows of each part's matrix products for that much audio."""
        encoder: Any = self.model.encoder
        encoded = seconds * (encoder.frame_rate if encoder is not None else 50)
        frames = encoded / self.flops.stack
        tokens = WORDS_A_SECOND_TO_POSITIONS * seconds if self.stage.needs_llm else 0.0
        return {
            "encoder": encoded,
            **dict.fromkeys(("alignment", "ctc_head", "shrinking"), frames),
            **dict.fromkeys(("llm", "lora", "recomputed"), tokens),
            "lm_head": tokens / 2,
        }

    def hours(self) -> float:
        speed = UTILISATION * self.gpu.peak * self.count
        return self.step_flops() * self.recipe.optim.total_steps / speed / 3600

    def micro_batches(self, seconds: float) -> int:
        return max(1, math.ceil(self.recipe.data.batch_seconds / self.count / max(seconds, 1e-9)))

    def collectives(self, zero_stage: int, micro_batches: int) -> dict[str, float]:
        """Bytes of the tensors that DeepSpeed 0.19.8 hands to each kind of collective in a step.

        ZeRO-1: an all-reduce of the gradients once a step, and the new weights. ZeRO-2: that all-reduce after
        each micro-batch (not a reduce-scatter: runtime/zero/stage_1_and_2.py, allreduce_and_scatter). ZeRO-3:
        a reduce-scatter, and weights as often as train/gathers.py counts. Gradients travel in the weights'
        dtype.
        """
        weights, trained = self.weight_bytes, self.weight_bytes * self.trained
        if zero_stage < 3:
            return {"all_reduce": trained * (micro_batches if zero_stage == 2 else 1), "all_gather": trained}
        _, config = self.with_zero_stage(zero_stage)
        uses_ctc = any(LOSSES[name].uses_ctc for name in losses_of(self.recipe))
        limits = Limits.of(config["zero_optimization"])
        gathered = gathered_elements(self.model, uses_ctc, limits, micro_batches)
        return {"reduce_scatter": micro_batches * trained, "all_gather": weights * gathered}

    def network_bytes(
        self, zero_stage: int, micro_batches: int, backend: dict[str, int] | None = None
    ) -> float:
        """Bytes that one GPU sends in a step. backend: NCCL (default) or GLOO."""
        factors = backend or NCCL
        share = (self.count - 1) / self.count
        sent = self.collectives(zero_stage, micro_batches)
        return share * sum(factors[kind] * size for kind, size in sent.items())

    def checkpoint_bytes(self) -> float:
        """Trained weights, their fp32 masters and two moments; frozen weights are not stored."""
        return self.trained * (self.weight_bytes + 12)

    def write_seconds(self) -> float:
        return self.checkpoint_bytes() / (WRITE_SPEED * math.ceil(self.count / GPUS_PER_NODE))

    # ---- text

    def work_line(self) -> str:
        flops = self.step_flops()
        hours = self.hours() * self.count
        petaflop = f"{flops / 1e15:.2f}" if flops > 1e13 else f"{flops / 1e15:.1g}"
        time = f"{hours:,.1f} hours" if hours >= 0.1 else duration(max(1, 3600 * hours))
        return (
            f"arithmetic: {petaflop} PFLOP a step (clips of 10 s), {time} of one "
            f"{self.gpu.device} in all if {UTILISATION:.0%} of {self.gpu.peak / 1e12:.0f} TFLOP/s are "
            "reached (an assumption, not a measurement)"
        )

    def lines(self, epochs: dict[str, float], brief: bool = False) -> list[str]:
        """brief: only what does not depend on the number of GPUs."""
        about_data = [epoch_line(name, number) for name, number in epochs.items()]
        a_step = min(epochs.values(), default=0.0) / self.recipe.optim.total_steps
        if a_step > 0.5:
            about_data.append(
                f"warning: data.batch_seconds={self.recipe.data.batch_seconds:g}, one step, is {a_step:.0%} "
                "of an epoch: lower it"
            )
        if not epochs:
            about_data = ["epochs: not known; pack the data, or give --data-hours"]
        if brief:
            return [*about_data, self.work_line()]
        choices = self.choices()
        chosen = self.proposal(choices)
        hours = self.hours()
        rows = [
            (
                f"ZeRO-{c.zero_stage}{', offload' if c.offload else ''}",
                c.memory.states / GIB,
                (c.memory.gathered + c.memory.buckets) / GIB,
                c.memory.activations / GIB if c.fits else None,
                c.memory.update / GIB,
                c.memory.total / GIB if c.fits else None,
                f"{c.micro_batch_seconds:g} s" if c.fits else "does not fit",
                self.bytes_sent(c) / 1e9 if c.fits else None,
            )
            for c in choices
        ]
        headers = (
            "",
            "states",
            "buffers",
            "activations",
            "or update",
            "GiB in all",
            "largest micro-batch",
            "GB sent a step",
        )
        lines = [
            f"\nPlan for {self.count} x {self.name} ({self.gpu.memory:g} GiB, {self.gpu.peak / 1e12:.0f} "
            f"TFLOP/s); memory of one GPU in GiB",
            tabulate(rows, headers=headers, floatfmt=".2f"),
            f"time: {hours:,.1f} h wall-clock, {hours * self.count:,.0f} GPU hours, if {UTILISATION:.0%} of "
            "the peak is reached (an assumption, not a measurement)",
            f"offload: {self.host_bytes() / GIB:.1f} GiB of host memory for each GPU",
            f"checkpoint: {self.checkpoint_bytes() / 1e9:.1f} GB, written in {self.write_seconds():.0f} s if "
            f"each node writes {WRITE_SPEED / 1e9:g} GB/s (an assumption)",
        ]
        return [*about_data, self.work_line(), *lines, self._proposal_line(chosen)]

    def _proposal_line(self, chosen: Choice | None) -> str:
        if chosen is None:
            more = (
                "" if self.recipe.optim.activation_checkpointing else ", optim.activation_checkpointing=true"
            )
            return (
                f"proposal: nothing fits into {self.gpu.memory:g} GiB: take more or larger GPUs, lower "
                f"data.max_seconds{more}"
            )
        seconds = chosen.micro_batch_seconds
        keys = [f"deepspeed={chosen.config}", f"data.micro_batch_seconds={seconds:g}"]
        if self.stage.needs_llm:
            keys.append(f"data.micro_batch_tokens={self.tokens(seconds)}")
        count = self.micro_batches(seconds)
        batches = f"{count} micro-batch{'' if count == 1 else 'es'}"
        return f"proposal: {' '.join(keys)} ({batches} a step and GPU)"


def epoch_line(name: str, epochs: float) -> str:
    line = f"epochs of {name}: {epochs:.2f}"
    if epochs >= EPOCHS[1] + 0.5:  # whole steps hold a little more than the epochs that are asked for
        return f"{line}; warning: above {EPOCHS[1]}: give fewer (optim.epochs or optim.steps), or add data"
    if epochs < EPOCHS[0]:
        return (
            f"{line}; warning: below {EPOCHS[0]}: part of the data is not used; raise optim.steps or give "
            "optim.epochs"
        )
    return line


def check_options(count: int | None, gpu: str | None, data_hours: float | None) -> None:
    """Errors: RecipeError where --gpus, --gpu or --data-hours is missing or wrong."""
    if (count is None) != (gpu is None):
        raise RecipeError(
            f"give --gpus and --gpu together, e.g. --gpus 8 --gpu a100-80; known: {', '.join(GPUS)}"
        )
    if gpu is not None:
        gpu_named(gpu)
    if count is not None and count < 1:
        raise RecipeError(f"--gpus {count}: give 1 or more")
    if data_hours is not None and not 0 < data_hours < math.inf:
        raise RecipeError(f"--data-hours {data_hours:g}: give a number above 0")
