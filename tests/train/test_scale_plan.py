"""The scale rehearsal on a small index: sizes of the paper, epochs by closed formula, equal micro-batches."""

from __future__ import annotations

import pytest

from benchmarks import scale_plan


def test_the_corpora_have_the_papers_sizes():
    audio = [part for name, parts in scale_plan.CORPORA.items() if name != "sft" for part in parts]
    assert sum(part.hours for part in audio) == 9857
    assert sum(part.count(1.0) for part in scale_plan.CORPORA["sft"]) == 2_651_493
    assert sum(part.hours for part in scale_plan.CORPORA["sft"]) == 5359


@pytest.mark.parametrize("ranks", [8, 512])
def test_a_small_rehearsal(tmp_path, ranks):
    scale, hours = 1e-3, {}
    for name in ("asr", "sound"):
        utterances, hours[name] = scale_plan.write_corpus(tmp_path / name, scale_plan.CORPORA[name], scale)
        assert utterances == scale_plan.CORPORA[name][0].count(scale)
    found = scale_plan.measure(tmp_path, "alignment", ranks, 0)
    assert found["equal"] and found["micro_batches"] >= 1 and 0 <= found["padding"] < 0.5
    # tau stays 1: a task's utterances are in proportion to its size, so all sources have as many epochs.
    seconds = scale_plan.STEPS * max(3600.0, 60.0 * ranks)
    expected = seconds / 3600 / sum(hours.values())
    assert list(found["epochs"].values()) == pytest.approx([expected, expected], rel=1e-3)
