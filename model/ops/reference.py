"""The fused op in plain PyTorch: what the C++ and Triton implementations mean, readable as the formulas.

Changes only when the op's meaning changes. Differentiable by autograd, in float64 too (gradcheck).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# Frames whose logits exist at one time: 64 x 128,257 x 4 B = 33 MB.
FRAMES_AT_ONCE = 64
# log(0) that logaddexp can differentiate; every loss beyond half of it means that no path exists.
LOG_ZERO = -1e30


def _logits(frames: Tensor, weight: Tensor, extra_row: Tensor | None) -> Tensor:
    """frames [C, D] -> logits [C, V (+ 1)], product in the frames' dtype, result in at least float32."""
    logits = linear(frames, weight.to(frames.dtype))
    if extra_row is not None:
        logits = torch.cat([logits, linear(frames, extra_row.to(frames.dtype)[None])], dim=1)
    return logits.to(torch.promote_types(frames.dtype, torch.float32))


def _log_normaliser(frames: Tensor, weight: Tensor, extra_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(frames, weight, extra_row)
    largest, argmax = logits.detach().max(dim=1)
    return torch.logsumexp(logits, dim=1), largest, argmax


def sweep(frames: Tensor, weight: Tensor, extra_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, largest logit and its token, for each of the frames [N, D]; all [N].

    Chunks of frames one after the other, each computed again in backward, so that N x V logits are never held.
    """
    pieces = []
    for chunk in frames.split(FRAMES_AT_ONCE):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_log_normaliser, chunk, weight, extra_row, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_log_normaliser(chunk, weight, extra_row))
    if not pieces:
        empty = frames.sum(dim=1, dtype=torch.promote_types(frames.dtype, torch.float32))
        return empty, empty.detach(), empty.detach().long()
    lse, largest, argmax = (torch.cat(column) for column in zip(*pieces))
    return lse, largest, argmax


def columns(hidden: Tensor, weight: Tensor, extra_row: Tensor | None, tokens: Tensor) -> Tensor:
    """Logits of chosen tokens: hidden [B, T, D], tokens [B, C] -> [B, T, C]."""
    in_weight = tokens.clamp(max=weight.shape[0] - 1)
    rows = weight[in_weight].to(hidden.dtype)
    if extra_row is not None:
        rows = torch.where((tokens == weight.shape[0])[..., None], extra_row.to(hidden.dtype), rows)
    return (hidden @ rows.transpose(1, 2)).to(torch.promote_types(hidden.dtype, torch.float32))


def ctc_negative_log_likelihood(label_logprob: Tensor, blank_logprob: Tensor, targets: Tensor, input_lengths: Tensor,
                                target_lengths: Tensor) -> Tensor:
    """CTC by the forward recursion over the 2U+1 states blank, y1, blank, y2, ..., blank.

    label_logprob [B, T, U], blank_logprob [B, T], targets [B, U] (only compared with each other) -> loss [B], inf where the
    input is too short. Graves et al., "Connectionist Temporal Classification", ICML 2006, equations 6 to 8.
    """
    batch, frames, labels = label_logprob.shape
    states = 2 * labels + 1
    logprob = blank_logprob[:, :, None].expand(-1, -1, states).clone()
    logprob[:, :, 1::2] = label_logprob
    # State s may be entered from s - 2 where it is a label that differs from the label before it.
    skip = torch.zeros(batch, states, dtype=torch.bool, device=targets.device)
    skip[:, 3::2] = targets[:, 1:] != targets[:, :-1]

    def from_below(alpha: Tensor, by: int) -> Tensor:
        return torch.nn.functional.pad(alpha, (by, 0), value=LOG_ZERO)[:, :states]

    # Before the first frame all mass sits just below state 0, so that frame 0 enters the states 0 and 1.
    alpha = logprob.new_full((batch, states), LOG_ZERO)
    for t in range(frames):
        if t == 0:
            moved = torch.full_like(alpha, LOG_ZERO)
            moved[:, :2] = 0.0
        else:
            moved = torch.logaddexp(alpha, from_below(alpha, 1))
            moved = torch.where(skip, torch.logaddexp(moved, from_below(alpha, 2)), moved)
        alpha = torch.where((t < input_lengths)[:, None], moved + logprob[:, t], alpha)

    last = (2 * target_lengths)[:, None]
    end_blank = alpha.gather(1, last)[:, 0]
    end_label = alpha.gather(1, (last - 1).clamp(min=0))[:, 0]
    total = torch.where(target_lengths > 0, torch.logaddexp(end_blank, end_label), end_blank)
    loss = torch.where(total < LOG_ZERO / 2, torch.inf, -total)
    # No frames: certain for the empty transcript, impossible for any other.
    return torch.where(input_lengths > 0, loss, torch.where(target_lengths > 0, torch.inf, 0.0).to(loss))


def linear_ctc(hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor, targets: Tensor,
               target_lengths: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [B] (inf where impossible), and argmax, lse, largest logit and blank's logit [B, T]."""
    valid = torch.arange(hidden.shape[1], device=hidden.device)[None] < input_lengths[:, None]
    hidden = hidden.masked_fill(~valid[..., None], 0.0)  # padded frames may hold anything
    argmax, lse, largest, blank_logit = linear_argmax(hidden, weight, extra_row, input_lengths, blank)
    labels = columns(hidden, weight, extra_row, targets)
    labels = torch.where(valid[..., None], labels - lse[..., None], 0.0)
    loss = ctc_negative_log_likelihood(labels, blank_logit - lse, targets, input_lengths, target_lengths)
    return loss, argmax, lse.detach(), largest, blank_logit.detach()


def linear_argmax(hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor,
                  blank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax, lse, largest logit and blank's logit, [B, T]; a frame past its utterance's length reads as a certain blank."""
    batch, length, _ = hidden.shape
    valid = torch.arange(length, device=hidden.device)[None] < input_lengths[:, None]
    lse, largest, argmax = sweep(hidden[valid], weight, extra_row)

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((batch, length), fill).masked_scatter(valid, values)

    blank_token = torch.full((batch, 1), blank, device=hidden.device)
    blank_logit = torch.where(valid, columns(hidden, weight, extra_row, blank_token)[..., 0], 0.0)
    return spread(argmax, blank), spread(lse, 0.0), spread(largest, 0.0), blank_logit
