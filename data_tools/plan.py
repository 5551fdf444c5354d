"""Which sample goes into which shard, settled from metadata before any audio is decoded, in bounded memory.

    1 scan    corpora -> SampleFilter -> 256 bucket files by the high bits of a shuffle hash; 20 bytes a
              sample to find equal ids
    2 count   totals -> number of shards, all about the same size (no small remainder)
    3 sort    bucket after bucket -> entries.jsonl, the samples in their final order; cut into shards
              (shards.npy)

A pure function of (corpora, seed, options): every part of an array job that plans for itself arrives at the
same plan. Only one bucket is in memory at a time: 10 million entries of 500 bytes make buckets of 20 MB.
Several splits are planned in one pass.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec
import numpy as np

from core.console import plural
from core.tar_members import MAX_TEXT_BYTES
from data_tools.audio import estimate_bytes, estimate_seconds
from data_tools.corpora import ENTRY_FIELDS, Corpus, CorpusError, Entry, Ignored, Item, Rejection, fault_of
from data_tools.filters import FILTERS, SampleFilter, SplitKey
from data_tools.shards import OutputError, id_hash, replace_file

SHARD_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("first", "<u8"), ("count", "<u4"), ("seconds", "<f8")]
)
# Without a wanted size: shards of 256 MB, smaller where a small corpus would not feed 32 readers.
_SHARD_BYTES, _SMALL_SHARD_BYTES, _SMALL_CORPUS_SHARDS = 256e6, 4e6, 32
_RECORD_BYTES = 2048  # JSON, two tar headers and padding, about
SHUFFLES = ("samples", "recordings", "none")


@dataclass
class Layout:
    """How samples are laid out: order and shard size. None for both sizes: by the size of the corpus."""

    seed: int = 0
    # samples | recordings: a recording's segments stay together, in order | none: the corpus' order
    shuffle: str = "samples"
    codec: str = "flac"
    shard_megabytes: float | None = None
    shard_hours: float | None = None

    def shards(self, total_bytes: float, total_seconds: float) -> int:
        if self.shard_hours:
            return max(1, math.ceil(total_seconds / 3600 / self.shard_hours))
        if self.shard_megabytes:
            return max(1, math.ceil(total_bytes / 1e6 / self.shard_megabytes))
        return max(
            1,
            math.ceil(
                max(total_bytes / _SHARD_BYTES, min(_SMALL_CORPUS_SHARDS, total_bytes / _SMALL_SHARD_BYTES))
            ),
        )

    def unit(self, entry: Entry) -> str:
        """What the shuffle moves as one."""
        if self.shuffle == "recordings":
            return f"{entry.corpus}/{entry.recording or entry.audio or entry.id}"
        return entry.group or f"{entry.corpus}/{entry.id}"


_CLIPS = np.dtype([("clip", "<u8"), ("source", "<u4")])  # distinguishes samples of one id
_pack_id, _pack_clip = struct.Struct("<Q").pack, struct.Struct("<QL").pack
_encode = msgspec.json.Encoder().encode
_values = attrgetter(*ENTRY_FIELDS)
_TABLES = ("ids", "clips", "hashes")  # files beside the buckets, a row a sample
_MOST_KEYS = 100_000  # of each split, that are counted


@dataclass
class _Scan:
    """What was found for one split (or for all samples), and the files that it goes to."""

    folder: Path
    faults: TextIO
    ids: BinaryIO
    clips: BinaryIO
    hashes: BinaryIO
    stack: ExitStack
    buckets: dict[int, BinaryIO] = field(default_factory=dict)
    samples: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    other_split: int = 0
    unknown_durations: int = 0  # clips that filters by seconds can only judge when they are decoded
    estimated_seconds: float = 0.0  # of these clips, by the size of their files
    unprompted: Counter = field(default_factory=Counter)  # task -> clips that bring no prompt
    rejected: Counter = field(default_factory=Counter)
    rejected_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first of its kind

    def count(self, entry: Entry, seconds: float, by: int = 1) -> None:
        """What the report says of samples that are kept; by -1: this one is not after all."""
        if entry.audio is not None:
            self.unknown_durations += by * (entry.duration is None)
            self.estimated_seconds += by * seconds * (entry.duration is None)
            self.unprompted[entry.task] += by * (not entry.prompt and not entry.messages)

    def reject(self, fault: Rejection, seconds: float) -> None:
        self.rejected[fault.reason] += 1
        self.rejected_seconds[fault.reason] += seconds
        if fault.reason not in self.examples:
            names_sample = not fault.detail or fault.detail.startswith(
                f"{fault.id}:"
            )  # a line that has no id but its place
            self.examples[fault.reason] = (
                (fault.detail or fault.id) if names_sample else f"{fault.id}: {fault.detail}"
            )
        self.faults.write(fault.to_json() + "\n")


@dataclass
class _Whole:
    """What concerns all splits alike."""

    items: int = 0  # entries and faults
    ignored: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)  # what samples without the wanted key are split by
    keys: dict[str, set[int]] = field(default_factory=dict)  # split -> its keys
    of_split: Counter = field(default_factory=Counter)  # split -> samples


def make_plan(
    folder: Path,
    corpora: Sequence[Iterable[Item]],
    sieve: SampleFilter,
    layout: Layout,
    head: dict,
    watch=iter,
) -> dict:
    """Write entries.jsonl, shards.npy, rejected.jsonl and, last, plan.json (`head` and counts) into `folder`.

    Returns what plan.json holds. Errors: CorpusError for a corpus that cannot be read, OutputError for
    `folder`.
    """
    return make_plans({sieve.take: (folder, head)}, corpora, sieve, layout, watch)[sieve.take]


def make_plans(
    targets: dict[str | None, tuple[Path, dict]],
    corpora: Sequence[Iterable[Item]],
    sieve: SampleFilter,
    layout: Layout,
    watch=iter,
) -> dict[str | None, dict]:
    """Make the plans of several splits (None: all samples, no split) in one pass: {split: (folder, head)} ->
    {split: plan}.

    watch: what a corpus is iterated through, to show how far it is. A corpus whose ids are those of another
    one, or restart in each of its parts, is read a second time, with its name or its parts' names in front of
    the ids.
    """
    corpora = list(corpora)
    try:
        while True:
            with ExitStack() as stack:
                scans = {split: _open_scan(folder, stack) for split, (folder, _) in targets.items()}
                sources: dict[tuple, int] = {}
                whole = _scan(scans, corpora, sieve, layout, watch, sources)
            repeated = {split: _Repeated(scan.folder) for split, scan in scans.items()}
            if not _qualify(corpora, sources, repeated.values()):
                break
        return {
            split: _finish(
                scan, whole, corpora, sieve, layout, targets[split][1], repeated[split].is_repeated
            )
            for split, scan in scans.items()
        }
    except OSError as error:
        folder = next(iter(targets.values()))[0]
        raise OutputError(f"planning in {folder}: {error.strerror or error}") from error


def _open_scan(folder: Path, stack: ExitStack) -> _Scan:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "buckets").mkdir(parents=True)
    faults = stack.enter_context(open(folder / "rejected.jsonl", "w", encoding="utf-8"))
    ids, clips, hashes = (
        stack.enter_context(open(folder / name, "wb", buffering=1 << 16)) for name in _TABLES
    )
    return _Scan(folder, faults, ids, clips, hashes, stack)


def _finish(
    scan: _Scan,
    whole: _Whole,
    corpora: list,
    sieve: SampleFilter,
    layout: Layout,
    head: dict,
    same_id: Callable[[int], bool] | None,
) -> dict:
    """Sort what was scanned and write the plan."""
    with open(scan.folder / "rejected.jsonl", "a", encoding="utf-8") as scan.faults:
        rows = _sort(scan, layout, same_id, _doubles(scan.folder / "hashes", same_id))
    shutil.rmtree(scan.folder / "buckets")
    for name in _TABLES:
        (scan.folder / name).unlink()
    np.save(scan.folder / "shards.npy", np.array(rows, dtype=SHARD_DTYPE))
    plan = {
        **head,
        "samples": sum(row[3] for row in rows),
        "shards": len(rows),
        "hours": sum(row[4] for row in rows) / 3600,
        "megabytes": scan.bytes / 1e6,
        "items": whole.items,
        "other_splits": scan.other_split,
        "unknown_durations": scan.unknown_durations,
        "estimated_hours": scan.estimated_seconds / 3600,
        "unprompted": sorted(task for task, count in scan.unprompted.items() if count),
        "rejected": dict(sorted(scan.rejected.items())),
        "rejected_hours": {
            reason: seconds / 3600 for reason, seconds in sorted(scan.rejected_seconds.items())
        },
        "faults": sum(count for reason, count in scan.rejected.items() if reason not in FILTERS),
        "examples": dict(sorted(scan.examples.items())),
        "ignored": dict(sorted(whole.ignored.items())),
        "notes": [*_qualified_notes(corpora), *_split_notes(whole, sieve)],
        "facts": [fact for corpus in corpora if isinstance(corpus, Corpus) for fact in corpus.reader.facts()],
    }
    replace_file(scan.folder / "plan.json", json.dumps(plan, indent=1, ensure_ascii=False).encode())
    return plan


def _scan(
    scans: dict[str | None, _Scan],
    corpora: list,
    sieve: SampleFilter,
    layout: Layout,
    watch: Callable,
    sources: dict[tuple, int],
) -> _Whole:
    """Read the corpora once. sources: filled with a number for each part of a corpus in which ids are
    unique."""
    whole = _Whole()
    single = scans.get(None)
    for number, corpus in enumerate(corpora):
        has_global_ids = isinstance(corpus, Corpus) and corpus.reader.has_global_ids
        for item in _readable(watch(corpus)):
            if isinstance(item, Ignored):
                whole.ignored[item.what] += item.count
                continue
            whole.items += 1
            scan = single
            if isinstance(item, Rejection):
                fault: Rejection | None = item
            else:
                try:
                    fault = sieve.prepare(item)
                    if fault is None:
                        scan = scan or _of_split(item, sieve, scans, whole)
                        if scan is None:
                            continue
                        fault = sieve.judge_metadata(item)
                except CorpusError:
                    raise
                except Exception as error:  # whatever a filter makes of one entry
                    fault = fault_of(error, item.id, item.corpus, "failed")
                if fault is None and scan is not None:
                    key = (item.corpus, None, None) if has_global_ids else (item.corpus, number, item.source)
                    source = sources.setdefault(key, len(sources))
                    fault = _keep(scan, item, source, layout, sieve.filters.drop_duplicates)
            if fault is not None:
                seconds = getattr(item, "duration", None) or 0.0
                for rejecting in (scan,) if scan is not None else scans.values():
                    rejecting.reject(fault, seconds)
    return whole


def _of_split(
    entry: Entry, sieve: SampleFilter, scans: dict[str | None, _Scan], whole: _Whole
) -> _Scan | None:
    """The scan of the split that an entry falls into; None where that split is not wanted."""
    key = sieve.split_key(entry)
    if key.by != sieve.split_by:
        whole.fallbacks[key.by] += 1
    name, place = sieve.split_of(key)
    whole.of_split[name] += 1
    keys = whole.keys.setdefault(name, set())
    if len(keys) < _MOST_KEYS:
        keys.add(place)
    for split, scan in scans.items():
        if split != name:
            scan.other_split += 1
    return scans.get(name)


def _keep(scan: _Scan, entry: Entry, source: int, layout: Layout, by_sound: bool) -> Rejection | None:
    """Write an entry into its bucket."""
    entry.source = None  # known to the caller
    try:
        line = _encode(entry)
    except (TypeError, ValueError, OverflowError) as error:  # nothing that `malformed` lets through
        return fault_of(error, entry.id, entry.corpus)
    if len(line) > MAX_TEXT_BYTES:
        return Rejection(
            entry.id,
            "too_large",
            f"its line has {len(line):,} bytes: more than any sample's text",
            entry.corpus,
        )
    audio, seconds, size = entry.audio, 0.0, float(_RECORD_BYTES + _spelt_length(entry, line))
    if audio is not None:
        seconds = entry.duration if entry.duration is not None else estimate_seconds(audio, entry.size)
        size += estimate_bytes(audio, seconds, layout.codec)
    unit = f"{layout.seed}:{layout.unit(entry)}".encode()
    place = int.from_bytes(hashlib.blake2b(unit, digest_size=8).digest(), "big")
    bucket = 0 if layout.shuffle == "none" else place >> 56  # one of 256
    file = scan.buckets.get(bucket)
    if file is None:
        path = scan.folder / "buckets" / f"{bucket:03d}"
        file = scan.buckets[bucket] = scan.stack.enter_context(open(path, "wb", buffering=1 << 16))
    sequence = scan.samples
    file.write(b"%020d\t%020d\t%.0f\t%.3f\t%b\n" % (place, sequence, size, seconds, line))
    clip = (
        hash((audio, entry.offset, entry.duration if entry.offset is not None else None)) & 0xFFFFFFFFFFFFFFFF
    )
    scan.ids.write(_pack_id(id_hash(entry.corpus, entry.id)))
    scan.clips.write(_pack_clip(clip, source))
    if by_sound and audio:
        stretch = f"{entry.sound_hash}:{entry.offset}:{entry.duration if entry.offset is not None else None}"
        question = f"{entry.task}:{entry.prompt}:{entry.target_lang}"
        digest = hashlib.blake2b(f"{stretch}:{question}".encode(), digest_size=8).digest()
        scan.hashes.write(digest + struct.pack("<Q", sequence))
    scan.count(entry, seconds)
    scan.samples, scan.bytes, scan.seconds = sequence + 1, scan.bytes + size, scan.seconds + seconds
    return None


def _spelt_length(entry: Entry, line: bytes) -> int:
    """The characters of an entry's JSON as `json` writes it, which is what shards are cut by."""
    if (
        entry.messages is not None or 0 < (entry.duration or 1) < 1e-4 or 0 < (entry.offset or 1) < 1e-4
    ):  # json: 1e-05
        return len(entry.to_json())
    fields = len(ENTRY_FIELDS) - _values(entry).count(None)
    return (
        (len(line) if line.isascii() else len(line.decode())) + 2 * fields - 1
    )  # a blank behind each : and ,


