"""The C++ backend: CPU, float32 products, or bfloat16 ones where the CPU has the instructions for them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .torch_op import TILE, CTCInputs, SavedForBackward


def available() -> bool:
    """Whether it is built or can be built here; the first call compiles it where the set-up has not."""
    from .build import load  # here, because `python -m model.ops.build` must not find itself imported already

    return load()


@functools.cache
def native_bf16() -> bool:
    """Whether bfloat16 products are fast here. Elsewhere bfloat16 tiles are converted, and the product is
    float32's."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def forward(problem: CTCInputs, deterministic: bool, with_gradient: bool):
    return torch.ops.soundwave_cpu.forward(*problem, TILE, with_gradient, native_bf16())


def computed_pairs(problem: CTCInputs, active: Tensor) -> Tensor:
    """Return which (frame, tile) pairs `backward` computes, [B * T, tiles]: those that are `active`."""
    return active


def backward(
    problem: CTCInputs,
    kept: SavedForBackward,
    loss_gradient: Tensor,
    computed: Tensor,
    deterministic: bool,
    wanted,
):
    saved = kept.loss, kept.lse, kept.label_gradient
    return torch.ops.soundwave_cpu.backward(
        *problem, *saved, loss_gradient, computed, TILE, *wanted, native_bf16()
    )
