"""Optimizer states after a universal checkpoint was loaded. DeepSpeed 0.19.8.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage3.py
(load_hp_checkpoint_state_from_checkpoint_dir_stage3)
"""

from __future__ import annotations

import torch


def untie_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its own step counter: one tensor for all would count once for each parameter in
    every step.

    AdamW's fused kernel wants the counter where the parameter lies; the universal loader leaves it where it
    was saved.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            step = state["step"]
            state["step"] = step.to(parameter.device if on_device else step.device, copy=True)
