"""Compare a packed folder with its index; exit code 0 if they agree, 1 if not.

    python -m data_tools.verify DIR [--limit all]

every shard:  size, sha256; tar members against the sample table (names, offsets, sizes); JSON against the
              table
a sample or all of the clips:  decoded; duration and rate as the JSON says
the whole:    counts, hours, fingerprint
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from core.audio import AudioError, read
from core.command_line import CommandParser, accept_old_name
from core.console import print_error, print_text
from core.json_files import read_object
from core.object_store import joined
from data_tools.progress import watched
from data_tools.shards import (
    INDEX_NAME,
    ShardError,
    ShardIndex,
    audio_hash,
    fingerprint,
    id_hash,
    target_characters,
)

_DURATION_TOLERANCE = 0.002  # seconds: JSON and table keep fewer digits than there are


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(index: ShardIndex, shard: int, decode: int | None) -> list[str]:
    """Problems of one shard, a line each. decode: at most this many clips, spread over the shard; None:
    all."""
    expected = index.shards[shard]
    with TemporaryDirectory() as scratch:
        path = (Path(scratch) if index.is_remote else index.folder) / expected["url"]
        if index.is_remote:
            try:
                index.download(shard, path)
            except OSError as error:
                return [f"{path.name}: {error}"]
        return _check_file(index, shard, path, decode)


def _check_file(index: ShardIndex, shard: int, path: Path, decode: int | None) -> list[str]:
    expected = index.shards[shard]
    if path.stat().st_size != expected["filesize"]:
        return [f"{path.name}: {path.stat().st_size} bytes, the index says {expected['filesize']}"]
    if file_sha256(path) != expected["sha256"]:
        return [f"{path.name}: content differs from what was packed (sha256)"] + _check_members(
            index, shard, path, 0
        )
    return _check_members(index, shard, path, decode)


def _check_members(index: ShardIndex, shard: int, path: Path, decode: int | None) -> list[str]:
    rows = np.flatnonzero(index.samples["shard"] == shard)
    checked_rows = set(
        rows
        if decode is None
        else rows[np.linspace(0, len(rows) - 1, min(decode, len(rows))).astype(int)]
        if decode
        else []
    )
    try:
        with tarfile.open(path) as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, OSError) as error:
        return [f"{path.name}: not a readable tar: {error}"]
    problems, place = [], 0
    for row in rows:
        sample = index.samples[row]
        count = 2 if sample["audio_size"] else 1
        here, place = members[place : place + count], place + count
        table = [(sample["audio_offset"], sample["audio_size"])] * (count - 1) + [
            (sample["json_offset"], sample["json_size"])
        ]
        if [(offset, size) for _, offset, size in here] != table:
            problems.append(f"{path.name}: sample {row} is not where the table says")
            continue
        keys = {name.partition(".")[0] for name, _, _ in here}
        if len(keys) != 1 or not here[-1][0].endswith(".json") or "/" in here[0][0]:
            problems.append(
                f"{path.name}: members of sample {row} are named {', '.join(name for name, _, _ in here)}"
            )
        try:
            audio, record = index.read(int(row))
        except ShardError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{path.name}: sample {row} ({record.get('id')}): {problem}"
            for problem in _check_record(index, sample, record)
        ]
        if audio_hash(audio) != sample["audio_hash"]:
            problems.append(
                f"{path.name}: sample {row} ({record.get('id')}): the audio is not the one that the table "
                f"knows"
            )
        if audio is not None and row in checked_rows:
            problems += [
                f"{path.name}: sample {row} ({record.get('id')}): {problem}"
                for problem in _check_audio(audio, record)
            ]
    if place != len(members):
        problems.append(f"{path.name}: {len(members)} members, the table knows {place}")
    return problems


def _check_record(index: ShardIndex, sample: np.void, record: dict) -> list[str]:
    pairs = {
        "id": (id_hash(record.get("corpus", ""), record.get("id", "")), int(sample["id_hash"])),
        "task": (record.get("task"), index.tasks[sample["task"]]),
        "lang": (record.get("lang") or "", index.langs[sample["lang"]]),
        "characters": (len(record.get("text") or ""), int(sample["characters"])),
        "target characters": (target_characters(record), int(sample["target_characters"])),
    }
    problems = [
        f"{name} is {here} in the JSON, {in_table} in the table"
        for name, (here, in_table) in pairs.items()
        if here != in_table
    ]
    if abs((record.get("duration") or 0.0) - float(sample["duration"])) > _DURATION_TOLERANCE:
        problems.append(
            f"duration is {record.get('duration')} in the JSON, {sample['duration']} in the table"
        )
    return problems


def _check_audio(audio: bytes, record: dict) -> list[str]:
    try:
        decoded = read(audio)
    except AudioError as error:
        return [f"does not decode ({error.reason}): {error}"]
    problems = []
    if decoded.rate != record["sample_rate"]:
        problems.append(f"{decoded.rate} samples a second, the JSON says {record['sample_rate']}")
    if abs(decoded.seconds - record["duration"]) > _DURATION_TOLERANCE:
        problems.append(f"{decoded.seconds:.3f} s, the JSON says {record['duration']}")
    return problems


def check(folder: Path | str, decode: int | None, workers: int) -> list[str]:
    """All problems of a packed folder. Errors: ShardError where there is no index to go by."""
    index = ShardIndex.load(folder)
    problems = list(index.damaged)
    damaged = {line.split(" ")[0] for line in index.damaged}
    if fingerprint(index.samples, [shard["sha256"] for shard in index.shards]) != index.fingerprint:
        problems.append("samples.npy is not the table that the index was written with (fingerprint)")
    record = read_object(index.folder / INDEX_NAME)
    hours = float(index.samples["duration"].astype(np.float64).sum()) / 3600
    counted = record.get("samples")
    if counted != len(index) or abs(hours - index.hours) > 1e-5:
        problems.append(
            f"index.json says {counted} samples, {index.hours} h; the table has {len(index)}, {hours:.6f} h"
        )
    shards = [
        shard
        for shard in range(len(index.shards))
        if joined(index.location, index.shards[shard]["url"]) not in damaged
    ]
    per_shard = None if decode is None else -(-decode // max(1, len(shards)))
    with ProcessPoolExecutor(max(1, min(workers, len(shards))), get_context("fork")) as pool:
        futures = [pool.submit(check_shard, index, shard, per_shard) for shard in shards]
        for future in watched(futures, "checking shards", " shards", len(futures)):
            problems += future.result()
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser("python -m data_tools.verify", __doc__, example="shards/train")
    parser.add_argument("folder", help="a packed folder or its URL")
    parser.add_argument(
        "--limit",
        default="1000",
        help="how many clips to decode, spread over the shards, or all (default: 1000)",
    )
    accept_old_name(parser, "--decode", "--limit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="reading processes")
    options = parser.parse_args(argv)
    if options.limit != "all" and not options.limit.isdigit():
        parser.error(f"--limit {options.limit}: a number, or all")
    try:
        problems = check(
            options.folder, None if options.limit == "all" else int(options.limit), options.workers
        )
    except ShardError as error:
        print_error("error:", error)
        return 2
    for problem in problems:
        print_text(problem)
    print(f"{options.folder}: {f'{len(problems)} problems' if problems else 'as its index says'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
