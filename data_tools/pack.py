"""Corpora to shards: `python data_tools/pack.py --manifest M.jsonl --out DIR` (also `python -m data_tools.pack`).

    manifest --plan--> which sample in which shard --N worker processes, a shard each--> NAME-000000.tar ... --> index

Samples are planned before audio is touched, each worker writes whole shards, and a shard gets its name when it is complete:
the same command again after any interruption goes on, and ends in the same bytes, whatever --workers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository, not data_tools/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from data_tools import audio as audio_module
from data_tools.corpora import Entry, Fault
from data_tools.corpora.manifest import Manifest
from data_tools.plan import SHARD_DTYPE, ShardSize, make_plan, shard_entries
from data_tools.shards import (
    INDEX_NAME,
    OPTIONAL_FIELDS,
    SAMPLE_DTYPE,
    OutputError,
    ShardSummary,
    ShardWriter,
    replace_file,
    write_index,
)

WORK = ".pack"  # folder inside the output: the plan, unfinished shards, and what is known of finished ones


class UsageError(ValueError):
    """A command that cannot be carried out: one line, exit code 2."""


def record_of(entry: Entry, duration: float, sample_rate: int | None) -> dict:
    """What KEY.json holds."""
    record = {"id": entry.id, "corpus": entry.corpus, "task": entry.task, "text": entry.text, "lang": entry.lang,
              "duration": round(duration, 6), "sample_rate": sample_rate}
    record.update({name: value for name in OPTIONAL_FIELDS if (value := getattr(entry, name)) is not None})
    return record


def key_of(number: int, sample_id: str) -> str:
    """Member name: the sample's number in the plan (unique, sorted), then its id as far as tar and WebDataset allow."""
    return f"{number:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', sample_id)[:60]}"


def write_shard(folder: Path, name: str, shard: int, progress=None) -> None:
    """Pack one planned shard. Its tar is renamed into place, then its summary: whichever is missing is made again."""
    first, entries = shard_entries(folder / WORK / "plan", shard)
    file_name = f"{name}-{shard:06d}.tar"
    unfinished = folder / WORK / f"{file_name}.{os.uname().nodename}.{os.getpid()}"
    writer, rejected = ShardWriter(unfinished), []
    for number, entry in enumerate(entries, first):
        try:
            stretch = (None, None) if entry.offset is None else (entry.offset, entry.duration)
            clip = audio_module.make_clip(entry.audio, *stretch) if entry.audio else None
        except audio_module.ClipError as error:
            rejected.append(Fault(entry.id, error.reason, str(error), entry.corpus))
        else:
            if clip:
                writer.add(key_of(number, entry.id), clip.data, clip.codec, record_of(entry, clip.duration, clip.sample_rate))
            else:
                writer.add(key_of(number, entry.id), None, "", record_of(entry, 0.0, None))
            if progress is not None and clip:
                with progress.get_lock():
                    progress.value += clip.duration
    summary = writer.close(file_name)
    try:
        if len(summary.rows):
            os.replace(unfinished, folder / file_name)
        else:
            unfinished.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {folder / file_name}: {error.strerror}") from error
    header = {"name": file_name, "filesize": summary.filesize, "sha256": summary.sha256, "tasks": summary.tasks,
              "langs": summary.langs, "codecs": summary.codecs, "rejected": [fault.to_json() for fault in rejected]}
    replace_file(summary_path(folder, shard), json.dumps(header).encode() + b"\n" + summary.rows.tobytes())


def summary_path(folder: Path, shard: int) -> Path:
    return folder / WORK / "done" / f"{shard:06d}"


class Summaries:
    """The summaries of shards that hold samples, loaded one by one as write_index goes through them."""

    def __init__(self, folder: Path, shards: int):
        self.folder, self.shards = folder, shards

    def load(self, shard: int) -> tuple[ShardSummary, list[str]]:
        header, _, rows = summary_path(self.folder, shard).read_bytes().partition(b"\n")
        values = json.loads(header)
        rejected = values.pop("rejected")
        return ShardSummary(rows=np.frombuffer(rows, dtype=SAMPLE_DTYPE), **values), rejected

    def __iter__(self):
        for shard in range(self.shards):
            summary, _ = self.load(shard)
            if len(summary.rows):
                yield summary


_progress = None


def _start_worker(progress) -> None:
    global _progress
    _progress = progress
    import torch
    torch.set_num_threads(1)


def _work(folder: Path, name: str, shard: int) -> int:
    write_shard(folder, name, shard, _progress)
    return shard


