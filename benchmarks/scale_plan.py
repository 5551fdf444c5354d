"""Rehearse the data side of a run of the paper's size, without audio: plan, mixture, epochs, batches, memory.

    python -m benchmarks.scale_plan [--scale 1.0] [--ranks 8 64 512] [--out FILE]

Writes an index of as many utterances and hours as the paper reports (9,857 hours; 2,651,493 SFT examples of
5,359 hours). The shards behind it are sparse files without content. The division among tasks and the lengths
are made up: the paper does not disclose them. Every measurement runs in a fork of its own:

    start     open the index, plan, the first batch dealt to the ranks
    resume    the same for a step near the end of the stage
    step      the next batch: what a rank does for each step beside reading

A rank computes the whole plan and takes its part, so one process shows what each of 512 does.

Marks: start and resume at most 20 s, 1 GB for each process; a step at 512 ranks at most 1 s; equal numbers of
micro-batches on all ranks.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.machine import keep, machine
from core.command_line import CommandParser, accept_old_name

HOURS, SFT_EXAMPLES, SFT_HOURS = 9857, 2_651_493, 5359
PER_SHARD = 1000
SHARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A task of a corpus: hours, mean seconds of an utterance (0: text only), utterances of text only."""

    task: str
    hours: float
    mean: float
    texts: int = 0

    def count(self, scale: float) -> int:
        return max(PER_SHARD, round(scale * (self.texts or 3600 * self.hours / self.mean)))


#: Folder -> its parts. The hours add up to the paper's; the division is ours.
CORPORA = {
    "asr": [Part("asr", 7500, 9.0)],
    "translation": [Part("translation", 1500, 5.5)],
    "paralinguistic": [Part("emotion", 100, 4.0), Part("gender", 500, 5.0)],
    "sound": [Part("sound", 257, 3.0)],
    "sft": [Part("instruct", SFT_HOURS, 8.0), Part("text", 0, 0, SFT_EXAMPLES - round(3600 * SFT_HOURS / 8))],
}
#: Stage -> corpora, and the last tau of the mixture, as in train/recipes/.
STAGES = {
    "alignment": (("asr", "sound"), 1.0),
    "shrinking": (("asr", "translation", "paralinguistic", "sound"), 5.0),
    "sft": (("sft",), 1.0),
}
STEPS = 6000


def write_corpus(folder: Path, parts: list[Part], scale: float) -> tuple[int, float]:
    """Write a packed folder's index over sparse shards; return its utterances and hours."""
    from data_tools.shards import SAMPLE_DTYPE, ShardSummary, write_index

    folder.mkdir(parents=True)
    tasks = sorted(part.task for part in parts)

    def summaries() -> Iterator[ShardSummary]:
        shard = 0
        for part in parts:
            left = part.count(scale)
            while left:
                size = min(PER_SHARD, left)
                left -= size
                random = np.random.default_rng(shard)
                rows = np.zeros(size, SAMPLE_DTYPE)
                rows["task"] = tasks.index(part.task)
                rows["json_size"], rows["id_hash"] = 100, random.integers(0, 2**63, size)
                rows["target_characters"] = random.integers(20, 400, size)
                if part.mean:  # lognormal, cut at 30 s: a long tail, as of read speech
                    rows["audio_size"] = 1000
                    seconds = random.lognormal(0, 0.5, size)
                    rows["duration"] = np.clip(seconds * part.mean / seconds.mean(), 0.5, 30)
                    rows["characters"] = 15 * rows["duration"]
                name = f"{folder.name}-{shard:06d}.tar"
                with open(folder / name, "wb") as file:
                    file.truncate(SHARD_BYTES)
                codecs = ["flac" if part.mean else ""]
                yield ShardSummary(name, rows, SHARD_BYTES, f"{shard:064x}", tasks, ["en"], codecs)
                shard += 1

    # Gone through twice: the same rows each time, since a shard's number is its seed.
    index = write_index(folder, folder.name, _Again(summaries))
    return int(sum(shard["nsamples"] for shard in index["shardlist"])), float(index["hours"])


