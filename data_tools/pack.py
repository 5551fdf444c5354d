"""Corpora to shards: `python data_tools/pack.py --corpus librispeech:/data/LibriSpeech --out DIR`.

    corpora --plan--> which sample in which shard --worker processes, a shard each--> NAME-000000.tar ... --merge--> index

Samples are planned before audio is touched, each worker writes whole shards, and a shard gets its name when it is complete:
the same command again after any interruption goes on and ends in the same bytes, whatever --workers. On a cluster every
task of an array runs `--part i/N`; when all have ended, `--merge --out DIR` writes the index. docs/data.md has an example
for each kind of corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository, not data_tools/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from core.audio import REFUSABLE, SAMPLE_RATE
from core.console import one_line
from core.languages import is_known
from core.samples import INSTRUCTIONS
from data_tools.audio import CODECS, check_output
from data_tools.corpora import Corpus, CorpusError, path_of
from data_tools.filters import Filters, Sieve, load_tokenizer
from data_tools.normalise import NORMALISERS
from data_tools.packing import FINDINGS_NAME, WORK, PackError, Packing
from data_tools.plan import SHUFFLES, Layout, make_plan, plan_once
from data_tools.shards import INDEX_NAME, OutputError, ShardError, ShardIndex

# Options that change how the work is done but not the bytes that come out.
_SHOWN_IDS = 5  # of each kind of finding, in the report
_END_BYTES = 1 << 24  # of a corpus' file, read at both ends to know it again
_NOT_IN_BYTES = {"out", "workers", "part", "merge", "dry_run", "max_broken_share"}
# Options that earlier versions did not have: without them, their folders are still those of the same command.
_ADDED = {"refuse"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("corpora").add_argument
    add(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME:PATH[,option=value]",
        help="a corpus by its format's name; repeatable",
    )
    add("--manifest", action="append", default=[], metavar="M.jsonl", help="the same as --corpus manifest:M.jsonl")
    add("--allow-pipes", action="store_true", help="run the shell commands that a corpus gives in place of files")
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, type=Path, help="folder for shards and index")
    add("--name", help="shards are NAME-000000.tar ...; default: the name of --out")
    add("--codec", choices=CODECS, default="flac", help="copy: compressed bytes as they are")
    add("--rate", default=str(SAMPLE_RATE), help="samples a second, or keep (default: 16000); channels are mixed to one")
    add("--shard-mb", type=float, help="about this many MB a shard; default: 256, less for small corpora")
    add("--shard-hours", type=float, help="about this many hours of audio a shard, instead of --shard-mb")
    add(
        "--shuffle",
        choices=SHUFFLES,
        default="samples",
        help="recordings: a recording's segments stay together (default: samples)",
    )
    add("--seed", type=int, default=0, help="of shuffle and splits")
    add("--measure", action="store_true", help="write level, peak, clipping and estimated SNR of each clip into its JSON")
    add(
        "--clearest", type=float, metavar="SECONDS", help="cut clips of task sound to their clearest stretch (the paper: about 3)"
    )
    add = parser.add_argument_group("text").add_argument
    add("--normalise", choices=tuple(NORMALISERS), default="raw", help="transcripts: see data_tools/normalise.py")
    add("--tokenizer", metavar="DIR", help="the LLM's tokenizer: counts tokens, needed by --ctc-frame-rate")
    add("--ctc-text", choices=("raw", "lower", "lower_no_punctuation"), default="lower", help="as the recipe's data.ctc_text")
    add = parser.add_argument_group("filters (refused samples are counted, and named in rejected.jsonl)").add_argument
    add("--min-seconds", type=float)
    add("--max-seconds", type=float)
    add("--min-rate", type=float, help="characters of text a second")
    add("--max-rate", type=float)
    add("--langs", help="only these languages: en,de")
    add("--ctc-frame-rate", type=float, help="CTC frames a second (25: Whisper, two frames stacked): refuse text that cannot fit")
    add(
        "--max-wer", type=float, help="of the hypothesis column (data_tools.annotate --whisper) against the text; the paper: 0.10"
    )
    add(
        "--refuse",
        metavar="KIND,...",
        help=f"clips that are {', '.join(REFUSABLE)} (otherwise packed, counted, and named in findings.jsonl)",
    )
    add("--drop-duplicates", action="store_true", help="by the sound_hash column (data_tools.annotate --hash)")
    add("--max-broken-share", type=float, default=0.5, help="stop when more clips than this share are missing or broken")
    add = parser.add_argument_group("splits").add_argument
    add("--splits", metavar="train=0.9,valid=0.05,test=0.05", help="shares; with --take")
    add("--split-by", choices=("speaker", "recording", "id"), default="speaker", help="what is never on two sides of a split")
    add("--take", metavar="SPLIT", help="pack this split")
    add = parser.add_argument_group("work").add_argument
    add("--workers", type=int, default=os.cpu_count(), help="processes, each writing a shard of its own")
    add("--part", metavar="i/N", help="pack every N-th shard, from i = 0 on (an array job); --merge joins the parts")
    add("--merge", action="store_true", help="write the index of a folder whose parts are all packed")
    add(
        "--dry-run",
        action="store_true",
        help="read the corpora, print what would be packed and refused, keep nothing: other options may follow",
    )
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What argparse cannot tell, as argparse would say it (exit code 2)."""
    options.corpus = [*options.corpus, *(f"manifest:{path}" for path in options.manifest)]
    del options.manifest
    if not options.corpus and not options.merge:
        parser.error("give --corpus NAME:PATH or --manifest M.jsonl")
    if options.rate != "keep" and not options.rate.isdigit():
        parser.error(f"--rate {options.rate}: a number of samples a second, or keep")
    if problem := check_output(options.codec, None if options.rate == "keep" else int(options.rate)):
        parser.error(f"--rate {options.rate}: {problem}")
    options.refuse = sorted(set(options.refuse.split(","))) if options.refuse else None
    if unknown := [kind for kind in options.refuse or () if kind not in REFUSABLE]:
        parser.error(f"--refuse {unknown[0]}: {', '.join(REFUSABLE)} can be refused")
    if options.ctc_frame_rate and not options.tokenizer:
        parser.error("--ctc-frame-rate needs --tokenizer")
    if options.measure and options.codec == "copy":
        parser.error("--measure decodes, --codec copy does not: leave one of them out")
    if options.shard_mb and options.shard_hours:
        parser.error("--shard-mb or --shard-hours, not both")
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    if bool(options.splits) != bool(options.take):
        parser.error("--splits and --take go together")
    try:
        options.splits = {
            name: float(share) for name, share in (pair.split("=") for pair in (options.splits or "").split(",") if pair)
        }
    except ValueError:
        parser.error(f"--splits {options.splits}: NAME=SHARE, joined by commas")
    if options.take and options.take not in options.splits:
        parser.error(f"--take {options.take}: --splits knows {', '.join(options.splits)}")
    if options.part:
        part, _, parts = options.part.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            parser.error(f"--part {options.part}: i/N with i from 0 to N-1")
        options.part = (int(part), int(parts))


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
    sieve = Sieve(filters, options.normalise, options.splits, options.split_by, options.take, options.seed, options.allow_pipes,
                  options.clearest)
    packing = Packing(
        options.out,
        options.name or options.out.absolute().name,
        sieve,
        options.codec,
        None if options.rate == "keep" else int(options.rate),
        options.measure,
        frozenset(options.refuse or ()),
        options.max_broken_share,
    )
    return packing, Layout(options.seed, options.shuffle, options.codec, options.shard_mb, options.shard_hours)


