"""The LLM's linear layers in 8 or 4 bits (`model.llm.quantization`): less memory for a frozen base.

    kind          package        a weight
    torchao_int8  torchao        8 bits, an fp32 scale for each row
    torchao_int4  torchao        4 bits, an fp32 scale for 32 numbers of a row
    nf4           bitsandbytes   4 bits (NormalFloat), an fp32 scale for 64 numbers (QLoRA)

A layer's weight is dequantised for each product, forward and backward, and dropped: what is computed, and its
gradients, are those of a plain layer with the dequantised weight. Embedding tables (the CTC head's targets),
norms, LoRA and layers trained whole keep their type. Files, and their hashes, are the unquantised model's.

The numbers are buffers of integers that no checkpoint holds and no cast rounds (DeepSpeed casts a model to
bf16). QLoRA: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from model.pretrained import SourceError


@dataclass(frozen=True)
class Kind:
    """How weights are stored. group: numbers that share a scale (of a row; nf4: of the flat weight); None: a
    row's."""

    package: str
    bits: int
    group: int | None
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # weight -> numbers, scales
    dequantise: Callable[[QuantisedLinear], torch.Tensor]  # -> fp32 [rows, columns]

    def group_of(self, columns: int) -> int:
        return self.group if self.group and columns % self.group == 0 else columns

    def bytes_of(self, rows: int, columns: int) -> int:
        """Return the bytes of a weight with its scales."""
        size = rows * columns
        scales = -(-size // 64) if self.package == "bitsandbytes" else size // self.group_of(columns)
        return -(-size * self.bits // 8) + 4 * scales


def _integers(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symmetric integers [rows, columns] and fp32 scales [rows, columns / group], as torchao's
    weight-only configurations have them."""
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = weight.float()
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.SYMMETRIC,
        cast(Any, (1, group)),
        torch.int8,
        quant_min=least,
        quant_max=most,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
    )
    numbers = quantize_affine(weight, (1, group), scale, zero, torch.int8, quant_min=least, quant_max=most)
    return numbers, scale.reshape(len(weight), -1)


def _scaled(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = numbers.shape
    return (numbers.view(rows, scale.shape[1], -1).float() * scale[..., None]).view(rows, columns)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _integers(weight, 8, weight.shape[1])


def _from_int8(layer: QuantisedLinear) -> torch.Tensor:
    return _scaled(layer.numbers, layer.scale)


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers a byte."""
    numbers, scale = _integers(weight, 4, KINDS["torchao_int4"].group_of(weight.shape[1]))
    flat = F.pad(numbers.flatten().to(torch.int16) + 8, (0, numbers.numel() % 2))
    return (flat[0::2] * 16 + flat[1::2]).to(torch.uint8), scale


def _from_int4(layer: QuantisedLinear) -> torch.Tensor:
    pairs = torch.stack([layer.numbers >> 4, layer.numbers & 15], -1).flatten().to(torch.int8) - 8
    rows, columns = layer.out_features, layer.in_features
    return _scaled(pairs[: rows * columns].view(rows, columns), layer.scale)


def _nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    numbers, state = quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4")
    return numbers, state.absmax


def _from_nf4(layer: QuantisedLinear) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    state = QuantState(
        layer.scale,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=get_4bit_type("nf4", device=layer.numbers.device),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return dequantize_4bit(layer.numbers, state)


KINDS = {
    "torchao_int8": Kind("torchao", 8, None, _int8, _from_int8),
    "torchao_int4": Kind("torchao", 4, 32, _int4, _from_int4),
    "nf4": Kind("bitsandbytes", 4, 64, _nf4, _from_nf4),
}


class _Product(torch.autograd.Function):
    """x [..., columns] -> x W^T. W is made again in backward, and has no gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class QuantisedLinear(nn.Module):
    """A frozen linear layer (Conv1D of transformers, too), its weight in few bits."""

    numbers: torch.Tensor
    scale_bits: torch.Tensor

    def __init__(self, layer: nn.Linear | Conv1D, kind: str):
        super().__init__()
        weight = layer.weight.detach()
        weight = weight.T if isinstance(layer, Conv1D) else weight
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype, self.bias = KINDS[kind], weight.dtype, layer.bias
        numbers, scale = self.kind.quantise(weight)
        self.register_buffer("numbers", numbers, persistent=False)
        # As integers: a cast of the model would round them.
        self.register_buffer("scale_bits", scale.float().contiguous().view(torch.int32), persistent=False)

    @property
    def scale(self) -> torch.Tensor:
        return self.scale_bits.view(torch.float32)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight [out_features, in_features], in the type that it had."""
        return self.kind.dequantise(self).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = cast(torch.Tensor, _Product.apply(x, self))
        return out if self.bias is None else out + self.bias.to(out.dtype)


def missing_package(kind: str) -> str | None:
    """Return one line where the package of a kind is not installed."""
    if kind == "none" or importlib.util.find_spec(KINDS[kind].package):
        return None
    return (
        f"model.llm.quantization={kind} needs the package {KINDS[kind].package}, which is not installed: "
        "make setup EXTRAS=quantization, or pip install -r requirements-quantization.txt"
    )


def quantised_layers(llm: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    """Yield (module that has it, its name there, layer) of the layers that are quantised: linear ones, but
    the output embeddings, LoRA and what is trained whole."""
    base: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    head = base.get_output_embeddings()
    for name, module in list(cast(nn.Module, base).named_modules()):
        for child, layer in list(module.named_children()):
            inside = f"{name}.{child}"
            if any(word in inside for word in (".lora_", "modules_to_save", "original_module")):
                continue
            if type(layer) in (nn.Linear, Conv1D) and layer is not head:
                yield module, child, cast(Any, layer)


def quantise(llm: nn.Module, kind: str, name: str) -> None:
    """Replace the frozen linear layers of an LLM by quantised ones, in place. Errors: SourceError."""
    if problem := missing_package(kind):
        raise SourceError(problem)
    found = 0
    for module, child, layer in quantised_layers(llm):
        setattr(module, child, QuantisedLinear(layer, kind))
        found += 1
    if not found:
        raise SourceError(
            f"model.llm.quantization={kind}: {name} has no linear layers that can be quantised: set it to "
            "none"
        )


@dataclass(frozen=True)
class Saving:
    """Bytes of the linear layers as they are, and quantised; largest: while the largest weight is dequantised
    (twice in fp32)."""

    plain: float = 0.0
    quantised: float = 0.0
    largest: float = 0.0

    @property
    def saved(self) -> float:
        return self.plain - self.quantised


def saving(llm: nn.Module | None, kind: str, weight_bytes: int) -> Saving:
    """Return what quantising an LLM (on any device, not quantised yet) saves."""
    if llm is None or kind == "none":
        return Saving()
    shapes = [tuple(layer.weight.shape) for _, _, layer in quantised_layers(llm)]
    transposed = [isinstance(layer, Conv1D) for _, _, layer in quantised_layers(llm)]
    matrices = [shape[::-1] if swap else shape for shape, swap in zip(shapes, transposed, strict=True)]
    sizes = [rows * columns for rows, columns in matrices]
    return Saving(
        weight_bytes * sum(sizes),
        sum(KINDS[kind].bytes_of(*matrix) for matrix in matrices),
        8 * max(sizes, default=0),
    )
