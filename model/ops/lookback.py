"""Look-back attention: each CTC peak attends to the frames of its own utterance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:  # CUDA only, an optional extra
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def lookback_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept_lengths: Tensor,
    key_lengths: Tensor,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, each utterance by itself.

    query [B, K, H, d] (CTC peaks), key and value [B, T, H, d] (frames), kept_lengths and key_lengths [B];
    key_mask [B, T] bool leaves only some of the frames as keys. Returns [B, K, H, d]; positions past
    kept_lengths, and utterances without any key, give zero. Varlen FlashAttention (Dao, arXiv 2307.08691)
    where it imports and the tensors are fp16 or bf16 on a GPU, PyTorch's scaled_dot_product_attention
    otherwise.
    """
    batch, queries, heads, width = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[2:] != (heads, width):
        raise ValueError(
            f"lookback_attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} do not fit: they must be [B, K, H, d], [B, T, H, d] and [B, T, H, d]"
        )
    is_query = torch.arange(queries, device=query.device)[None] < kept_lengths.to(query.device)[:, None]
    is_key = torch.arange(key.shape[1], device=key.device)[None] < key_lengths.to(key.device)[:, None]
    if key_mask is not None:
        is_key = is_key & key_mask
    is_query = is_query & is_key.any(dim=1, keepdim=True)
    if (
        flash_attn_varlen_func is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
    ):
        return _varlen(query, key, value, is_query, is_key)
    # An all-masked row would be NaN: rows that do not count look at every frame, and are set to zero below.
    mask = (is_key[:, None, None, :] | ~is_query[:, None, :, None]).expand(batch, 1, queries, key.shape[1])
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).masked_fill(~is_query[:, :, None, None], 0.0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, is_query: Tensor, is_key: Tensor) -> Tensor:
    is_key = is_key & is_query.any(dim=1, keepdim=True)

    def ends(mask: Tensor) -> tuple[Tensor, int]:
        lengths = mask.sum(dim=1)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()) if len(
            lengths
        ) else 0

    (query_ends, longest_query), (key_ends, longest_key) = ends(is_query), ends(is_key)
    out = torch.zeros_like(query)
    if longest_query:
        out[is_query] = flash_attn_varlen_func(
            query[is_query], key[is_key], value[is_key], query_ends, key_ends, longest_query, longest_key
        )
    return out