def shaping_options(options: argparse.Namespace, name: str) -> dict:
    """The options that shape the bytes, and a digest of them."""
    given = {key: value for key, value in vars(options).items() if value is not None or key not in _ADDED}
    shaping = {key: value for key, value in given.items() if key not in _NOT_IN_BYTES} | {"name": name}
    return {"options": shaping, "digest": hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()}


def corpus_files(specifications: list[str]) -> dict[str, str]:
    """{path: size and digest} of corpora that are a file, e.g. a manifest. Of a large one its two ends are read, of 16 MiB each:
    an edit changes the size, or it is small."""
    found = {}
    for path in (path_of(specification) for specification in specifications):
        if path.is_file():
            size, digest = path.stat().st_size, hashlib.sha256()
            with open(path, "rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(max(file.tell(), size - _END_BYTES))
                digest.update(file.read())
            found[str(path)] = f"{size}:{digest.hexdigest()[:16]}"
    return found


def _unchanged(folder: Path, known: dict, now: dict[str, str]) -> None:
    """Errors: CorpusError where a corpus' file is another one than `known`, a plan or an index, was made from."""
    for path, found in now.items():
        if known.get("files", {}).get(path, found) != found:
            raise CorpusError(f"{path} has changed since {folder} was made from it: give another --out, or remove {folder}")


def run(options: argparse.Namespace) -> str:
    """Carry out a command; returns what to print. Errors: CorpusError, PackError, OutputError, BrokenProcessPool."""
    packing, layout = packing_of(options)
    folder, head = options.out, shaping_options(options, packing.name) | {"files": corpus_files(options.corpus)}
    plan_path = folder / WORK / "plan" / "plan.json"
    if options.merge and not options.corpus:
        if not plan_path.exists():
            raise PackError(
                f"{folder} holds no unfinished packing to merge"
                + (": it has its index" if (folder / INDEX_NAME).exists() else "")
            )
        plan = json.loads(plan_path.read_bytes())
        packing.name = plan["options"]["name"]
        return _report(folder, packing.merge(plan), plan)
    if (folder / INDEX_NAME).exists():
        index = ShardIndex.load(folder)
        done = json.loads((folder / INDEX_NAME).read_bytes())
        if done.get("options") != head["digest"]:
            raise CorpusError(f"{folder} is packed already, with other options: give another --out, or remove it")
        _unchanged(folder, done, head["files"])
        shutil.rmtree(folder / WORK, ignore_errors=True)  # a kill may have come while the merge was removing it
        return f"{folder} is packed already: {len(index)} samples, {index.hours:.2f} h"
    corpora = [Corpus(specification) for specification in options.corpus]
    if options.tokenizer:
        try:
            load_tokenizer(options.tokenizer)
        except Exception as error:  # of a folder that others wrote: the libraries have no list of what it makes them raise
            raise CorpusError(f"--tokenizer {options.tokenizer}: {one_line(error)}") from None
    _prepare(folder, packing)
    plan = _plan(folder, corpora, packing, layout, head, options.dry_run)
    if plan["digest"] != head["digest"]:
        differing = [key for key, value in head["options"].items() if plan["options"].get(key) != json.loads(json.dumps(value))]
        raise CorpusError(
            f"{folder} was begun with other options ({', '.join(differing)}): finish it with those, or remove {folder}"
        )
    _unchanged(folder, plan, head["files"])
    if not plan["samples"]:
        where = ""
        if not options.dry_run:  # no plan stays behind: the corpus may be mended
            (plan_path.parent / "rejected.jsonl").replace(folder / "rejected.jsonl")
            shutil.rmtree(folder / WORK, ignore_errors=True)
            where = f", see {folder / 'rejected.jsonl'}"
        raise CorpusError(f"nothing to pack: every sample was refused {plan['rejected']}{where}")
    if options.dry_run:
        return _dry_report(plan)
    if not options.merge:
        part, parts = options.part or (0, 1)
        shards = [shard for shard in packing.missing(plan["shards"]) if shard % parts == part]
        if shards:
            packing.run(shards, float(np.load(plan_path.parent / "shards.npy")["seconds"][shards].sum()) / 3600, options.workers)
        if options.part:
            missing = len(packing.missing(plan["shards"]))
            return (
                f"part {part}/{parts} of {folder} is packed; {missing} of {plan['shards']} shards are left to other parts, then: "
                f"pack.py --merge --out {folder}"
            )
    return _report(folder, packing.merge(plan), plan)


def _prepare(folder: Path, packing: Packing) -> None:
    begun = (folder / WORK).exists()
    if not begun and folder.exists() and (strange := next(folder.glob("*.tar"), None)):
        raise CorpusError(f"{folder} holds {strange.name}, which this command did not write: give an empty --out")
    try:
        (folder / WORK / "done").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    packing.clear_unfinished()


def _plan(folder: Path, corpora: list[Corpus], packing: Packing, layout: Layout, head: dict, trial: bool) -> dict:
    """The plan of a packing that has begun, else a new one. A trial's is not kept: the next command may have other options."""
    bars = (tqdm(corpus, desc=f"planning {corpus.name}", unit=" samples", disable=None, unit_scale=True) for corpus in corpora)
    if trial and not (folder / WORK / "plan" / "plan.json").exists():
        own = folder / WORK / f"trial.{os.uname().nodename}.{os.getpid()}"  # so named, it is cleared away after a kill
        try:
            return make_plan(own, bars, packing.sieve, layout, head)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return plan_once(folder / WORK / "plan", lambda own: make_plan(own, bars, packing.sieve, layout, head))


def _table(counts: dict, hours: dict) -> str:
    return "".join(f"\n  refused {count:>9,}  {hours.get(reason, 0.0):>10.2f} h  {reason}" for reason, count in counts.items())


def _noted(folder: Path, counts: dict[str, int]) -> str:
    """Lines about packed clips that may be of no use, with the first ids of each kind; "" where there are none."""
    if not counts:
        return ""
    ids: dict[str, list[str]] = {kind: [] for kind in counts}
    with open(folder / FINDINGS_NAME, encoding="utf-8") as lines:
        for told in map(json.loads, lines):
            if len(ids[told["finding"]]) < _SHOWN_IDS:
                ids[told["finding"]].append(told["id"])
    shown = {kind: ", ".join(ids[kind]) + (" ..." if counts[kind] > len(ids[kind]) else "") for kind in counts}
    return f"\npacked all the same, named in {folder / FINDINGS_NAME} (--refuse KIND leaves them out):" + "".join(
        f"\n  noted   {count:>9,}  {kind}: {shown[kind]}" for kind, count in counts.items()
    )


def _unasked(plan: dict) -> str:
    """A line about tasks whose clips are trained on without a word of what is asked; "" where there is none."""
    tasks = set(plan.get("unprompted", ())) - {"chat", *INSTRUCTIONS}  # of chat, the audio is the question
    if not tasks:
        return ""
    return (
        f"\nno instruction: clips of task {', '.join(sorted(tasks))} have no prompt, and such a task has no default instruction; "
        "give --corpus NAME:PATH,prompt=..., or wordings by data_tools.instruct wrap --templates"
    )


def _unknown_languages(folder: Path) -> str:
    """A line about languages that core/languages.py does not hold, with the samples of each; "" where there are none."""
    index = ShardIndex.load(folder)
    counts = np.bincount(index.samples["lang"], minlength=len(index.langs)).tolist()
    unknown = [f"'{lang}' ({count:,})" for lang, count in zip(index.langs, counts, strict=True) if lang and not is_known(lang)]
    return f"\nnot known, samples of language {', '.join(unknown)}: scores split their text by its script" if unknown else ""


def _dry_report(plan: dict) -> str:
    unknown = (
        f"\n{count:,} samples have no known duration: filters by seconds, rate and CTC frames judge them when they are decoded; "
        "data_tools.annotate finds durations"
        if (count := plan.get("unknown_durations"))
        else ""
    )
    return (
        f"{plan['samples']:,} samples, about {plan['hours']:.2f} h and {plan['megabytes']:,.0f} MB, in {plan['shards']} shards; "
        f"{plan['other_splits']:,} belong to other splits"
        + _table(plan["rejected"], plan["rejected_hours"])
        + unknown
        + _unasked(plan)
        + "\nnothing was packed (--dry-run); clips are checked when they are decoded"
    )


def _report(folder: Path, index: dict, plan: dict) -> str:
    refused = f"; refused {sum(index['rejected'].values()):,}, named in {folder / 'rejected.jsonl'}" if index["rejected"] else ""
    return (
        f"{folder}: {index['samples']:,} samples, {index['hours']:.2f} h in {len(index['shardlist'])} shards{refused}"
        + _table(index["rejected"], index["rejected_hours"])
        + _noted(folder, index.get("findings", {}))
        + _unasked(plan)
        + _unknown_languages(folder)
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 stopped on the way (the same command goes on), 2 the command or the corpus has to be mended first."""
    options = parse_arguments(argv)
    try:
        print(run(options))
        return 0
    except (CorpusError, ShardError, PackError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"pack: {error}; free space or mend the folder, then run the same command again: it goes on", file=sys.stderr)
    except KeyboardInterrupt:
        print("pack: interrupted; run the same command again: it goes on", file=sys.stderr)
        return 130
    except BrokenProcessPool as error:
        where = f" while it wrote {error}" if str(error) else ""
        print(
            f"pack: a worker process died{where} (out of memory?); run the same command again, with fewer --workers: it goes on",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
