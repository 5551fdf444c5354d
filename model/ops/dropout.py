"""Dropout whose mask is a function of a key for each vector: the same on every device, in every batch, each
time it is asked for.

    bits(key, site, channel) = lane (channel mod 4) of SplitMix64(SplitMix64(key xor site) xor
    SplitMix64(channel div 4 + 1))

One 64-bit hash gives four lanes of 16 bits, one for each of four channels. A channel is dropped where its
lane, read as a signed number plus 2^15, is below p x 65536 (so p is rounded to a multiple of 1/65536, and the
rest is scaled by that p). No generator has a state. Source of the hash: Steele, Lea and Flood, OOPSLA 2014,
as in `stream.plan.mix64`.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from .lanes import LANES, STEPS


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GAMMA, FIRST, SECOND = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _finish(z: Tensor) -> Tensor:
    """SplitMix64's finaliser in place on int64, whose product wraps and whose shift copies the sign: the mask
    takes it off."""
    for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


def mix64(values: Tensor) -> Tensor:
    """int64 of any shape -> SplitMix64's next output from each as a state."""
    return _finish(values + GAMMA)


@lru_cache(maxsize=32)
def _channels(width: int, device: torch.device) -> Tensor:
    """[ceil(width / 4)] hashes, one for four channels."""
    return mix64(torch.arange(1, -(-width // LANES) + 1, device=device))


def _scaled_mask(keys: Tensor, site: int, width: int, threshold: int, dtype: torch.dtype) -> Tensor:
    """keys [...] -> [..., width]: 0 where a channel is dropped, 1 / (1 - p) elsewhere."""
    hashes = _finish((mix64(keys ^ site).reshape(-1, 1) ^ _channels(width, keys.device)).add_(GAMMA))
    lanes = hashes.reshape(-1).view(torch.int16).view(*keys.shape, LANES * hashes.shape[1])[..., :width]
    mask = torch.empty(lanes.shape, dtype=dtype, device=keys.device)
    torch.ge(lanes, threshold - STEPS // 2, out=mask)  # lanes are signed: the lowest is -2^15
    return mask.mul_(STEPS / (STEPS - threshold))


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _OnGPU(torch.autograd.Function):
    """One kernel forward and one backward, which computes the mask again: nothing but the keys is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, site: int, threshold: int) -> Tensor:
        from . import triton_dropout

        ctx.save_for_backward(keys)
        ctx.site, ctx.threshold = site, threshold
        return triton_dropout.apply(x, keys, site, threshold)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        from . import triton_dropout

        (keys,) = ctx.saved_tensors
        return triton_dropout.apply(gradient, keys, ctx.site, ctx.threshold), None, None, None


def keyed_dropout(x: Tensor, keys: Tensor, site: int, p: float) -> Tensor:
    """x [..., D] with channels set to zero with probability p, the others scaled by 1 / (1 - p); keys [...]
    int64 choose which.

    site: a hash as a signed 64-bit number, which separates places with the same keys. Errors: ValueError
    for keys of another shape.
    """
    if keys.shape != x.shape[:-1]:
        raise ValueError(
            f"keyed_dropout: keys {tuple(keys.shape)} must have the shape of x {tuple(x.shape)} without its "
            f"last "
            "dimension"
        )
    threshold = round(p * STEPS)
    if threshold == 0 or not x.numel():
        return x
    if threshold >= STEPS:
        return torch.zeros_like(x)
    if x.is_cuda and _has_triton():
        return _OnGPU.apply(x, keys, site, threshold)
    return x * _scaled_mask(keys, site, x.shape[-1], threshold, x.dtype)
