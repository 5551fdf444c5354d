"""Every utterance of a split exactly once, for validation during training and for the evaluation afterwards.

The split is sorted by length, cut and dealt to ranks as in training (assign), so all ranks get equally many
batches; where utterances are too few, a rank gets dummies. Nothing is shuffled, augmented or replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from model.batch import Batch
from model.config import SoundwaveConfig
from recipe.config import Corpus, DataConfig
from stream.assign import Budgets, assign
from stream.cache import FeatureStore
from stream.collate import Collator
from stream.loader import Job, Loader
from stream.packed import MicroBatchReader
from stream.plan import PLANNED, load_index
from stream.selection import select, share_of_each

LOGGER = logging.getLogger(__name__)


class EvalStream:
    """Iterates (Batch, samples): one micro-batch and the JSON of its rows, longest utterances first.

    shards: a packed folder, or a list of Corpus. answers: False gives prompts ready to be continued, True
    whole conversations with labels. done: tells which samples to leave out. limit: so many utterances of each
    corpus. batch_seconds: padded audio of one batch. `samples` is empty where a dummy fills up a shorter
    rank. total: utterances of this rank. rejected: what could not be read, or is too long for the encoder, as
    {"id", "why", ...}.
    """

    def __init__(
        self,
        shards: str | list[Corpus],
        tokenizer: PreTrainedTokenizerBase,
        model_config: SoundwaveConfig,
        stage: str,
        *,
        tasks: list[str] | None = None,
        limit: int | None = None,
        batch_seconds: float = 60.0,
        done: Callable[[dict], bool] | None = None,
        rank: int = 0,
        world_size: int = 1,
        data: DataConfig | None = None,
        answers: bool = False,
    ):
        data = data or DataConfig()
        corpora = [Corpus(shards=str(shards), tasks=tasks)] if not isinstance(shards, list) else shards
        indexes = [load_index(corpus.shards) for corpus in corpora]
        chosen = [
            select(index, number, stage, corpus, limit)
            for number, (corpus, index) in enumerate(zip(corpora, indexes, strict=True))
        ]
        entries = np.concatenate([np.empty(0, PLANNED), *chosen])
        if done:
            entries = entries[[not done(indexes[e["corpus"]].read(int(e["row"]))[1]) for e in entries]]
        longest = model_config.encoder.max_seconds
        too_long, entries = entries[entries["seconds"] > longest], entries[entries["seconds"] <= longest]
        features = None
        if data.cache_features:
            features = FeatureStore.open(data.cache_features, model_config)
        self.data = replace(data, speed_perturb=[], noise_snr_db=[], spec_augment=False)
        budgets = Budgets(batch_seconds, data.micro_batch_tokens)
        groups = (
            assign(entries["seconds"], entries["positions"], world_size, budgets)[rank]
            if len(entries)
            else []
        )
        self._parts = [entries[group] for group in groups]
        self.total = sum(map(len, self._parts))
        collator = Collator(
            tokenizer,
            model_config,
            stage,
            data.ctc_text,
            answers=answers,
            feature_width=features.width if features else None,
        )
        self._reader = MicroBatchReader(indexes, collator, self.data, features=features, slots=data.workers)
        why = f"longer than model.encoder.max_seconds = {longest:g}"
        self.rejected = (
            [{**self._reader.identity(entry), "reason": why, "why": why} for entry in too_long]
            if rank == 0
            else []
        )

    def __len__(self) -> int:
        """Batches, the same number on every rank."""
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Batch, list[dict]]]:
        jobs = (Job(0, position, len(self._parts), part) for position, part in enumerate(self._parts))
        workers = min(self.data.workers, len(self._parts))
        for loaded in Loader(self._reader, jobs, workers, self.data.prefetch):
            self.rejected += [{**record, "why": record["reason"]} for record in loaded.rejected]
            yield loaded.batch, loaded.metas

    def read(self, position: int) -> Batch:
        """Return one of this rank's batches, read anew."""
        (loaded,) = Loader(self._reader, iter([Job(0, 0, 1, self._parts[position])]), 0, 1)
        return loaded.batch


def validation_samples(
    data: DataConfig,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
    model_config: SoundwaveConfig,
    rank: int,
    world_size: int,
    utterances: int,
    *,
    answers: bool = False,
) -> list[tuple[Batch, list[dict]]]:
    """data.valid as a list of (Batch, the JSON of its rows), equally many batches on every rank; a dummy has
    none.

    `utterances` are spread evenly over the corpora. answers as in EvalStream. Broken utterances are left out.
    """
    if not data.valid:
        return []
    stream = validation_stream(
        data, stage, tokenizer, model_config, rank, world_size, utterances, answers=answers
    )
    batches = list(stream)
    if stream.rejected:
        LOGGER.warning(
            "%d utterances of data.valid are left out; the first: %s",
            len(stream.rejected),
            stream.rejected[0],
        )
    return batches


def validation_stream(
    data: DataConfig,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
    model_config: SoundwaveConfig,
    rank: int,
    world_size: int,
    utterances: int,
    *,
    answers: bool,
) -> EvalStream:
    """Return data.valid as a stream of batches; arguments as in `validation_samples`."""
    return EvalStream(
        data.valid,
        tokenizer,
        model_config,
        stage,
        limit=share_of_each(data, utterances),
        batch_seconds=data.micro_batch_seconds,
        rank=rank,
        world_size=world_size,
        data=replace(data, workers=0),
        answers=answers,
    )
