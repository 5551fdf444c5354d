"""Run detection against itertools.groupby, utterance by utterance."""

import itertools
import random

import pytest
import torch

from model.ops import ctc_runs


def by_hand(tokens, peak, blank, keep, keep_blank_runs, blank_logprob):
    kept = []
    for token, run in itertools.groupby(range(len(tokens)), key=lambda t: tokens[t]):
        run = list(run)
        if token != blank or keep_blank_runs:
            kept.append(run[0] if keep == "first" else max(run, key=lambda t: peak[t]))
    return kept or ([min(range(len(tokens)), key=lambda t: blank_logprob[t])] if tokens else [0])


@pytest.mark.parametrize("keep", ["peak", "first"])
@pytest.mark.parametrize("keep_blank_runs", [False, True])
def test_runs(keep, keep_blank_runs):
    draw = random.Random(7)
    for _ in range(50):
        batch, length = draw.randint(1, 4), draw.randint(1, 12)
        argmax = torch.randint(0, 3, (batch, length))
        peak, blank_logprob = torch.rand(batch, length), torch.rand(batch, length)
        lengths = torch.randint(0, length + 1, (batch,))
        kept, kept_lengths = ctc_runs(
            argmax, peak, lengths, 0, keep=keep, keep_blank_runs=keep_blank_runs, blank_logprob=blank_logprob
        )
        assert kept.shape[1] == kept_lengths.max()
        for row in range(batch):
            n = int(lengths[row])
            expected = by_hand(
                argmax[row, :n].tolist(),
                peak[row].tolist(),
                0,
                keep,
                keep_blank_runs,
                blank_logprob[row].tolist(),
            )
            assert kept[row, : kept_lengths[row]].tolist() == expected
            assert (kept[row, kept_lengths[row] :] == 0).all()