class _Again:
    """An iterable that starts its generator anew each time."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def recipe_data(root: Path, stage: str, ranks: int):
    from recipe.config import Corpus, DataConfig, MixtureConfig

    names, tau = STAGES[stage]
    return DataConfig(
        train=[Corpus(shards=str(root / name)) for name in names],
        mixture=MixtureConfig(tau_start=1.0, tau_end=tau),
        batch_seconds=max(3600.0, 60.0 * ranks),
        micro_batch_seconds=120.0,
        micro_batch_tokens=8192,
    )


def measure(root: Path, stage: str, ranks: int, step: int) -> dict:
    """Open the plan and deal `step` and five more; in this process."""
    from stream.assign import Budgets, assign, padded_cost, padding_share
    from stream.plan import Plan

    data = recipe_data(root, stage, ranks)
    budgets = Budgets.of(data)
    reset_peak()
    imported = peak_mb()
    began, used = time.perf_counter(), time.process_time()
    plan = Plan.open(data, stage, STEPS)
    opened = time.perf_counter()
    batch = plan.global_batch(step)
    assign(batch["seconds"], batch["positions"], ranks, budgets)
    ready, used = time.perf_counter(), time.process_time() - used
    steps, padding, uneven, micro_batches, equal = [], [], [], [], True
    for following in range(step + 1, step + 6):
        at = time.process_time()
        batch = plan.global_batch(following)
        dealt = assign(batch["seconds"], batch["positions"], ranks, budgets)
        steps.append(time.process_time() - at)
        counts = {len(rank) for rank in dealt}
        equal &= len(counts) == 1
        micro_batches.append(max(counts))
        audio = batch["seconds"] > 0
        groups = [group[audio[group]] for rank in dealt for group in rank]
        padding.append(padding_share(batch["seconds"], [group for group in groups if len(group)]))
        cost = [
            sum(padded_cost(batch["seconds"][g], batch["positions"][g], budgets) for g in rank)
            for rank in dealt
        ]
        uneven.append(max(cost) / (sum(cost) / len(cost)) - 1)
    return {
        "open": opened - began,
        "ready": ready - began,
        "ready_cpu": used,
        "step_cpu": sum(steps) / len(steps),
        "peak_mb": peak_mb(),
        "imports_mb": imported,
        "utterances": len(batch),
        "micro_batches": max(micro_batches),
        "equal": equal,
        "padding": sum(padding) / len(padding),
        "uneven": max(uneven),
        "epochs": plan.passes(STEPS),
        "shares": {str(at): plan.shares(at) for at in (0, STEPS // 2, STEPS - 1)},
    }


def child(root: Path, stage: str, ranks: int, step: int) -> dict:
    """`measure` in a fork of this process, which has imported everything."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (root, stage, ranks, step))


def peak_mb() -> float:
    """Largest resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def reset_peak() -> None:
    """https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html"""
    Path("/proc/self/clear_refs").write_text("5")


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m benchmarks.scale_plan", __doc__.splitlines()[0], example="--scale 0.01 --ranks 8 64"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the paper's size")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 64, 512],
        help="numbers of ranks to plan for",
    )
    parser.add_argument("--out", type=Path, help="write the report here, and its table beside it")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args(argv)
    facts = machine()
    import stream.plan  # noqa: F401  before the forks

    with tempfile.TemporaryDirectory() as folder:
        root, written = Path(folder), {}
        began = time.process_time()
        for name, parts in CORPORA.items():
            utterances, hours = write_corpus(root / name, parts, options.scale)
            written[name] = {"utterances": utterances, "hours": hours}
        seconds = time.process_time() - began
        results = []
        for stage in STAGES:
            for ranks in options.ranks:
                for kind, step in (("start", 0), ("resume", STEPS - 10)):
                    results.append(
                        {"stage": stage, "ranks": ranks, "kind": kind} | child(root, stage, ranks, step)
                    )
    table = tabulate(
        [
            (
                row["stage"],
                row["ranks"],
                row["kind"],
                row["ready_cpu"],
                row["ready"],
                1000 * row["step_cpu"],
                row["peak_mb"],
                row["utterances"],
                row["micro_batches"],
                100 * row["padding"],
                100 * row["uneven"],
            )
            for row in results
        ],
        headers=(
            "stage", "ranks", "", "CPU s", "wall s", "step CPU ms", "MB", "utterances", "micro-batches",
            "padding %", "uneven %",
        ),
        floatfmt=("", "", "", ".2f", ".2f", ".1f", ".0f", "", "", ".1f", ".1f"),
    )  # fmt: skip
    sizes = ", ".join(f"{k} {v['utterances']:,} ({v['hours']:,.0f} h)" for k, v in written.items())
    epochs = "\n".join(
        f"epochs after {STEPS} steps, {row['stage']}, {row['ranks']} ranks: "
        + ", ".join(f"{name} {value:.2f}" for name, value in row["epochs"].items())
        for row in results
        if row["kind"] == "start"
    )
    marks = {
        "ready, CPU seconds": (max(row["ready_cpu"] for row in results), 20.0),
        "step, CPU seconds": (max(row["step_cpu"] for row in results), 1.0),
        "memory, GB": (max(row["peak_mb"] for row in results) / 1024, 1.0),
        "ranks with unequal micro-batches": (sum(not row["equal"] for row in results), 0),
    }
    lines = [f"{name}: {value:.2f} (mark: at most {mark:g})" for name, (value, mark) in marks.items()]
    text = f"index: {sizes}; written in {seconds:.0f} s of CPU\n\n{table}\n\n{epochs}\n\n" + "\n".join(lines)
    print(text)
    if options.out:
        report = {
            "machine": facts,
            "scale": options.scale,
            "corpora": written,
            "steps": STEPS,
            "runs": results,
        }
        keep(options.out, report | {"marks": marks}, text)
    return 0 if all(value <= mark for value, mark in marks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
