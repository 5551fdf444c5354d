"""Words are counted by how often training showed their rarest token, and are wrong where they were deleted or
replaced."""

import json
from collections import Counter

import pytest

from examples.less_is_more.rare_words import BINS, bin_of, build, files, shares, wrong_words
from examples.less_is_more.study import HERE, Study

ROWS = [
    {"lang": "en", "reference": "Take the ferret home.", "prediction": "the parrot home now"},
    {"lang": "en", "reference": "The end", "prediction": ""},
]


def test_a_word_is_wrong_where_it_is_deleted_or_replaced():
    assert wrong_words(ROWS) == [
        ("take", True),
        ("the", False),
        ("ferret", True),
        ("home", False),
        ("the", True),
        ("end", True),
    ]


def test_bins_hold_every_count_once():
    assert [bin_of(n) for n in (0, 1, 4, 5, 19, 20, 99, 100, 10**6)] == [
        "never",
        *["1 to 4 times"] * 2,
        *["5 to 19 times"] * 2,
        *["20 to 99 times"] * 2,
        *["100 times and more"] * 2,
    ]
    counts = Counter({"the": 500, "home": 30, "take": 2})
    found = shares(
        [*ROWS, {"lang": "en", "reference": "end...", "prediction": "end"}],
        lambda word: None if word == "." else counts[word],
    )
    assert found == {
        "never": (3, 2 / 3),
        "1 to 4 times": (1, 1.0),
        "20 to 99 times": (1, 0.0),
        "100 times and more": (2, 0.5),
    }
    assert list(found) == [name for name in BINS if name in found]


def test_read_outs_that_were_not_scored_are_left_out_and_none_at_all_is_an_error(tmp_path):
    study = Study(HERE / "plan.yaml")
    study.output = tmp_path
    data = study.plan.score.shards[0]
    whisper = tmp_path / "whisper" / f"{data}.jsonl"
    joint = study.folder("ours", 1) / "model" / "evaluation-joint" / f"{data}-asr-joint.jsonl"
    for path in (whisper, joint):
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert files(study, 1) == {"ours, both": joint, "Whisper's own decoder": whisper}
    with pytest.raises(ValueError, match="no predictions of seed 0: run python -m"):
        build(study, 0)
