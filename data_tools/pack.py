"""Pack corpora into WebDataset shards with an index.

    python data_tools/pack.py --corpus librispeech:/data/LibriSpeech --out DIR

    corpora --plan--> which sample in which shard --worker processes, a shard each--> NAME-000000.tar ...
    --merge--> index

Samples are planned before audio is touched, each worker writes whole shards, and a shard gets its name when
it is complete: the same command again after any interruption continues and ends in the same bytes, whatever
--workers. On a cluster every task of an array runs `--part i/N`; when all have ended, `--merge --out DIR`
writes the index. `--splits` without `--split` packs every split into a folder of its own, in one pass.
docs/corpora.md has an example for each kind of corpus.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository, not data_tools/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from core.audio import REFUSABLE, SAMPLE_RATE
from core.command_line import CommandParser, accept_old_name
from core.console import duration, one_line, plural, print_error, printable_line
from core.object_store import StoreError, check_url, folder_name, is_store_url, joined
from data_tools.audio import CODECS
from data_tools.audio import check_output as check_codec
from data_tools.corpora import Corpus, CorpusError, open_corpora, path_of
from data_tools.filters import Filters, SampleFilter, load_tokenizer
from data_tools.normalise import NORMALISERS
from data_tools.output import InUse, check_output, locked
from data_tools.packing import WORK, PackError, Packing, Planned, counted
from data_tools.plan import SHUFFLES, Layout, make_plans, plan_once
from data_tools.progress import watched
from data_tools.report import broken_clips, broken_lines, dry_report, probe, report
from data_tools.shards import INDEX_NAME, OutputError, ShardError, ShardIndex
from data_tools.upload import SCHEMES, Upload, work_folder

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_END_BYTES = 1 << 24  # of a corpus' file, read at both ends to know it again
# Options that change how the work is done but not the bytes that come out.
_NOT_IN_BYTES = {"out", "url", "work", "workers", "part", "merge", "dry_run", "max_broken_share"}
# Options that earlier versions did not have: without them, their folders are still those of the same command.
_ADDED = {"refuse"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser("data_tools/pack.py", __doc__, example="--corpus folder:clips --out shards/train")
    add = parser.add_argument_group("corpora").add_argument
    add(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME:PATH[,option=value]",
        help="a corpus by its format's name; repeatable",
    )
    add(
        "--manifest",
        action="append",
        default=[],
        metavar="M.jsonl",
        help="the same as --corpus manifest:M.jsonl",
    )
    add(
        "--allow-pipes",
        action="store_true",
        help="run the shell commands that a corpus gives in place of files",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, help="folder for shards and index, or its URL (s3://BUCKET/..., gs://...)")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="where --out is a URL: local folder for unfinished work; for --part a shared one",
    )
    add("--name", help="shards are NAME-000000.tar ...; default: the name of --out")
    add("--codec", choices=CODECS, default="flac", help="copy: compressed bytes as they are")
    add(
        "--rate",
        default=str(SAMPLE_RATE),
        help="samples a second, or keep (default: 16000); channels are mixed to one",
    )
    add("--shard-mb", type=float, help="about this many MB a shard; default: 256, less for small corpora")
    add("--shard-hours", type=float, help="about this many hours of audio a shard, instead of --shard-mb")
    add(
        "--shuffle",
        choices=SHUFFLES,
        default="samples",
        help="recordings: a recording's segments stay together (default: samples)",
    )
    add("--seed", type=int, default=0, help="of shuffle and splits")
    add(
        "--measure",
        action="store_true",
        help="write level, peak, clipping and estimated SNR of each clip into its JSON",
    )
    add(
        "--clearest",
        type=float,
        metavar="SECONDS",
        help="cut clips of task sound to their clearest stretch (the paper: about 3)",
    )
    add = parser.add_argument_group("text").add_argument
    add(
        "--normalise",
        choices=tuple(NORMALISERS),
        default="raw",
        help="transcripts: clean: NFC, plain quotation marks, no invisible characters; sentence: clean, and "
        "text in capitals alone in sentence case; the lower ones are clean, too",
    )
    add("--tokenizer", metavar="DIR", help="the LLM's tokenizer: counts tokens, needed by --ctc-frame-rate")
    add(
        "--ctc-text",
        choices=("raw", "lower", "lower_no_punctuation"),
        default="lower",
        help="as the recipe's data.ctc_text",
    )
    add = parser.add_argument_group(
        "filters (refused samples are counted, and named in rejected.jsonl)"
    ).add_argument
    add("--min-seconds", type=float, help="the shortest clip to keep")
    add("--max-seconds", type=float, help="the longest clip to keep")
    add("--min-rate", type=float, help="least characters of text a second")
    add("--max-rate", type=float, help="most characters of text a second")
    add("--languages", help="only these languages: en,de", dest="langs")
    accept_old_name(parser, "--langs", "--languages")
    add(
        "--ctc-frame-rate",
        type=float,
        help="CTC frames a second (25: Whisper, two frames stacked): refuse text that cannot fit",
    )
    add(
        "--max-wer",
        type=float,
        help="of the hypothesis column (data_tools.annotate --whisper) against the text; the paper: 0.10",
    )
    add(
        "--refuse",
        metavar="KIND,...",
        help=f"clips that are {', '.join(REFUSABLE)} (otherwise packed, counted, and named in findings.jsonl)",  # noqa: E501
    )
    add(
        "--drop-duplicates", action="store_true", help="by the sound_hash column (data_tools.annotate --hash)"
    )
    add(
        "--max-broken-share",
        type=float,
        default=0.5,
        help="stop when more lines and clips than this share are missing or broken",
    )
    add = parser.add_argument_group("splits").add_argument
    add(
        "--splits",
        metavar="train=0.9,valid=0.05,test=0.05",
        help="shares; each split becomes a folder of --out",
    )
    add(
        "--split-by",
        choices=("speaker", "recording", "id"),
        default="speaker",
        help="what is never on two sides of a split; speaker falls back on recording and id",
    )
    add("--split", metavar="SPLIT", help="pack this split alone, into --out itself", dest="take")
    accept_old_name(parser, "--take", "--split")
    add = parser.add_argument_group("work").add_argument
    add("--workers", type=int, default=os.cpu_count(), help="processes, each writing a shard of its own")
    add(
        "--part",
        metavar="i/N",
        help="pack every N-th shard, from i = 0 on (an array job); --merge joins the parts",
    )
    add("--merge", action="store_true", help="write the index of a folder whose parts are all packed")
    add(
        "--dry-run",
        action="store_true",
        help="read the corpora, print what would be packed and refused, keep nothing: other options may follow",  # noqa: E501
    )
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what argparse cannot, with its kind of error (exit code 2)."""
    options.corpus = [*options.corpus, *(f"manifest:{path}" for path in options.manifest)]
    del options.manifest
    if not options.corpus and not options.merge:
        parser.error("give --corpus NAME:PATH or --manifest M.jsonl")
    if options.rate != "keep" and not options.rate.isdigit():
        parser.error(f"--rate {options.rate}: a number of samples a second, or keep")
    if problem := check_codec(options.codec, None if options.rate == "keep" else int(options.rate)):
        parser.error(f"--rate {options.rate}: {problem}")
    options.refuse = sorted(set(options.refuse.split(","))) if options.refuse else None
    if unknown := [kind for kind in options.refuse or () if kind not in REFUSABLE]:
        parser.error(f"--refuse {unknown[0]}: {', '.join(REFUSABLE)} can be refused")
    if options.ctc_frame_rate and not options.tokenizer:
        parser.error("--ctc-frame-rate needs --tokenizer")
    if options.measure and options.codec == "copy":
        parser.error("--measure decodes, --codec copy does not: leave one out")
    if options.shard_mb and options.shard_hours:
        parser.error("--shard-mb or --shard-hours, not both")
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    if not 0 <= options.max_broken_share <= 1:
        parser.error(f"--max-broken-share {options.max_broken_share}: a share from 0 to 1")
    _check_out(parser, options)
    _check_names(parser, options)
    _check_splits(parser, options)
    if options.part:
        part, _, parts = options.part.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            parser.error(f"--part {options.part}: i/N with i from 0 to N-1")
        options.part = (int(part), int(parts))


