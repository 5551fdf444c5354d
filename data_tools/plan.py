"""Which sample goes into which shard, settled from metadata before any audio is decoded, in bounded memory.

    1 scan    corpora -> Sieve -> 256 bucket files by the high bits of a shuffle hash; 16 bytes a sample to find duplicates
    2 count   totals -> number of shards, all about the same size (no small remainder)
    3 sort    bucket after bucket -> entries.jsonl, the samples in their final order; cut into shards (shards.npy)

A pure function of (corpora, seed, options): every part of an array job that plans for itself arrives at the same plan. Only
one bucket is in memory at a time: 10 million entries of 500 bytes make buckets of 20 MB.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.audio import estimate_bytes, estimate_seconds
from data_tools.corpora import CorpusError, Entry, Fault
from data_tools.filters import OTHER_SPLIT, Sieve
from data_tools.shards import OutputError, id_hash, replace_file

SHARD_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("first", "<u8"), ("count", "<u4"), ("seconds", "<f8")])
# Without a wanted size: shards of 256 MB, smaller where a small corpus would not feed 32 readers.
_SHARD_BYTES, _SMALL_SHARD_BYTES, _SMALL_CORPUS_SHARDS = 256e6, 4e6, 32
_RECORD_BYTES = 2048  # JSON, two tar headers and padding, about
SHUFFLES = ("samples", "recordings", "none")


@dataclass
class Layout:
    """How samples are laid out: order and shard size. None for both sizes: by the size of the corpus."""

    seed: int = 0
    shuffle: str = "samples"  # samples | recordings: a recording's segments stay together, in order | none: the corpus' order
    codec: str = "flac"
    shard_megabytes: float | None = None
    shard_hours: float | None = None

    def shards(self, total_bytes: float, total_seconds: float) -> int:
        if self.shard_hours:
            return max(1, math.ceil(total_seconds / 3600 / self.shard_hours))
        if self.shard_megabytes:
            return max(1, math.ceil(total_bytes / 1e6 / self.shard_megabytes))
        return max(1, math.ceil(max(total_bytes / _SHARD_BYTES, min(_SMALL_CORPUS_SHARDS, total_bytes / _SMALL_SHARD_BYTES))))

    def unit(self, entry: Entry) -> str:
        """What the shuffle moves as one."""
        if self.shuffle == "recordings":
            return f"{entry.corpus}/{entry.recording or entry.audio or entry.id}"
        return entry.group or f"{entry.corpus}/{entry.id}"


@dataclass
class _Scan:
    samples: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    other_split: int = 0
    unknown_durations: int = 0  # clips that filters by seconds can only judge when they are decoded
    unprompted: Counter = field(default_factory=Counter)  # task -> clips that bring no prompt
    rejected: Counter = field(default_factory=Counter)
    rejected_seconds: Counter = field(default_factory=Counter)

    def note(self, entry: Entry, by: int = 1) -> None:
        """What the report says of samples that are kept; by -1: this one is not after all."""
        if entry.audio is not None:
            self.unknown_durations += by * (entry.duration is None)
            self.unprompted[entry.task] += by * (not entry.prompt and not entry.messages)

    def reject(self, fault: Fault, seconds: float, out) -> None:
        self.rejected[fault.reason] += 1
        self.rejected_seconds[fault.reason] += seconds
        out.write(fault.to_json() + "\n")


def make_plan(folder: Path, corpora: Iterable[Iterable[Entry | Fault]], sieve: Sieve, layout: Layout, head: dict) -> dict:
    """Write entries.jsonl, shards.npy, rejected.jsonl and, last, plan.json (`head` and counts) into `folder`.

    Returns what plan.json holds. Errors: CorpusError for a corpus that cannot be read, OutputError for `folder`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "buckets").mkdir(parents=True)
        with open(folder / "rejected.jsonl", "w", encoding="utf-8") as faults:
            scan = _scan(folder, corpora, sieve, layout, faults)
            same_id = _doubles(folder / "ids")
            rows = _sort(folder, scan, layout, faults, same_id, _doubles(folder / "hashes", same_id))
        shutil.rmtree(folder / "buckets")
        for name in ("ids", "hashes"):
            (folder / name).unlink()
        np.save(folder / "shards.npy", np.array(rows, dtype=SHARD_DTYPE))
    except OSError as error:
        raise OutputError(f"planning in {folder}: {error.strerror or error}") from error
    plan = {
        **head,
        "samples": sum(row[3] for row in rows),
        "shards": len(rows),
        "hours": sum(row[4] for row in rows) / 3600,
        "megabytes": scan.bytes / 1e6,
        "other_splits": scan.other_split,
        "unknown_durations": scan.unknown_durations,
        "unprompted": sorted(task for task, count in scan.unprompted.items() if count),
        "rejected": dict(sorted(scan.rejected.items())),
        "rejected_hours": {reason: seconds / 3600 for reason, seconds in sorted(scan.rejected_seconds.items())},
    }
    replace_file(folder / "plan.json", json.dumps(plan, indent=1, ensure_ascii=False).encode())
    return plan


