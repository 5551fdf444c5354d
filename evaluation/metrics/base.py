"""The contract of a metric, and the registry of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod

from core.registry import Registry
from core.text import Marks

BOOTSTRAP = 1000  # resamples for each 95 % interval


class Metric(ABC):
    """How prediction rows of a task are scored, compared and displayed.

    columns: names of two scores that the table shows. lower_is_better: those scores that are.
    rates: scores that are shares: the table shows them in percent.
    tasks: those that it scores; no two metrics share one.
    """

    columns: tuple[str, str]
    lower_is_better: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    @abstractmethod
    def score(self, rows: list[dict], marks: Marks) -> dict:
        """Return scores by name, the two of `columns` among them, and NAME_ci95 where there is an
        interval."""

    @abstractmethod
    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        """Return, per score, what evaluation.resampling.paired_test gives for two systems on the same
        rows."""

    def show(self, name: str, value: object) -> str:
        """Return a score as the table shows it."""
        return f"{name} {f'{value:.3f}' if isinstance(value, float) else value}"

    def notes(self, scores: dict) -> list[str]:
        """Return what the table adds after the second score."""
        return []


METRICS: Registry[Metric] = Registry("metric")


def register_metric(name: str):
    """Return a class decorator that adds an instance of a Metric under `name`. Errors: AlreadyRegistered, and
    ValueError where another metric scores one of its tasks."""

    def add(kind: type[Metric]) -> type[Metric]:
        metric = kind()
        for other, registered in METRICS.items():
            shared = set(metric.tasks) & set(registered.tasks)
            if shared and other != name:
                raise ValueError(f"metric '{name}': task '{min(shared)}' is scored by '{other}' already")
        METRICS.add(name, metric)
        return kind

    return add


def metric_of_task(task: str | None) -> str | None:
    """Return the metric that is registered for a task."""
    return next((name for name, metric in METRICS.items() if task in metric.tasks), None)


def metric_of(rows: list[dict]) -> str:
    """Return the name of the metric for the prediction rows of one task: by the task, else by what they
    hold."""
    if all(row.get("choices") for row in rows):
        return "accuracy"
    by_task = metric_of_task(rows[0].get("task") or "asr")
    return by_task or ("accuracy" if all(row.get("label") for row in rows) else "answer")
