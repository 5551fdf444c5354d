"""Which checkpoints are kept, and how others are removed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from core.files import PARTIAL, step_folders, step_of, write_atomically
from core.json_files import JsonError, read_object
from recipe.config import CheckpointConfig
from train.checkpoint.verification import is_best, saved_in_health

logger = logging.getLogger("soundwave")
REPLACED = ".replaced"


def remove(folder: Path) -> None:
    """A checkpoint that is not wanted any more. What cannot be deleted now has another name, and goes at the
    next start."""
    gone = folder if folder.name.endswith(REPLACED) else folder.with_name(folder.name + REPLACED)
    try:
        if gone != folder:
            os.rename(folder, gone)
        shutil.rmtree(gone)
    except OSError as error:
        logger.warning("checkpoint %s could not be removed: %s", folder, error)


def clean_up(folder: Path) -> None:
    """Finish or remove what a kill left in the folder of checkpoints."""
    for leftover in folder.glob("*" + PARTIAL):
        final = leftover.with_name(leftover.name.removesuffix(PARTIAL))
        # The manifest is written when all else is.
        if (leftover / "manifest.json").exists() and not final.exists():
            os.rename(leftover, final)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    remove_replaced(folder)


def remove_replaced(folder: Path) -> None:
    """Remove folders whose replacement is in place."""
    for old in folder.glob("*" + REPLACED):
        remove(old)


def best_step(folder: Path) -> int | None:
    """Return the step of the best checkpoint, where best.json names one."""
    try:
        best = read_object(folder / "best.json")
    except JsonError:  # missing, for one
        return None
    return best["step"] if is_best(best) else None


def prune(folder: Path, config: CheckpointConfig, *, but: Path | None = None) -> None:
    """Keep the last, the best, and the last one from before a bad stretch, which a roll-back needs.

    but: one that is being copied, and stays until that is done.
    """
    best = best_step(folder) if config.keep_best else None
    checkpoints = step_folders(folder)
    healthy = next((checkpoint for checkpoint in checkpoints if saved_in_health(checkpoint)), None)
    for old in checkpoints[max(1, config.keep_last) :]:
        if step_of(old) != best and old not in (healthy, but):
            remove(old)


def delete_after(folder: Path, step: int, best: dict | None) -> None:
    """Remove checkpoints of later steps, and let `latest` and best.json name earlier ones."""
    for later in step_folders(folder):
        if (step_of(later) or 0) > step:
            shutil.rmtree(later)
    left = [path.name for path in step_folders(folder)]
    best_is_left = best is not None and f"step-{best['step']:06d}" in left
    for name, text in (
        ("latest", left[0] if left else None),
        ("best.json", json.dumps(best) if best_is_left else None),
    ):
        if text is not None:
            write_atomically(folder / name, text)
        else:
            (folder / name).unlink(missing_ok=True)
