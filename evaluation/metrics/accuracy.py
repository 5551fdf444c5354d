"""Accuracy on closed questions: the choice that an answer names."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from core.text import Marks
from data_tools.normalise import plain_label
from evaluation.metrics.base import BOOTSTRAP, Metric, metric_of_task, register_metric
from evaluation.resampling import interval, paired_test
from evaluation.tasks import label_among, parse_choice, parse_letter, same_label, split_chain


def label_of(row: dict) -> str:
    return str(row.get("label") or row["reference"])


def with_labels(rows: list[dict], among: list[dict]) -> list[dict]:
    """Rows of closed tasks without `choices` get `labels`, what can be answered: all labels of their corpus
    and task in `among` (of a task without any, as METRICS has it, the references), so that a part of the rows
    is scored as it is within the whole."""
    labelled: dict[tuple, set[str]] = defaultdict(set)
    bare: dict[tuple, set[str]] = defaultdict(set)
    for row in among:
        key = row.get("corpus"), row.get("task")
        if row.get("label"):
            labelled[key].add(str(row["label"]))
        elif metric_of_task(row.get("task")) == "accuracy":
            bare[key].add(row["reference"])
    labels = {key: sorted(names) for key, names in {**bare, **labelled}.items()}
    return [
        row if row.get("choices") else row | {"labels": labels.get((row.get("corpus"), row.get("task")), [])}
        for row in rows
    ]


def correct_answers(rows: list[dict]) -> tuple[np.ndarray, int, int]:
    """1 where the choice read from the answer is the label, else 0; how many answers named no single choice;
    and how many labels are none of their row's choices, which no answer can get right.

    The choices are the row's own (`choices`), else its `labels` (with_labels).
    """
    correct, unparsed, mislabelled = np.zeros(len(rows)), 0, 0
    for i, row in enumerate(rows):
        answer = split_chain(row["prediction"])[1]
        label: str | None = label_of(row)
        if choices := row.get("choices"):
            choice, label = parse_letter(answer, choices), label_among(label_of(row), choices)
            mislabelled += label is None
        else:
            choice = parse_choice(answer, row["labels"])
        unparsed += choice is None
        correct[i] = choice is not None and label is not None and same_label(choice, label)
    return correct, unparsed, mislabelled


def score_accuracy(rows: list[dict], marks: Marks = "script") -> dict:
    correct, unparsed, mislabelled = correct_answers(rows)
    by_label = defaultdict(list)
    for row, hit in zip(rows, correct, strict=True):
        by_label[plain_label(label_of(row))].append(hit)
    recalls = {label: float(np.mean(hits)) for label, hits in sorted(by_label.items())}
    scores = {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": interval(correct, np.ones(len(rows)), samples=BOOTSTRAP),
        "unparsed": unparsed,
        **({"labels_not_among_choices": mislabelled} if mislabelled else {}),
    }
    if len(recalls) <= 50 and not any(row.get("choices") for row in rows):
        scores |= {"unweighted_recall": float(np.mean(list(recalls.values()))), "recall": recalls}
    return scores


@register_metric("accuracy")
class Accuracy(Metric):
    columns = ("accuracy", "unparsed")
    rates = ("accuracy",)
    lower_is_better = ("unparsed",)
    tasks = ("emotion", "gender", "sound", "instrument", "genre", "mood")

    def score(self, rows: list[dict], marks: Marks) -> dict:
        return score_accuracy(rows, marks)

    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        hits = correct_answers(first)[0], correct_answers(second)[0]
        return {"accuracy": paired_test(*hits, np.ones(len(first)))}

    def notes(self, scores: dict) -> list[str]:
        return label_note(scores)


def label_note(scores: dict) -> list[str]:
    """Return what the table says about labels that no answer can name."""
    stray = scores.get("labels_not_among_choices")
    return [f"{stray} labels are no choice"] if stray else []
