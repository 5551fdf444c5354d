"""Planned shards to tars: worker processes, each writing whole shards; what is finished is never done again.

A shard's tar is written under .pack/, brought to the disk, renamed into place, and only then is its summary
written: a shard counts as done when its summary is there. Whatever a kill leaves, the next run makes the
missing shards again, the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from core.audio import MAX_SECONDS, SAMPLE_RATE, Finding
from core.console import OneLine, duration, plural, printable_line
from data_tools import quality
from data_tools.audio import Clip, make_clip
from data_tools.corpora import Entry, Rejection, fault_of
from data_tools.filters import FILTERS, SampleFilter, load_tokenizer
from data_tools.output import WORK
from data_tools.plan import shard_entries
from data_tools.progress import Progress
from data_tools.shards import (
    OPTIONAL_FIELDS,
    SAMPLE_DTYPE,
    OutputError,
    ShardSummary,
    ShardWriter,
    replace_file,
    write_index,
)
from data_tools.sources import ClipError
from data_tools.upload import Upload
from data_tools.workers import start_worker

FINDINGS_NAME = "findings.jsonl"
_ENOUGH_TO_JUDGE = 100  # clips before a share of broken ones means something while others are still to come


class PackError(OneLine, RuntimeError):
    """Packing cannot continue or be joined; one line: what, where, what to do."""


@dataclass(frozen=True)
class Planned:
    """How many lines and clips a plan was made from, and how many are faults already."""

    items: int = 0
    faults: int = 0

    def broken_share(self, broken: int, clips: int) -> float:
        """The share of all that is broken, where `broken` of the `clips` tried so far are."""
        share = self.faults / self.items if self.items else 0.0
        return share + (1 - share) * (broken / clips if clips else 0.0)


@dataclass
class Packing:
    """One output folder and everything that its shards' bytes depend on."""

    folder: Path
    name: str
    sieve: SampleFilter = field(default_factory=SampleFilter)
    codec: str = "flac"
    rate: int | None = SAMPLE_RATE
    measure: bool = False
    refuse: frozenset[str] = frozenset()  # kinds of findings (core/audio.py) that cost a clip its place
    max_broken_share: float = 0.5
    planned: Planned = Planned()
    upload: Upload | None = None  # where finished shards and the index go instead of `folder`

    @property
    def location(self) -> Path | str:
        """Where readers will find what is packed."""
        return self.folder if self.upload is None else self.upload.url

    def file_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06d}.tar"

    def summary_path(self, shard: int) -> Path:
        return self.folder / WORK / "done" / f"{shard:06d}"

    def write_shard(self, shard: int, progress=None) -> tuple[int, int]:
        """Pack one planned shard; returns (clips tried, clips broken)."""
        first, entries = shard_entries(self.folder / WORK / "plan", shard)
        name = self.file_name(shard)
        unfinished = self.folder / WORK / f"{name}.{os.uname().nodename}.{os.getpid()}"
        writer, rejected, noted = ShardWriter(unfinished), [], []
        for number, entry in enumerate(entries, first):
            try:
                fault, seconds, findings = self._add(writer, number, entry)
                noted += [] if fault else [finding_line(entry, finding) for finding in findings]
            except ClipError as error:
                fault = Rejection(entry.id, error.reason, str(error), entry.corpus)
                seconds = error.seconds or entry.duration or 0.0
            except OutputError:
                raise
            except Exception as error:  # whatever one sample leads to: it is no reason to stop
                reason = "bad_row" if isinstance(error, ValueError) else "failed"
                fault, seconds = fault_of(error, entry.id, entry.corpus, reason), entry.duration or 0.0
            if fault is not None:
                rejected.append((fault, seconds))
            if progress is not None:
                with progress.get_lock():
                    progress.value += seconds
        summary = writer.close(name)
        try:
            if len(summary.rows) and self.upload is None:
                os.replace(unfinished, self.folder / name)
            else:
                if len(summary.rows) and self.upload is not None:
                    self.upload.put(unfinished, name)
                unfinished.unlink()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / name}: {error.strerror}") from error
        header = {
            "name": name,
            "filesize": summary.filesize,
            "sha256": summary.sha256,
            "tasks": summary.tasks,
            "langs": summary.langs,
            "codecs": summary.codecs,
            "rejected": [[fault.to_json(), seconds] for fault, seconds in rejected],
            "findings": noted,
        }
        replace_file(self.summary_path(shard), json.dumps(header).encode() + b"\n" + summary.rows.tobytes())
        return len(entries), sum(fault.reason not in FILTERS for fault, _ in rejected)

    def _add(
        self, writer: ShardWriter, number: int, entry: Entry
    ) -> tuple[Rejection | None, float, Sequence[Finding]]:
        """Decode, judge and append one sample; (why not, seconds, findings). Errors: ClipError, ValueError
        (no JSON)."""
        key = f"{number:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', entry.id)[:60]}"
        if entry.audio is None:
            writer.add(key, None, "", record_of(entry, 0.0, None))
            return None, 0.0, ()
        clip, fault = self.clip_of(entry)
        if fault is not None:
            return fault, clip.duration, ()
        record = record_of(entry, clip.duration, clip.sample_rate)
        if self.measure and clip.samples is not None:
            record["quality"] = quality.measure(clip.samples, clip.sample_rate)
        writer.add(key, clip.data, clip.codec, record, tokens=len(self.sieve.token_ids(entry.text)))
        return None, clip.duration, clip.findings

    def clip_of(self, entry: Entry) -> tuple[Clip, Rejection | None]:
        """An entry's audio as it would be packed, and why it is not. Errors: ClipError."""
        cut, seconds = None, self.sieve.clearest_seconds
        if seconds and entry.task == "sound":
            cut = lambda samples, rate: quality.clearest(samples, rate, seconds)  # noqa: E731
        # A cut needs samples, so copy cannot pass such a clip through.
        codec = "flac" if self.codec == "copy" and cut is not None else self.codec
        # What is too long is refused before it is decoded: a clip of days would take all memory.
        most = self.sieve.filters.max_seconds
        if most is None or cut is not None:  # the filter judges what a cut leaves
            most = MAX_SECONDS
        assert entry.audio is not None  # text samples are written without a clip
        clip = make_clip(
            entry.audio, entry.offset, entry.duration, codec=codec, rate=self.rate, cut=cut, max_seconds=most
        )
        if fault := self.sieve.judge_clip(entry, clip.duration):
            return clip, fault
        if refused := next((finding for finding in clip.findings if finding.kind in self.refuse), None):
            return clip, Rejection(entry.id, refused.kind, refused.detail, entry.corpus)
        if len(clip.data) >= 2**32:
            raise ClipError(
                "too_large", f"{entry.audio}: {len(clip.data)} bytes, a shard's member holds less than 4 GiB"
            )
        return clip, None

    def run(self, shards: list[int], hours: float, workers: int) -> None:
        """Pack the given planned shards in `workers` processes.

        Errors: OutputError (raised in a worker, re-raised here), PackError past the share of broken clips,
        BrokenProcessPool for a worker that died, its text naming the shards that were being written.
        """
        if self.sieve.filters.tokenizer:
            load_tokenizer(self.sieve.filters.tokenizer)
        if self.upload is not None:
            self.upload.close()  # each worker has a client of its own
        context = get_context("fork")
        progress = context.Value("d", 0.0)
        pool = ProcessPoolExecutor(
            min(workers, len(shards)), context, _start_worker, (self, progress, os.getpid())
        )
        try:
            self._follow({pool.submit(_work, shard) for shard in shards}, hours, progress)
        except BrokenProcessPool:
            pool.shutdown(wait=True)  # the other workers end too, each inside its shard
            names = sorted(
                path.name.rpartition(".tar.")[0] for path in self._left_behind() if ".tar." in path.name
            )
            raise BrokenProcessPool(" or ".join(f"{name}.tar" for name in names)) from None
        finally:
            # Shards in the queue are dropped; one that is being written when another fails ends
            # first.
            pool.shutdown(wait=True, cancel_futures=True)

    def _follow(self, pending: set[Future], hours: float, progress) -> None:
        checked, broken = 0, 0
        with Progress(f"packing {plural(len(pending), 'shard')}", hours, " h", decimals=2) as display:
            display.begin(f"about {duration(hours * 3600)} of audio; a line a minute follows")
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    clips, bad = future.result()
                    checked, broken = checked + clips, broken + bad
                now = progress.value / 3600
                # Durations that the corpus does not give are guesses: the total moves when they turn out to
                # be low.
                display.total = max(display.total, now)
                display.to(now, f"{plural(len(pending), 'shard')} left")
                if checked >= _ENOUGH_TO_JUDGE:
                    self._check_share(broken, checked)

    def _check_share(self, broken: int, checked: int) -> None:
        """Errors: PackError where more is broken than allowed, faults found while planning included."""
        if self.planned.broken_share(broken, checked) > self.max_broken_share:
            before = (
                f", and {self.planned.faults:,} of {self.planned.items:,} lines before"
                if self.planned.faults
                else ""
            )
            raise PackError(
                f"{broken:,} of {checked:,} clips are missing or broken{before}: stopped. "
                f"{self._first_fault()} "
                f"Fix the corpus, remove {self.folder} and run again, or raise --max-broken-share"
            )

    def _first_fault(self) -> str:
        for path in sorted((self.folder / WORK / "done").glob("[0-9]*")):
            for line, _ in self.load(int(path.name))[1]:
                fault = json.loads(line)
                if fault["reason"] not in FILTERS:
                    return printable_line(f"The first: {fault['id']}: {fault['reason']}: {fault['detail']}.")
        return ""

    def load(self, shard: int) -> tuple[ShardSummary, list]:
        """A finished shard's summary and its [reject line, seconds] pairs."""
        header, _, rows = self.summary_path(shard).read_bytes().partition(b"\n")
        values = json.loads(header)
        rejected = values.pop("rejected")
        values.pop("findings", None)
        return ShardSummary(rows=np.frombuffer(rows, dtype=SAMPLE_DTYPE), **values), rejected

    def findings(self, shard: int) -> list[str]:
        """What was noticed about a finished shard's clips: lines of findings.jsonl."""
        return json.loads(self.summary_path(shard).read_bytes().partition(b"\n")[0]).get("findings", [])

    def clear_unfinished(self) -> None:
        """Remove what killed processes of this machine left half written (those of other machines go with the
        merge)."""
        for path in self._left_behind():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _left_behind(self) -> list[Path]:
        """Unfinished work of this machine's processes that are no more."""
        here = f".{os.uname().nodename}."
        paths = (self.folder / WORK).glob(
            f"*{here}*"
        )  # WHAT.MACHINE.PROCESS, and a thread's number behind it for a plan
        return [
            path
            for path in paths
            if not Path(f"/proc/{path.name.rpartition(here)[2].partition('.')[0]}").exists()
        ]

    def missing(self, shards: int) -> list[int]:
        return [shard for shard in range(shards) if not self.summary_path(shard).exists()]

    def forget_lost(self, shards: int) -> None:
        """Count shards as missing that are done and no longer in the object store."""
        if self.upload is None:
            return
        done = [shard for shard in range(shards) if self.summary_path(shard).exists()]
        expected = {}
        for shard in done:
            summary, _ = self.load(shard)
            if len(summary.rows):
                expected[shard] = summary.filesize
        sizes = self.upload.sizes(self.file_name(shard) for shard in expected)
        for shard, size in expected.items():
            if sizes[self.file_name(shard)] != size:
                self.summary_path(shard).unlink()

    def merge(self, plan: dict, lock: AbstractContextManager | None = None) -> dict:
        """Join all finished shards into index and rejected.jsonl; then the working folder goes. Returns the
        index.

        lock: held while this works; let go before the folder that it is in is removed.
        """
        with lock or nullcontext():
            self.forget_lost(plan["shards"])
            index = self._merge(plan)
            if self.upload is not None:
                self.upload.finish(self.folder)
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        return index

    def _merge(self, plan: dict) -> dict:
        missing = self.missing(plan["shards"])
        if missing:
            some = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            raise PackError(
                f"{len(missing)} of {plan['shards']} shards of {self.location} are not packed yet (numbers "
                f"{some}): "
                "run the parts that hold them again, then merge"
            )
        counts, seconds = (
            Counter(plan["rejected"]),
            Counter({reason: hours * 3600 for reason, hours in plan["rejected_hours"].items()}),
        )
        unfinished, broken, clips = self.folder / WORK / "rejected.jsonl", 0, 0
        try:
            with open(unfinished, "w", encoding="utf-8") as out:
                with open(self.folder / WORK / "plan" / "rejected.jsonl", encoding="utf-8") as planned:
                    shutil.copyfileobj(planned, out)
                for shard in range(plan["shards"]):
                    summary, rejected = self.load(shard)
                    clips += len(summary.rows) + len(rejected)
                    for line, duration in rejected:
                        reason = json.loads(line)["reason"]
                        counts[reason] += 1
                        seconds[reason] += duration
                        broken += reason not in FILTERS
                        out.write(line + "\n")
            if not any(True for _ in self._summaries(plan["shards"])):
                os.replace(unfinished, self.folder / "rejected.jsonl")
                shutil.rmtree(
                    self.folder / WORK, ignore_errors=True
                )  # so that the same command packs a fixed corpus
                raise PackError(
                    f"no sample was left to pack ({counted(counts)}): see {self.folder / 'rejected.jsonl'}"
                )
            self._check_share(broken, clips)
            os.replace(unfinished, self.folder / "rejected.jsonl")
        except OSError as error:
            raise OutputError(f"cannot write {unfinished}: {error.strerror}") from error
        report = {
            "findings": self._write_findings(plan["shards"]),
            "rejected": dict(sorted(counts.items())),
            "other_splits": plan["other_splits"],
            "rejected_hours": {reason: round(value / 3600, 6) for reason, value in sorted(seconds.items())},
            "options": plan["digest"],
            "files": plan.get("files", {}),  # by which a corpus is known again; an older plan has none
        }
        if plan.get("ignored"):
            report["ignored"] = plan["ignored"]
        summaries, extra = _Again(lambda: self._summaries(plan["shards"])), report
        return write_index(self.folder, self.name, summaries, extra, scratch=self.folder / WORK)

    def _write_findings(self, shards: int) -> dict[str, int]:
        """Name in findings.jsonl what was noticed about packed clips; {kind: clips}."""
        counts: Counter[str] = Counter()
        unfinished, path = self.folder / WORK / FINDINGS_NAME, self.folder / FINDINGS_NAME
        try:
            with open(unfinished, "w", encoding="utf-8") as out:
                for shard in range(shards):
                    for line in self.findings(shard):
                        counts[json.loads(line)["finding"]] += 1
                        out.write(line + "\n")
            if counts:
                os.replace(unfinished, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        return dict(sorted(counts.items()))

    def _summaries(self, shards: int):
        for shard in range(shards):
            summary, _ = self.load(shard)
            if len(summary.rows):
                yield summary


def counted(counts: dict[str, int]) -> str:
    """Counts as a sentence has them: bad_json 3, no_text 1."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


class _Again:
    """An iterable that starts anew each time."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        return self.start()


def finding_line(entry: Entry, finding: Finding) -> str:
    """A line of findings.jsonl."""
    record = {"id": entry.id, "finding": finding.kind, "detail": finding.detail, "corpus": entry.corpus}
    return json.dumps(record, ensure_ascii=False)


def record_of(entry: Entry, duration: float, sample_rate: int | None) -> dict:
    """What KEY.json holds."""
    record = {
        "id": entry.id,
        "corpus": entry.corpus,
        "task": entry.task,
        "text": entry.text,
        "lang": entry.lang,
        "duration": round(duration, 6),
        "sample_rate": sample_rate,
    }
    record.update({name: value for name in OPTIONAL_FIELDS if (value := getattr(entry, name)) is not None})
    return record


_packing: Packing  # of a worker process
_progress = None


def _start_worker(packing: Packing, progress, parent: int) -> None:
    global _packing, _progress
    _packing, _progress = packing, progress
    start_worker(parent)


def _work(shard: int) -> tuple[int, int]:
    return _packing.write_shard(shard, _progress)
