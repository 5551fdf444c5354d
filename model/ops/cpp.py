"""The C++ backend: CPU, float32 products, or bfloat16 ones where the CPU has the instructions for them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .build import load
from .operator import TILE


def available() -> bool:
    return load()


@functools.cache
def native_bf16() -> bool:
    """Whether bfloat16 products are fast here. Elsewhere bfloat16 tiles are converted, and the product is float32's."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def forward(hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor,
            blank: int, deterministic: bool, with_gradient: bool):
    return torch.ops.soundwave_cpu.forward(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank, TILE, with_gradient,
                                           native_bf16())


def backward(loss_gradient: Tensor, hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor, targets: Tensor,
             target_lengths: Tensor, blank: int, skip_below: float, deterministic: bool, loss: Tensor, lse: Tensor, blank_logit: Tensor,
             log_mass: Tensor, occupancy: Tensor, want_hidden: bool, want_weight: bool, want_extra: bool):
    return torch.ops.soundwave_cpu.backward(loss_gradient, hidden, weight, extra_row, input_lengths, targets, target_lengths, blank, TILE,
                                            skip_below, loss, lse, blank_logit, log_mass, occupancy, want_hidden, want_weight, want_extra,
                                            native_bf16())
