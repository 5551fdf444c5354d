"""Which utterances of packed folders are scored: those that a stage can be scored on, spread evenly over a
corpus."""

from __future__ import annotations

import numpy as np

from core.options import RecipeError
from data_tools.shards import ShardIndex
from model.stages import STAGES
from recipe.config import Corpus, DataConfig
from stream.plan import PLANNED, drawn_share, llm_positions, usable


def select(index: ShardIndex, number: int, stage: str, corpus: Corpus, limit: int | None) -> np.ndarray:
    """PLANNED entries of a corpus that a stage can be scored on; `limit` takes that many, evenly spaced, so
    that a split sorted by speaker or dialogue is not judged by its first one."""
    tasks = corpus.tasks
    for task in tasks or []:
        if task not in index.tasks:
            raise RecipeError(f"'{index.location}' has no task '{task}'; it has {', '.join(index.tasks)}")
    samples = np.asarray(index.samples)
    wanted = usable(samples, DataConfig(min_seconds=0.0, max_seconds=float("inf")), stage)[""]
    if tasks is not None:
        wanted &= np.isin(samples["task"], [index.tasks.index(task) for task in tasks])
    if (drawn := drawn_share(samples, corpus)) is not None:
        wanted &= drawn
    rows = np.flatnonzero(wanted)
    if limit is not None and limit < len(rows):
        rows = rows[np.arange(limit) * len(rows) // limit]
    entries = np.zeros(len(rows), PLANNED)
    chosen = samples[rows]
    entries["corpus"], entries["row"] = number, rows
    entries["seconds"] = np.where(chosen["audio_size"] > 0, chosen["duration"], 0)
    if STAGES[stage].needs_llm:
        entries["positions"] = llm_positions(chosen)
    return entries


def share_of_each(data: DataConfig, utterances: int) -> int:
    """How many of `utterances` each corpus of data.valid gives."""
    return -(-utterances // max(1, len(data.valid)))
