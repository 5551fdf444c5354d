"""Plain streaming: shards without an index (pipes, HTTP, object-store commands), opened by `webdataset`, read
from front to back.

    urls -> slots (rank x worker): whole shards, or every n-th sample where shards are fewer than slots
    each slot, for ever: shards in a new order each epoch -> tar -> shuffle buffer -> decode, check, augment,
    tokenise
                         -> pool of a few micro-batches' worth -> neighbours in length make a micro-batch

Without an index nothing is known beforehand, so less is promised than for a packed folder. What holds: every
rank gets the same number of steps, and of micro-batches in each step, because no slot ever ends; a slot
reads each of its utterances once per pass. What does not: global batches depend on the number of ranks and
workers, a resumed run has a new order, and slots whose shards are fewer get round sooner (at most one
shard's difference where there are more shards than slots).

Which members make a sample is the rule of core/tar_members.py, the same as for packing: every member ends in
a sample, in a named broken one, or in a count of what was ignored, which is logged for each shard.
"""

from __future__ import annotations

import logging
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from core.console import one_line
from core.keys import signed_key64
from core.tar_members import (
    MAX_TEXT_BYTES,
    Group,
    Grouper,
    Member,
    ignored_as,
    is_text_sample,
    kind_of_member,
    read_record,
    stands_alone,
)
from recipe.config import DataConfig, RecipeError
from stream import augment
from stream.assign import Budgets
from stream.collate import Collator, Prepared
from stream.loader import PHASES, Job, Loaded
from stream.plan import PLANNED, SPOKEN_CHARACTERS_PER_SECOND, UnindexedPlan, key64
from stream.reader import RETRY_PAUSES, SAMPLE_RATE, Sample, check_length, decode
from stream.rejected import BrokenSample, broken_by

SHUFFLE_BUFFER = 500  # undecoded utterances that wait in each slot
POOL = 8  # micro-batches' worth of utterances among which neighbours in length are found
MOST_WAITING = 64 << 20  # bytes of members that wait in each slot for the others of their sample
LINKS = "links and devices"
LOGGER = logging.getLogger(__name__)
_NAMES = ("id", "speaker", "recording")  # what corpora number
_TEXTS = (
    "id",
    "corpus",
    "text",
    "task",
    "lang",
    "target_lang",
    "prompt",
    "response",
    "label",
    "speaker",
    "origin",
)


def micro_batches_per_step(data: DataConfig, world_size: int) -> int:
    return max(int(np.ceil(data.batch_seconds / (world_size * data.micro_batch_seconds) - 1e-9)), 1)


def sample_seconds(prepared: Prepared) -> float:
    """Seconds of audio; of a text-only turn, the time it would take to say it (four characters a token)."""
    if prepared.sample.waveform is None:
        return len(prepared.input_ids) * 4 / SPOKEN_CHARACTERS_PER_SECOND
    return len(prepared.sample.waveform) / SAMPLE_RATE


def tar_groups(url: str, counts: Counter[str]) -> Iterator[Group[bytes | None]]:
    """Members of one shard, grouped. counts: filled with all members, those in groups, and what is ignored,
    by heading."""
    # None: the content of a member that no sample takes, or that is too large.
    grouper: Grouper[bytes | None] = Grouper(_stands_alone, MOST_WAITING)

    def counted(groups: Iterator[Group[bytes | None]]) -> Iterator[Group[bytes | None]]:
        for group in groups:
            counts["groups"] += 1
            counts["grouped"] += sum(member.kind is not None for member in group.members)
            yield group

    with tarfile.open(fileobj=gopen(url), mode="r|*") as archive:
        for info in archive:
            cast(Any, archive).members = []  # it would keep them all; typeshed hides the list
            if info.isdir():
                continue
            counts["members"] += 1
            heading = ignored_as(info.name) if info.isreg() else LINKS
            if heading:
                counts[heading] += 1
                if heading.startswith("files of"):
                    continue
            kind = kind_of_member(info.name) if info.isreg() else None
            wanted = kind == "audio" or kind in ("json", "text") and info.size <= MAX_TEXT_BYTES
            file = archive.extractfile(info) if wanted else None
            data = file.read() if file is not None else None
            yield from counted(grouper.add(Member(info.name, data, len(data or b""), info.isreg())))
        yield from counted(grouper.end())


