"""Refuse an update after DeepSpeed has computed the global gradient norm and before anything has moved.

DeepSpeed 0.19.8 offers no hook there. Its own sign for a gradient that is not finite is a norm of -1 (ZeRO-1
in bf16: NaN): it then clears the gradients and leaves weights and optimizer states alone, which is what
skipping a step means. Each optimizer computes the norm in a method of its own:
    ZeRO-3         _get_norm_groups          deepspeed/runtime/zero/stage3.py
    ZeRO-1 bf16    get_grads_for_norm        deepspeed/runtime/bf16_optimizer.py
    ZeRO-1, -2     scaled_global_norm        deepspeed/runtime/zero/stage_1_and_2.py
Source: https://github.com/deepspeedai/DeepSpeed/tree/v0.19.8/deepspeed/runtime
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors


def install_step_gate(optimizer, zero_stage: int, device: str, rejects: Callable[[float], bool]) -> None:
    """Have `rejects` asked with the global norm of each step; where it returns True, the step is skipped.

    DeepSpeed finds NaN and infinity itself before it asks for the norm in some modes; then it does not ask.
    """
    if zero_stage == 3:
        from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

        norms = optimizer._get_norm_groups

        def gated_groups():
            groups = norms()
            return [torch.tensor(-1.0)] if rejects(float(combine_grad_norm_groups(groups))) else groups

        optimizer._get_norm_groups = gated_groups
    elif isinstance(optimizer, BF16_Optimizer):  # ZeRO-1 in bf16 with fp32 gradients
        gradients = optimizer.get_grads_for_norm

        def gated_gradients(for_clipping=False):
            norms = gradients(for_clipping=for_clipping)
            if not for_clipping and rejects(float(get_global_norm_of_tensors(norms[0], mpu=optimizer.mpu))):
                return [torch.full((1,), float("nan"), device=device)], {}
            return norms

        optimizer.get_grads_for_norm = gated_gradients
    else:
        total = optimizer.scaled_global_norm

        def gated_total(*args, **kwargs):
            norm = total(*args, **kwargs)
            return torch.tensor(-1.0) if rejects(float(norm)) else norm

        optimizer.scaled_global_norm = gated_total


def hide_overflow_lines(is_refused: Callable[[], bool]) -> None:
    """Drop DeepSpeed's lines about an overflow where `is_refused`: the trainer logs the reason instead."""
    deepspeed.utils.logger.addFilter(lambda record: not (is_refused() and "OVERFLOW" in record.getMessage()))
