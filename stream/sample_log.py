"""What each step consumed: `samples.jsonl`, kept where `log.sample_ids` is on.

One line per step and rank: {"step", "planned" (the plan's step), "rank", "ids": [[of a micro-batch], ...]}. A
step that is done again after an interruption stands once; after a roll-back the later line counts. What a
step was meant to hold needs no record: `python -m stream RECIPE --ids`.
"""

from __future__ import annotations

from pathlib import Path

from core.files import append_lines, read_lines, truncate_log
from model.batch import Batch

NAME = "samples.jsonl"


def begin(folder: Path, first_step: int) -> None:
    """Take out the lines of steps that are done again. For one rank alone, before any rank's first step."""
    truncate_log(folder / NAME, first_step)


def append(folder: Path, step: int, planned: int, rank: int, micro_batches: list[Batch]) -> None:
    append_lines(
        folder / NAME,
        [{"step": step, "planned": planned, "rank": rank, "ids": [b.ids for b in micro_batches]}],
    )


def read(folder: Path) -> dict[int, dict[int, list[list[str]]]]:
    """{step: {rank: [ids of each micro-batch]}}"""
    steps: dict[int, dict[int, list[list[str]]]] = {}
    for line in read_lines(folder / NAME):
        steps.setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return steps
