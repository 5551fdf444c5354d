"""Forced alignment: against every path for short inputs, against a textbook Viterbi over all tokens' full
log-probabilities, C++ and PyTorch alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops import ctc_align, label_scores
from tests.model.ops.truth import cases

BACKENDS = ["cpp", "reference"]


def columns(log_probs: np.ndarray, targets: list[int], blank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, V] float32 -> the labels' columns [1, T, U] and the blank's [1, T]."""
    values = torch.from_numpy(log_probs)
    return values[None][:, :, targets], values[None, :, blank]


def aligned(log_probs: np.ndarray, targets: list[int], blank: int, backend: str, open_end: bool = False):
    labels, blanks = columns(log_probs, targets, blank)
    place, score = ctc_align(
        labels,
        blanks,
        torch.tensor([targets], dtype=torch.long).view(1, -1),
        torch.tensor([len(log_probs)]),
        torch.tensor([len(targets)]),
        open_end=open_end,
        backend=backend,
    )
    return place[0].tolist(), float(score[0])


def collapsed(path: tuple[int, ...], blank: int) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != blank]


def tokens_of(place: list[int], targets: list[int], blank: int) -> tuple[int, ...]:
    return tuple(targets[p] if p >= 0 else blank for p in place)


def probabilities(seed: int, frames: int, size: int) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet(np.full(size, 0.5), frames)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    frames=st.integers(0, 6),
    targets=st.lists(st.integers(0, 2), max_size=4),
    open_end=st.booleans(),
)
def test_best_path_is_the_best_of_all_paths(backend, seed, frames, targets, open_end):
    blank = 3
    lp = probabilities(seed, frames, 4)
    texts = [targets[:n] for n in range(len(targets) + 1)] if open_end else [targets]
    scores = {
        path: sum(float(lp[t, token]) for t, token in enumerate(path))
        for path in itertools.product(range(4), repeat=frames)
        if collapsed(path, blank) in texts
    }
    place, score = aligned(lp, targets, blank, backend, open_end)
    if not scores:
        assert score == -np.inf and set(place) <= {-1}
        return
    path = tokens_of(place, targets, blank)
    assert collapsed(path, blank) in texts
    emitted = [p for p in place if p >= 0]
    assert emitted == sorted(emitted)
    assert scores[path] == pytest.approx(max(scores.values()), abs=1e-5)
    assert score == pytest.approx(max(scores.values()), abs=1e-5)


def textbook(log_probs: np.ndarray, targets: list[int], blank: int) -> float:
    """The best path's log-probability by the usual recursion over full log-probabilities [T, V]."""
    states = [blank]
    for token in targets:
        states += [token, blank]
    best = np.full((len(log_probs), len(states)), -np.inf)
    best[0, 0] = log_probs[0, blank]
    if targets:
        best[0, 1] = log_probs[0, targets[0]]
    for t in range(1, len(log_probs)):
        for s, token in enumerate(states):
            ways = [best[t - 1, s]] + ([best[t - 1, s - 1]] if s else [])
            if s > 1 and token != blank and token != states[s - 2]:
                ways.append(best[t - 1, s - 2])
            best[t, s] = max(ways) + log_probs[t, token]
    return float(best[-1, -2:].max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_a_textbook_viterbi_over_all_tokens(backend):
    for seed in range(8):
        generator = np.random.default_rng(seed)
        targets = generator.integers(0, 5, generator.integers(1, 20)).tolist()
        lp = probabilities(seed, 50, 40)
        place, score = aligned(lp, targets, 39, backend)
        assert score == pytest.approx(textbook(lp, targets, 39), rel=1e-6)
        assert collapsed(tokens_of(place, targets, 39), 39) == targets


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), open_end=st.booleans(), coarse=st.booleans())
def test_backends_agree_in_unequal_batches_and_ties(seed, open_end, coarse):
    generator = torch.Generator().manual_seed(seed)
    batch, frames, labels = 4, 15, 6
    lp = torch.randn(batch, frames, 4, generator=generator).log_softmax(-1)
    if coarse:  # many paths of the same score
        lp = lp.round()
    targets = torch.randint(0, 3, (batch, labels), generator=generator)
    lengths = torch.randint(0, frames + 1, (batch,), generator=generator)
    counts = torch.randint(0, labels + 1, (batch,), generator=generator)
    columns = lp.gather(2, targets[:, None].expand(-1, frames, -1))
    found = [
        ctc_align(columns, lp[..., 3], targets, lengths, counts, open_end=open_end, backend=backend)
        for backend in BACKENDS
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for row in range(batch):  # and alone as in the batch
        alone = ctc_align(
            columns[row : row + 1, :, : counts[row]],
            lp[row : row + 1, :, 3],
            targets[row : row + 1, : counts[row]],
            lengths[row : row + 1],
            counts[row : row + 1],
            open_end=open_end,
        )
        assert torch.equal(alone[0][0], found[0][0][row])
        assert alone[1][0] == found[0][1][row]


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_label_scores_are_columns_of_log_softmax(implementation, case):
    vocabulary = case.weight if case.extra_row is None else torch.cat([case.weight, case.extra_row[None]])
    targets = case.targets.clamp(0, case.weight.shape[0] - 1)  # the extra row is the blank, never a label
    logprob = (case.hidden @ vocabulary.T).log_softmax(-1)
    hidden, weight, extra = (t if t is None else t.detach() for t in case.inputs(torch.float32))
    labels, blank = label_scores(
        hidden,
        weight,
        case.input_lengths,
        targets,
        case.blank,
        extra_row=extra,
        implementation=implementation,
    )
    for row, length in enumerate(case.input_lengths.tolist()):
        wanted = logprob[row, :length][:, targets[row]]
        assert torch.allclose(labels[row, :length].double(), wanted, atol=1e-4)
        assert torch.allclose(blank[row, :length].double(), logprob[row, :length, case.blank], atol=1e-4)
        assert not labels[row, length:].any() and not blank[row, length:].any()


def test_lengths_that_do_not_fit_are_named():
    labels, blanks = columns(probabilities(0, 5, 4), [0, 1], 3)
    targets, lengths, counts = torch.tensor([[0, 1]]), torch.tensor([6]), torch.tensor([2])
    with pytest.raises(ValueError, match="utterance 0: input length 6 is not within 0 to 5"):
        ctc_align(labels, blanks, targets, lengths, counts)
    with pytest.raises(ValueError, match="utterance 0: target length 3 is not within 0 to 2"):
        ctc_align(labels, blanks, targets, torch.tensor([5]), torch.tensor([3]))
