"""The contract of a tracker, and the registry of trackers."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from core.registry import Registry
from recipe.config import LogConfig, RecipeError


@dataclass(frozen=True)
class RunInfo:
    """The run that is tracked.

    folder: <output>/<stage>. name: how lists call it. run_id: the tracker's own id of the run, from an
    earlier start of it; None at the first. first_step: the step that this process starts with.
    """

    folder: Path
    name: str
    first_step: int = 0
    run_id: str | None = None
    settings: dict = field(default_factory=dict)  # the recipe, nested


class Tracker(ABC):
    """One place that shows a run. Made and called in a thread of its own (feed.py).

    package: what it imports; the extra of `make setup` that brings it. A method may raise: that is logged,
    and training continues.
    """

    package: str
    extra: str = "trackers"
    #: The tracker's id of the run, which the next start of the same run is given; None where it needs none.
    run_id: str | None = None

    @classmethod
    def new_run_id(cls) -> str | None:
        """Return an id for a new run; None where the tracker's own store makes it, in __init__."""
        return None

    @abstractmethod
    def __init__(self, run: RunInfo): ...

    @abstractmethod
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers by name, e.g. train/loss."""

    @abstractmethod
    def picture(self, step: int, name: str, path: Path) -> None:
        """Record a PNG file."""

    @abstractmethod
    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        """Record a table of texts."""

    @abstractmethod
    def close(self) -> None:
        """Write what is not written yet."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker")


def tracker_names(log: LogConfig) -> list[str]:
    """Return the trackers of a recipe, each once; `log.tensorboard: false` leaves TensorBoard out."""
    return [name for name in dict.fromkeys(log.trackers) if name != "tensorboard" or log.tensorboard]


def check_trackers(log: LogConfig) -> None:
    """Errors: RecipeError for a tracker that is not known, or whose package is not installed."""
    for name in tracker_names(log):
        if name not in TRACKERS:
            raise RecipeError(f"log.trackers: {TRACKERS.describe_unknown(name)}")
        tracker = TRACKERS[name]
        if not _is_installed(tracker.package):
            raise RecipeError(
                f"log.trackers: {name} needs the package {tracker.package}, which is not installed: "
                f"make setup EXTRAS={tracker.extra}"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
