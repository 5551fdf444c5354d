"""Free answers with a reference, alone or after a transcription."""

from __future__ import annotations

import re

import numpy as np
from sacrebleu.metrics import CHRF

from core.text import Marks, normalise
from evaluation.metrics.accuracy import label_note, score_accuracy
from evaluation.metrics.base import BOOTSTRAP, Metric, register_metric
from evaluation.metrics.error_rates import score_wer, silence_note
from evaluation.resampling import interval, paired_test
from evaluation.tasks import split_chain

_SIGN = re.compile(r"(?<![\w)\]])[-\u2212\u2013](?=[.,]?\d)")  # of a number; not the dash in 3-5
_SYMBOLS = re.compile(r"(?<!\w)\+(?=\d)|([+=<>\u2264\u2265\u2260\u00b1\u00d7\u00f7^#/\\])")


def same_answer(first: str, second: str, lang: str | None, marks: Marks = "script") -> bool:
    """Whether two answers are the same after normalisation. What Whisper's normaliser drops and an answer may
    consist of counts here: words in brackets, the sign of a number, symbols of arithmetic. Answers that it
    empties are compared as they are, case, spaces and outer punctuation aside."""
    plain = [
        " ".join(text.casefold().split()).strip(" .,;:!?\"'\u201c\u201d\u2018\u2019")
        for text in (first, second)
    ]
    if plain[0] == plain[1]:
        return True
    symbols = [[symbol for symbol in _SYMBOLS.findall(text) if symbol] for text in (first, second)]
    unbracketed = [re.sub(r"[()\[\]{}<>]", " ", _SIGN.sub(" minus ", text)) for text in (first, second)]
    normalised = [normalise(text, lang, marks) for text in unbracketed]
    return bool(normalised[0]) and normalised[0] == normalised[1] and symbols[0] == symbols[1]


def exact_answers(rows: list[dict], marks: Marks = "script") -> np.ndarray:
    """1 where the answer is the reference's (same_answer, by the row's language), else 0."""
    answers = [[split_chain(row[key])[1] for key in ("prediction", "reference")] for row in rows]
    return np.array(
        [
            float(same_answer(prediction, reference, row.get("lang"), marks))
            for (prediction, reference), row in zip(answers, rows, strict=True)
        ]
    )


def score_answer(rows: list[dict], marks: Marks = "script") -> dict:
    """Free answers with a reference: the share that equals it, chrF, and accuracy over the rows that carry a
    label."""
    chrf, exact = CHRF(), exact_answers(rows, marks)
    answers, references = (
        [split_chain(row["prediction"])[1] for row in rows],
        [split_chain(row["reference"])[1] for row in rows],
    )
    scores = {
        "exact": float(exact.mean()),
        "exact_ci95": interval(exact, np.ones(len(rows)), samples=BOOTSTRAP),
        "chrf": float(chrf.corpus_score(answers, [references]).score),
        "chrf_signature": str(chrf.get_signature()),
    }
    labelled = [row for row in rows if row.get("label")]
    if labelled:
        scores |= {"labelled": len(labelled), **score_accuracy(labelled)}
    return scores


def score_chain(rows: list[dict], marks: Marks = "script") -> dict:
    """ "Transcription: ... Answer: ...": WER of the first part, the second part as an answer. A missing part
    counts as wrong."""
    transcripts = [
        row | {key: split_chain(row[key])[0] or "" for key in ("reference", "prediction")} for row in rows
    ]
    whole = score_wer(transcripts, marks)
    malformed = sum(split_chain(row["prediction"])[0] is None for row in rows)
    shown = {key: whole[key] for key in ("wer", "wer_ci95", "words", "silence", "normaliser") if key in whole}
    return {**shown, "malformed": malformed, **score_answer(rows, marks)}


class _Exact(Metric):
    """Answers are compared by the share that equals the reference."""

    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        return {"exact": paired_test(exact_answers(first), exact_answers(second), np.ones(len(first)))}

    def notes(self, scores: dict) -> list[str]:
        return [*label_note(scores), *silence_note(scores)]


@register_metric("answer")
class Answers(_Exact):
    columns = ("exact", "chrf")
    rates = ("exact",)

    def score(self, rows: list[dict], marks: Marks) -> dict:
        return score_answer(rows, marks)


@register_metric("chain")
class Chain(_Exact):
    columns = ("wer", "exact")
    rates = columns
    lower_is_better = ("wer",)
    tasks = ("chain",)

    def score(self, rows: list[dict], marks: Marks) -> dict:
        return score_chain(rows, marks)

    def show(self, name: str, value: object) -> str:
        if name == "wer":
            return super().show("WER", "none: no words" if value is None else value)
        return super().show(name, value)
