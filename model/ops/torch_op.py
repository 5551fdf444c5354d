"""The op as torch knows it: schema, shapes without values (fake), gradient. The work is in the backends.

A backend is a module of this package with `forward` and `backward` as called below. `weight` is saved as the
very tensor that was given: under DeepSpeed ZeRO-3 that is the Parameter, whose storage is swapped in place
when its module is gathered and released; nothing here keeps a view, a cast or a copy of it between forward
and backward.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens of one vocabulary tile: the grain at which backward skips.
TILE = 512


class CTCInputs(NamedTuple):
    """The op's inputs, as linear_ctc describes them."""

    hidden: Tensor
    weight: Tensor
    extra_row: Tensor | None
    input_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    blank: int

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0] + (self.extra_row is not None)

    @property
    def tiles(self) -> int:
        return (self.weight.shape[0] + TILE - 1) // TILE

    def is_label(self) -> Tensor:
        """[B, U] bool: which targets are real, not padding."""
        return (
            torch.arange(self.targets.shape[1], device=self.targets.device)[None]
            < self.target_lengths[:, None]
        )

    def check_values(self) -> None:
        """ValueError that names the utterance whose lengths or targets do not fit."""
        for name, lengths, limit in (
            ("input", self.input_lengths, self.hidden.shape[1]),
            ("target", self.target_lengths, self.targets.shape[1]),
        ):
            wrong = ((lengths < 0) | (lengths > limit)).nonzero()
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(
                    f"linear_ctc: utterance {row}: {name} length {int(lengths[row])} is not within 0 to "
                    f"{limit}"
                )
        targets = self.targets
        wrong = (
            self.is_label() & ((targets < 0) | (targets >= self.vocabulary) | (targets == self.blank))
        ).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            target = int(targets[row, place])
            what = (
                "is the blank"
                if target == self.blank
                else f"lies outside the vocabulary of {self.vocabulary} tokens"
            )
            raise ValueError(f"linear_ctc: utterance {row}: target {target} at position {place} {what}")


class SavedForBackward(NamedTuple):
    """What forward leaves for backward. None of it is as long as frames x vocabulary."""

    loss: Tensor  # [B], inf where no alignment exists
    lse: Tensor  # [B, T]
    log_mass: (
        Tensor  # [B * T, tiles] log of the sum of exp(logit) over each tile's tokens; unset for padded frames
    )
    # [B, T, U + 1] gradient of each loss for the logits of its labels (one that stands several times: at its
    # first place, the others zero) and, last, of the blank: softmax minus occupancy.
    label_gradient: Tensor


def _backend(implementation: str):
    return importlib.import_module(f".{implementation}_backend", __package__)


