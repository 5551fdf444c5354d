"""What every implementation must agree with: torch's log_softmax and ctc_loss in float64, and random cases
for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional


@dataclass
class Case:
    hidden: Tensor  # [B, T, D] float64
    weight: Tensor  # [V, D] float64
    extra_row: Tensor | None  # [D]
    input_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    blank: int
    loss_weight: Tensor  # [B]: the gradient that comes from above

    def inputs(self, dtype: torch.dtype, strided: bool = False) -> list[Tensor | None]:
        """hidden, weight and extra_row as leaves of a dtype; `strided`: as views with other strides than a
        fresh tensor's."""
        leaves = []
        for tensor in (self.hidden, self.weight, self.extra_row):
            if tensor is None:
                leaves.append(None)
                continue
            leaf = tensor.to(dtype)
            if strided:
                leaf = (
                    leaf.mT.contiguous().mT
                    if leaf.dim() == 2
                    else leaf.repeat_interleave(2, dim=-1)[..., ::2]
                )
            leaves.append(leaf.detach().requires_grad_())
        return leaves


@st.composite
def cases(draw, most_frames: int = 12, vocabularies=(3, 7, 511, 512, 513, 1100), scale: float = 1.5) -> Case:
    batch, frames, depth = draw(st.integers(1, 3)), draw(st.integers(1, most_frames)), draw(st.integers(1, 9))
    size, labels = draw(st.sampled_from(vocabularies)), draw(st.integers(0, 5))
    with_extra_row = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vocabulary = size + with_extra_row
    blank = size if with_extra_row else draw(st.sampled_from([0, size - 1, size // 2]))
    few = draw(st.booleans())  # few different labels: adjacent repeats are likely
    pool = torch.tensor([v for v in range(vocabulary) if v != blank])[: 2 if few else None]
    targets = pool[torch.randint(len(pool), (batch, labels), generator=generator)]
    target_lengths = torch.randint(0, labels + 1, (batch,), generator=generator)
    padding = torch.arange(labels)[None] >= target_lengths[:, None]
    return Case(
        hidden=scale * normal(batch, frames, depth),
        weight=normal(size, depth),
        extra_row=normal(depth) if with_extra_row else None,
        input_lengths=torch.randint(0, frames + 1, (batch,), generator=generator),
        targets=targets.masked_fill(padding, draw(st.sampled_from([-1, blank, 10**6]))),
        target_lengths=target_lengths,
        blank=blank,
        loss_weight=0.5 + torch.rand(batch, generator=generator),
    )


def peaked(
    batch: int,
    frames: int,
    depth: int,
    vocabulary: int,
    labels: int,
    sharpness: float,
    extra_row: bool = False,
    label_pool: int | None = None,
    seed: int = 0,
) -> Case:
    """A trained model's posteriors: each frame points at the blank, or at a label (one of the first
    `label_pool` tokens) where its turn has come."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, depth, generator=generator, dtype=torch.float64) / depth**0.5
    row = torch.randn(depth, generator=generator, dtype=torch.float64) / depth**0.5 if extra_row else None
    blank = vocabulary if extra_row else vocabulary - 1
    targets = torch.randint(label_pool or vocabulary - 1, (batch, labels), generator=generator)
    said = (row if extra_row else weight[blank]).expand(batch, frames, depth).clone()
    turns = torch.arange(labels) * frames // labels
    said[:, turns] = weight[targets]
    noise = torch.randn(batch, frames, depth, generator=generator, dtype=torch.float64)
    return Case(
        sharpness * said + 0.3 * noise,
        weight,
        row,
        torch.full((batch,), frames),
        targets,
        torch.full((batch,), labels),
        blank,
        torch.ones(batch, dtype=torch.float64),
    )


def ordinary(
    case: Case, hidden: Tensor, weight: Tensor, extra_row: Tensor | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], Tensor]:
    """loss [B] with zero_infinity, gradients of the given tensors' values, and the logits [B, T, V], computed
    in `dtype`."""
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, extra_row)
    ]
    whole = leaves[1] if leaves[2] is None else torch.cat([leaves[1], leaves[2][None]])
    logits = functional.linear(leaves[0], whole)
    valid = torch.arange(case.targets.shape[1])[None] < case.target_lengths[:, None]
    loss = functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        case.targets.masked_fill(~valid, 0 if case.blank else 1),
        case.input_lengths,
        case.target_lengths,
        blank=case.blank,
        reduction="none",
        zero_infinity=True,
    )
    gradients = torch.autograd.grad(
        (loss * case.loss_weight).sum(), [leaf for leaf in leaves if leaf is not None]
    )
    return loss.detach(), list(gradients), logits.detach()


def with_skipped_tiles(
    case: Case, leaves: list[Tensor | None], skip_below: float, tile: int = 512, piece: int = 1
) -> tuple[list[Tensor], float]:
    """Gradients of `leaves` (hidden, weight, extra row) in float64, if all tokens of a skipped tile have the same
    share of its softmax mass; and the share of pairs that are skipped.

    A pair of a frame and `piece` tiles is skipped if, in each tile, the mass and the gradients of labels and
    blank are below `skip_below`.
    """
    hidden, weight, extra_row = (None if leaf is None else leaf.detach().double() for leaf in leaves)
    whole = weight if extra_row is None else torch.cat([weight, extra_row[None]])
    logits = functional.linear(hidden, whole).requires_grad_()
    loss = functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        case.targets,
        case.input_lengths,
        case.target_lengths,
        blank=case.blank,
        reduction="none",
        zero_infinity=True,
    )
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    probability = logits.detach().softmax(-1)
    real = torch.arange(logits.shape[1])[None] < case.input_lengths[:, None]
    own = torch.zeros(len(loss), 1, len(whole), dtype=torch.bool)
    own[:, 0].scatter_(1, torch.nn.functional.pad(case.targets, (0, 1), value=case.blank), True)
    tiles = [slice(v, v + tile) for v in range(0, len(weight), tile)]
    tiles = [slice(one.start, min(one.stop, len(weight))) for one in tiles]
    mass = torch.stack([probability[..., one].sum(-1) for one in tiles], -1)
    steep = torch.stack([(slope[..., one].abs() * own[..., one]).amax(-1) for one in tiles], -1)
    active = (mass >= skip_below) | (steep > skip_below)
    skipped = []
    for first in range(0, len(tiles), piece):
        whole_piece = active[..., first : first + piece].any(-1, keepdim=True)
        skipped.append((~whole_piece).expand_as(active[..., first : first + piece]))
    is_skipped = torch.cat(skipped, -1) & real[..., None]
    for number, one in enumerate(tiles):
        even = (mass[..., number] / (one.stop - one.start))[..., None]
        slope[..., one] = torch.where(is_skipped[..., number, None], even, slope[..., one])
    slope = slope * case.loss_weight[:, None, None]
    rows = torch.einsum("btv,btd->vd", slope, hidden)
    gradients = [slope @ whole, rows[: len(weight)], *rows[len(weight) :]]
    return gradients, float(is_skipped[real].double().mean())


def check(case: Case, results: tuple, leaves: list[Tensor | None], relative: float) -> None:
    """`results` of linear_ctc(reduction="none") on `leaves`, and its gradients, against the baseline in
    float64.

    `relative`: the error allowed, as a share of the largest absolute value of each tensor (of each logit for
    the choices).
    """
    loss, argmax, lse, largest, blank_logit = results
    expected, gradients, logits = ordinary(case, *leaves)
    found = torch.autograd.grad(
        (loss * case.loss_weight.to(loss)).sum(), [leaf for leaf in leaves if leaf is not None]
    )

    def close(actual: Tensor, wanted: Tensor, what: str) -> None:
        assert actual.shape == wanted.shape, what
        if wanted.numel():
            limit = relative * (wanted.abs().max() + 1)
            assert (actual.detach().double() - wanted).abs().max() <= limit, (what, actual, wanted)

    close(loss, expected, "loss")
    names = ("hidden", "weight", "extra_row")
    for actual, wanted, name in zip(found, gradients, names[: len(found)], strict=True):
        close(actual, wanted, f"gradient of {name}")
    real = torch.arange(logits.shape[1])[None] < case.input_lengths[:, None]
    close(lse[real], logits.logsumexp(-1)[real], "lse")
    close(largest[real], logits.amax(-1)[real], "largest logit")
    close(blank_logit[real], logits[..., case.blank][real], "blank's logit")
    close(logits.gather(-1, argmax[..., None])[..., 0][real], logits.amax(-1)[real], "argmax")
    assert (argmax[~real] == case.blank).all() and (lse[~real] == 0).all() and (largest[~real] == 0).all()
    assert (found[0][~real] == 0).all(), "padded frames have a gradient"