def _scan(folder: Path, corpora: Iterable[Iterable[Entry | Fault]], sieve: Sieve, layout: Layout, faults) -> _Scan:
    scan = _Scan()
    with ExitStack() as stack:
        ids, hashes = (stack.enter_context(open(folder / name, "wb")) for name in ("ids", "hashes"))
        buckets: dict[int, BinaryIO] = {}
        for item in _items(corpora):
            fault = item if isinstance(item, Fault) else sieve.judge(item)
            if fault is OTHER_SPLIT:
                scan.other_split += 1
                continue
            if fault is not None:
                scan.reject(fault, getattr(item, "duration", None) or 0.0, faults)
                continue
            seconds = (
                0.0
                if item.audio is None
                else item.duration
                if item.duration is not None
                else estimate_seconds(item.audio, item.size)
            )
            line = item.to_json()
            size = _RECORD_BYTES + len(line) + (estimate_bytes(item.audio, seconds, layout.codec) if item.audio else 0)
            unit = f"{layout.seed}:{layout.unit(item)}".encode()
            place = int.from_bytes(hashlib.blake2b(unit, digest_size=8).digest(), "big")
            bucket = 0 if layout.shuffle == "none" else place >> 56  # one of 256
            if bucket not in buckets:
                buckets[bucket] = stack.enter_context(open(folder / "buckets" / f"{bucket:03d}", "wb"))
            buckets[bucket].write(f"{place:020d}\t{scan.samples:020d}\t{size:.0f}\t{seconds:.3f}\t{line}\n".encode())
            ids.write(struct.pack("<QQ", id_hash(item.corpus, item.id), scan.samples))
            if sieve.filters.drop_duplicates and item.audio:
                stretch = f"{item.sound_hash}:{item.offset}:{item.duration if item.offset is not None else None}"
                asked = f"{item.task}:{item.prompt}:{item.target_lang}"
                digest = hashlib.blake2b(f"{stretch}:{asked}".encode(), digest_size=8).digest()
                hashes.write(digest + struct.pack("<Q", scan.samples))
            scan.note(item)
            scan.samples, scan.bytes, scan.seconds = scan.samples + 1, scan.bytes + size, scan.seconds + seconds
    return scan


def _items(corpora: Iterable[Iterable[Entry | Fault]]) -> Iterator[Entry | Fault]:
    try:
        for corpus in corpora:
            yield from corpus
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or 'a corpus'}: {error.strerror or error}") from error


