"""LoRA of a model folder in a model whose ranks or scales differ: the new adapter starts with the function of
the old one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from core.keys import signed_key64
from model.lora_init import starts
from model.pretrained import read_json

_A, _B = ".lora_A.weight", ".lora_B.weight"


def scale_of(settings: dict[str, Any], layer: str, rank: int) -> float:
    """Return alpha / rank of a layer, or alpha / sqrt(rank), by a peft configuration."""
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def rank_axis(name: str) -> int | None:
    """Return the dimension of a LoRA tensor that is its rank."""
    return {_A: 0, _B: 1}.get(name[-len(_A) :])


def starting_state(llm: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA folder as `llm` needs them to compute the same: further rows of A are
    drawn, further columns of B are 0, and B is scaled where alpha / rank differs.

    No rank of `llm` is below the folder's (`artifact.check_fit`). Rows are drawn alike on all ranks.
    """
    state = load_file(folder / "adapter_model.safetensors")
    then, now = read_json(folder / "adapter_config.json"), llm.peft_config["default"].to_dict()
    ranks = {
        name.removesuffix(".default"): module.r["default"]
        for name, module in llm.named_modules()
        if isinstance(getattr(module, "r", None), dict) and "default" in module.r
    }
    halves = 2 if starts(llm) else 1  # files hold the start of LoRA, too (model/lora_init.py)
    for name in [name for name in state if name.endswith(_A)]:
        path = name.removesuffix(_A)
        down, up, layer = state[name], state[path + _B], path.removeprefix("base_model.model.")
        more = halves * ranks[path] - len(down)
        ratio = scale_of(then, layer, len(down)) / scale_of(now, layer, ranks[path])
        if more:
            generator = torch.Generator().manual_seed(signed_key64("lora", path) & (2**63 - 1))
            drawn = torch.rand(more, down.shape[1], generator=generator)
            drawn = (2 * drawn - 1) / down.shape[1] ** 0.5  # as peft draws A
            state[name] = torch.cat([down, drawn.to(down.dtype)])
            up = torch.cat([up, up.new_zeros(len(up), more)], 1)
        state[path + _B] = up if math.isclose(ratio, 1) else up * ratio
    return state