def _stands_alone(group: Group[bytes | None]) -> bool:
    member = group.one("json")
    return member is not None and member.content is not None and stands_alone(member.content)


def sample_of(group: Group[bytes | None]) -> tuple[dict, bytes | None]:
    """A sample's JSON and audio (None for a text-only one). Errors: BrokenSample."""
    if group.problem:
        raise BrokenSample(group.problem)
    parts = {kind: group.one(kind) for kind in ("audio", "json", "text")}
    if large := next(
        (member for member in parts.values() if member is not None and member.content is None), None
    ):
        raise BrokenSample(f"{large.name} is larger than {MAX_TEXT_BYTES:,} bytes")
    audio, json_text, text = (member.content if member else None for member in parts.values())
    try:
        meta = read_record(json_text, text)
    except Exception as error:
        raise BrokenSample(f"its JSON or text cannot be read: {one_line(error)}") from None
    if audio is None and not is_text_sample(meta):
        raise BrokenSample(group.without_audio)
    for name in _NAMES:
        if type(meta.get(name)) is int:
            meta[name] = str(meta[name])
    meta["id"] = meta.get("id") or group.key
    if (
        audio is not None
        and meta.get("task") is None
        and meta.get("text")
        and not (meta.get("messages") or meta.get("response"))
    ):
        meta["task"] = "asr"
    duration = meta.get("duration")
    if isinstance(duration, bool) or not isinstance(duration or 0, int | float):
        raise BrokenSample("its JSON is no sample's: an object, with seconds as `duration` where it has one")
    if strange := next((key for key in _TEXTS if not isinstance(meta.get(key) or "", str)), None):
        raise BrokenSample(f"its JSON is no sample's: {strange} is no text")
    return meta, audio