def _doubles(table: Path, out: Callable[[int], bool] | None = None, chunk: int = 1 << 20) -> Callable[[int], bool]:
    """A test for sequence numbers whose hash an earlier one has; those that are `out` already have none. `table` holds
    (hash, sequence) pairs; it is gone through once for every `chunk` of them, each time for another residue of the hash, so that
    memory does not grow with it."""
    count = table.stat().st_size // 16
    marks = bytearray(count // 8 + 1)
    pairs = np.memmap(table, dtype="<u8", mode="r", shape=(count, 2)) if count else np.zeros((0, 2), dtype="<u8")
    passes = max(1, math.ceil(count / chunk))
    for residue in range(passes):
        picked = [
            block[block[:, 0] % np.uint64(passes) == residue]
            for start in range(0, count, chunk)
            for block in (np.asarray(pairs[start : start + chunk]),)
        ]
        mine = np.concatenate(picked) if picked else pairs
        if out is not None:
            mine = mine[[not out(sequence) for sequence in mine[:, 1].tolist()]]
        mine = mine[np.argsort(mine[:, 0], kind="stable")]
        for sequence in mine[1:][mine[1:, 0] == mine[:-1, 0], 1].tolist():
            marks[sequence >> 3] |= 1 << (sequence & 7)
    return lambda sequence: bool(marks[sequence >> 3] & 1 << (sequence & 7)) if sequence >> 3 < len(marks) else False


def _sort(
    folder: Path, scan: _Scan, layout: Layout, faults, same_id: Callable[[int], bool], same_audio: Callable[[int], bool]
) -> list[tuple]:
    shards = layout.shards(scan.bytes, scan.seconds)
    per_shard = (scan.seconds if layout.shard_hours else scan.bytes) / shards
    rows: list[tuple] = []
    start = offset = first = count = 0
    filled, seconds_here, last_unit = 0.0, 0.0, None
    with open(folder / "entries.jsonl", "wb") as entries:
        for bucket in sorted((folder / "buckets").iterdir()):
            for packed in _bucket(bucket, ordered=layout.shuffle == "none"):
                unit, sequence_text, size, seconds_text, line = packed.split(b"\t", 4)
                sequence, seconds = int(sequence_text), float(seconds_text)
                if same_id(sequence) or same_audio(sequence):
                    entry = Entry.from_json(line)
                    reason, detail = (
                        ("duplicate_id", "an earlier sample of this corpus has the same id")
                        if same_id(sequence)
                        else ("duplicate_audio", "an earlier sample has the same audio")
                    )
                    scan.reject(Fault(entry.id, reason, detail, entry.corpus), seconds, faults)
                    scan.note(entry, -1)
                    continue
                # A unit (one recording, one row group) is not torn apart, unless it alone is larger than a shard.
                full = filled >= per_shard * (len(rows) + 1) and (unit != last_unit or filled >= per_shard * (len(rows) + 2))
                if count and full and len(rows) + 1 < shards:
                    rows.append((start, offset - start, first, count, seconds_here))
                    start, first, count, seconds_here = offset, first + count, 0, 0.0
                entries.write(line)
                offset, count, last_unit = offset + len(line), count + 1, unit
                filled += seconds if layout.shard_hours else float(size)
                seconds_here += seconds
    if count:
        rows.append((start, offset - start, first, count, seconds_here))
    return rows


def _bucket(path: Path, ordered: bool) -> Iterable[bytes]:
    """Lines of one bucket, sorted by (shuffle hash, place in the corpus); streamed where the corpus' own order is kept."""
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


def plan_once(folder: Path, make: Callable[[Path], dict], patience_seconds: float = 60.0) -> dict:
    """The plan in `folder`, made by `make` if nobody has made it; parts of an array job that start together wait for one.

    The lock only saves work: plans are equal, and the rename of a finished one into place is what counts. A planner that
    died (its process is gone, or its lock has not moved for `patience_seconds`) is replaced by who waits.
    """
    lock = folder.with_name("plan.lock")
    own = folder.with_name(f"plan.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    me = f"{os.uname().nodename} {os.getpid()}"
    seen, since = None, time.monotonic()
    while not (folder / "plan.json").exists():
        try:
            with open(lock, "x") as file:
                file.write(me)
        except FileExistsError:
            state = _lock_state(lock)
            if state != seen:
                seen, since = state, time.monotonic()
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
    """Remove the lock that was seen in this state, and no other: who waited too may have replaced it in the meantime."""
    with suppress(OSError), open(lock, "r+") as file:  # gone: somebody was faster
        with suppress(OSError):  # a file system without flock: two may plan the same then
            fcntl.flock(file, fcntl.LOCK_EX)  # one at a time; who comes after finds another file under this name, or none
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
