"""The metric of tempo, against hand-made answers and the tolerances of MIREX and mir_eval."""

from __future__ import annotations

import pytest

from evaluation.metrics import METRICS, metric_of
from evaluation.metrics.tempo import tempo_in


def rows(*pairs: tuple[str, str]) -> list[dict]:
    return [
        {"task": "tempo", "label": label, "reference": label, "prediction": said} for label, said in pairs
    ]


@pytest.mark.parametrize(
    ("text", "tempo"),
    [
        ("120", 120.0),
        ("The tempo is 92.5 beats per minute.", 92.5),
        ("128bpm", 128.0),
        ("about 128 BPM, so 128", 128.0),
        ("between 90 and 100", None),
        ("fast", None),
        ("0 BPM", None),
        ("", None),
    ],
)
def test_the_one_number_of_an_answer_is_its_tempo(text, tempo):
    assert tempo_in(text) == tempo


def test_shares_within_tolerances():
    """Of 100: 104 is within 4 %, 107.9 within 8 %, 50, 206 and 33 are octave errors within 4 %, 150 is none."""
    given = rows(*[("100", said) for said in ("104", "107.9", "50", "206", "33", "150", "no idea", "100")])
    assert metric_of(given) == "tempo"
    scores = METRICS["tempo"].score(given, "script")
    assert (scores["within_4"], scores["within_8"], scores["octave_4"]) == (2 / 8, 3 / 8, 5 / 8)
    assert scores["unparsed"] == 1 and "references_without_number" not in scores
    assert METRICS["tempo"].notes(scores) == ["within 8 %: 37.5 %"]


def test_a_reference_without_a_number_is_counted_and_never_right():
    scores = METRICS["tempo"].score(rows(("fast", "120"), ("120", "120")), "script")
    assert (scores["within_4"], scores["references_without_number"]) == (0.5, 1)


def test_two_systems_are_compared_on_the_same_rows():
    better, worse = rows(*[("100", "100")] * 30), rows(*[("100", "200")] * 30)
    found = METRICS["tempo"].paired(better, worse)
    assert found["within_4"]["difference"] == -1 and found["octave_4"]["difference"] == 0


@pytest.mark.parametrize("task", ["instrument", "genre", "mood"])
def test_music_classes_are_scored_by_accuracy(task):
    given = [{"task": task, "label": "rock", "reference": "rock", "prediction": "It is rock."}]
    assert metric_of(given) == "accuracy"


def test_captions_are_scored_as_free_answers():
    given = [{"task": "caption", "reference": "Loud guitars.", "prediction": "Loud guitars."}]
    assert metric_of(given) == "answer" and METRICS["answer"].score(given, "script")["chrf"] == 100
