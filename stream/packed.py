"""The stream: planned global batches, read and collated in worker processes, one list of micro-batches per
step and rank.

    plan.global_batch(step) -> assign -> this rank's micro-batches -> workers: read, decode, check, augment,
    tokenise, collate
                                                                    -> StepBatches(step, [Batch, ...])

State: the step. Nothing else is needed to resume, on any number of ranks and workers.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from core.keys import signed_key64
from core.object_store import joined
from data_tools.shards import ShardIndex
from model.batch import Batch
from model.config import SoundwaveConfig
from recipe.config import DataConfig, RecipeError
from stream import augment
from stream.assign import Budgets, assign
from stream.cache import FeatureStore
from stream.collate import Collator, Prepared
from stream.loader import PHASES, Job, Loaded, Loader
from stream.plan import Plan, UnindexedPlan
from stream.reader import SAMPLE_RATE, Sample, check_length, decode, read_with_retry
from stream.rejected import RejectedLog, UnreadableSample, broken_by
from stream.unindexed import UnindexedReader

REPLACEMENTS = 8  # further utterances that are tried in a broken one's place
GIVE_UP_SECONDS = 600.0  # that a shard whose reads failed is asked only once per utterance


@dataclass
class StepBatches:
    """What one rank does in one optimizer step."""

    step: int
    micro_batches: list[Batch]  # as many on every rank; where utterances are too few, dummies
    seconds: float  # audio of this rank
    padded_seconds: float
    samples: int
    rejected: list[dict]  # id, reason, step, replaced_by ...: named in rejected.jsonl already
    retries: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def padding_share(self) -> float:
        return 1 - self.seconds / self.padded_seconds if self.padded_seconds else 0.0


OPEN_FILES, OTHER_FILES = (
    64,
    384,
)  # most of one corpus; what a worker needs for all else (shared memory, above all)


def share_open_files(indexes: list[ShardIndex]) -> None:
    """As many open files as the system lets this process (and its workers) have, dealt out among corpora:
    each keeps some, and twenty times some is more than many systems' first limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    limit = most if soft == resource.RLIM_INFINITY else soft
    for index in indexes:
        index.keep_open(max(1, min(OPEN_FILES, (limit - OTHER_FILES) // len(indexes))))


class MicroBatchReader(Dataset):
    """Makes a micro-batch from a job: the work of a worker process. replace: another utterance in a broken
    one's place."""

    def __init__(
        self,
        indexes: list[ShardIndex],
        collator: Collator,
        data: DataConfig,
        *,
        plan: Plan | None = None,
        features=None,
        slots: int = 1,
        mel_channels: int | None = None,
    ):
        self.mel_channels = mel_channels
        share_open_files(indexes)
        self.indexes, self.collator, self.data, self.plan, self.features = (
            indexes,
            collator,
            data,
            plan,
            features,
        )
        self._refused: dict[
            tuple[int, int], float
        ] = {}  # (corpus, shard) -> when its reads failed to the last attempt
        # What each worker is at, for the watchdog: [time it began (0: idle), corpus, row, step].
        self.at = torch.zeros(max(slots, 1), 4, dtype=torch.float64).share_memory_()

    def _sample(self, entry: np.void, timings: dict[str, float]) -> tuple[Prepared, int]:
        index, row = self.indexes[entry["corpus"]], int(entry["row"])
        began = time.perf_counter()
        shard = int(entry["corpus"]), int(index.samples["shard"][row])
        # Of a vanished shard not every utterance has to wait through all attempts.
        given_up = time.monotonic() - self._refused.get(shard, -np.inf) < GIVE_UP_SECONDS
        try:
            audio, meta, retries = read_with_retry(index, row, () if given_up else None)
        except UnreadableSample:
            self._refused[shard] = time.monotonic()
            raise
        read = time.perf_counter()
        if audio is None:
            sample = Sample(meta, None)
        elif self.features is not None:
            sample = Sample(meta, None, self.features.read(index.samples[row]))
        else:
            # Of an evaluation's clips: it is reported beside their scores.
            findings: list[str] | None = [] if self.plan is None else None
            waveform = decode(audio, findings=findings)
            if findings:
                meta = meta | {"findings": findings}
            if self.plan is not None:
                check_length(waveform, self.data)
                sample = augment.augmented(waveform, meta, self.data, int(entry["epoch"]), self.mel_channels)
            else:
                sample = Sample(meta, waveform)
        sample.dropout_key = signed_key64("utterance", entry["corpus"], row, entry["epoch"])
        decoded = time.perf_counter()
        prepared = self.collator.prepare(sample)
        timings["read"] += read - began
        timings["decode"] += decoded - read
        timings["prepare"] += time.perf_counter() - decoded
        return prepared, retries

    def identity(self, entry: np.void) -> dict:
        """Name of an utterance, its id too where its JSON can be read."""
        index, row = self.indexes[entry["corpus"]], int(entry["row"])
        try:
            sample = index.read(row)[1]
        except Exception:
            sample = None
        sample = sample if isinstance(sample, dict) else {}
        name = sample.get("id")
        shard = index.shards[int(index.samples["shard"][row])]["url"]
        name = f"row {row} of {shard}" if name is None else str(name)
        return {"id": name, "corpus": str(sample.get("corpus") or index.name), "row": row, "shard": shard}

    def _prefetch(self, *groups: np.ndarray | None) -> None:
        """Ask object stores for all utterances of a job and of the next one: they answer while this process
        decodes."""
        for entries in groups:
            if entries is None:
                continue
            for corpus in np.unique(entries["corpus"]):
                self.indexes[corpus].prefetch(entries["row"][entries["corpus"] == corpus].tolist())

    def __getitem__(self, job: Job) -> Loaded:
        worker = torch.utils.data.get_worker_info()
        slot = self.at[worker.id if worker else 0].numpy()
        timings = dict.fromkeys(PHASES, 0.0)
        prepared, rejected, retries = [], [], 0
        self._prefetch(job.entries, job.following)
        for entry in job.entries:
            planned = entry
            broken: list[dict] = []
            for attempt in range(REPLACEMENTS + 1 if self.plan is not None else 1):
                if attempt and self.plan is not None:
                    entry = self.plan.replacement(planned, attempt)
                slot[:] = time.time(), entry["corpus"], entry["row"], job.step
                try:
                    one, more = self._sample(entry, timings)
                except RecipeError:
                    raise
                except Exception as error:  # one utterance is no reason to stop
                    reason = str(broken_by(error))
                    if not any(record["row"] == entry["row"] for record in broken):
                        broken.append(
                            {**self.identity(entry), "reason": reason, "step": job.step, "replaced_by": None}
                        )
                    continue
                for record in broken:
                    record["replaced_by"] = str(one.sample.meta.get("id"))
                prepared.append(one)
                retries += more
                break
            rejected += broken
        slot[0] = 0
        began = time.perf_counter()
        batch = self.collator(prepared)
        timings["collate"] = time.perf_counter() - began
        rate = self.features.frame_rate if self.features is not None else SAMPLE_RATE
        lengths = batch.audio_lengths.double() / rate * (not batch.audio_is_dummy)
        return Loaded(
            job,
            batch,
            [p.sample.meta for p in prepared],
            float(lengths.sum()),
            float(lengths.max()) * len(lengths),
            rejected,
            retries,
            timings,
        )

    def doing(self, worker: int) -> tuple[float, str] | None:
        """(seconds, what) of the utterance that a worker is at."""
        began, corpus, row, step = self.at[worker].tolist()
        if not began:
            return None
        index = self.indexes[int(corpus)]
        shard = index.shards[int(index.samples["shard"][int(row)])]["url"]
        return time.time() - began, f"sample {int(row)} of {joined(index.location, shard)} (step {int(step)})"


class Stream:
    """Iterates StepBatches for steps [start_step, steps) of one rank.

    Every rank gets the same number of steps, and in each step the same number of micro-batches. Where
    data.train names pipes or URLs in place of packed folders, see stream/unindexed.py for what holds then.
    rejected_path: JSONL that names broken utterances (all ranks append). plan: where the caller has one
    already. row_limit: see Collator.
    Errors: RecipeError before the first step; StreamStalled. The caller, which
    gathers them from all ranks, checks for too many broken utterances: `rejected.too_many(...)`.
    """

    def __init__(
        self,
        data: DataConfig,
        stage: str,
        tokenizer: PreTrainedTokenizerBase,
        model_config: SoundwaveConfig,
        rank: int,
        world_size: int,
        start_step: int,
        steps: int,
        *,
        rejected_path: str | Path | None = None,
        plan: Plan | UnindexedPlan | None = None,
        row_limit: int | None = None,
    ):
        augment.check(data)
        self.data, self.rank, self.world_size = data, rank, world_size
        self.start_step, self.steps = start_step, steps
        self.plan = plan or Plan.open(data, stage, steps, model_config)
        features = None
        if data.cache_features:
            features = FeatureStore.open(data.cache_features, model_config)
        collator = Collator(
            tokenizer,
            model_config,
            stage,
            data.ctc_text,
            token_limit=data.micro_batch_tokens,
            row_limit=row_limit,
            feature_width=features.width if features else None,
        )
        channels = augment.mel_channels(data, model_config)
        self.rejected = RejectedLog(rejected_path, data.max_rejected_share)
        self._iterator: Generator[StepBatches] | None = None
        self.reader: UnindexedReader | MicroBatchReader
        if isinstance(self.plan, UnindexedPlan):
            self.reader = UnindexedReader(self.plan, collator, data, rank, world_size, start_step, channels)
            return
        self.reader = reader = MicroBatchReader(
            self.plan.indexes,
            collator,
            data,
            plan=self.plan,
            features=features,
            slots=data.workers,
            mel_channels=channels,
        )
        if rank == 0 and start_step == 0:
            self.rejected.write(self._excluded(self.plan, reader))

    @staticmethod
    def _excluded(plan: Plan, reader: MicroBatchReader, most: int = 1000) -> list[dict]:
        """Lines that name what the index rules out, at most `most` per corpus and reason, and a count of the
        rest."""
        lines = []
        for excluded in plan.excluded:
            entries = np.zeros(min(len(excluded.rows), most), [("corpus", "u2"), ("row", "u4")])
            entries["corpus"], entries["row"] = excluded.corpus, excluded.rows[:most]
            lines += [
                {**reader.identity(entry), "reason": excluded.reason, "step": None} for entry in entries
            ]
            if len(excluded.rows) > most:
                lines.append(
                    {
                        "id": None,
                        "corpus": plan.indexes[excluded.corpus].name,
                        "reason": excluded.reason,
                        "step": None,
                        "further": len(excluded.rows) - most,
                    }
                )
        return lines

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """This rank's part of a step: PLANNED entries of each micro-batch. Errors: ValueError without an
        index."""
        if isinstance(self.plan, UnindexedPlan):
            raise ValueError("shards without an index have no plan of their steps")
        batch = self.plan.global_batch(step)
        groups = assign(batch["seconds"], batch["positions"], self.world_size, Budgets.of(self.data))
        return [batch[group] for group in groups[self.rank]]

    def _jobs(self) -> Iterator[Job]:
        """Jobs in order; those on an object store know the next one of their worker (workers take turns)."""
        if isinstance(self.plan, UnindexedPlan) or not any(index.is_remote for index in self.plan.indexes):
            yield from self._planned_jobs()
            return
        waiting: deque[Job] = deque()
        for job in self._planned_jobs():
            waiting.append(job)
            if len(waiting) > max(self.data.workers, 1):
                first = waiting.popleft()
                first.following = job.entries
                yield first
        yield from waiting

    def _planned_jobs(self) -> Iterator[Job]:
        for step in range(self.start_step, self.steps):
            parts = self.micro_batches(step)
            for position, entries in enumerate(parts):
                yield Job(step, position, len(parts), entries)

    def __iter__(self) -> Generator[StepBatches]:
        self.close()
        self._iterator = self._steps()
        return self._iterator

    def _steps(self) -> Generator[StepBatches]:
        jobs = None if isinstance(self.plan, UnindexedPlan) else self._jobs()
        loader = Loader(self.reader, jobs, self.data.workers, self.data.prefetch)
        parts: list[Loaded] = []
        step = self.start_step
        for loaded in loader:
            if step >= self.steps:
                break
            parts.append(loaded)
            if len(parts) < loaded.job.count:
                continue
            rejected = [record for part in parts for record in part.rejected]
            self.rejected.add(rejected)
            yield StepBatches(
                step=step,
                micro_batches=[part.batch for part in parts],
                seconds=sum(part.seconds for part in parts),
                padded_seconds=sum(part.padded_seconds for part in parts),
                samples=sum(len(part.metas) for part in parts),
                rejected=rejected,
                retries=sum(part.retries for part in parts),
                timings={name: sum(part.timings[name] for part in parts) for name in loaded.timings},
            )
            parts, step = [], step + 1

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
