"""The op as torch knows it: schema, shapes without values (fake), gradient. The work is in the backends.

A backend is a module with forward(...) and backward(...) as called below. `weight` is saved as the very tensor that was
given: under DeepSpeed ZeRO-3 that is the Parameter, whose storage is swapped in place when its module is gathered and
released; nothing here keeps a view, a cast or a copy of it between forward and backward.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

# Tokens of one vocabulary tile: the grain at which backward skips.
TILE = 512


def _backend(implementation: str):
    return importlib.import_module(f".{implementation}", __package__)


def check_values(vocabulary: int, frames: int, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int) -> None:
    """ValueError that names the utterance whose lengths or targets do not fit."""
    for name, lengths, limit, symbol in (("input", input_lengths, frames, "T"), ("target", target_lengths, targets.shape[1], "U")):
        wrong = ((lengths < 0) | (lengths > limit)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"linear_ctc: utterance {row}: {name} length {int(lengths[row])} is not within 0 to {symbol} = {limit}")
    is_label = torch.arange(targets.shape[1], device=targets.device)[None] < target_lengths[:, None]
    wrong = (is_label & ((targets < 0) | (targets >= vocabulary) | (targets == blank))).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        what = "is the blank" if int(targets[row, place]) == blank else f"lies outside the vocabulary of {vocabulary} tokens"
        raise ValueError(f"linear_ctc: utterance {row}: target {int(targets[row, place])} at position {place} {what}")


@torch.library.custom_op("soundwave::linear_ctc", mutates_args=())
def forward(hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor,
            blank: int, skip_below: float, implementation: str, deterministic: bool,
            with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [B] (inf where impossible); argmax, lse, largest logit, blank's logit [B, T]; and what backward needs: the log of
    each tile's sum of exponentials [B T, tiles] and the occupancy of labels and blank [B, T, U + 1]."""
    vocabulary = weight.shape[0] + (extra_row is not None)
    check_values(vocabulary, hidden.shape[1], input_lengths, targets, target_lengths, blank)
    return _backend(implementation).forward(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank, deterministic,
                                            with_gradient)


@forward.register_fake
def _(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank, skip_below, implementation, deterministic, with_gradient):
    batch, length, _ = hidden.shape
    tiles = (weight.shape[0] + TILE - 1) // TILE

    def float32(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    occupancy = (batch, length, targets.shape[1] + 1) if with_gradient else (0, 0, 0)
    return (float32(batch), hidden.new_empty((batch, length), dtype=torch.int64), float32(batch, length), float32(batch, length),
            float32(batch, length), float32(batch * length, tiles), float32(*occupancy))


@torch.library.custom_op("soundwave::linear_ctc_backward", mutates_args=())
def backward(loss_gradient: Tensor, hidden: Tensor, weight: Tensor, extra_row: Tensor | None, input_lengths: Tensor, targets: Tensor,
             target_lengths: Tensor, blank: int, skip_below: float, implementation: str, deterministic: bool, loss: Tensor, lse: Tensor,
             blank_logit: Tensor, log_mass: Tensor, occupancy: Tensor, want_hidden: bool, want_weight: bool,
             want_extra: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and extra_row; an empty tensor for each that is not wanted."""
    return _backend(implementation).backward(loss_gradient, hidden, weight, extra_row, input_lengths, targets, target_lengths, blank,
                                             skip_below, deterministic, loss, lse, blank_logit, log_mass, occupancy, want_hidden,
                                             want_weight, want_extra)


@backward.register_fake
def _(loss_gradient, hidden, weight, extra_row, input_lengths, targets, target_lengths, blank, skip_below, implementation, deterministic,
      loss, lse, blank_logit, log_mass, occupancy, want_hidden, want_weight, want_extra):
    def like(tensor, wanted):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0, dtype=torch.float32)

    return like(hidden, want_hidden), like(weight, want_weight), like(extra_row, want_extra)


def _save(ctx, inputs, output):
    (hidden, weight, extra_row, input_lengths, targets, target_lengths, ctx.blank, ctx.skip_below, ctx.implementation,
     ctx.deterministic, with_gradient) = inputs
    loss, argmax, lse, largest, blank_logit, log_mass, occupancy = output
    ctx.mark_non_differentiable(argmax, lse, largest, blank_logit, log_mass, occupancy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, extra_row, input_lengths, targets, target_lengths, loss, lse, blank_logit, log_mass, occupancy)


def _gradient(ctx, loss_gradient, *_):
    nothing = (None,) * 11
    if loss_gradient is None:
        return nothing
    hidden, weight, extra_row, input_lengths, targets, target_lengths, *kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = backward(loss_gradient, hidden, weight, extra_row, input_lengths, targets, target_lengths, ctx.blank, ctx.skip_below,
                         ctx.implementation, ctx.deterministic, *kept, *wanted)
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted)) + nothing[3:]


forward.register_autograd(_gradient, setup_context=_save)
