"""How new LoRA starts: from random numbers, or from the LLM's own weights (PiSSA, OLoRA).

PiSSA starts the factors at the largest components of a weight, W ~ s B0 A0, and takes these out of it:

    (W - s B0 A0) x + s B A x     peft: the base weight changes
    W x + s (B A - B0 A0) x       here: the same function and gradients, and W stays as it is

The start A0, B0 is two buffers beside the trained factors, so that base files, their hashes, ZeRO-3's shards
and the LLM without LoRA (the teacher of the loss `kl`) are those of any LoRA. Files hold an ordinary LoRA of
twice the rank, [B, -B0] [A; A0], for any reader of peft's format. Under dropout both halves read the same
input, so that training starts with the LLM's own function.

PiSSA: https://arxiv.org/abs/2404.02948, OLoRA: https://arxiv.org/abs/2406.01775; the factors are peft's.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from core.distributed import from_main
from core.keys import signed_key64
from model.config import LLMConfig

logger = logging.getLogger("soundwave")
_A, _B = ".lora_A", ".lora_B"


def takes_components(kind: str) -> bool:
    """Whether LoRA of this `model.llm.lora_init` starts at components of the LLM's weights."""
    return kind == "olora" or kind.startswith("pissa")


def drawn_start(config: LLMConfig) -> bool | str:
    """Return peft's init_lora_weights for what is drawn at random; of PiSSA's structure, before its start is
    known, the default."""
    return config.lora_init if config.lora_init in ("gaussian", "orthogonal") else True


def odd_rank(config: LLMConfig) -> str | None:
    """Return one line for a rank that `orthogonal`, which draws pairs of rows, does not have."""
    ranks = {"model.llm.lora_r": config.lora_r}
    ranks |= {f"model.llm.lora_rank_pattern.{name}": int(r) for name, r in config.lora_rank_pattern.items()}
    for key, rank in ranks.items():
        if config.lora_init == "orthogonal" and rank % 2:
            return f"{key} is {rank}, and model.llm.lora_init=orthogonal needs even ranks: give {rank + 1}"
    return None


def too_few_components(llm: PeftModel, kind: str) -> str | None:
    """Return one line for a layer whose weight has fewer components than its LoRA has ranks."""
    for name, layer in lora_layers(llm):
        rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > most:
            where = name.removeprefix("base_model.model.")
            return (
                f"model.llm.lora_init={kind}: {where} has rank {rank}, and its weight has {most} components: "
                f"give it a rank of at most {most} (model.llm.lora_r, lora_rank_pattern)"
            )
    return None


class StartedA(nn.Linear):
    """LoRA's A with its start beside it: x [..., D] -> [A x, A0 x] [..., 2 r]."""

    start: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, self.weight), F.linear(x, self.start.to(self.weight.dtype))], -1)


class StartedB(nn.Linear):
    """LoRA's B: [A x, A0 x] [..., 2 r] -> B A x - B0 A0 x [..., D], in one product, so that what cancels is
    added up before it is rounded."""

    start: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.cat([self.weight, -self.start.to(self.weight.dtype)], 1))


def add_starts(llm: PeftModel) -> None:
    """Give each LoRA layer room for its start, in place; it is 0 until `decompose` or a file fills it."""
    for _, layer in lora_layers(llm):
        for factors, kind in ((layer.lora_A, StartedA), (layer.lora_B, StartedB)):
            factor = factors["default"]
            factor.__class__ = kind
            factor.register_buffer("start", torch.zeros_like(factor.weight))