def pack_shards(folder: Path, name: str, shards: list[int], hours: float, workers: int) -> None:
    """Pack the given planned shards in `workers` processes. A worker that dies, or an output that fails, is raised here."""
    import torch  # noqa: F401  loaded before the fork, so that workers share it instead of loading it each
    context = get_context("fork")
    progress = context.Value("d", 0.0)
    started, shown = time.monotonic(), 0.0
    with ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (progress,)) as pool:
        pending = {pool.submit(_work, folder, name, shard) for shard in shards}
        bar = tqdm(total=round(hours, 3), unit="h", desc=f"packing {len(shards)} shards", disable=None,
                   bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]")
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(progress.value / 3600 - shown)
                shown = progress.value / 3600
                bar.set_postfix_str(f"{shown / (time.monotonic() - started) * 3600:.0f} audio-hours/h, {len(pending)} shards left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()


def merge(folder: Path, name: str, plan: dict) -> dict:
    """Join all finished shards into the index and rejected.jsonl; then the working folder goes."""
    missing = [shard for shard in range(plan["shards"]) if not summary_path(folder, shard).exists()]
    if missing:
        raise UsageError(f"{len(missing)} of {plan['shards']} shards of {folder} are not packed yet (first: {missing[0]}): run the other parts")
    summaries, counts = Summaries(folder, plan["shards"]), Counter(plan["rejected"])
    unfinished = folder / WORK / "rejected.jsonl"
    with open(unfinished, "w") as out:
        with open(folder / WORK / "plan" / "rejected.jsonl") as planned:
            shutil.copyfileobj(planned, out)
        for shard in range(plan["shards"]):
            for line in summaries.load(shard)[1]:
                counts[json.loads(line)["reason"]] += 1
                out.write(line + "\n")
    if not any(True for _ in summaries):
        raise UsageError(f"no sample was left to pack; {unfinished} says why for each ({dict(counts)})")
    os.replace(unfinished, folder / "rejected.jsonl")
    index = write_index(folder, name, summaries, {"rejected": dict(sorted(counts.items()))})
    shutil.rmtree(folder / WORK)
    return index


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pack.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--manifest", action="append", required=True, help="JSONL, one sample a line; may be given several times")
    parser.add_argument("--out", required=True, type=Path, help="folder for shards and index")
    parser.add_argument("--name", help="shards are NAME-000000.tar ...; default: the name of --out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each writing a shard of its own")
    parser.add_argument("--shard-mb", type=float, help="about this many MB a shard; default: 256, less for small corpora")
    parser.add_argument("--shard-hours", type=float, help="about this many hours of audio a shard, instead of --shard-mb")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle over the whole corpus")
    parser.add_argument("--shuffle", choices=("samples", "none"), default="samples")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> dict:
    folder: Path = options.out
    name = options.name or folder.absolute().name
    for manifest in options.manifest:
        if not Path(manifest).is_file():
            raise UsageError(f"manifest {manifest} does not exist")
    if (folder / INDEX_NAME).exists():
        raise UsageError(f"{folder} is packed already ({INDEX_NAME} is there): give another --out or remove it")
    try:
        (folder / WORK / "done").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    plan_folder = folder / WORK / "plan"
    if not (plan_folder / "plan.json").exists():
        readers = [tqdm(Manifest(path), desc=f"planning {path}", unit=" samples", disable=None) for path in options.manifest]
        plan = make_plan(plan_folder, readers, seed=options.seed, shuffle=options.shuffle,
                         size=ShardSize(options.shard_mb, options.shard_hours))
    else:
        plan = json.loads((plan_folder / "plan.json").read_bytes())
    if not plan["samples"]:
        raise UsageError(f"nothing to pack: every line was rejected ({plan['rejected']}), see {plan_folder / 'rejected.jsonl'}")
    shards = [shard for shard in range(plan["shards"]) if not summary_path(folder, shard).exists()]
    if shards:
        seconds = np.load(plan_folder / "shards.npy").astype(SHARD_DTYPE)["seconds"][shards].sum()
        pack_shards(folder, name, shards, seconds / 3600, options.workers)
    return merge(folder, name, plan)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        index = run(options)
    except UsageError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"pack: {error}; free space or fix the folder, then run the same command again: it goes on", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("pack: a worker process died (out of memory?); run the same command again, with fewer --workers: it goes on", file=sys.stderr)
        return 1
    rejected = index["rejected"]
    print(f"{options.out}: {index['samples']} samples, {index['hours']:.2f} h in {len(index['shardlist'])} shards; "
          f"rejected {sum(rejected.values())} {rejected or ''}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