class UnindexedReader(IterableDataset):
    """Micro-batches for ever; the work of a worker process. Errors: RecipeError where a whole pass yields
    nothing."""

    def __init__(
        self,
        plan: UnindexedPlan,
        collator: Collator,
        data: DataConfig,
        rank: int,
        world_size: int,
        start_step: int,
        mel_channels: int | None = None,
    ):
        self.mel_channels = mel_channels
        self.plan, self.collator, self.data = plan, collator, data
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.urls = [expand_urls(corpus.shards) for corpus in data.train]
        self.micro_batches = micro_batches_per_step(data, world_size)
        self._logged: set[str] = set()
        self.at = torch.zeros(
            max(data.workers, 1), 4, dtype=torch.float64
        ).share_memory_()  # [began, corpus, shard, pass]

    def doing(self, worker: int) -> tuple[float, str] | None:
        began, corpus, shard, number = self.at[worker].tolist()
        return (
            (time.time() - began, f"{self.urls[int(corpus)][int(shard)]} (pass {int(number)})")
            if began
            else None
        )

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
            counts: Counter[str] = Counter()
            try:
                for number, group in enumerate(tar_groups(url, counts)):
                    if number >= done:
                        done = number + 1
                        yield {"__key__": group.key, "__url__": url, "group": group}
                self._log_members(url, counts)
                return
            except (
                Exception
            ) as error:  # commands, sockets and tar readers fail in many types; all end this shard
                if pause is None:
                    broken.append(
                        {
                            "id": f"{url} after {done} samples",
                            "corpus": url,
                            "reason": f"cannot be read: {error}",
                            "step": None,
                            "replaced_by": None,
                            "attempts": attempt + 1,
                        }
                    )
                    return
                time.sleep(pause)

    def _log_members(self, url: str, counts: Counter[str]) -> None:
        """Say once of each shard what became of its members, where some are in no sample."""
        ignored = {
            heading: count
            for heading, count in counts.items()
            if heading not in ("members", "grouped", "groups")
        }
        if ignored and url not in self._logged:
            self._logged.add(url)
            LOGGER.warning(
                "%s: %d members: %d in %d samples, %d ignored (%s)",
                url,
                counts["members"],
                counts["grouped"],
                counts["groups"],
                sum(ignored.values()),
                ", ".join(f"{n} {what}" for what, n in ignored.items()),
            )

    def _samples(
        self, corpus: int, slot: int, slots: int, at: np.ndarray, broken: list[dict]
    ) -> Iterator[tuple[dict, int]]:
        """Undecoded samples of one corpus and their pass, for ever."""
        shards, first, every = self._shards(corpus, slot, slots)
        number = 0
        while True:
            counted = accepted = 0
            for shard in sorted(
                shards, key=lambda s: int(key64(self.data.seed, self.start_step, number, corpus, s))
            ):
                at[:] = time.time(), corpus, shard, number
                for sample in self._open(self.urls[corpus][shard], broken):
                    at[0] = 0
                    counted += 1
                    if (counted - 1) % every == first:
                        accepted += 1
                        yield sample, number
                    at[0] = time.time()
            if not accepted:
                why = broken[-1]["reason"] if broken else f"{counted} samples in {len(shards)} shards"
                pattern = self.data.train[corpus].shards
                raise RecipeError(
                    f"data.train: '{pattern}' gives rank {self.rank} nothing in a whole pass: {why}"
                )
            number += 1

    def _prepare(self, raw: dict, epoch: int, timings: dict[str, float]) -> Prepared | None:
        """None for what the recipe leaves out by task or length. Errors: BrokenSample."""
        began = time.perf_counter()
        meta, audio = sample_of(raw["group"])
        corpus = self.data.train[raw["__corpus__"]]
        duration = meta.get("duration") or 0
        if corpus.tasks is not None and meta.get("task") not in corpus.tasks:
            return None
        if audio is None and not self.collator.stage.needs_llm:
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
        random = np.random.Generator(
            np.random.PCG64(int(key64("plain", self.data.seed, self.start_step, slot)))
        )
        at, timings = self.at[number].numpy(), dict.fromkeys(PHASES, 0.0)
        broken: list[dict] = []
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
                except RecipeError:
                    raise
                except Exception as error:  # one utterance is no reason to stop
                    broken.append(
                        {
                            "id": f"{raw['__key__']} of {raw['__url__']}",
                            "corpus": raw["__url__"],
                            "reason": str(broken_by(error)),
                            "step": None,
                            "replaced_by": None,
                        }
                    )
                    seen += 1
                    prepared = None
                if prepared is not None:
                    pool.append(prepared)
                    seen, idle = seen + 1, 0
                if idle > 20 * SHUFFLE_BUFFER:
                    why = (
                        broken[-1]["reason"]
                        if broken
                        else "of another task, or outside data.min_seconds and data.max_seconds"
                    )
                    raise RecipeError(
                        f"data.train: of {idle} utterances in a row none can be used; the last: {why}"
                    )
            owed += target
            chosen = self._neighbours(pool, max(owed, target / 4), random)
            seconds = [sample_seconds(p) for p in chosen]
            owed -= sum(seconds)
            began = time.perf_counter()
            batch = self.collator(chosen)
            timings["collate"] += time.perf_counter() - began
            audio = [
                len(p.sample.waveform) / SAMPLE_RATE for p in chosen if p.sample.waveform is not None
            ] or [0.0]
            job = Job(0, 0, self.micro_batches, np.zeros(seen, PLANNED))
            yield Loaded(
                job,
                batch,
                [p.sample.meta for p in chosen],
                sum(audio),
                max(audio) * len(audio),
                list(broken),
                0,
                dict(timings),
            )
            broken.clear()
            timings.update(dict.fromkeys(PHASES, 0.0))
            seen = 0

    def _neighbours(self, pool: list[Prepared], wanted: float, random: np.random.Generator) -> list[Prepared]:
        """Take neighbours in length out of the pool: about `wanted` seconds, within the budgets, at least
        one."""
        pool.sort(key=sample_seconds)
        budgets = Budgets.of(self.data)
        high = int(random.integers(len(pool)))
        while high < len(pool) - 1 and sum(map(sample_seconds, pool[: high + 1])) < wanted:
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
        chosen = pool[low : high + 1][::-1]
        del pool[low : high + 1]
        return chosen