def lora_layers(llm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of the layers that have LoRA."""
    for name, module in llm.named_modules():
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict) and "default" in factors:
            yield name, module


def starts(llm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of all starts by name; {} where LoRA has none."""
    return {
        name: b
        for name, b in llm.named_buffers()
        if name.endswith((f"{_A}.default.start", f"{_B}.default.start"))
    }


@torch.no_grad()
def decompose(llm: PeftModel, kind: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Start LoRA at the components of its weights. Collective: rank 0 decomposes, all ranks get the same.

    dtype: of training; the start is rounded to it, so that A - A0 is exactly 0 at the first step.
    """
    layers, began = list(lora_layers(llm)), time.perf_counter()
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_main:
        logger.info("model.llm.lora_init=%s: decomposing %d weights", kind, len(layers))
    for name, layer in layers:
        with _gathered(layer.get_base_layer().weight) as weight:
            factors = from_main(_components(name, layer, weight, kind, device) if is_main else None)
        for factor, value in zip((layer.lora_A, layer.lora_B), cast(Any, factors), strict=True):
            rounded = value.to(dtype)
            factor["default"].weight.copy_(rounded)
            factor["default"].start.copy_(rounded)
    if is_main:
        logger.info("decomposed in %.0f s", time.perf_counter() - began)


def _components(
    name: str, layer: Any, weight: torch.Tensor, kind: str, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0, B0 of one layer, as peft makes them, by a layer of its own."""
    # A Conv1D holds its weight transposed, which peft's olora does not know.
    matrix = weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
    rows, columns = matrix.shape
    alone = nn.Linear(columns, rows, bias=False, device="meta")
    alone.weight = nn.Parameter(matrix.to(device, copy=True).contiguous(), requires_grad=False)
    config = LoraConfig(
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        use_rslora=layer.use_rslora["default"],
        init_lora_weights=cast(Any, kind),
        target_modules=["0"],
    )
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else None):
        torch.manual_seed(signed_key64("lora", name) & (2**63 - 1))
        found = cast(Any, get_peft_model(cast(Any, nn.Sequential(alone)), config)).base_model.model[0]
    return tuple(factor["default"].weight.detach().float().cpu() for factor in (found.lora_A, found.lora_B))


@contextmanager
def _gathered(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The whole weight, which ZeRO-3 may have sharded while it was loaded."""
    if not hasattr(weight, "ds_id"):
        yield weight.detach()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight.detach()


# ------------------------------------------------------------------------------------------------------ files


def file_state(llm: PeftModel) -> dict[str, torch.Tensor]:
    """Return LoRA's tensors as files hold them: with a start, an ordinary LoRA of twice the rank."""
    state = get_peft_model_state_dict(llm)
    for name in [name for name in state if name.endswith(".start")]:
        start, weight = state.pop(name), name.removesuffix("start") + "weight"
        is_a = weight.endswith(f"{_A}.weight")
        sign, axis = (1, 0) if is_a else (-1, 1)
        state[weight] = torch.cat([state[weight], sign * start.to(state[weight])], axis)
    return state


def file_shapes(llm: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the sizes of `file_state`'s tensors; ZeRO-3 may have sharded them."""
    state = get_peft_model_state_dict(llm)
    sizes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in state.items()}
    for name in [name for name in sizes if name.endswith(".start")]:
        weight = name.removesuffix("start") + "weight"
        sizes.pop(name)
        sizes[weight][0 if weight.endswith(f"{_A}.weight") else 1] *= 2
    return {name: tuple(size) for name, size in sizes.items()}


def file_config(llm: PeftModel) -> LoraConfig:
    """Return peft's configuration of `file_state`: with a start, twice the rank at the same scale."""
    config = copy.deepcopy(cast(LoraConfig, llm.peft_config["default"]))
    config.init_lora_weights = True  # whoever reads the files changes no base weight
    if starts(llm):
        more = 2**0.5 if config.use_rslora else 2
        config.r, config.lora_alpha = 2 * config.r, cast(int, more * config.lora_alpha)
        config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {name: more * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def take_starts(llm: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the second half of `file_state`'s rows into the starts, and return the rest. LoRA without starts
    has all rows in its factors."""
    if not starts(llm):
        return state
    rest = dict(state)
    for name, layer in lora_layers(llm):
        for part, factors in ((_A, layer.lora_A), (_B, layer.lora_B)):
            key = f"{name}{part}.weight"
            value, rank = state[key], layer.r["default"]
            rest[key] = value[:rank] if part == _A else value[:, :rank].contiguous()
            factors["default"].start.copy_(value[rank:] if part == _A else -value[:, rank:])
    return rest