def _readable(corpus: Iterable[Item]) -> Iterator[Item]:
    try:
        yield from corpus
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or 'a corpus'}: {error.strerror or error}") from error


def _qualify(corpora: list, sources: dict[tuple, int], repeated: Iterable[_Repeated]) -> bool:
    """Ask corpora to tell apart ids that several corpora, or several of their parts, use for different clips.
    False: none can."""
    by_number = {number: key for key, number in sources.items()}
    changed = False
    for group in set().union(*(each.groups for each in repeated)):
        keys = [
            by_number[number] for number in group
        ]  # (corpus' name, its place in the command or None, its part)
        places = {place for _, place, _ in keys}
        for place in places - {None}:
            if isinstance(corpora[place], Corpus):
                parts = {part for _, other, part in keys if other == place}
                changed = corpora[place].qualify(len(places) > 1, len(parts) > 1) or changed
    return changed


def _qualified_notes(corpora: list) -> list[str]:
    return [note for corpus in corpora if isinstance(corpus, Corpus) for note in corpus.qualified()]


def _split_notes(whole: _Whole, sieve: SampleFilter) -> list[str]:
    """How many keys and samples each split has, what they were split by, and what to do about an empty
    one."""
    if not sieve.splits:
        return []
    kinds = " or ".join(SplitKey.NAMES[by] for by in dict.fromkeys((sieve.split_by, *whole.fallbacks)))
    if whole.fallbacks.total() == whole.of_split.total():
        kinds = " or ".join(SplitKey.NAMES[by] for by in whole.fallbacks)
    notes = [
        f"no {sieve.split_by} is known of {plural(whole.fallbacks[by], 'sample')}: split by {by}"
        + (" (give a column of speakers, or --split-by to choose)" if sieve.split_by == "speaker" else "")
        for by in whole.fallbacks
    ]

    def count(name: str) -> str:
        keys = len(whole.keys.get(name, ()))
        return f"{'more than ' if keys >= _MOST_KEYS else ''}{keys:,}"

    total = len(set().union(*whole.keys.values())) if whole.keys else 0
    parts = ", ".join(f"{name} {count(name)} ({whole.of_split[name]:,} samples)" for name in sieve.splits)
    notes.append(f"{kinds} by split: {parts}")
    samples, shares = whole.of_split.total(), sum(sieve.splits.values())
    missed = [
        f"{name} {whole.of_split[name] / samples:.0%} instead of {share / shares:.0%}"
        for name, share in sieve.splits.items()
        if whole.of_split[name] and not 2 / 3 < whole.of_split[name] / samples / (share / shares) < 1.5
    ]
    if missed and kinds != SplitKey.NAMES["id"]:
        notes.append(
            f"few {kinds}, or large ones, miss the shares ({', '.join(missed)}): try another --seed, or "
            "split by another unit (--split-by recording, --split-by id)"
        )
    for name, share in sieve.splits.items():
        if not whole.of_split[name] and total:
            notes.append(
                f"none of the {total:,} {kinds} is in split {name}, whose share is "
                f"{share / sum(sieve.splits.values()):.3g} ({share / sum(sieve.splits.values()) * total:.2g} "
                f"{kinds}): give it a larger share, another --seed, or split by another unit "
                "(--split-by recording, --split-by id)"
            )
    return notes


