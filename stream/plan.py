"""The plan: which utterances make up the global batch of any step, from the shard index alone.

    index (samples.npy) -> sources (task x corpus) -> endless order of each source -> the step's stretch of
    each order

1. Every source has an endless order: epoch after epoch of its utterances. In each epoch its shards are
   shuffled and cut into windows of `shuffle_window_shards`; reads stay within a window. "Shuffled" means
   sorted by a hash of (seed, source, epoch, sample id): no generator state, no numpy version enters.
2. The utterances of a window are sorted by length (give or take LENGTH_JITTER, new in each epoch), cut
   into buckets of about `bucket_seconds`, and the buckets are shuffled. A global batch is a random set of
   whole buckets, each of about one length: that is what keeps padding low where a global batch is only a few
   micro-batches.
3. An utterance occupies as many units (milliseconds) of that order as it lasts. The mixture gives the
   stretch of units of step s; the utterances that begin in the stretch are the source's part of the
   global batch.

So step 100,000 costs what step 0 costs: one binary search over windows and the shuffle of one window per
source. World size, workers and history do not enter. Each utterance comes once per pass, batches cross pass
boundaries, and the mean batch holds exactly `batch_seconds`; a single one misses it by less than one
utterance per source.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

import core.keys
from core.console import shown
from core.languages import language_code
from core.object_store import is_folder_url, is_store_url
from data_tools.shards import ShardError, ShardIndex
from model.compressors import compressor_of
from model.config import SoundwaveConfig
from model.stages import STAGES
from recipe.config import Corpus, DataConfig, RecipeError
from stream.mixture import Mixture

#: Rows of an index, whole or as columns by name.
Columns: TypeAlias = "np.ndarray | Mapping[str, np.ndarray]"

# One planned utterance. seconds: audio (0: text only). positions: estimated LLM positions after shrinking (0
# in stage 1).
PLANNED = np.dtype(
    [
        ("corpus", "u2"),
        ("source", "u2"),
        ("row", "u4"),
        ("epoch", "u4"),
        ("seconds", "f4"),
        ("positions", "u4"),
    ]
)

UNITS_PER_SECOND = 1000
LENGTH_JITTER = 0.05  # lengths this close count as one; costs about half of it in padding
SPOKEN_CHARACTERS_PER_SECOND = (
    15.0  # English read aloud; a text-only turn weighs as much as it would take to say it
)
TEMPLATE_POSITIONS = 48  # chat template and default instruction
CHARACTERS_PER_TOKEN = 3.0  # where pack counted no tokens; on the safe side for English (about 4)
_PLAN_COLUMNS = ("shard", "audio_size", "duration", "characters", "target_characters", "task")
NO_LANGUAGE = "none"  # the group of samples without a language, with data.mixture.language_alpha
_INDEX_CHUNK = 1 << 15  # rows (2 MB): a chunk stays in the processor's cache while its columns are taken out
_RELEASE_CHUNKS = 32
LOGGER = logging.getLogger(__name__)


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on uint64 [N]: a fixed hash, the same on every
    machine."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key64(*parts: object) -> np.uint64:
    """64-bit key of a tuple of names and numbers."""
    return np.uint64(core.keys.key64(*parts))


def _release(samples: np.ndarray) -> None:
    """Let go of the pages of a memory-mapped table that were read: 10 million rows are 0.7 GB, and every rank
    maps them."""
    if isinstance(samples, np.memmap):
        cast(Any, samples)._mmap.madvise(mmap.MADV_DONTNEED)  # numpy has no public name for it


def is_plain_stream(shards: str) -> bool:
    """A pipe or URL pattern that webdataset opens, in place of a folder with an index."""
    return shards.startswith("pipe:") or "://" in shards and not is_folder_url(shards)


def load_index(folder: str) -> ShardIndex:
    if not is_store_url(folder) and not (Path(folder) / "index.json").exists():
        raise RecipeError(
            f"data: no index.json in '{folder}': pack the corpus first with "
            "python data_tools/pack.py --manifest M.jsonl --out DIR"
        )
    try:
        return ShardIndex.load(folder)
    except ShardError as error:
        raise RecipeError(f"data: {error}") from None


def llm_positions(samples: Columns, model: SoundwaveConfig | None = None) -> np.ndarray:
    """Return the estimated LLM positions of index rows: template, compressed frames, prompt and answer.
    model: whose compressor shortens the audio (default: CTC peaks, about a frame a transcript token)."""
    config = model or SoundwaveConfig()
    characters, tokens = samples["characters"].astype(np.float64), samples["tokens"].astype(np.float64)
    transcript = np.where(tokens > 0, tokens, characters / CHARACTERS_PER_TOKEN)
    per_character = np.where(
        (tokens > 0) & (characters > 0), tokens / np.maximum(characters, 1), 1 / CHARACTERS_PER_TOKEN
    )
    seconds = samples["duration"].astype(np.float64)
    frames = compressor_of(config).expected_length(config, transcript, seconds, characters > 0)
    audio = np.where(samples["audio_size"] == 0, 0, frames)
    answer = np.where(
        samples["target_characters"] > 0, samples["target_characters"] * per_character, transcript
    )
    return np.ceil(TEMPLATE_POSITIONS + audio + answer).astype(np.uint32)


def sample_units(samples: Columns) -> np.ndarray:
    """Cost of index rows in units of the plan: milliseconds of audio; of text, the time it would take to say
    it."""
    seconds = samples["duration"].astype(np.float64)
    if len(silent := np.flatnonzero(samples["audio_size"] == 0)):
        characters = samples["characters"][silent].astype(np.float64) + samples["target_characters"][silent]
        seconds[silent] = characters / SPOKEN_CHARACTERS_PER_SECOND
    np.rint(seconds * UNITS_PER_SECOND, out=seconds)
    # What has no sensible length is left out by `usable`.
    return np.clip(np.nan_to_num(seconds, copy=False), 1, 2**32 - 1).astype(np.uint32)


def usable(samples: Columns, data: DataConfig, stage: str) -> dict[str, np.ndarray]:
    """Masks [N] over index rows: "" for what the stage trains on, and one per reason for what it leaves
    out."""
    audio, duration = samples["audio_size"] > 0, samples["duration"]
    reasons = {
        f"shorter than data.min_seconds={data.min_seconds:g}": audio
        & ~(duration >= data.min_seconds),  # NaN too
        f"longer than data.max_seconds={data.max_seconds:g}": audio & (duration > data.max_seconds),
    }
    if not STAGES[stage].needs_llm:
        reasons["no transcript for CTC"] = samples["characters"] == 0
        reasons["no audio"] = ~audio
    left = np.ones(len(duration), dtype=bool)
    masks = {}
    for reason, mask in reasons.items():
        masks[reason] = mask & left
        left &= ~mask
    return {"": left, **masks}


def drawn_share(samples: np.ndarray, corpus: Corpus) -> np.ndarray | None:
    """Bool [N]: the index rows that `share` and `share_from` take; None: all. By id alone: runs with other
    seeds see the same utterances, and all tasks on one clip's id fall on one side. Errors: RecipeError."""
    if not 0 < corpus.share <= 1:
        raise RecipeError(f"data: '{corpus.shards}' has share {corpus.share}: above 0, at most 1 (all of it)")
    if not 0 <= corpus.share_from <= 1 - corpus.share + 1e-9:
        raise RecipeError(
            f"data: '{corpus.shards}' has share {corpus.share} from {corpus.share_from} on: "
            "at least 0, together at most 1"
        )
    if corpus.share == 1:
        return None
    at = mix64(samples["id_hash"] ^ key64("share")) / 2.0**64
    return (corpus.share_from <= at) & (at < corpus.share_from + corpus.share)


