"""This rank's fp32 master weights, and how the model's weights are made from them. DeepSpeed 0.19.8.

Each optimizer has them under a name of its own, and writes them into the model inside its step:
    ZeRO-3         fp32_partitioned_groups_flat       deepspeed/runtime/zero/stage3.py
    ZeRO-1 bf16    fp32_groups_flat_partition         deepspeed/runtime/bf16_optimizer.py
    ZeRO-1, -2     single_partition_of_fp32_groups    deepspeed/runtime/zero/stage_1_and_2.py
Source: https://github.com/deepspeedai/DeepSpeed/tree/v0.19.8/deepspeed/runtime
"""

from __future__ import annotations

import torch

_NAMES = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")


def masters(optimizer) -> list[torch.Tensor]:
    """Return the flat fp32 shards of this rank, one a group of parameters, padding included."""
    return next(getattr(optimizer, name) for name in _NAMES if hasattr(optimizer, name))


def copy_to_model(optimizer, zero_stage: int) -> None:
    """Write the masters into the model's weights, as a step does at its end. Collective."""
    if zero_stage < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if persistent := optimizer.persistent_parameters:
        persistent[0].all_gather(persistent)
    optimizer.invalidate_secondary_tensor()
