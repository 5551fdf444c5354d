"""Which sample goes into which shard, settled from metadata before any audio is decoded, in constant memory.

    readers --scan--> 256 bucket files by shuffle hash --sort each--> entries.jsonl, cut into shards (shards.npy)

A pure function of (corpus, seed, options): every part of an array job that plans for itself arrives at the same plan.
Only the largest bucket is ever in memory: 10 million entries of 500 bytes are 20 MB a bucket.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.audio import estimate_seconds
from data_tools.corpora import Entry, Fault
from data_tools.shards import id_hash, replace_file

BUCKETS = 256
SHARD_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("first", "<u8"), ("count", "<u4"), ("seconds", "<f8")])
FLAC_BYTES_PER_SECOND = 18000  # of 16 kHz speech, about
# Without --shard-mb or --shard-hours: shards of 256 MB, smaller where a small corpus would not feed 32 readers.
DEFAULT_SHARD_BYTES, SMALL_SHARD_BYTES, SMALL_CORPUS_SHARDS = 256e6, 4e6, 32


@dataclass
class ShardSize:
    megabytes: float | None = None
    hours: float | None = None

    def count(self, total_bytes: float, total_seconds: float) -> int:
        if self.hours:
            shards = total_seconds / 3600 / self.hours
        elif self.megabytes:
            shards = total_bytes / 1e6 / self.megabytes
        else:
            shards = max(total_bytes / DEFAULT_SHARD_BYTES, min(SMALL_CORPUS_SHARDS, total_bytes / SMALL_SHARD_BYTES))
        return max(1, math.ceil(shards))


def required_target(entry: Entry) -> Fault | None:
    """A sample must have something to be learnt: text for asr, an answer of some kind for every other task."""
    if entry.task is None:
        has_answer = entry.response is not None or entry.messages or entry.label is not None
        entry.task = "asr" if entry.audio is not None and not has_answer else "text" if entry.audio is None else "chat"
    if entry.audio is None and not (entry.messages or entry.response is not None):
        return Fault(entry.id, "no_audio", "neither audio nor a text-only sample (prompt and response, or messages)", entry.corpus)
    if entry.task == "asr" and not (entry.text or "").strip():
        return Fault(entry.id, "no_text", "task asr needs a transcript in text", entry.corpus)
    if not any((entry.text, entry.response, entry.messages, entry.label)):
        return Fault(entry.id, "no_target", f"task {entry.task} needs response, label, messages or text", entry.corpus)
    return None


def make_plan(folder: Path, readers: Iterable, *, seed: int, shuffle: str, size: ShardSize) -> dict:
    """Write entries.jsonl, shards.npy, rejected.jsonl and plan.json into `folder`; returns what plan.json holds."""
    buckets = folder / "buckets"
    shutil.rmtree(folder, ignore_errors=True)
    buckets.mkdir(parents=True)
    rejected, ids = Counter(), folder / "ids"
    total_bytes = total_seconds = sequence = 0
    with ExitStack() as stack:
        faults, id_file = stack.enter_context(open(folder / "rejected.jsonl", "w")), stack.enter_context(open(ids, "wb"))
        spills = [stack.enter_context(open(buckets / f"{number:03d}", "wb")) for number in range(BUCKETS)]
        for item in (item for reader in readers for item in reader):
            fault = item if isinstance(item, Fault) else required_target(item)
            if fault is not None:
                rejected[fault.reason] += 1
                faults.write(fault.to_json() + "\n")
                continue
            seconds = item.duration if item.duration is not None else estimate_seconds(item.audio) if item.audio else 0.0
            line = item.to_json()
            nbytes = seconds * FLAC_BYTES_PER_SECOND + len(line) + 2048
            total_bytes, total_seconds = total_bytes + nbytes, total_seconds + seconds
            unit = item.group or f"{item.corpus}/{item.id}"
            place = sequence if shuffle == "none" else int.from_bytes(
                hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=8).digest(), "big")
            bucket = 0 if shuffle == "none" else place >> 56
            id_file.write(np.array([id_hash(item.corpus, item.id), sequence], dtype="<u8").tobytes())
            spills[bucket].write(f"{place:020d}\t{sequence:020d}\t{nbytes:.0f}\t{seconds:.3f}\t{line}\n".encode())
            sequence += 1
        for spill in spills:
            spill.close()
        id_file.flush()
        doubles = _doubles(ids)
        shards = size.count(total_bytes, total_seconds)
        by_time = bool(size.hours)
        per_shard = (total_seconds if by_time else total_bytes) / shards
        rows, offset, first, filled, count = [], 0, 0, 0.0, 0
        start, shard_seconds = 0, 0.0
        with open(folder / "entries.jsonl", "wb") as entries:
            for number in range(BUCKETS):
                lines = (buckets / f"{number:03d}").read_bytes().splitlines()
                if shuffle != "none":
                    lines.sort()
                for packed in lines:
                    _, sequence_text, nbytes, seconds, line = packed.split(b"\t", 4)
                    if int(sequence_text) in doubles:
                        entry = Entry.from_json(line)
                        fault = Fault(entry.id, "duplicate_id", "an earlier sample of this corpus has the same id", entry.corpus)
                        rejected[fault.reason] += 1
                        faults.write(fault.to_json() + "\n")
                        continue
                    if count and filled >= per_shard * (len(rows) + 1) and len(rows) + 1 < shards:
                        rows.append((start, offset - start, first, count, shard_seconds))
                        start, first, count, shard_seconds = offset, first + count, 0, 0.0
                    entries.write(line + b"\n")
                    offset += len(line) + 1
                    filled += float(seconds) if by_time else float(nbytes)
                    shard_seconds += float(seconds)
                    count += 1
        if count:
            rows.append((start, offset - start, first, count, shard_seconds))
    shutil.rmtree(buckets)
    ids.unlink()
    np.save(folder / "shards.npy", np.array(rows, dtype=SHARD_DTYPE))
    plan = {"samples": int(first + count), "shards": len(rows), "hours": total_seconds / 3600, "megabytes": total_bytes / 1e6,
            "rejected": dict(sorted(rejected.items()))}
    replace_file(folder / "plan.json", json.dumps(plan, indent=1).encode())
    return plan


def _doubles(ids: Path) -> set[int]:
    """Sequence numbers of entries whose id an earlier entry has. The table is 16 bytes an entry, sorted on disk pages."""
    table = np.memmap(ids, dtype="<u8", mode="r").reshape(-1, 2) if ids.stat().st_size else np.zeros((0, 2), dtype="<u8")
    order = np.argsort(table[:, 0], kind="stable")
    hashes = table[order, 0]
    return set(table[order[1:][hashes[1:] == hashes[:-1]], 1].tolist())


def shard_entries(folder: Path, shard: int) -> tuple[int, list[Entry]]:
    """(number of the first sample, entries) of one planned shard."""
    row = np.load(folder / "shards.npy", mmap_mode="r")[shard]
    with open(folder / "entries.jsonl", "rb") as file:
        file.seek(int(row["offset"]))
        lines = file.read(int(row["size"])).splitlines()
    return int(row["first"]), [Entry.from_json(line) for line in lines]