class _Repeated:
    """Ids that occur more than once: the first of equal ids stays, later ones are repeated.

    groups: numbers of the parts of corpora that use one id for different clips."""

    def __init__(self, folder: Path, chunk: int = 1 << 19):
        """folder: of the tables `ids` and `clips`, in the order of the samples. They are gone through once
        for every `chunk` of samples, each time for another residue of the id's hash, so that memory does not
        grow with them."""
        self.groups: set[frozenset[int]] = set()
        self._folder, self._count = folder, (folder / "ids").stat().st_size // 8
        self._marks: bytearray | None = None
        passes = math.ceil(self._count / chunk)
        for residue in range(passes):
            ids, places = [], []
            for start in range(0, self._count, chunk):
                part = np.fromfile(folder / "ids", "<u8", chunk, offset=8 * start)
                mine = np.flatnonzero(part % np.uint64(passes) == residue)
                ids.append(part[mine])
                places.append(mine + start)
            self._mark_repeated(np.concatenate(ids), np.concatenate(places))

    def _mark_repeated(self, ids: np.ndarray, places: np.ndarray) -> None:
        """Mark the repeated ones among these ids; places: which samples they are, rising."""
        order = np.argsort(ids, kind="stable")
        same = ids[order[1:]] == ids[order[:-1]]
        if not same.any():
            return
        if self._marks is None:
            self._marks = bytearray(self._count // 8 + 1)
        involved = order[np.flatnonzero(np.r_[same, False] | np.r_[False, same])]
        rows = np.memmap(self._folder / "clips", _CLIPS, "r")[places[involved]]
        last, clips, parts = None, set(), set()
        columns = (
            column.tolist() for column in (ids[involved], places[involved], rows["clip"], rows["source"])
        )
        for sample_id, sequence, clip, source in zip(*columns, strict=True):
            if sample_id != last:
                last, clips, parts = sample_id, {clip}, {source}
                continue
            if clip not in clips and source not in parts:
                self.groups.add(frozenset((*parts, source)))
            clips.add(clip)
            parts.add(source)
            self._marks[sequence >> 3] |= 1 << (sequence & 7)

    @property
    def is_repeated(self) -> Callable[[int], bool] | None:
        """A test for sequence numbers; None where no id is repeated."""
        marks = self._marks
        return None if marks is None else lambda sequence: bool(marks[sequence >> 3] & 1 << (sequence & 7))


def _doubles(
    table: Path, out: Callable[[int], bool] | None = None, chunk: int = 1 << 20
) -> Callable[[int], bool] | None:
    """A test for sequence numbers whose hash an earlier one has (None: there are none); those that are `out`
    have none. `table` holds (hash, sequence) pairs; it is gone through once for every `chunk` pairs, each
    time for another residue of the hash, so that memory does not grow with it."""
    count = table.stat().st_size // 16
    if not count:
        return None
    pairs = np.memmap(table, dtype="<u8", mode="r", shape=(count, 2))
    marks = bytearray(int(pairs[:, 1].max()) // 8 + 1)
    passes = max(1, math.ceil(count / chunk))
    for residue in range(passes):
        picked = [
            block[block[:, 0] % np.uint64(passes) == residue]
            for start in range(0, count, chunk)
            for block in (np.asarray(pairs[start : start + chunk]),)
        ]
        mine = np.concatenate(picked)
        if out is not None:
            mine = mine[[not out(sequence) for sequence in mine[:, 1].tolist()]]
        mine = mine[np.argsort(mine[:, 0], kind="stable")]
        for sequence in mine[1:][mine[1:, 0] == mine[:-1, 0], 1].tolist():
            marks[sequence >> 3] |= 1 << (sequence & 7)
    return lambda sequence: (
        bool(marks[sequence >> 3] & 1 << (sequence & 7)) if sequence >> 3 < len(marks) else False
    )


def _sort(
    scan: _Scan,
    layout: Layout,
    same_id: Callable[[int], bool] | None,
    same_audio: Callable[[int], bool] | None,
) -> list[tuple]:
    shards = layout.shards(scan.bytes, scan.seconds)
    per_shard = (scan.seconds if layout.shard_hours else scan.bytes) / shards
    by_hours = bool(layout.shard_hours)
    rows: list[tuple] = []
    start = offset = first = count = 0
    filled, seconds_here, last_unit = 0.0, 0.0, None
    with open(scan.folder / "entries.jsonl", "wb", buffering=1 << 20) as entries:
        for bucket in sorted((scan.folder / "buckets").iterdir()):
            for packed in _bucket(bucket, ordered=layout.shuffle == "none"):
                unit, sequence_text, size, seconds_text, line = packed.split(b"\t", 4)
                seconds = float(seconds_text)
                if same_id is not None and same_id(int(sequence_text)):
                    reason, detail = "duplicate_id", "an earlier sample of this corpus has the same id"
                elif same_audio is not None and same_audio(int(sequence_text)):
                    reason, detail = "duplicate_audio", "an earlier sample has the same audio"
                else:
                    reason = ""
                if reason:
                    entry = Entry.from_json(line)
                    scan.reject(Rejection(entry.id, reason, detail, entry.corpus), seconds)
                    scan.count(entry, seconds, -1)
                    continue
                # A unit (one recording, one row group) is not torn apart, unless it alone is larger than a
                # shard.
                full = count and filled >= per_shard * (len(rows) + 1) and len(rows) + 1 < shards
                if full and (unit != last_unit or filled >= per_shard * (len(rows) + 2)):
                    rows.append((start, offset - start, first, count, seconds_here))
                    start, first, count, seconds_here = offset, first + count, 0, 0.0
                entries.write(line)
                offset, count, last_unit = offset + len(line), count + 1, unit
                filled += seconds if by_hours else float(size)
                seconds_here += seconds
    if count:
        rows.append((start, offset - start, first, count, seconds_here))
    return rows


def _bucket(path: Path, ordered: bool) -> Iterable[bytes]:
    """Lines of one bucket, sorted by (shuffle hash, place in the corpus); streamed where the corpus' own
    order is kept."""
    if ordered:
        with open(path, "rb") as file:
            yield from file
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    lines.sort()
    yield from lines


def shard_entries(folder: Path, shard: int) -> tuple[int, list[Entry]]:
    """(number of the first sample, entries) of one planned shard."""
    row = np.load(folder / "shards.npy", mmap_mode="r")[shard]
    with open(folder / "entries.jsonl", "rb") as file:
        file.seek(int(row["offset"]))
        lines = file.read(int(row["size"])).split(b"\n")[:-1]
    return int(row["first"]), [Entry.from_json(line) for line in lines]


def plan_once(folder: Path, make: Callable[[Path], Any], patience_seconds: float = 60.0) -> dict:
    """The plan in `folder`, made by `make` if there is none; parts of an array job that start together
    wait for one.

    The lock only saves work: plans are equal, and the rename of a finished one into place is what counts. A
    planner that died (its process is gone, or its lock has not moved for `patience_seconds`) is replaced by
    who waits.
    """
    lock = folder.with_name("plan.lock")
    own = folder.with_name(f"plan.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    me = f"{os.uname().nodename} {os.getpid()}"
    last_state, since = None, time.monotonic()
    while not (folder / "plan.json").exists():
        try:
            with open(lock, "x") as file:
                file.write(me)
        except FileExistsError:
            state = _lock_state(lock)
            if state != last_state:
                last_state, since = state, time.monotonic()
            if state is not None and (time.monotonic() - since > patience_seconds or _is_dead(state[0])):
                _take_away(lock, state)
            else:
                time.sleep(0.2)
            continue
        except OSError as error:
            raise OutputError(f"cannot write {lock}: {error.strerror}") from error
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(lock, stop, patience_seconds / 6), daemon=True)
        beat.start()
        try:
            if (folder / "plan.json").exists():  # finished between the look for it and the lock
                continue
            make(own)
            shutil.rmtree(folder, ignore_errors=True) if not (folder / "plan.json").exists() else None
            try:
                os.rename(own, folder)
            except OSError:
                if not (folder / "plan.json").exists():
                    raise
        finally:
            stop.set()
            beat.join()
            lock.unlink(missing_ok=True)
            shutil.rmtree(own, ignore_errors=True)
    return json.loads((folder / "plan.json").read_bytes())


def _lock_state(lock: Path) -> tuple[str, int] | None:
    try:
        return lock.read_text(), lock.stat().st_mtime_ns
    except OSError:
        return None


def _take_away(lock: Path, state: tuple[str, int]) -> None:
    """Remove the lock that was seen in this state, and no other: who waited too may have replaced it in the
    meantime."""
    with suppress(OSError), open(lock, "r+") as file:  # gone: somebody was faster
        with suppress(OSError):  # a file system without flock: two may plan the same then
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # one at a time; who comes after finds another file under this name, or none
        if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)) and _lock_state(lock) == state:
            lock.unlink()


def _is_dead(owner: str) -> bool:
    host, _, process = owner.partition(" ")
    return host == os.uname().nodename and process.isdigit() and not Path(f"/proc/{process}").exists()


def _beat(lock: Path, stop: threading.Event, every: float) -> None:
    while not stop.wait(every):
        try:
            os.utime(lock)
        except OSError:
            return