@torch.library.custom_op("soundwave::linear_ctc", mutates_args=())
def forward(
    hidden: Tensor,
    weight: Tensor,
    extra_row: Tensor | None,
    input_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    blank: int,
    skip_below: float,
    implementation: str,
    deterministic: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, argmax, lse, largest logit, blank's logit; then log_mass and label_gradient as in
    SavedForBackward (empty without gradient)."""
    problem = CTCInputs(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank)
    problem.check_values()
    return _backend(implementation).forward(problem, deterministic, with_gradient)


@forward.register_fake
def _(
    hidden,
    weight,
    extra_row,
    input_lengths,
    targets,
    target_lengths,
    blank,
    skip_below,
    implementation,
    deterministic,
    with_gradient,
):
    problem = CTCInputs(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank)
    batch, length, _ = hidden.shape

    def float32(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    label_gradient = (batch, length, targets.shape[1] + 1) if with_gradient else (0, 0, 0)
    frames = [float32(batch, length) for _ in range(3)]
    return (
        float32(batch),
        hidden.new_empty((batch, length), dtype=torch.int64),
        *frames,
        float32(batch * length, problem.tiles),
        float32(*label_gradient),
    )


@torch.library.custom_op("soundwave::linear_ctc_backward", mutates_args=())
def backward(
    loss_gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    extra_row: Tensor | None,
    input_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    blank: int,
    loss: Tensor,
    lse: Tensor,
    log_mass: Tensor,
    label_gradient: Tensor,
    skip_below: float,
    implementation: str,
    deterministic: bool,
    want_hidden: bool,
    want_weight: bool,
    want_extra: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and extra_row; an empty tensor for each that is not wanted."""
    problem = CTCInputs(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank)
    kept = SavedForBackward(loss, lse, log_mass, label_gradient)
    needed = (want_hidden, want_weight, want_extra)
    backend = _backend(implementation)
    scale = torch.where(loss.isinf(), 0.0, loss_gradient.float())
    real = real_frames(problem, scale)
    computed = backend.computed_pairs(problem, active_pairs(problem, kept, real, skip_below))
    gradients = backend.backward(problem, kept, loss_gradient, computed, deterministic, needed)
    if skip_below > 0:
        add_skipped(problem, kept, scale, real[:, None] & ~computed, gradients)
    return gradients


def real_frames(problem: CTCInputs, scale: Tensor) -> Tensor:
    """Return [B * T] bool: frames that exist, of utterances whose loss has a gradient (`scale` [B])."""
    frame = torch.arange(problem.hidden.shape[1], device=scale.device)[None]
    return ((frame < problem.input_lengths[:, None]) & (scale != 0)[:, None]).flatten()


def active_pairs(problem: CTCInputs, kept: SavedForBackward, real: Tensor, skip_below: float) -> Tensor:
    """Return [B * T, tiles] bool: pairs of a frame and a tile whose softmax mass is at least `skip_below`, or
    in which a label (or the blank) has a larger gradient."""
    threshold = math.log(skip_below) if skip_below > 0 else -math.inf
    active = ~(kept.log_mass - kept.lse.reshape(-1, 1) < threshold)
    blank = problem.targets.new_full((len(problem.targets), 1), problem.blank)
    token = torch.cat([problem.targets.masked_fill(~problem.is_label(), -1), blank], dim=1)
    tile = torch.where(
        token < len(problem.weight), token // TILE, -1
    )  # the row beside the weight: in no tile
    tile_of = (tile[..., None] == torch.arange(problem.tiles, device=tile.device)).float()
    steep = (kept.label_gradient.abs() > skip_below).float() @ tile_of
    return (active | (steep.flatten(0, 1) > 0)) & real[:, None]


def add_skipped(
    problem: CTCInputs,
    kept: SavedForBackward,
    scale: Tensor,
    skipped: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add in place what the `skipped` pairs [B * T, tiles] contribute, as if all tokens of a tile had the
    same probability: the tile's softmax mass times the mean row of its weights for hidden, and the mass
    spread evenly over its rows for the weight. `gradients`: of hidden, weight, extra_row (empty: not wanted).
    """
    for_hidden, for_weight, _ = gradients
    hidden, weight = problem.hidden, problem.weight
    mass = (kept.log_mass - kept.lse.reshape(-1, 1)).exp() * scale.repeat_interleave(hidden.shape[1])[:, None]
    mass = torch.where(skipped, mass, 0.0)
    if for_hidden.numel():
        mean = torch.stack([rows.mean(0, dtype=torch.float32) for rows in weight.split(TILE)])
        for_hidden.add_((mass @ mean).view_as(for_hidden))
    if for_weight.numel():
        frames = torch.where(skipped.any(1, keepdim=True), hidden.flatten(0, 1).float(), 0.0)
        for rows, total in zip(for_weight.split(TILE), mass.t() @ frames, strict=True):
            rows.add_(total / len(rows))


@backward.register_fake
def _(
    loss_gradient,
    hidden,
    weight,
    extra_row,
    input_lengths,
    targets,
    target_lengths,
    blank,
    loss,
    lse,
    log_mass,
    label_gradient,
    skip_below,
    implementation,
    deterministic,
    want_hidden,
    want_weight,
    want_extra,
):
    def like(tensor, needed):
        if not needed:
            return hidden.new_empty(0, dtype=torch.float32)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(hidden, want_hidden), like(weight, want_weight), like(extra_row, want_extra)


def _save(ctx, inputs, output):
    *problem, ctx.skip_below, ctx.implementation, ctx.deterministic, _ = inputs
    loss, argmax, lse, largest, blank_logit, log_mass, label_gradient = output
    ctx.mark_non_differentiable(argmax, lse, largest, blank_logit, log_mass, label_gradient)
    ctx.set_materialize_grads(False)
    *tensors, ctx.blank = problem
    ctx.save_for_backward(*tensors, *SavedForBackward(loss, lse, log_mass, label_gradient))


def _gradient(ctx, loss_gradient, *_):
    nothing = (None,) * 11
    if loss_gradient is None:
        return nothing
    saved = ctx.saved_tensors
    hidden, weight, extra_row, input_lengths, targets, target_lengths = saved[:6]
    problem = CTCInputs(hidden, weight, extra_row, input_lengths, targets, target_lengths, ctx.blank)
    needed = ctx.needs_input_grad[:3]
    gradients = backward(
        loss_gradient, *problem, *saved[6:], ctx.skip_below, ctx.implementation, ctx.deterministic, *needed
    )
    return (
        tuple(gradient if want else None for gradient, want in zip(gradients, needed, strict=True))
        + nothing[3:]
    )


forward.register_autograd(_gradient, setup_context=_save)
