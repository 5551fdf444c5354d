"""Keyed dropout as one pass over its input: CUDA (and, under TRITON_INTERPRET=1, any tensor, for tests). See
dropout.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import LANES, STEPS

ROWS, WORDS = 4, 256  # vectors and hashes of a program: 4,096 numbers


@triton.jit
def _mix64(z):
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


# What follows the batch is not specialised: each kind of it would be compiled anew, in the middle of
# training.
@triton.jit(do_not_specialize=["rows", "site", "threshold"])
def _dropout(x, keys, out, rows, width, site, threshold, scale, ROWS_: tl.constexpr, WORDS_: tl.constexpr):
    """out [rows, width] <- x with channels dropped by keys [rows]; site as it is, threshold of 2^16."""
    row = tl.program_id(0) * ROWS_ + tl.arange(0, ROWS_)
    word = tl.program_id(1) * WORDS_ + tl.arange(0, WORDS_)
    lane = tl.arange(0, 4)
    key = tl.load(keys + row, mask=row < rows, other=0) ^ site.to(tl.int64)
    channels = _mix64((word + 1).to(tl.uint64))
    bits = _mix64(_mix64(key.to(tl.uint64, bitcast=True))[:, None] ^ channels[None, :])
    place = ((bits[:, :, None] >> (16 * lane).to(tl.uint64)[None, None, :]) & 0xFFFF).to(tl.int32) ^ 0x8000
    column = word[None, :, None] * 4 + lane[None, None, :]
    here = (row < rows)[:, None, None] & (column < width)
    at = row.to(tl.int64)[:, None, None] * width + column
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(out + at, tl.where(place >= threshold, value, 0.0).to(out.dtype.element_ty), mask=here)


def apply(x: Tensor, keys: Tensor, site: int, threshold: int) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), keys.numel()
    if rows:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, WORDS * LANES))
        _dropout[grid](
            x, keys.contiguous(), out, rows, width, site, threshold, STEPS / (STEPS - threshold), ROWS, WORDS
        )
    return out
