"""The fused op in plain PyTorch: what the C++ and Triton implementations mean, readable as the formulas.

Changes only when the op's meaning changes. Differentiable by autograd, in float64 too (gradcheck).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

# Frames whose logits exist at one time: 64 x 128,257 x 4 B = 33 MB.
FRAMES_AT_ONCE = 64
# log(0) that logaddexp can differentiate; every loss beyond half of it means that no path exists.
LOG_ZERO = -1e30


def _piece(frames: Tensor, weight: Tensor, extra_row: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
    """Of the logits of frames [C, D]: log-sum-exp, largest, argmax, [C]; log probabilities of the columns
    `tokens` [C, K] of each frame, and the last of these columns' logit [C]. Only the log probabilities have a
    gradient."""
    logits = linear(
        frames, weight.to(frames.dtype)
    )  # the product in the frames' dtype, the rest in float32 at least
    if extra_row is not None:
        logits = torch.cat([logits, linear(frames, extra_row.to(frames.dtype)[None])], dim=1)
    logits = logits.to(torch.promote_types(frames.dtype, torch.float32))
    largest, argmax = logits.detach().max(dim=1)
    logprob = logits.log_softmax(dim=1)
    lse = largest - logprob.detach().gather(1, argmax[:, None])[:, 0]
    return lse, largest, argmax, logprob.gather(1, tokens), logits.detach().gather(1, tokens[:, -1:])[:, 0]


def sweep(frames: Tensor, weight: Tensor, extra_row: Tensor | None, tokens: Tensor) -> list[Tensor]:
    """The results of _piece for all of the frames [N, D] with their tokens [N, K].

    Chunks of frames one after the other, each computed again in backward, so that N x V logits are never
    held.
    """
    chunks = list(zip(frames.split(FRAMES_AT_ONCE), tokens.split(FRAMES_AT_ONCE), strict=True))
    if torch.is_grad_enabled():
        pieces = [
            checkpoint(
                _piece, chunk, weight, extra_row, its_tokens, use_reentrant=False, preserve_rng_state=False
            )
            for chunk, its_tokens in chunks
        ]
    else:
        pieces = [_piece(chunk, weight, extra_row, its_tokens) for chunk, its_tokens in chunks]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def ctc_negative_log_likelihood(
    label_logprob: Tensor,
    blank_logprob: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
) -> Tensor:
    """CTC by the forward recursion over the 2U+1 states blank, y1, blank, y2, ..., blank.

    label_logprob [B, T, U], blank_logprob [B, T], targets [B, U] (only compared with each other) -> loss [B],
    inf where the input is too short. Graves et al., "Connectionist Temporal Classification", ICML 2006,
    equations 6 to 8.
    """
    batch, frames, labels = label_logprob.shape
    states = 2 * labels + 1
    logprob = blank_logprob[:, :, None].expand(-1, -1, states).clone()
    logprob[:, :, 1::2] = label_logprob
    # State s may be entered from s - 2 where it is a label that differs from the label before it.
    skip = torch.zeros(batch, states, dtype=torch.bool, device=targets.device)
    skip[:, 3::2] = targets[:, 1:] != targets[:, :-1]

    def from_below(alpha: Tensor, by: int) -> Tensor:
        return pad(alpha, (by, 0), value=LOG_ZERO)[:, :states]

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


def linear_ctc(
    hidden: Tensor,
    weight: Tensor,
    extra_row: Tensor | None,
    input_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [B] (inf where impossible), and argmax, lse, largest logit and blank's logit [B, T]; a frame past
    its utterance's length reads as a certain blank. Targets [B, U] hold valid tokens in their padding too."""
    batch, length, _ = hidden.shape
    valid = torch.arange(length, device=hidden.device)[None] < input_lengths[:, None]
    tokens = torch.cat([targets, targets.new_full((batch, 1), blank)], dim=1)
    lse, largest, argmax, logprob, blank_logit = sweep(
        hidden[valid], weight, extra_row, tokens[valid.nonzero()[:, 0]]
    )

    def spread(values: Tensor, fill: float) -> Tensor:
        out = values.new_full((batch, length, *values.shape[1:]), fill)
        return out.masked_scatter(valid.view(batch, length, *[1] * (values.dim() - 1)), values)

    logprob = spread(logprob, 0.0)
    loss = ctc_negative_log_likelihood(
        logprob[..., :-1], logprob[..., -1], targets, input_lengths, target_lengths
    )
    return loss, spread(argmax, blank), spread(lse, 0.0), spread(largest, 0.0), spread(blank_logit, 0.0)
