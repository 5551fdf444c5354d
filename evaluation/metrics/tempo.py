"""Tempo: the share of answers within 4 % and 8 % of the reference, and within 4 % where an octave error
counts as right.

4 % and the octave tolerance (a half, a third, twice, three times the reference) are those of MIREX's Accuracy
1 and 2; 8 % is the tolerance of mir_eval.tempo.
"""

from __future__ import annotations

import re

import numpy as np

from core.text import Marks
from evaluation.metrics.accuracy import label_of
from evaluation.metrics.base import BOOTSTRAP, Metric, register_metric
from evaluation.resampling import interval, paired_test
from evaluation.tasks import split_chain

OCTAVES = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)")


def tempo_in(text: str) -> float | None:
    """Return the one number above 0 of a text; None where it holds none or several that differ."""
    found = {float(number) for number in _NUMBER.findall(re.sub(r"(?<=\d)(?=bpm)", " ", text.lower()))}
    return found.pop() if len(found) == 1 and min(found) > 0 else None


def within(rows: list[dict], tolerance: float, factors: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """1 where an answer's tempo differs from the reference, or a multiple of it by `factors`, by at most
    `tolerance` of that, else 0."""
    hits = np.zeros(len(rows))
    for i, row in enumerate(rows):
        answer, reference = tempo_in(split_chain(row["prediction"])[1]), tempo_in(label_of(row))
        if answer is not None and reference is not None:
            error = min(abs(answer / (factor * reference) - 1) for factor in factors)
            hits[i] = error <= tolerance + 1e-9
    return hits


SCORES = {
    "within_4": (0.04, (1.0,)),
    "within_8": (0.08, (1.0,)),
    "octave_4": (0.04, OCTAVES),
}


@register_metric("tempo")
class Tempo(Metric):
    columns = ("within_4", "octave_4")
    rates = tuple(SCORES)
    lower_is_better = ("unparsed",)
    tasks = ("tempo",)

    def score(self, rows: list[dict], marks: Marks) -> dict:
        scores: dict = {"unparsed": sum(tempo_in(split_chain(row["prediction"])[1]) is None for row in rows)}
        for name, (tolerance, factors) in SCORES.items():
            hits = within(rows, tolerance, factors)
            scores[name] = float(hits.mean())
            scores[f"{name}_ci95"] = interval(hits, np.ones(len(rows)), samples=BOOTSTRAP)
        if unusable := sum(tempo_in(label_of(row)) is None for row in rows):
            scores["references_without_number"] = unusable
        return scores

    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        return {
            name: paired_test(within(first, *how), within(second, *how), np.ones(len(first)))
            for name, how in SCORES.items()
        }

    def notes(self, scores: dict) -> list[str]:
        unusable = scores.get("references_without_number")
        notes = [f"within 8 %: {100 * scores['within_8']:.1f} %"]
        return [*notes, f"{unusable} references hold no number"] if unusable else notes
