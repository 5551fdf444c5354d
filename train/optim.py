"""AdamW groups and the learning-rate schedule, both pure functions of the recipe (and of the step)."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from core.options import RecipeError
from recipe.config import OptimConfig


def lr_share(config: OptimConfig, step: int) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warm-up, then cosine or line down
    to `min_lr_share` at the last step, or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps))
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.min_lr_share + (1.0 - config.min_lr_share) * shape


def parameter_groups(
    named: dict[str, list[tuple[str, torch.nn.Parameter]]], config: OptimConfig
) -> list[dict]:
    """Optimizer groups, two for each of `named`: weights with decay, norms and biases (one-dimensional)
    without.

    Each group holds its `name` and `peak_lr`; `set_lr` multiplies the latter. Parameters may be ZeRO-3
    partitions, whose own shape is flat: the shape that counts is the full one.
    """
    peaks = {name: getattr(config, f"lr_{name}") for name in named}
    groups = []
    for name in named:
        parameters = [parameter for _, parameter in named[name] if parameter.requires_grad]
        for suffix, decay in (("", config.weight_decay), ("_no_decay", 0.0)):
            chosen = [p for p in parameters if (len(getattr(p, "ds_shape", p.shape)) > 1) == (suffix == "")]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": name + suffix,
                        "weight_decay": decay,
                        "peak_lr": peaks[name],
                        "lr": peaks[name],
                    }
                )
    return groups


def build(groups: list[dict], config: OptimConfig, *, offload: bool) -> torch.optim.Optimizer:
    """torch's AdamW (fused on CUDA); where DeepSpeed keeps optimizer states in host memory, its own
    vectorised CPU Adam."""
    arguments: dict[str, Any] = {"betas": tuple(config.betas), "eps": config.eps}
    if offload:
        if problem := missing_offload_op():
            raise RecipeError(problem)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **arguments)


def missing_offload_op() -> str | None:
    """Return one line where the environment of `make setup` is without DeepSpeed's Adam for the CPU, which
    all ranks would then compile inside the run; None where it is there, or the environment is another one."""
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("cpu_adam") or not (Path(sys.prefix) / ".setup").is_dir():
        return None
    return "DeepSpeed's op for offloaded optimizer states is not built: make setup EXTRAS=offload"


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> dict[str, float]:
    """Set every group's rate for this step; returns them by name, for the log: with and without decay a part
    has one."""
    share = lr_share(config, step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
