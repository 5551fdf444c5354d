"""From the CTC argmax to the frames that stay: runs of equal tokens, one frame kept of each."""

from __future__ import annotations

import torch
from torch import Tensor


def ctc_runs(
    argmax: Tensor,
    peak: Tensor,
    input_lengths: Tensor,
    blank: int,
    *,
    keep: str = "peak",
    keep_blank_runs: bool = False,
    blank_logprob: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one frame of every run of equal argmax tokens.

    argmax [B, T] int64; peak [B, T]: how probable the argmax token is (any increasing measure, e.g. largest
    logit - lse); input_lengths [B] in frames. `keep`: "peak", the run's most probable frame (the first of
    equals), or "first", its first frame. Blank runs are dropped unless `keep_blank_runs`. An utterance
    without any run to keep keeps its least blank frame: the smallest blank_logprob [B, T], or, without it,
    the smallest peak.

    Returns kept [B, K] int64, frame positions in rising order padded with 0, and kept_lengths [B] int64, each
    >= 1.
    Errors: ValueError for another `keep`, for shapes that differ, and for a batch of zero-frame tensors.
    """
    if keep not in ("peak", "first"):
        raise ValueError(f"ctc_runs: keep='{keep}' is unknown: give 'peak' or 'first'")
    if argmax.dim() != 2 or peak.shape != argmax.shape or input_lengths.shape != argmax.shape[:1]:
        raise ValueError(
            f"ctc_runs: argmax {tuple(argmax.shape)}, peak {tuple(peak.shape)} and input_lengths "
            f"{tuple(input_lengths.shape)} do not fit: they must be [B, T], [B, T] and [B]"
        )
    batch, length = argmax.shape
    if batch and not length:
        raise ValueError("ctc_runs: the utterances have no frames at all (T = 0), so none can be kept")
    if not batch:
        return argmax.new_zeros(0, 0), input_lengths.new_zeros(0, dtype=torch.int64)

    position = torch.arange(length, device=argmax.device).expand(batch, length)
    input_lengths = input_lengths.to(argmax.device)
    valid = position < input_lengths[:, None]
    starts = torch.ones_like(valid)
    starts[:, 1:] = argmax[:, 1:] != argmax[:, :-1]
    if keep == "first":
        chosen = starts
    else:
        run = starts.cumsum(dim=1) - 1
        score = peak.detach().masked_fill(~valid, -torch.inf)
        best = torch.full_like(score, -torch.inf).scatter_reduce(1, run, score, "amax")
        is_best = score == best.gather(1, run)
        first = torch.full_like(position, length).scatter_reduce(
            1, run, position.where(is_best, length), "amin"
        )
        chosen = position == first.gather(1, run)
    kept = chosen & valid
    if not keep_blank_runs:
        kept &= argmax != blank

    blankness = (peak if blank_logprob is None else blank_logprob).detach().masked_fill(~valid, torch.inf)
    least_blank = blankness.argmin(dim=1, keepdim=True)  # frame 0 where an utterance has no frame
    kept |= ~kept.any(dim=1, keepdim=True) & (position == least_blank)

    kept_lengths = kept.sum(dim=1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(kept_lengths.max())]
    in_range = torch.arange(order.shape[1], device=order.device)[None] < kept_lengths[:, None]
    return order.masked_fill(~in_range, 0), kept_lengths