def corpus_names(corpora: list[Corpus]) -> list[str]:
    """What metrics and reports call them: the paths' ends, as long as tells them apart; a folder named twice
    has a number."""
    paths = [Path(corpus.shards.replace("://", "/")).parts for corpus in corpora]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(path[-depth:]) for path in paths]
    return [
        f"{name}#{names[: at + 1].count(name)}" if names.count(name) > 1 else name
        for at, name in enumerate(names)
    ]


@dataclass(frozen=True)
class UnindexedPlan:
    """Takes a plan's place where shards are streamed without an index (stream/unindexed.py): nothing is known
    beforehand."""

    fingerprint: str  # of the patterns and settings, not of the content
    names: list[str]
    weights: list[float]  # share of each corpus among the utterances

    @classmethod
    def open(cls, data: DataConfig, stage: str) -> UnindexedPlan:
        """Errors: RecipeError for settings that need an index."""
        if not all(is_plain_stream(corpus.shards) for corpus in data.train):
            raise RecipeError("data.train mixes packed folders and streamed shards: pack all, or stream all")
        mixture = data.mixture
        if mixture.tau_start != mixture.tau_end or mixture.task_weights:
            raise RecipeError(
                "data.mixture needs an index: give streamed corpora a `weight` each, or pack them"
            )
        if mixture.language_alpha is not None:
            raise RecipeError(
                "data.mixture.language_alpha needs an index, which has the hours of each language: pack the "
                "corpora, or leave it unset"
            )
        if data.cache_features:
            raise RecipeError("data.cache_features needs an index: pack the corpora, or leave it unset")
        if any((corpus.share, corpus.share_from) != (1, 0) for corpus in data.train):
            raise RecipeError("data.train: `share` needs an index: pack the corpora, or leave it unset")
        weights = [1.0 if corpus.weight is None else float(corpus.weight) for corpus in data.train]
        if min(weights) <= 0:
            raise RecipeError(f"data.train: weights must be above 0, got {shown(weights)}")
        facts = [
            data.seed,
            data.batch_seconds,
            data.micro_batch_seconds,
            data.min_seconds,
            data.max_seconds,
            stage,
            weights,
            [(corpus.shards, corpus.tasks) for corpus in data.train],
        ]
        return cls(
            hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
            [corpus.shards for corpus in data.train],
            [weight / sum(weights) for weight in weights],
        )

    def shares(self, step: int) -> dict[str, float]:
        return dict(zip(self.names, self.weights, strict=True))

    def passes(self, step: int) -> dict[str, float]:
        """Not known without an index."""
        return {}


