"""How a run ended, and run.json, which `python -m train.status` reads."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from core.distributed import Ranks
from core.files import code_version, write_atomically
from recipe.config import Recipe
from recipe.stages import losses_of, stage_folder
from train.preemption import DONE, FAILED, PREEMPTED

logger = logging.getLogger("soundwave")


@dataclass(frozen=True)
class RunOutcome:
    """One of the ways in which training ends: done, preempted, data failed, unhealthy, ranks diverged.

    status, step, reason: as in run.json; code: the exit code (train/preemption.py). The same on all ranks.
    """

    status: str
    code: int
    step: int | None = None
    reason: str | None = None

    @classmethod
    def done(cls, step: int, reason: str | None = None) -> RunOutcome:
        """reason: why before the last step."""
        return cls("done", DONE, step, reason)

    @classmethod
    def preempted(cls, step: int | None, reason: str) -> RunOutcome:
        """Stopped early and saved: the same command resumes."""
        return cls("preempted", PREEMPTED, step, reason)

    @classmethod
    def failed(cls, step: int, reason: str, code: int = FAILED) -> RunOutcome:
        return cls("failed", code, step, reason)


class RunStatus:
    """Writes <stage folder>/run.json on rank 0."""

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.folder: Path = stage_folder(recipe)
        self.ranks = ranks
        self.values: dict = {
            "stage": recipe.stage,
            "losses": list(losses_of(recipe)),
            "steps": recipe.optim.total_steps,
            "epochs": recipe.optim.epochs,
            "world_size": ranks.world_size,
            "started": time.time(),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "commit": code_version() if ranks.is_main else None,
        }

    def write(self, status: str, **values) -> None:
        """Record a status, and further values that are not None."""
        if not self.ranks.is_main:
            return
        present = {key: value for key, value in values.items() if value is not None}
        self.values.update(status=status, updated=time.time(), **present)
        try:
            write_atomically(self.folder / "run.json", json.dumps(self.values, indent=1))
        except OSError as error:  # a full disk must not end what is only in memory
            logger.error("run.json does not say '%s': %s", status, error)

    def write_outcome(self, outcome: RunOutcome) -> None:
        self.write(outcome.status, step=outcome.step, reason=outcome.reason, exit_code=outcome.code)
