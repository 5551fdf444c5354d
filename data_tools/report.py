"""What pack says: of a plan before anything is packed, and of a folder that is packed."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.console import duration, plural, printable_line
from core.languages import is_known
from core.object_store import joined
from core.samples import INSTRUCTIONS
from data_tools.audio import estimate_seconds
from data_tools.corpora import Entry, fault_of
from data_tools.filters import FILTERS, Filters
from data_tools.packing import FINDINGS_NAME, Packing, Planned, counted
from data_tools.plan import shard_entries
from data_tools.shards import ShardIndex
from data_tools.sources import kind_of

_SHOWN_IDS = 5  # of each kind of finding, in the report
_FILES, _CLIPS = 200, 10  # that a dry run looks for, and decodes


def broken_lines(plan: dict, most: float) -> str | None:
    """One line where more than the share `most` of what was planned is broken; None otherwise."""
    items, faults = plan.get("items", 0), plan.get("faults", 0)
    if not items or faults <= most * items:
        return None
    counts = {reason: count for reason, count in plan["rejected"].items() if reason not in FILTERS}
    first = next(
        (
            f"{reason} of {plan['examples'][reason]}"
            for reason in counts
            if reason in plan.get("examples", {})
        ),
        "",
    )
    return (
        f"{faults:,} of {items:,} lines or members are broken ({counted(counts)}), more than "
        f"--max-broken-share {most:g}: "
        f"stopped. For example {first}. Fix the corpus, or raise the share"
    )


@dataclass
class ProbedClips:
    """What a dry run found of some clips: how many were looked for and decoded, the seconds of those whose
    duration the corpus does not give, what is wrong, and an example of each reason."""

    files: int = 0
    decoded: int = 0
    estimated_seconds: float = 0.0
    decoded_seconds: float = 0.0
    faults: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def broken(self) -> int:
        return sum(count for reason, count in self.faults.items() if reason not in FILTERS)

    def add(self, reason: str, example: str) -> None:
        self.faults[reason] += 1
        self.examples.setdefault(reason, example)


def probe(folder: Path, plan: dict, packing: Packing) -> ProbedClips:
    """Look for some of a plan's clips, spread over the corpus by its shuffle, and decode a few. folder: where
    the plan is."""
    probed, shard = ProbedClips(), 0
    while shard < plan["shards"] and probed.files < _FILES:
        for entry in shard_entries(folder, shard)[1]:
            if entry.audio is not None and probed.files < _FILES:
                _check_clip(entry, entry.audio, probed, packing)
        shard += 1
    return probed


def _check_clip(entry: Entry, audio: str, probed: ProbedClips, packing: Packing) -> None:
    probed.files += 1
    kind, path = kind_of(audio)
    if probed.decoded < _CLIPS and kind != "pipe":
        probed.decoded += 1
        try:
            clip, fault = packing.clip_of(entry)
            if entry.duration is None:
                probed.estimated_seconds += estimate_seconds(audio, entry.size)
                probed.decoded_seconds += clip.duration
        except Exception as error:
            fault = fault_of(error, entry.id, reason="failed")
        if fault is not None:
            probed.add(fault.reason, f"{fault.id}: {fault.detail}")
    elif kind == "file" and not os.path.exists(path):
        probed.add("missing_file", f"{entry.id}: {path}")


def _measured_hours(plan: dict, probed: ProbedClips | None) -> float:
    """The hours of a plan, those of unknown durations in proportion to the clips that were decoded."""
    estimated = plan.get("estimated_hours", 0.0)
    if not estimated or probed is None or not probed.estimated_seconds or not probed.decoded_seconds:
        return plan["hours"]
    return plan["hours"] + estimated * (probed.decoded_seconds / probed.estimated_seconds - 1)


def dry_report(plan: dict, probed: ProbedClips | None, filters: Filters) -> str:
    """What would be packed and refused, and why; `probed`: what some clips turned out to be."""
    unknown = plan.get("unknown_durations", 0)
    about = "about " if unknown else ""
    hours = _measured_hours(plan, probed)
    megabytes = plan["megabytes"] * (hours / plan["hours"] if plan["hours"] else 1)
    lines = [
        f"{plural(plan['samples'], 'sample')}, {about}{duration(hours * 3600)} and "
        f"{megabytes:,.1f} MB, in {plural(plan['shards'], 'shard')}"
    ]
    lines += _totals(plan, plan["samples"], plan["rejected"])
    lines += _table(plan["rejected"], plan["rejected_hours"], plan.get("examples", {}))
    lines += _ignored(plan)
    lines += plan.get("notes", [])
    lines += [f"columns  {fact}" for fact in plan.get("facts", [])]
    if probed is not None and probed.files:
        lines.append(
            f"looked for {probed.files:,} clips and decoded {probed.decoded}: {_faults_text(probed)}"
        )
    if unknown and filters.by_seconds:
        lines.append(
            f"{unknown:,} samples have no known duration: {', '.join(filters.by_seconds)} apply when they "
            "are decoded; data_tools.annotate finds durations"
        )
    lines += _unasked(plan)
    lines.append("nothing was packed (--dry-run)")
    return "\n".join(map(printable_line, lines))


def broken_clips(plan: dict, probed: ProbedClips, most: float) -> str | None:
    """One line where packing would stop if all clips were like those that a dry run looked at; None
    otherwise."""
    planned = Planned(plan.get("items", 0), plan.get("faults", 0))
    if planned.broken_share(probed.broken, probed.files) <= most:
        return None
    first = next(
        f"{reason} of {example}" for reason, example in probed.examples.items() if reason not in FILTERS
    )
    before = f", and {planned.faults:,} of {planned.items:,} lines" if planned.faults else ""
    what = f"{probed.broken} of the {probed.files} clips looked at are missing or broken{before}"
    return f"{what}: fix the corpus. For example {first}"


def _faults_text(probed: ProbedClips) -> str:
    if not probed.faults:
        return "all are good"
    return "; ".join(
        f"{count:,} {reason} (for example {probed.examples[reason]})"
        for reason, count in probed.faults.items()
    )


def report(packing: Packing, index: dict, plan: dict) -> str:
    """What is in a folder that is packed, and what is not."""
    location = packing.location
    refused = (
        f"; refused {sum(index['rejected'].values()):,}, named in {joined(location, 'rejected.jsonl')}"
        if index["rejected"]
        else ""
    )
    seconds = index["hours"] * 3600
    lines = [
        f"{location}: {plural(index['samples'], 'sample')}, {duration(seconds)} in "
        f"{plural(len(index['shardlist']), 'shard')}{refused}"
    ]
    lines += _totals(plan, index["samples"], index["rejected"])
    lines += _table(index["rejected"], index["rejected_hours"], {})
    lines += _ignored(plan)
    lines += plan.get("notes", [])
    lines += _findings(packing, index.get("findings", {}))
    lines += _unasked(plan)
    lines += _unknown_languages(location)
    return "\n".join(map(printable_line, lines))


def _totals(plan: dict, samples: int, rejected: dict[str, int]) -> list[str]:
    """How the numbers add up: everything that was read is a sample, refused, or of another split."""
    if "items" not in plan:  # planned by an earlier version
        return []
    other = f" + {plan['other_splits']:,} of other splits" if plan["other_splits"] else ""
    return [
        f"read {plan['items']:,} = {plural(samples, 'sample')} + {sum(rejected.values()):,} refused{other}"
    ]


def _table(counts: dict[str, int], hours: dict[str, float], examples: dict[str, str]) -> list[str]:
    lines = []
    for reason, count in counts.items():
        example = f"  for example {examples[reason]}" if reason in examples else ""
        lines.append(
            f"  refused {count:>9,}  {duration(hours.get(reason, 0.0) * 3600):>10}  {reason}{example}"
        )
    return lines


def _ignored(plan: dict) -> list[str]:
    return [f"  ignored {count:>9,}  {what}" for what, count in plan.get("ignored", {}).items()]


def _findings(packing: Packing, counts: dict[str, int]) -> list[str]:
    """Lines about packed clips that may be of no use, with the first ids of each kind."""
    if not counts:
        return []
    ids: dict[str, list[str]] = {kind: [] for kind in counts}
    with open(packing.folder / FINDINGS_NAME, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if len(ids[record["finding"]]) < _SHOWN_IDS:
                ids[record["finding"]].append(record["id"])
    examples = {
        kind: ", ".join(ids[kind]) + (" ..." if counts[kind] > len(ids[kind]) else "") for kind in counts
    }
    named = joined(packing.location, FINDINGS_NAME)
    return [
        f"packed all the same, named in {named} (--refuse KIND leaves them out):",
        *(f"  noted   {count:>9,}  {kind}: {examples[kind]}" for kind, count in counts.items()),
    ]


def _unasked(plan: dict) -> list[str]:
    """A line about tasks whose clips are trained on without a word of what is asked; none where there is
    none."""
    tasks = set(plan.get("unprompted", ())) - {"chat", *INSTRUCTIONS}  # of chat, the audio is the question
    if not tasks:
        return []
    return [
        f"no instruction: clips of task {', '.join(sorted(tasks))} have no prompt, and such a task has no "
        f"default instruction; "
        "give --corpus NAME:PATH,prompt=..., or wordings by data_tools.instruct wrap --templates"
    ]


def _unknown_languages(folder: Path | str) -> list[str]:
    """A line about languages that core/languages.py does not hold, with the samples of each; none where there
    are none."""
    index = ShardIndex.load(folder)
    counts = np.bincount(index.samples["lang"], minlength=len(index.langs)).tolist()
    unknown = [
        f"'{lang}' ({count:,})"
        for lang, count in zip(index.langs, counts, strict=True)
        if lang and not is_known(lang)
    ]
    return (
        [f"not known, samples of language {', '.join(unknown)}: scores split their text by its script"]
        if unknown
        else []
    )
