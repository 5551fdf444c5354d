"""The public face of the fused op: arguments checked, an implementation chosen, the reduction applied."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

IMPLEMENTATIONS = ("auto", "cpp", "triton", "reference")


def linear_ctc(hidden: Tensor, weight: Tensor, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int, *,
               reduction: str = "mean", zero_infinity: bool = True, extra_row: Tensor | None = None,
               skip_below: float | None = None, implementation: str = "auto",
               deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CTC loss over softmax(hidden @ weight.T) without the logits.

    hidden [B, T, D]; weight [V, D]; input_lengths [B] in frames; targets [B, U] token ids, padded with anything;
    target_lengths [B]. Words mean what they mean in torch.nn.functional.ctc_loss: `reduction` "none" (loss [B]), "sum", or
    "mean" (each loss divided by its target length, at least 1, then the mean; 0 for an empty batch); `zero_infinity` sets
    impossible alignments (frames < labels + adjacent repeats) to zero with zero gradient.

    extra_row [D] is one more row of the vocabulary, with index V, which must then be the blank: the trained blank beside a
    frozen embedding. skip_below: backward leaves out (frame, vocabulary tile) pairs whose softmax mass is below it
    (default 2^-24 in float32, 2^-12 in bfloat16; 0: exact; docs/fused_op.md has the bound). Products run in hidden's dtype,
    or autocast's; sums and the recursion in float32 (float64 for float64).

    Returns loss; argmax [B, T] int64; lse, largest logit and blank's logit [B, T] float32. Only the loss has a gradient
    (hidden, weight, extra_row). A frame past its utterance's length reads as a certain blank (argmax blank, the others 0).

    Errors: ValueError naming the argument, or the utterance (row of the batch) whose target equals the blank or lies outside
    the vocabulary, or whose lengths do not fit. Source: Graves et al., ICML 2006.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"linear_ctc: reduction='{reduction}' is unknown: give 'none', 'mean' or 'sum'")
    hidden, input_lengths = _checked(hidden, weight, input_lengths, blank, extra_row, implementation)
    targets, target_lengths = _checked_targets(hidden, weight, targets, target_lengths, input_lengths, blank, extra_row)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, argmax, lse, largest, blank_logit = reference.linear_ctc(hidden, weight, extra_row, input_lengths, targets,
                                                                       target_lengths, blank)
        if zero_infinity:
            loss = torch.where(loss == torch.inf, 0.0, loss)
        if reduction == "mean":
            loss = (loss / target_lengths.clamp(min=1)).sum() / max(len(loss), 1)
        elif reduction == "sum":
            loss = loss.sum()
    return loss, argmax, lse.detach(), largest, blank_logit.detach()


@torch.no_grad()
def linear_argmax(hidden: Tensor, weight: Tensor, input_lengths: Tensor, *, blank: int, extra_row: Tensor | None = None,
                  implementation: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sweep alone: argmax [B, T] int64, and lse, largest logit, blank's logit [B, T] float32. See linear_ctc."""
    hidden, input_lengths = _checked(hidden, weight, input_lengths, blank, extra_row, implementation)
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.linear_argmax(hidden, weight, extra_row, input_lengths, blank)


def _checked(hidden: Tensor, weight: Tensor, input_lengths: Tensor, blank: int, extra_row: Tensor | None,
             implementation: str) -> tuple[Tensor, Tensor]:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"linear_ctc: implementation='{implementation}' is unknown: give one of {', '.join(IMPLEMENTATIONS)}")
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(f"linear_ctc: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: they must be "
                         "[B, T, D] and [V, D]")
    vocabulary = weight.shape[0] + (extra_row is not None)
    if extra_row is not None and (extra_row.shape != weight.shape[1:] or blank != weight.shape[0]):
        raise ValueError(f"linear_ctc: extra_row {tuple(extra_row.shape)} must be [D] = [{weight.shape[1]}], and blank {blank} its "
                         f"index V = {weight.shape[0]}")
    if not 0 <= blank < vocabulary:
        raise ValueError(f"linear_ctc: blank {blank} lies outside the vocabulary of {vocabulary} tokens")
    if input_lengths.shape != hidden.shape[:1]:
        raise ValueError(f"linear_ctc: input_lengths {tuple(input_lengths.shape)} must be [B] = [{hidden.shape[0]}]")
    wrong = ((input_lengths < 0) | (input_lengths > hidden.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"linear_ctc: utterance {row}: input length {int(input_lengths[row])} is not within 0 to T = {hidden.shape[1]}")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, input_lengths.to(hidden.device)


def _checked_targets(hidden: Tensor, weight: Tensor, targets: Tensor, target_lengths: Tensor, input_lengths: Tensor, blank: int,
                     extra_row: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets with the padding set to one harmless label, after every real one was checked."""
    if targets.dim() != 2 or targets.shape[0] != hidden.shape[0] or target_lengths.shape != hidden.shape[:1]:
        raise ValueError(f"linear_ctc: targets {tuple(targets.shape)} and target_lengths {tuple(target_lengths.shape)} must be [B, U] "
                         f"and [B] with B = {hidden.shape[0]}")
    targets, target_lengths = targets.to(hidden.device), target_lengths.to(hidden.device)
    vocabulary = weight.shape[0] + (extra_row is not None)
    wrong = ((target_lengths < 0) | (target_lengths > targets.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"linear_ctc: utterance {row}: target length {int(target_lengths[row])} is not within 0 to U = {targets.shape[1]}")
    is_label = torch.arange(targets.shape[1], device=targets.device)[None] < target_lengths[:, None]
    wrong = (is_label & ((targets < 0) | (targets >= vocabulary) | (targets == blank))).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        what = "is the blank" if int(targets[row, place]) == blank else f"lies outside the vocabulary of {vocabulary} tokens"
        raise ValueError(f"linear_ctc: utterance {row}: target {int(targets[row, place])} at position {place} {what}")
    return targets.masked_fill(~is_label, 0), target_lengths
