"""Forced alignment with CTC: which frame emits which label of a text, without frames x vocabulary numbers.

`label_scores` takes the log-probabilities of a text's labels from the op's sweep, `ctc_align` finds the most
probable path through them (Viterbi).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpp_backend
from .linear_ctc import linear_argmax

BACKENDS = ("auto", "cpp", "reference")


@torch.no_grad()
def label_scores(
    hidden: Tensor,
    weight: Tensor,
    input_lengths: Tensor,
    targets: Tensor,
    blank: int,
    *,
    extra_row: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of each utterance's labels [B, T, U] and of the blank [B, T], float32.

    Arguments as linear_ctc. The sweep gives the softmax's denominator; the labels' columns are a product of
    their own with the U rows of `weight`, which adds U / V to the sweep's work. Past an utterance's length
    the values are 0. targets [B, U]: valid ids in their padding, too.
    """
    _, lse, _, blank_logit = linear_argmax(
        hidden, weight, input_lengths, blank=blank, extra_row=extra_row, implementation=implementation
    )
    rows = weight[targets].to(hidden.dtype)
    logits = torch.einsum("btd,bud->btu", hidden, rows).float()
    valid = (
        torch.arange(hidden.shape[1], device=hidden.device)[None] < input_lengths.to(hidden.device)[:, None]
    )
    labels = (logits - lse[..., None]).masked_fill(~valid[..., None], 0.0)
    return labels, blank_logit - lse


@torch.no_grad()
def ctc_align(
    label_logprob: Tensor,
    blank_logprob: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    open_end: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the most probable CTC path of each target: place [B, T] int64, score [B] float64.

    label_logprob [B, T, U], blank_logprob [B, T]: of `label_scores`; targets [B, U] are only compared with
    each other. place: the position in the target of the label that a frame emits; -1 for the blank, past the
    utterance, and where no path exists (score -inf: fewer frames than labels and adjacent repeats).
    open_end: the path may end after any label, for a text that continues beyond the audio.

    backend: "cpp" runs on the CPU (results are moved there and back), "reference" anywhere in PyTorch; both
    give the same paths. Sums are float64. Memory: T x (2U + 1) bytes per utterance. Source: Viterbi over the
    states of Graves et al., ICML 2006. Errors: ValueError naming the utterance whose lengths do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ctc_align: backend='{backend}' is unknown: give one of {', '.join(BACKENDS)}")
    batch, frames, labels = label_logprob.shape
    for name, lengths, limit in (("input", input_lengths, frames), ("target", target_lengths, labels)):
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= limit:
                raise ValueError(
                    f"ctc_align: utterance {row}: {name} length {length} is not within 0 to {limit}"
                )
    compiled = backend != "reference" and cpp_backend.available()
    if backend == "cpp" and not compiled:
        raise ValueError("ctc_align: backend='cpp' needs a C++ compiler: choose 'auto'")
    if compiled:
        place, score = torch.ops.soundwave_cpu.ctc_align(
            label_logprob.cpu(),
            blank_logprob.cpu(),
            targets.cpu(),
            input_lengths.cpu(),
            target_lengths.cpu(),
            open_end,
        )
        return place.to(label_logprob.device), score.to(label_logprob.device)
    return _viterbi(label_logprob, blank_logprob, targets, input_lengths, target_lengths, open_end)


def _viterbi(
    label_logprob: Tensor,
    blank_logprob: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    open_end: bool,
) -> tuple[Tensor, Tensor]:
    """`ctc_align` in PyTorch, all utterances and states of a frame at once."""
    batch, frames, labels = label_logprob.shape
    device, states = label_logprob.device, 2 * labels + 1
    input_lengths, target_lengths = input_lengths.to(device), target_lengths.to(device)
    emission = blank_logprob.float().double()[:, :, None].expand(-1, -1, states).clone()
    emission[:, :, 1::2] = label_logprob.float().double()
    skip = torch.zeros(batch, states, dtype=torch.bool, device=device)
    skip[:, 3::2] = (targets[:, 1:] != targets[:, :-1]).to(device)

    def below(score: Tensor, by: int) -> Tensor:
        return torch.nn.functional.pad(score, (by, 0), value=-torch.inf)[:, :states]

    score = torch.full((batch, states), -torch.inf, dtype=torch.float64, device=device)
    origin = torch.zeros(frames, batch, states, dtype=torch.uint8, device=device)
    for t in range(frames):
        if t == 0:
            moved = torch.full_like(score, -torch.inf)
            moved[:, :2] = 0.0
        else:
            moved = score
            for by, allowed in ((1, None), (2, skip)):
                other = below(score, by)
                better = other > moved if allowed is None else allowed & (other > moved)
                moved = torch.where(better, other, moved)
                origin[t].masked_fill_(better, by)
        score = torch.where((t < input_lengths)[:, None], moved + emission[:, t], score)

    final = 2 * target_lengths
    state_ids = torch.arange(states, device=device)[None]
    allowed = state_ids <= final[:, None]
    if not open_end:
        allowed = allowed & (state_ids >= final[:, None] - 1)
    ends = score.masked_fill(~allowed, -torch.inf).flip(1)  # the highest state wins among equals
    best = ends.amax(dim=1)
    first = (ends == best[:, None]).int().argmax(dim=1)
    state = states - 1 - first
    empty = input_lengths == 0
    best = torch.where(empty & ((target_lengths == 0) | open_end), 0.0, best)
    has_path = (best > -torch.inf) & ~empty
    place = torch.full((batch, frames), -1, dtype=torch.long, device=device)
    for t in reversed(range(frames)):
        here = has_path & (t < input_lengths)
        place[:, t] = torch.where(here & (state % 2 == 1), torch.div(state, 2, rounding_mode="floor"), -1)
        state = torch.where(here, state - origin[t].gather(1, state[:, None])[:, 0].long(), state)
    return place, best
