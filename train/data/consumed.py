"""What each step consumed: `samples.jsonl`, kept where `log.sample_ids` is on.

One line per step and rank: {"step", "planned" (the plan's step), "rank", "ids": [[of a micro-batch], ...]}. A step that is done
again after an interruption stands once; after a roll-back the later line counts. What a step was meant to hold needs no record:
`python -m train.data RECIPE --ids`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from model.batch import Batch
from train.data.rejected import append_lines

NAME = "samples.jsonl"


def _lines(path: Path) -> list[dict]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill: that step is done again
    return found


def begin(folder: Path, first_step: int) -> None:
    """Take out the lines of steps that are done again. For one rank alone, before any rank's first step."""
    path = folder / NAME
    if path.exists():
        kept = [line for line in _lines(path) if line["step"] < first_step]
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        append_lines(partial, kept)
        os.replace(partial, path)


def note(folder: Path, step: int, planned: int, rank: int, micro_batches: list[Batch]) -> None:
    append_lines(folder / NAME, [{"step": step, "planned": planned, "rank": rank, "ids": [b.ids for b in micro_batches]}])


def read(folder: Path) -> dict[int, dict[int, list[list[str]]]]:
    """{step: {rank: [ids of each micro-batch]}}"""
    steps: dict[int, dict[int, list[list[str]]]] = {}
    for line in _lines(folder / NAME):
        steps.setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return steps