def _check_out(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Turn --out into a local folder and, where it is a URL, the URL."""
    options.url = None
    if not is_store_url(options.out):
        if options.work is not None:
            parser.error("--work is for an --out that is a URL")
        options.out = Path(options.out)
        return
    try:
        check_url(options.out)
    except StoreError as error:
        parser.error(f"--out: {error}")
    options.url = options.out.rstrip("/")
    if options.url.partition("://")[0] not in SCHEMES:
        parser.error(
            f"--out {printable_line(options.url)}: pack writes to s3:// and gs://; pack into a folder, and "
            f"copy it: python -m data_tools.copy_packed FOLDER {printable_line(options.url)}"
        )
    if (options.part or options.merge) and options.work is None:
        parser.error("--part and --merge with a URL need --work DIR, the same for all parts")
    try:
        options.out = options.work or work_folder(options.url)
    except OutputError as error:
        parser.error(str(error))


def _check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for option, name in (
        ("--name", options.name),
        ("--out", folder_name(options.url or options.out.absolute())),
    ):
        if name is not None and (not name.isprintable() or "/" in name or name.startswith(".") or not name):
            parser.error(
                f"{option} {printable_line(name)}: shards are named after it, so it must be a plain file name"
            )


def _check_splits(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.take and not options.splits:
        parser.error("--split needs --splits")
    try:
        options.splits = {
            name: float(share)
            for name, share in (pair.split("=") for pair in (options.splits or "").split(",") if pair)
        }
    except ValueError:
        parser.error(f"--splits {options.splits}: NAME=SHARE, joined by commas")
    for name, share in options.splits.items():
        if not (re.fullmatch(r"\w[\w.-]*", name) and 0 < share < math.inf):
            parser.error(f"--splits {name}={share:g}: a name, and a share above 0")
    if options.take and options.take not in options.splits:
        parser.error(f"--split {options.take}: --splits knows {', '.join(options.splits)}")


def packing_of(options: argparse.Namespace) -> tuple[Packing, Layout]:
    filters = Filters(
        options.min_seconds,
        options.max_seconds,
        options.min_rate,
        options.max_rate,
        options.langs.split(",") if options.langs else None,
        options.max_wer,
        options.ctc_frame_rate,
        options.ctc_text,
        options.tokenizer,
        options.drop_duplicates,
    )
    sieve = SampleFilter(
        filters,
        options.normalise,
        options.splits,
        options.split_by,
        options.take,
        options.seed,
        options.allow_pipes,
        options.clearest,
    )
    packing = Packing(
        options.out,
        options.name or folder_name(options.url or options.out.absolute()),
        sieve,
        options.codec,
        None if options.rate == "keep" else int(options.rate),
        options.measure,
        frozenset(options.refuse or ()),
        options.max_broken_share,
        upload=Upload(options.url) if options.url else None,
    )
    return packing, Layout(
        options.seed, options.shuffle, options.codec, options.shard_mb, options.shard_hours
    )


def shaping_options(options: argparse.Namespace, name: str) -> dict:
    """Return the options that shape the bytes, and their digest."""
    values = {key: value for key, value in vars(options).items() if value is not None or key not in _ADDED}
    shaping = {key: value for key, value in values.items() if key not in _NOT_IN_BYTES} | {"name": name}
    return {
        "options": shaping,
        "digest": hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest(),
    }


def corpus_files(specifications: list[str]) -> dict[str, str]:
    """{path: size and digest} of corpora that are a file, e.g. a manifest. Of a large one its two ends are
    read, of 16 MiB each: an edit changes the size, or it is small."""
    fingerprints = {}
    for path in (path_of(specification) for specification in specifications):
        if path.is_file():
            size, digest = path.stat().st_size, hashlib.sha256()
            with open(path, "rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(max(file.tell(), size - _END_BYTES))
                digest.update(file.read())
            fingerprints[str(path)] = f"{size}:{digest.hexdigest()[:16]}"
    return fingerprints


def _unchanged(folder: Path | str, index: dict, now: dict[str, str]) -> None:
    """Errors: CorpusError where a corpus' file is another one than `index`, of a plan or a packed folder, was
    made from."""
    for path, fingerprint in now.items():
        if index.get("files", {}).get(path, fingerprint) != fingerprint:
            raise CorpusError(
                f"{path} has changed since {folder} was made from it: give another --out, or remove {folder}"
            )


@dataclass
class Job:
    """One folder to pack into: all samples, or one split."""

    split: str | None
    packing: Packing
    head: dict

    @property
    def folder(self) -> Path:
        return self.packing.folder

    @property
    def location(self) -> Path | str:
        return self.packing.location

    @property
    def plan_folder(self) -> Path:
        return self.folder / WORK / "plan"

    def index(self) -> dict | None:
        """The index of a folder that is finished; None for another one."""
        if self.packing.upload is not None:
            return self.packing.upload.index()
        path = self.folder / INDEX_NAME
        return json.loads(path.read_bytes()) if path.exists() else None

    @property
    def is_planned(self) -> bool:
        return (self.plan_folder / "plan.json").exists()


def jobs_of(options: argparse.Namespace) -> tuple[list[Job], Layout]:
    """What a command packs: one folder, or one for each split, just as the command with --split would."""
    jobs, files = [], corpus_files(options.corpus)
    splits = list(options.splits) if options.splits and not options.take else [options.take]
    for split in splits:
        own = copy(options)
        if split != options.take:
            own.take, own.out = split, options.out / split
            own.url = options.url and joined(options.url, split)
        packing, layout = packing_of(own)
        jobs.append(Job(split, packing, shaping_options(own, packing.name) | {"files": files}))
    return jobs, layout


def run(options: argparse.Namespace) -> str:
    """Carry out a command; returns what to print. Errors: CorpusError, PackError, OutputError,
    BrokenProcessPool."""
    if options.merge and not options.corpus:
        return _merge_alone(options)
    jobs, layout = jobs_of(options)
    folders = [job.folder for job in jobs]
    reports = {job.folder: text for job in jobs if (text := _finished(job)) is not None}
    jobs = [job for job in jobs if job.folder not in reports]
    if not jobs:
        return "\n".join(reports.values())
    corpora = open_corpora(options.corpus)
    if options.tokenizer:
        try:
            load_tokenizer(options.tokenizer)
        except (
            Exception
        ) as error:  # of a folder that others wrote: the libraries have no list of what it makes them raise
            raise CorpusError(f"--tokenizer {options.tokenizer}: {one_line(error)}") from None
    for job in jobs:
        check_output(job.folder)
        if job.packing.upload is not None:
            job.packing.upload.check(job.packing.name, job.head["digest"])
    if options.dry_run:
        return _dry_run(jobs, corpora, layout)
    with ExitStack() as stack:
        locks = {}
        for job in jobs:
            _prepare(job)
            locks[job.folder] = stack.enter_context(ExitStack())
            locks[job.folder].enter_context(locked(job.folder, None if options.merge else options.part))
            if job.index() is not None:  # another process has finished it in the meantime
                return run(options)
            if job.packing.upload is not None:
                job.packing.upload.begin(job.head["digest"], job.folder / WORK)
        _plan(jobs, corpora, layout)
        plans = {job.folder: json.loads((job.plan_folder / "plan.json").read_bytes()) for job in jobs}
        for job in jobs:
            _check_same(job, plans[job.folder])
        for job in jobs:
            _check_content(job, plans[job.folder], jobs)
        said: set[str] = set()
        for job in jobs:
            plan = _with_new_notes(plans[job.folder], said)
            reports[job.folder] = _pack(job, plan, options, locks[job.folder])
    return "\n".join(reports[folder] for folder in folders)


def _with_new_notes(plan: dict, said: set[str]) -> dict:
    """A plan without the notes that were said already: those about the corpora are in the plan of each
    split."""
    new = [note for note in plan.get("notes", []) if note not in said]
    said.update(new)
    return plan | {"notes": new}


def _merge_alone(options: argparse.Namespace) -> str:
    """--merge --out DIR: what is unfinished in a folder, or in the folders of its splits."""
    folders = [
        path.parents[2]
        for pattern in ("", "*/")
        for path in sorted(options.out.glob(f"{pattern}{WORK}/plan/plan.json"))
    ]
    if not folders:
        reason = ": it has its index" if (options.out / INDEX_NAME).exists() else ""
        raise PackError(f"{options.out} holds no unfinished packing to merge{reason}")
    reports: list[str] = []
    said: set[str] = set()
    for folder in folders:
        plan = json.loads((folder / WORK / "plan" / "plan.json").read_bytes())
        packing = Packing(
            folder,
            plan["options"]["name"],
            max_broken_share=options.max_broken_share,
            planned=_planned(plan),
            upload=_upload_of(options, folder),
        )
        job = Job(None, packing, {})
        with ExitStack() as lock:
            lock.enter_context(locked(folder, None))
            if job.index() is not None:
                raise PackError(f"{packing.location} holds no unfinished packing to merge: it has its index")
            reports.append(_merge(job, _with_new_notes(plan, said), lock))
    return "\n".join(reports)


def _upload_of(options: argparse.Namespace, folder: Path) -> Upload | None:
    """Where a folder of the work folder goes: --out's URL, or a split's below it."""
    if not options.url:
        return None
    return Upload(options.url if folder == options.out else joined(options.url, folder.name))


def _merge(job: Job, plan: dict, lock: ExitStack) -> str:
    """Merge a folder; returns what to print."""
    text = report(job.packing, job.packing.merge(plan, lock), plan)
    if job.packing.upload is not None:
        job.packing.upload.remove_copies(job.folder)
    return text


def _finished(job: Job) -> str | None:
    """What to say of a folder that has its index; None for another one. Errors: CorpusError where it is
    another command's."""
    finished_index = job.index()
    if finished_index is None:
        return None
    index = ShardIndex.load(job.location)
    if finished_index.get("options") != job.head["digest"]:
        raise CorpusError(
            f"{job.location} is packed already, with other options: give another --out, or remove it"
        )
    _unchanged(job.location, finished_index, job.head["files"])
    # A kill may have come while the merge was removing these.
    shutil.rmtree(job.folder / WORK, ignore_errors=True)
    if job.packing.upload is not None:
        job.packing.upload.end()
    return f"{job.location} is packed already: {plural(len(index), 'sample')}, {duration(index.hours * 3600)}"


def _prepare(job: Job) -> None:
    try:
        (job.folder / WORK / "done").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {job.folder}: {error.strerror}") from error
    job.packing.clear_unfinished()


def _plan(jobs: list[Job], corpora: list[Corpus], layout: Layout) -> None:
    """Make the plans that are missing, in one pass over the corpora; parts of an array job make them once."""

    def make(own: Path) -> None:
        rest = [job for job in jobs if not job.is_planned]
        # The folder that the lock is for is named by the lock's owner, the others are put in place before it.
        places = {
            job.split: own if job is rest[0] else own.with_name(f"{own.name}.{job.split}") for job in rest
        }
        targets = {job.split: (places[job.split], job.head) for job in rest}
        make_plans(targets, corpora, rest[0].packing.sieve, layout, _watch)
        for job in rest[1:]:
            shutil.rmtree(job.plan_folder, ignore_errors=True)
            try:
                os.rename(places[job.split], job.plan_folder)
            except OSError as error:
                raise OutputError(f"cannot write {job.plan_folder}: {error.strerror}") from error

    while lacking := [job for job in jobs if not job.is_planned]:
        plan_once(lacking[0].plan_folder, make)


def _watch(corpus: Corpus) -> Iterator:
    return watched(corpus, f"planning {printable_line(corpus.name)}")


def _planned(plan: dict) -> Planned:
    return Planned(plan.get("items", 0), plan.get("faults", 0))


def _check_same(job: Job, plan: dict) -> None:
    """Errors: CorpusError for a plan that was made by another command or from another file."""
    folder, head = job.folder, job.head
    if plan["digest"] != head["digest"]:
        differing = [
            key
            for key, value in head["options"].items()
            if plan["options"].get(key) != json.loads(json.dumps(value))
        ]
        raise CorpusError(
            f"{folder} was begun with other options ({', '.join(differing)}): finish it with those, or "
            f"remove {folder}"
        )
    _unchanged(folder, plan, head["files"])


def _check_content(job: Job, plan: dict, jobs: list[Job]) -> None:
    """Errors: CorpusError for a plan without samples; PackError where too much is broken. The plans of `jobs`
    are removed then, but for what they refuse: the corpus may be fixed, or split in another way."""
    problem = broken_lines(plan, job.packing.max_broken_share)
    if not problem and plan["samples"]:
        return
    where = f", see {job.folder / 'rejected.jsonl'}" if plan["rejected"] and jobs else ""
    for other in jobs:
        if not any((other.folder / WORK / "done").glob("[0-9]*")):
            (other.plan_folder / "rejected.jsonl").replace(other.folder / "rejected.jsonl")
            shutil.rmtree(other.folder / WORK, ignore_errors=True)
    if plan["samples"]:
        raise PackError(f"{problem}{where}")
    if not plan.get("items", 1):
        raise CorpusError("nothing to pack: the corpus is empty")
    notes = "".join(f". {note}" for note in plan["notes"])
    if not plan["rejected"]:
        raise CorpusError(f"nothing to pack for {job.split}{notes}")
    first = "; ".join(f"{reason}: {example}" for reason, example in list(plan["examples"].items())[:3])
    what = f"every sample was refused ({counted(plan['rejected'])})"
    raise CorpusError(f"nothing to pack: {what}{where}. For example {first}{notes}")


def _pack(job: Job, plan: dict, options: argparse.Namespace, lock: ExitStack) -> str:
    """Pack what is left of a planned folder, and merge it unless others have parts of it."""
    packing = job.packing
    packing.planned = _planned(plan)
    if not options.merge:
        packing.forget_lost(plan["shards"])
        part, parts = options.part or (0, 1)
        shards = [shard for shard in packing.missing(plan["shards"]) if shard % parts == part]
        if shards:
            packing.run(
                shards,
                float(np.load(job.plan_folder / "shards.npy")["seconds"][shards].sum()) / 3600,
                options.workers,
            )
        if options.part:
            missing = len(packing.missing(plan["shards"]))
            return (
                f"part {part}/{parts} of {job.location} is packed; {missing} of {plan['shards']} shards are "
                f"left to other parts, "
                f"then: pack.py --merge --out {_out(options)}"
            )
    return _merge(job, plan, lock)


def _out(options: argparse.Namespace) -> str:
    """--out, and --work where it is a URL, as they were given."""
    return f"{options.url} --work {options.work}" if options.url else str(options.out)


def _dry_run(jobs: list[Job], corpora: list[Corpus], layout: Layout) -> str:
    """Plan, look at some clips, keep nothing."""
    reports: list[str] = []
    said: set[str] = set()
    with _scratch(jobs[0].folder) as scratch:
        new = [job for job in jobs if not job.is_planned]
        places = {job.split: scratch / (job.split or "plan") for job in new}
        if new:
            targets = {job.split: (places[job.split], job.head) for job in new}
            make_plans(targets, corpora, new[0].packing.sieve, layout, _watch)
        for job in jobs:
            place = places.get(job.split, job.plan_folder)
            plan = json.loads((place / "plan.json").read_bytes())
            _check_same(job, plan)
            name = f"{job.location}: " if len(jobs) > 1 else ""
            shown, filters = _with_new_notes(plan, said), job.packing.sieve.filters
            if not plan["samples"] or broken_lines(plan, job.packing.max_broken_share):
                print("\n".join([*reports, name + dry_report(shown, None, filters)]))
                _check_content(job, plan, [])
            probed = probe(place, plan, job.packing)
            reports.append(name + dry_report(shown, probed, filters))
            if problem := broken_clips(plan, probed, job.packing.max_broken_share):
                print("\n".join(reports))
                raise PackError(problem)
    for job in jobs:
        if job.packing.upload is not None:
            continue
        parent = next(place for place in (job.folder, *job.folder.parents) if place.exists())
        if not os.access(parent, os.W_OK) or not parent.is_dir():
            reports.append(
                f"{job.folder} cannot be written: {parent} is {'read-only' if parent.is_dir() else 'a file'}"
            )
    return "\n".join(reports)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for a plan that is not kept: in the output where that is begun already, else where temporary
    files go."""
    work_folder = folder / WORK
    try:
        name = f"trial.{os.uname().nodename}.{os.getpid()}."  # so named, it is cleared away after a kill
        path = Path(
            tempfile.mkdtemp(prefix=name, dir=work_folder if os.access(work_folder, os.W_OK) else None)
        )
    except OSError as error:
        raise OutputError(f"cannot write {tempfile.gettempdir()}: {error.strerror}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 stopped on the way (the same command continues), 2 the command or the corpus has
    to be fixed first."""
    options = parse_arguments(argv)
    again = "run the same command again: it continues"
    try:
        print(run(options))
        return 0
    except (CorpusError, ShardError, PackError) as error:
        return _end(str(error), 2)
    except InUse as error:
        return _end(str(error), 1)
    except OutputError as error:
        full = any(os.strerror(code) in str(error) for code in _NO_ROOM)
        return _end(f"{error}; {'free space there' if full else 'fix that'}, then {again}", 1)
    except KeyboardInterrupt:
        return _end(f"interrupted; {again}", 130)
    except BrokenProcessPool as error:
        where = f" while it wrote {error}" if str(error) else ""
        return _end(f"a worker process died{where} (out of memory?); with fewer --workers, {again}", 1)


def _end(message: str, code: int) -> int:
    print_error("error:", " ".join(message.split()))
    return code


if __name__ == "__main__":
    sys.exit(main())
