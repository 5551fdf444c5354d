"""Measure the step time of two checkouts in alternation: what a change of structure costs.

    git worktree add ../before COMMIT
    python -m benchmarks.commits ../before . --out before-after.json

Each run is one process that trains a stage of the tiny golden recipe (tests/golden): its time is that of the
code around the network, not of the network's products. Checkouts take turns, so that a change of load meets
both. Of each run: the median and the 10th percentile of its steps after WARM_UP (the latter is what a busy
machine changes least), and CPU seconds, start included. A checkout's number is the median over its runs.
Losses are compared to the bit. The interpreter, and so every package, is the one that runs this file.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import keep, line, machine
from core.command_line import CommandParser

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
STAGES = {1: "alignment", 2: "shrinking", 3: "sft"}
WARM_UP = 5  # steps


class Run(NamedTuple):
    median_ms: float
    p10_ms: float
    cpu_seconds: float
    losses: tuple[float, ...]


def train(checkout: Path, stage: int, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "golden"
        shutil.copytree(GOLDEN, work)
        shutil.rmtree(work / "run" / STAGES[stage])
        options = [f"optim.steps={steps}", f"checkpoint.every_steps={steps + 1}", "data.valid=[]"]
        environment = {"PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "train.run", f"stage{stage}.yaml", *options],
            cwd=work,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{checkout}: training ended with {done.returncode}: {done.stderr[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = (work / "run" / STAGES[stage] / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    times = [1000 * (b["time"] - a["time"]) for a, b in pairwise(rows[WARM_UP:])]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    fast = statistics.quantiles(times, n=10)[0]
    return Run(statistics.median(times), fast, cpu, tuple(row["loss"] for row in rows))


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m benchmarks.commits", __doc__, example="../before . --repeats 5")
    parser.add_argument("before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("after", type=Path, help="checkout of the later one")
    parser.add_argument("--stage", type=int, choices=STAGES, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each checkout (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="where to write the numbers, the table beside them (.txt)",
    )
    options = parser.parse_args(arguments)
    facts = machine()
    runs: dict[str, list[Run]] = {"before": [], "after": []}
    for _ in range(options.repeats):
        for name, finished in runs.items():
            finished.append(train(getattr(options, name), options.stage, options.steps))
    are_equal = len({run.losses for finished in runs.values() for run in finished}) == 1
    table = f"stage {options.stage}, {options.repeats} x {options.steps} steps; losses equal: {are_equal}\n"
    table += f"{'':12} {'before':>9} {'after':>9} {'after / before':>15}\n"
    for column in ("median_ms", "p10_ms", "cpu_seconds"):
        a, b = (statistics.median(getattr(run, column) for run in finished) for finished in runs.values())
        table += f"{column:12} {a:9.1f} {b:9.1f} {b / a:15.3f}\n"
    print(f"{line(facts)}\n\n{table}")
    if options.out:
        measured = {name: [run._asdict() for run in finished] for name, finished in runs.items()}
        keep(options.out, {"machine": facts, **measured, "load_after": os.getloadavg()[0]}, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