@dataclass
class Excluded:
    """Utterances that the index already rules out."""

    corpus: int
    reason: str
    rows: np.ndarray  # [n] u4


class SourceOrder:
    """The endless order of one source: rows [n] in shard order, with their units, shuffled anew in every
    pass."""

    def __init__(
        self,
        index: ShardIndex,
        rows: np.ndarray,
        units: np.ndarray,
        shard_of: np.ndarray,
        key: str,
        seed: int,
        window_shards: int,
    ):
        self._index, self.rows, self.units, self._key, self._seed = index, rows, units, key, seed
        self._starts = np.flatnonzero(np.r_[True, shard_of[1:] != shard_of[:-1]])
        self._ends = np.r_[self._starts[1:], len(rows)]
        self._shard_units = np.add.reduceat(units, self._starts, dtype=np.int64)
        self._shard_hash = mix64(shard_of[self._starts].astype(np.uint64))
        self._window = max(int(window_shards), 1)
        self.total = int(self._shard_units.sum())  # units of one pass
        self._rate, self._buckets = 0, 0
        self._cache: OrderedDict[tuple, tuple] = OrderedDict()

    def set_buckets(self, rate: int, seconds: float) -> None:
        """Buckets of about `seconds` that divide the source's `rate` (units a step), so that steps hold whole
        buckets.

        At least two a step, so that a batch is not of one length only; but none shorter than the longest
        utterance: in each at least one begins, so no step of a single source is empty.
        """
        self._rate = max(rate, 1)
        most = self._rate // int(self.units.max())
        self._buckets = (
            max(min(max(round(self._rate / (seconds * UNITS_PER_SECOND)), 2), most), 1) if seconds > 0 else 0
        )
        self._cache.clear()

    def _remember(self, key: tuple, value: tuple) -> tuple:
        self._cache[key] = value
        while len(self._cache) > 4:  # two windows and two passes: what a step at a boundary touches
            self._cache.popitem(last=False)
        return value

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of this pass, and the units before each window [W + 1]."""
        if (cached := self._cache.get((number,))) is not None:
            return cached
        order = np.argsort(mix64(self._shard_hash ^ key64(self._seed, self._key, number)), kind="stable")
        units = np.add.reduceat(self._shard_units[order], np.arange(0, len(order), self._window))
        return self._remember((number,), (order, np.r_[0, np.cumsum(units)]))

    def _window_rows(self, number: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (into self.rows) of one window in the order of this pass, and the units before each
        within the pass."""
        if (cached := self._cache.get((number, window))) is not None:
            return cached
        order, before = self._pass(number)
        shards = order[window * self._window : (window + 1) * self._window]
        members = np.concatenate([np.arange(self._starts[s], self._ends[s]) for s in shards])
        hashes = mix64(
            self._index.samples["id_hash"][self.rows[members]] ^ key64(self._seed, self._key, number)
        )
        if self._buckets:
            members, starts = self._bucketed(members, hashes, number, int(before[window]))
        else:
            members = members[np.argsort(hashes, kind="stable")]
            starts = before[window] + np.r_[0, np.cumsum(self.units[members][:-1], dtype=np.int64)]
        return self._remember((number, window), (members, starts))

    def _bucketed(
        self, members: np.ndarray, hashes: np.ndarray, number: int, before: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Members of a window in buckets of one length, the buckets shuffled, and the units before each
        within the pass.

        Bucket j of the endless order takes the units from edge(j) to edge(j + 1), edge(j) = ceil(j rate /
        buckets): steps begin at edges. The window's first and last bucket may be cut by the window and stay
        where they are.
        """
        offset = number * self.total
        uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort(self.units[members] * (1 + LENGTH_JITTER * uniform), kind="stable")
        if key64(self._seed, self._key, number, before) & np.uint64(
            1
        ):  # which end of the lengths comes first
            order = order[::-1]
        members = members[order]
        starts = offset + before + np.r_[0, np.cumsum(self.units[members][:-1], dtype=np.int64)]
        bucket = starts * self._buckets // self._rate
        places = np.arange(bucket[0], bucket[-1] + 1)
        edges = -(-places * self._rate // self._buckets)
        widths = -(-(places + 1) * self._rate // self._buckets) - edges
        shuffled = np.arange(len(places))  # place of each bucket
        inner = shuffled[1:-1]
        if len(inner) > 1:
            keys = mix64(inner.astype(np.uint64) ^ key64(self._seed, self._key, number, before, "buckets"))
            shuffled[1:-1] = inner[np.argsort(keys, kind="stable")]
        old = bucket - bucket[0]
        new = shuffled[old]
        within = np.minimum(starts - edges[old], widths[new] - 1)  # widths differ by one unit at most
        # The first bucket keeps what the window's cut took from its front.
        starts = edges[new] + within
        order = np.lexsort((np.arange(len(members)), new))
        return members[order], starts[order] - offset

    def between(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the utterances that begin in units [low, high) of the endless order, and the pass of
        each."""
        rows, passes = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
        for number in range(low // self.total, -(-high // self.total)):
            base = number * self.total
            _, before = self._pass(number)
            window = max(int(np.searchsorted(before, low - base, side="right")) - 1, 0)
            while window < len(before) - 1 and base + before[window] < high:
                members, starts = self._window_rows(number, window)
                a, b = np.searchsorted(starts, [low - base, high - base])
                rows.append(self.rows[members[a:b]])
                passes.append(np.full(b - a, number, np.uint32))
                window += 1
        return np.concatenate(rows), np.concatenate(passes)

    def covering(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """The utterance under way at `unit`."""
        number, within = divmod(unit, self.total)
        _, before = self._pass(number)
        window = int(np.searchsorted(before, within, side="right")) - 1
        members, starts = self._window_rows(number, window)
        at = int(np.searchsorted(starts, within, side="right")) - 1
        return self.rows[members[at : at + 1]], np.array([number], np.uint32)


class Plan:
    """The sequence of global batches of one stage: a pure function of the step.

    indexes: one ShardIndex per corpus of data.train. steps: length of the stage, over which the mixture's tau
    moves.
    Errors: RecipeError where nothing is left to train on or a task is unknown.
    """

    def __init__(
        self,
        indexes: list[ShardIndex],
        data: DataConfig,
        stage: str,
        steps: int,
        model: SoundwaveConfig | None = None,
    ):
        self.indexes, self.data, self.stage, self.model = indexes, data, stage, model
        self.excluded: list[Excluded] = []
        # Of the sources: "folder/task", with language_alpha "folder/task/language".
        self.names: list[str] = []
        self.orders: list[SourceOrder] = []
        self.corpus_of: list[int] = []
        self.languages: list[str] = []  # of the sources, with data.mixture.language_alpha; else empty
        tasks, weights = [], []
        names = corpus_names(data.train)
        for number, (corpus, index, name) in enumerate(zip(data.train, indexes, names, strict=True)):
            for task, language, rows, units, shard_of in self._by_language(number, corpus, index):
                suffix = task if language is None else f"{task}/{language}"
                key = f"{index.fingerprint}/{suffix}"
                self.orders.append(
                    SourceOrder(index, rows, units, shard_of, key, data.seed, data.shuffle_window_shards)
                )
                self.names.append(f"{name}/{suffix}")
                if language is not None:
                    self.languages.append(language)
                self.corpus_of.append(number)
                tasks.append(task)
                weights.append(corpus.weight)
        if not self.orders:
            why = "; ".join(f"{len(e.rows)} x {e.reason}" for e in self.excluded) or "the folders are empty"
            raise RecipeError(f"data.train holds nothing that stage '{stage}' can train on: {why}")
        longest = max(int(order.units.max()) for order in self.orders) / UNITS_PER_SECOND
        if data.batch_seconds < longest:
            LOGGER.warning(
                "data.batch_seconds=%g is below the longest utterance (%.1f s): a step in which none begins "
                "repeats "
                "the one under way; raise it, or lower data.max_seconds",
                data.batch_seconds,
                longest,
            )
        self.utterances = np.array([len(order.rows) for order in self.orders])
        self.mixture = Mixture(
            data.mixture,
            tasks,
            self.utterances,
            np.array([o.total for o in self.orders]) / self.utterances,
            weights,
            int(round(data.batch_seconds * UNITS_PER_SECOND)),
            steps,
            self.languages or None,
        )
        rates = self.mixture.before(1)
        for order, rate in zip(self.orders, rates.tolist(), strict=True):
            order.set_buckets(rate, data.bucket_seconds)
        facts = [
            data.seed,
            data.batch_seconds,
            data.bucket_seconds,
            data.shuffle_window_shards,
            data.min_seconds,
            data.max_seconds,
            stage,
            weights,
            [data.mixture.tau_start, data.mixture.tau_end, dict(sorted(data.mixture.task_weights.items()))],
            steps if data.mixture.tau_start != data.mixture.tau_end else None,
            [(index.fingerprint, corpus.tasks) for index, corpus in zip(indexes, data.train, strict=True)],
        ]
        if any(corpus.share != 1 for corpus in data.train):
            facts.append([corpus.share for corpus in data.train])
        if any(corpus.share_from for corpus in data.train):
            facts.append([corpus.share_from for corpus in data.train])
        if data.mixture.language_alpha is not None:
            facts.append({"language_alpha": data.mixture.language_alpha})
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @classmethod
    def open(
        cls, data: DataConfig, stage: str, steps: int, model: SoundwaveConfig | None = None
    ) -> Plan | UnindexedPlan:
        """model: whose compressor the estimated lengths are of. Errors: RecipeError."""
        if not data.train:
            raise RecipeError(
                "data.train is empty: name at least one packed folder, e.g. data.train=[{shards: DIR}]"
            )
        if any(is_plain_stream(corpus.shards) for corpus in data.train):
            return UnindexedPlan.open(data, stage)
        return cls([load_index(corpus.shards) for corpus in data.train], data, stage, steps, model)

    def _sources(self, number: int, corpus: Corpus, index: ShardIndex):
        """(task, usable rows, their units, their shards) of one corpus; what is left out is recorded in
        self.excluded."""
        for task in corpus.tasks or []:
            if task not in index.tasks:
                raise RecipeError(
                    f"data.train: '{corpus.shards}' has no task '{task}'; it has {', '.join(index.tasks)}"
                )
        wanted = [i for i, task in enumerate(index.tasks) if corpus.tasks is None or task in corpus.tasks]
        # Rows, units and shards of each task; what is not filled costs no memory.
        columns = {place: tuple(np.empty(len(index), np.uint32) for _ in range(3)) for place in wanted}
        counts = dict.fromkeys(wanted, 0)
        left_out: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(index), _INDEX_CHUNK):
            table = index.samples[start : start + _INDEX_CHUNK]
            chunk = {name: np.ascontiguousarray(table[name]) for name in _PLAN_COLUMNS}
            masks, units = usable(chunk, self.data, self.stage), sample_units(chunk)
            if (drawn := drawn_share(table, corpus)) is not None:
                masks = {reason: mask & drawn for reason, mask in masks.items()}
            of_task = {place: chunk["task"] == place for place in wanted}
            for place, mask in of_task.items():
                at = np.flatnonzero(masks[""] & mask)
                here = slice(counts[place], counts[place] + len(at))
                for column, values in zip(
                    columns[place], (at + start, units[at], chunk["shard"][at]), strict=True
                ):
                    column[here] = values
                counts[place] = here.stop
            if start // _INDEX_CHUNK % _RELEASE_CHUNKS == 0:
                _release(index.samples)
            asked = np.logical_or.reduce(list(of_task.values())) if of_task else np.zeros(len(table), bool)
            for reason, mask in masks.items():
                if reason and (mask & asked).any():
                    left_out.setdefault(reason, []).append(
                        (np.flatnonzero(mask & asked) + start).astype(np.uint32)
                    )
        _release(index.samples)
        self.excluded += [Excluded(number, reason, np.concatenate(rows)) for reason, rows in left_out.items()]
        for place in wanted:
            if counts[place]:
                yield index.tasks[place], *(column[: counts[place]] for column in columns.pop(place))

    def _by_language(self, number: int, corpus: Corpus, index: ShardIndex):
        """(task, language, rows, units, shards) of the sources of one corpus. With language_alpha a task is
        cut by the language of its samples, however the folder mixes them; else the language is None."""
        by_language = self.data.mixture.language_alpha is not None
        codes = [language_code(lang) or NO_LANGUAGE for lang in index.langs]
        for task, *columns in self._sources(number, corpus, index):
            if not by_language:
                yield task, None, *columns
                continue
            places = np.empty(len(columns[0]), index.samples["lang"].dtype)
            for start in range(0, len(places), _INDEX_CHUNK):
                here = slice(start, start + _INDEX_CHUNK)
                places[here] = index.samples["lang"][columns[0][here]]
                if start // _INDEX_CHUNK % _RELEASE_CHUNKS == 0:
                    _release(index.samples)
            for code in sorted({codes[place] for place in np.unique(places)}):
                same = [place for place, other in enumerate(codes) if other == code]
                mask = np.isin(places, same)
                yield task, code, *(column[mask] for column in columns)

    def global_batch(self, step: int) -> np.ndarray:
        """The ordered utterances of one optimizer step, all ranks together: PLANNED [N], N >= 1."""
        low, high = self.mixture.before(step), self.mixture.before(step + 1)
        parts = [
            self._planned(s, *order.between(int(low[s]), int(high[s]))) for s, order in enumerate(self.orders)
        ]
        batch = np.concatenate(parts)
        if len(batch) == 0:
            # Only where no source is given as much a step as its longest utterance lasts: no step is empty,
            # one is repeated.
            source = int(np.argmax(high - low))
            batch = self._planned(source, *self.orders[source].covering(int(low[source])))
        return batch

    def _planned(self, source: int, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        planned = np.zeros(len(rows), PLANNED)
        samples = self.indexes[self.corpus_of[source]].samples[rows]
        planned["corpus"], planned["source"], planned["row"], planned["epoch"] = (
            self.corpus_of[source],
            source,
            rows,
            epochs,
        )
        planned["seconds"] = np.where(samples["audio_size"] > 0, samples["duration"], 0)
        if STAGES[self.stage].needs_llm:
            planned["positions"] = llm_positions(samples, self.model)
        return planned

    def replacement(self, entry: np.void, attempt: int) -> np.void:
        """What takes the place of a broken utterance: the `attempt`-th choice of its source, a pure function
        of the entry.

        Of 64 drawn utterances those that are not longer (the micro-batch's budget holds), from other shards
        first (a whole shard may be gone), then by closeness in length; the shortest where none is. The entry
        itself where the source has no other.
        """
        order, index = self.orders[entry["source"]], self.indexes[entry["corpus"]]
        draws = mix64(np.arange(64, dtype=np.uint64) + key64(self.data.seed, "replacement", *entry.tolist()))
        drawn = np.unique((draws % np.uint64(len(order.rows))).astype(np.int64))
        drawn = drawn[order.rows[drawn] != entry["row"]]
        if len(drawn) == 0:
            return entry
        units = order.units[drawn].astype(np.int64)
        limit = sample_units(index.samples[[entry["row"]]])[0]
        shard = index.samples["shard"]
        choices = drawn[np.lexsort((-units, shard[order.rows[drawn]] == shard[entry["row"]]))]
        fitting = choices[order.units[choices] <= limit]
        chosen = fitting[(attempt - 1) % len(fitting)] if len(fitting) else drawn[np.argmin(units)]
        return self._planned(
            int(entry["source"]), order.rows[chosen : chosen + 1], np.array([entry["epoch"]], np.uint32)
        )[0]

    def passes(self, step: int) -> dict[str, float]:
        """Return the epochs of each source before `step`, by name."""
        before = self.mixture.before(step)
        return {
            name: float(units / order.total)
            for name, units, order in zip(self.names, before, self.orders, strict=True)
        }

    def language_table(self, steps: int) -> list[dict[str, Any]]:
        """Return {language, hours, share, passes} of each language over a stage of `steps`: its share of the
        audio, and how often its data is seen. Most hours first; empty without language_alpha."""
        given = self.mixture.before(steps)
        rows = []
        for language in sorted(set(self.languages)):
            members = [at for at, other in enumerate(self.languages) if other == language]
            units = sum(self.orders[at].total for at in members)
            seen = int(given[members].sum())
            rows.append(
                {
                    "language": language,
                    "hours": units / UNITS_PER_SECOND / 3600,
                    "share": seen / max(int(given.sum()), 1),
                    "passes": seen / units,
                }
            )
        return sorted(rows, key=lambda row: -row["hours"])

    def shares(self, step: int) -> dict[str, float]:
        """Share of each source among the utterances of `step`, by name."""
        return dict(zip(self.names, self.mixture.probabilities(np.array([step]))[0].tolist(), strict=True))
