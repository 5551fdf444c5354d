"""The run of one stage: is there anything to do, set up, train, report."""

from __future__ import annotations

import logging
import os

from core.distributed import Ranks, from_main
from recipe.config import Recipe, RecipeError
from recipe.stages import stage_folder, stage_of, trained_by
from stream.cache import Interrupted
from train import report
from train.checkpoint import compatibility
from train.checks import warnings_of, workers_warning
from train.outcome import RunOutcome, RunStatus
from train.preemption import DONE, PREEMPTED, WRONG_INPUT, Preemption
from train.setup import set_up

logger = logging.getLogger("soundwave")


def run_stage(recipe: Recipe, ranks: Ranks, status: RunStatus, profile_steps: int = 0) -> int:
    """Train the stage; return the exit code (train/preemption.py). Collective."""
    code = reason_not_to_start(recipe, ranks)
    if code is not None:  # run.json stays as it is: the other process's, or the finished stage's
        return code
    if ranks.is_main:
        for line in warnings_of(recipe) + workers_warning(recipe, len(os.sched_getaffinity(0))):
            logger.warning("%s", line)
    status.write("starting")
    preemption = Preemption(status.folder)
    try:
        trainer = set_up(recipe, ranks, status, preemption, profile_steps)
    except Interrupted as stop:
        outcome = features_unfinished(str(stop), preemption, ranks)
        status.write_outcome(outcome)
        return outcome.code
    outcome = trainer.train()
    status.write_outcome(outcome)
    trainer.close(outcome)
    if ranks.is_main:
        write_report(recipe)
    return outcome.code


def reason_not_to_start(recipe: Recipe, ranks: Ranks) -> int | None:
    """Return the exit code where another process trains the stage, or it is finished; rank 0 looks."""
    seen: int | None = None
    if ranks.is_main:
        other, is_finished, problem = trained_by(recipe), False, None
        try:
            is_finished = not other and compatibility.finished(recipe)
        except RecipeError as error:
            problem = str(error)
        if other:
            problem = (
                f"process {other} of this machine is training {stage_folder(recipe)}: wait for it, end it, "
                "or choose another output"
            )
        if problem:
            logger.error("%s", problem)
            seen = WRONG_INPUT
        elif is_finished:
            logger.info(
                "stage %s is finished: %s; remove that folder or choose another output to train again",
                stage_of(recipe).number,
                stage_folder(recipe) / "model",
            )
            seen = DONE
    return from_main(seen)


def features_unfinished(why: str, preemption: Preemption, ranks: Ranks) -> RunOutcome:
    """End a run that was stopped while encoder features were computed."""
    if ranks.is_main:
        preemption.stop_file.unlink(missing_ok=True)
        logger.info(
            "stopped while encoder features were computed (%s), exit code %d; the same command resumes "
            "from there",
            why,
            PREEMPTED,
        )
    return RunOutcome.preempted(None, why)


def write_report(recipe: Recipe) -> None:
    folder = stage_folder(recipe)
    try:
        logger.info("report: %s", report.write(folder))
    except Exception:  # all is saved by now: a report that fails must not make the run fail
        logger.exception("no report was written; python -m train.report %s tries again", folder)
