"""Plain streaming: shards without an index (pipes, HTTP, object-store commands), read from front to back by `webdataset`.

    urls -> slots (rank x worker): whole shards, or every n-th sample where shards are fewer than slots
    each slot, for ever: shards in a new order each pass -> tar -> shuffle buffer -> decode, check, augment, tokenise
                         -> pool of a few micro-batches' worth -> neighbours in length make a micro-batch

Without an index nothing is known beforehand, so less is promised than for a packed folder. What holds: every rank gets the same
number of steps, and of micro-batches in each of them, because no slot ever ends; a slot reads each of its utterances once per
pass. What does not: global batches depend on the number of ranks and workers, a resumed run goes on in a new order, and slots
whose shards are fewer get round sooner (at most one shard's difference where there are more shards than slots).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from core.audio import EXTENSIONS
from core.keys import signed_key64
from train.config import DataConfig, RecipeError
from train.data import augment
from train.data.assign import Budgets
from train.data.collate import Collator, Prepared
from train.data.loader import PHASES, Job, Loaded
from train.data.plan import PLANNED, SPOKEN_CHARACTERS_PER_SECOND, PlainPlan, key64
from train.data.reader import RETRY_PAUSES, SAMPLE_RATE, Sample, check_length, decode
from train.data.rejected import BrokenSample

SHUFFLE_BUFFER = 500  # undecoded utterances that wait in each slot
POOL = 8  # micro-batches' worth of utterances among which neighbours in length are found


def micro_batches_per_step(data: DataConfig, world_size: int) -> int:
    return max(int(np.ceil(data.batch_seconds / (world_size * data.micro_batch_seconds) - 1e-9)), 1)


def sample_seconds(prepared: Prepared) -> float:
    """Seconds of audio; of a text-only turn, the time it would take to say it (four characters a token)."""
    if prepared.sample.waveform is None:
        return len(prepared.input_ids) * 4 / SPOKEN_CHARACTERS_PER_SECOND
    return len(prepared.sample.waveform) / SAMPLE_RATE


class PlainReader(IterableDataset):
    """Micro-batches for ever; the work of a worker process. Errors: RecipeError where a whole pass yields nothing."""

    def __init__(self, plan: PlainPlan, collator: Collator, data: DataConfig, rank: int, world_size: int, start_step: int,
                 mel_channels: int | None = None):
        self.mel_channels = mel_channels
        self.plan, self.collator, self.data = plan, collator, data
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.urls = [expand_urls(corpus.shards) for corpus in data.train]
        self.micro_batches = micro_batches_per_step(data, world_size)
        self.at = torch.zeros(max(data.workers, 1), 4, dtype=torch.float64).share_memory_()  # [began, corpus, shard, pass]

    def doing(self, worker: int) -> tuple[float, str] | None:
        began, corpus, shard, number = self.at[worker].tolist()
        return (time.time() - began, f"{self.urls[int(corpus)][int(shard)]} (pass {int(number)})") if began else None

    def _shards(self, corpus: int, slot: int, slots: int) -> tuple[list[int], int, int]:
        """Shards of a slot, and which of their samples it takes: every `n`-th from `first`."""
        count = len(self.urls[corpus])
        if count >= slots:
            order = np.argsort([key64(self.data.seed, url) for url in self.urls[corpus]], kind="stable")
            return order[slot::slots].tolist(), 0, 1
        return list(range(count)), slot, slots

    def _open(self, url: str, broken: list[dict]) -> Iterator[dict]:
        """Samples of one shard; what ends it early is tried again from where it was, then named."""
        done = 0
        for attempt, pause in enumerate((*RETRY_PAUSES, None)):
            try:
                for number, sample in enumerate(tarfile_samples([{"url": url}])):
                    if number >= done:
                        done = number + 1
                        yield sample
                return
            except Exception as error:  # commands, sockets and tar readers fail in many types; all end this shard
                if pause is None:
                    broken.append({"id": f"{url} after {done} samples", "corpus": url, "reason": f"cannot be read: {error}",
                                   "step": None, "replaced_by": None, "attempts": attempt + 1})
                    return
                time.sleep(pause)

    def _samples(self, corpus: int, slot: int, slots: int, at: np.ndarray, broken: list[dict]) -> Iterator[tuple[dict, int]]:
        """Undecoded samples of one corpus and their pass, for ever."""
        shards, first, every = self._shards(corpus, slot, slots)
        number = 0
        while True:
            counted = found = 0
            for shard in sorted(shards, key=lambda s: int(key64(self.data.seed, self.start_step, number, corpus, s))):
                at[:] = time.time(), corpus, shard, number
                for sample in self._open(self.urls[corpus][shard], broken):
                    at[0] = 0
                    counted += 1
                    if (counted - 1) % every == first:
                        found += 1
                        yield sample, number
                    at[0] = time.time()
            if not found:
                why = broken[-1]["reason"] if broken else f"{counted} samples in {len(shards)} shards"
                pattern = self.data.train[corpus].shards
                raise RecipeError(f"data.train: '{pattern}' gives rank {self.rank} nothing in a whole pass: {why}")
            number += 1

    def _prepare(self, raw: dict, epoch: int, timings: dict[str, float]) -> Prepared | None:
        """None for what the recipe leaves out by task or length. Errors: BrokenSample."""
        began = time.perf_counter()
        try:
            meta = json.loads(raw["json"])
        except (KeyError, ValueError):
            raise BrokenSample("its JSON is missing or broken") from None
        if not isinstance(meta, dict) or not isinstance(meta.get("duration") or 0, (int, float)):
            raise BrokenSample("its JSON is no sample's: an object, with seconds as `duration` where it has one")
        strange = [key for key in ("text", "task", "lang", "prompt", "response") if not isinstance(meta.get(key) or "", str)]
        if strange:
            raise BrokenSample(f"its JSON is no sample's: {strange[0]} is no text")
        audio = next((raw[suffix] for suffix in EXTENSIONS if suffix in raw), None)
        corpus = self.data.train[raw["__corpus__"]]
        duration = meta.get("duration") or 0
        if corpus.tasks is not None and meta.get("task") not in corpus.tasks:
            return None
        if audio is None and self.collator.stage == "alignment":
            return None
        if duration and not self.data.min_seconds <= duration <= self.data.max_seconds:
            return None
        waveform = None
        if audio is not None:
            waveform = decode(audio)
            if not duration:  # no index has told
                meta["duration"] = len(waveform) / SAMPLE_RATE
                if not self.data.min_seconds <= meta["duration"] <= self.data.max_seconds:
                    return None
            check_length(waveform, self.data)
        sample = Sample(meta, None)
        if waveform is not None:
            sample = augment.augmented(waveform, meta, self.data, epoch, self.mel_channels)
        sample.dropout_key = signed_key64("utterance", raw["__url__"], raw["__key__"], epoch)
        decoded = time.perf_counter()
        prepared = self.collator.prepare(sample)
        timings["decode"] += decoded - began
        timings["prepare"] += time.perf_counter() - decoded
        return prepared

    def __iter__(self) -> Iterator[Loaded]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slot, slots = self.rank * workers + number, self.world_size * workers
        random = np.random.Generator(np.random.PCG64(int(key64("plain", self.data.seed, self.start_step, slot))))
        at, broken, timings = self.at[number].numpy(), [], dict.fromkeys(PHASES, 0.0)
        sources = [self._samples(corpus, slot, slots, at, broken) for corpus in range(len(self.urls))]
        buffer: list[tuple[dict, int]] = []
        pool: list[Prepared] = []
        target = self.data.batch_seconds / (self.world_size * self.micro_batches)
        owed, seen = 0.0, 0
        while True:
            idle = 0
            while sum(map(sample_seconds, pool)) < POOL * target:
                began = time.perf_counter()
                while len(buffer) < SHUFFLE_BUFFER:
                    corpus = int(random.choice(len(sources), p=self.plan.weights))
                    raw, epoch = next(sources[corpus])
                    buffer.append(({**raw, "__corpus__": corpus}, epoch))
                raw, epoch = buffer.pop(int(random.integers(len(buffer))))
                timings["read"] += time.perf_counter() - began
                idle += 1
                try:
                    prepared = self._prepare(raw, epoch, timings)
                except BrokenSample as error:
                    broken.append({"id": f"{raw.get('__key__')} of {raw.get('__url__')}", "corpus": str(raw.get("__url__")),
                                   "reason": str(error), "step": None, "replaced_by": None})
                    seen += 1
                    prepared = None
                if prepared is not None:
                    pool.append(prepared)
                    seen, idle = seen + 1, 0
                if idle > 20 * SHUFFLE_BUFFER:
                    why = broken[-1]["reason"] if broken else "of another task, or outside data.min_seconds and data.max_seconds"
                    raise RecipeError(f"data.train: of {idle} utterances in a row none can be used; the last: {why}")
            owed += target
            chosen = self._neighbours(pool, max(owed, target / 4), random)
            seconds = [sample_seconds(p) for p in chosen]
            owed -= sum(seconds)
            began = time.perf_counter()
            batch = self.collator(chosen)
            timings["collate"] += time.perf_counter() - began
            audio = [len(p.sample.waveform) / SAMPLE_RATE for p in chosen if p.sample.waveform is not None] or [0.0]
            job = Job(0, 0, self.micro_batches, np.zeros(seen, PLANNED))
            yield Loaded(job, batch, [p.sample.meta for p in chosen], sum(audio), max(audio) * len(audio), list(broken), 0,
                         dict(timings))
            broken.clear()
            timings.update(dict.fromkeys(PHASES, 0.0))
            seen = 0

    def _neighbours(self, pool: list[Prepared], wanted: float, random: np.random.Generator) -> list[Prepared]:
        """Take neighbours in length out of the pool: about `wanted` seconds, within the budgets, at least one."""
        pool.sort(key=sample_seconds)
        budgets = Budgets.of(self.data)
        high = int(random.integers(len(pool)))
        while high < len(pool) - 1 and sum(map(sample_seconds, pool[:high + 1])) < wanted:
            high += 1  # too few shorter ones
        longest = sample_seconds(pool[high])
        low, total, widest = high, longest, len(pool[high].input_ids)
        while low > 0 and total + sample_seconds(pool[low - 1]) / 2 < wanted:
            widest = max(widest, len(pool[low - 1].input_ids))
            rows = high - low + 2
            if rows * longest > budgets.seconds or rows * widest > budgets.tokens:
                break
            low -= 1
            total += sample_seconds(pool[low])
        chosen = pool[low:high + 1][::-1]
        del pool[low:high + 1]
        return chosen
