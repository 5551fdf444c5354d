"""A checkpoint for another number of ranks: DeepSpeed's universal format, made once, inside the checkpoint's
own folder.

    step-000500/universal/            one file a parameter and state, of no topology; goes away with its
                                      checkpoint
    step-000500/universal.partial/    being made, or what a kill left of it: made again

DeepSpeed's loader drops frozen parameters without a word; here the frozen base comes from its own files and
the earlier stages' folder, and their hashes are compared (train/checkpoint/compatibility.py) before anything
is loaded. Its ZeRO-3 loader also gives every optimizer group the first group's settings and all parts one
shared step counter: `Checkpoints.load` puts both right.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from core.console import OneLine
from core.distributed import LAUNCHER_VARIABLES, Ranks, from_main
from core.files import ROOT
from recipe.config import RecipeError

logger = logging.getLogger("soundwave")
NAME = "universal"


class ConversionError(OneLine, RuntimeError):
    """One line: which checkpoint could not be converted, why, what to do."""


def needed(saved: dict, now: dict, source: Path) -> bool:
    """Does `source` have to be converted for this run? `saved`, `now`: {"world_size", "zero_stage"}.

    Errors: RecipeError for another ZeRO stage: the universal files made from ZeRO-3 and from ZeRO-1/2 name
    and nest the common optimizer state in two ways, and DeepSpeed's loaders read their own only.
    """
    if saved["zero_stage"] != now["zero_stage"]:
        raise RecipeError(
            f"{source} was written under ZeRO-{saved['zero_stage']} and this run uses "
            f"ZeRO-{now['zero_stage']}: "
            "only the number of ranks may change while a stage is trained; set `deepspeed` to a "
            f"ZeRO-{saved['zero_stage']} configuration again, or choose another output folder"
        )
    return saved["world_size"] != now["world_size"]


def convert(source: Path, ranks: Ranks) -> Path:
    """The universal folder of a checkpoint; rank 0 makes it where it is missing, the others wait. Errors:
    ConversionError."""
    problem: str | None = None
    if ranks.is_main and not (source / NAME).exists():
        try:
            _make(source)
        except (ConversionError, OSError) as error:
            problem = str(error)
    if problem := from_main(problem):
        raise ConversionError(problem)
    return source / NAME


def _make(source: Path) -> None:
    target, partial = source / NAME, source / (NAME + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Fragments and merged files lie side by side for a while.
    size = sum(path.stat().st_size for path in source.iterdir())
    free = shutil.disk_usage(source).free
    if free < 2.5 * size:
        raise ConversionError(
            f"no room to convert {source} for another number of ranks: it needs {2.5 * size / 1e6:.1f} MB "
            f"and "
            f"{free / 1e6:.1f} MB are free; free space and start again"
        )
    logger.info("converting %s (%.1f MB) for another number of ranks, once", source, size / 1e6)
    started = time.monotonic()
    workers = str(min(4, len(os.sched_getaffinity(0))))
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "train.deepspeed_fixes.safe_load",
            "--input_folder",
            str(source),
            "--output_folder",
            str(partial),
            "--num_extract_workers",
            workers,
            "--num_merge_workers",
            workers,
        ],
        env={**environment, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )  # no GPU needed
    (source / "latest_universal").unlink(
        missing_ok=True
    )  # the converter's own mark; the folder's name is ours
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConversionError(
            f"{source} could not be converted for another number of ranks ({last}): start with as many ranks "
            "as wrote it, or remove that folder to resume from the one before it"
        )
    for inner in partial.rglob("*"):  # a rename must not outrun the bytes
        descriptor = os.open(inner, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(partial, target)
    logger.info("converted in %.1f s: %s", time.monotonic() - started, target)
