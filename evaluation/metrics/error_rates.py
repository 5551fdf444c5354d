"""Word, character and mixed error rates."""

from __future__ import annotations

from typing import Any

import jiwer
import numpy as np

from core.languages import effective_language
from core.text import RATES, Errors, Marks, Unit, count_errors, describe, says_nothing
from evaluation.metrics.base import BOOTSTRAP, Metric, register_metric
from evaluation.resampling import interval, paired_test


def counted(rows: list[dict], unit: Unit = "word", marks: Marks = "script") -> Errors:
    """References and predictions aligned after normalisation, by core.text.count_errors."""
    references, predictions = ([row[key] for row in rows] for key in ("reference", "prediction"))
    return count_errors(references, predictions, [row.get("lang") for row in rows], unit, marks)


def aligned(rows: list[dict], *, characters: bool = False) -> jiwer.WordOutput | jiwer.CharacterOutput | None:
    """References and predictions after normalisation, aligned in words or characters; None of no rows."""
    return counted(rows, "character" if characters else "word").output


def word_counts(
    rows: list[dict], *, characters: bool = False
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Errors and reference units per utterance after normalisation, and the totals by kind of error.

    Units are words, or characters with `characters` (spaces count where the language writes them, as in
    jiwer's CER). An utterance whose reference is empty after normalisation adds its insertions as errors and
    no units.
    """
    counts = counted(rows, "character" if characters else "word")
    return counts.errors, counts.units, counts.kinds


def spoken(rows: list[dict]) -> list[dict]:
    """The rows whose reference says something: silence and noise have no error rate."""
    return [row for row in rows if not says_nothing(row["reference"])]


def score_wer(rows: list[dict], marks: Marks = "script") -> dict:
    """Error rates by words, characters and both mixed (core/text.py), over the utterances in which something
    is said; what a model writes for silence is counted by the minute. A rate is None where the references
    hold no words."""
    with_speech = spoken(rows)
    scores: dict[str, Any] = {}
    counts = {name: counted(with_speech, unit, marks) for name, unit in RATES.items()}
    for name, count in counts.items():
        scores[name] = float(count.errors.sum() / count.units.sum()) if count.units.sum() else None
        if scores[name] is not None and name != "mer":
            scores[f"{name}_ci95"] = interval(count.errors, count.units, samples=BOOTSTRAP)
    words = counts["wer"]
    languages = {row.get("lang") or effective_language(None, row["reference"]) for row in rows}
    return {
        **scores,
        "words": int(words.units.sum()),
        **words.kinds,
        "sentence_errors": float((words.errors > 0).mean()) if with_speech else None,
        **silence(rows, marks),
        "normaliser": {lang: describe(lang, marks) for lang in sorted(languages)},
    }


def silence(rows: list[dict], marks: Marks = "script") -> dict:
    """{"silence": {utterances, insertions, minutes, insertions_per_minute}} of the rows whose reference says
    nothing; {} without any. Minutes are None where durations are missing."""
    silent = [row for row in rows if says_nothing(row["reference"])]
    if not silent:
        return {}
    insertions = int(counted(silent, marks=marks).errors.sum())
    minutes = (
        sum(row["duration"] for row in silent) / 60 if all(row.get("duration") for row in silent) else None
    )
    return {
        "silence": {
            "utterances": len(silent),
            "insertions": insertions,
            "minutes": minutes,
            "insertions_per_minute": insertions / minutes if minutes else None,
        }
    }


@register_metric("wer")
class ErrorRates(Metric):
    columns = ("wer", "cer")
    rates = columns
    lower_is_better = ("wer", "cer", "mer")
    tasks = ("asr",)

    def score(self, rows: list[dict], marks: Marks) -> dict:
        return score_wer(rows, marks)

    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        first, second = spoken(first), spoken(second)
        results = {}
        for name, characters in (("wer", False), ("cer", True)) if first else ():
            a, units, _ = word_counts(first, characters=characters)
            b, _, _ = word_counts(second, characters=characters)
            results[name] = paired_test(a, b, units)
        return results

    def show(self, name: str, value: object) -> str:
        return super().show(name.upper(), "none: no words" if value is None else value)

    def notes(self, scores: dict) -> list[str]:
        return [*silence_note(scores)]


def silence_note(scores: dict) -> list[str]:
    """Return what the table says about utterances in which nothing is said."""
    silent = scores.get("silence")
    if not silent:
        return []
    inserted = f"{silent['insertions']} words inserted"
    if (rate := silent["insertions_per_minute"]) is not None:
        inserted = f"{rate:.1f} words inserted a minute"
    return [f"{silent['utterances']} silent: {inserted}"]
