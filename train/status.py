"""Where a run stands, from its files alone: `python -m train.status RUN`, RUN being the recipes' `output`.

    RUN/<stage>/run.json         state, steps, last error (the trainer writes it)
    RUN/<stage>/metrics.jsonl    seconds of the last steps: speed and time left
    RUN/<stage>/checkpoints/     the last good checkpoint
    RUN/slurm.jsonl              jobs and restarts (slurm/ writes it), also of stages that only wait in the queue
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median

from tabulate import tabulate

from train.files import read_lines
from train.stages import STAGES

SILENT_SECONDS = 600  # a running stage that has not written for so long is called silent
NO_END = {"submitted", "started", "done", "resubmitted"}  # events of slurm.jsonl after which nothing has gone wrong
_TAIL_BYTES = 1 << 16
_RECENT_STEPS = 50


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _time_of(event: dict) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def stage_status(run: Path, name: str, now: float) -> dict | None:
    """One stage's state; None where nothing of it is there yet. The trainer's word and the job's: the later one counts."""
    folder, jobs = run / name, [line for line in read_lines(run / "slurm.jsonl", _TAIL_BYTES) if line.get("stage") == name]
    train = [line for line in read_lines(folder / "metrics.jsonl", _TAIL_BYTES) if line.get("kind") == "train"][-_RECENT_STEPS:]
    path = folder / "run.json"
    if not path.exists() and not jobs:
        return None
    noted = json.loads(path.read_text()) if path.exists() else {}
    updated = noted.get("updated", 0.0)
    state, later = noted.get("status", "unknown"), [job for job in jobs if _time_of(job) > updated]
    if later:
        state = later[-1]["event"]
    last_word = max([updated, *(line.get("time", 0.0) for line in train[-1:])])
    if state == "running" and not later and now - last_word > SILENT_SECONDS:
        state = f"silent for {_clock(now - last_word)}"
    # The first end that a job notes after the trainer's last word is the one that the trainer gave its reason for.
    ends = [job for job in jobs if job["event"] not in NO_END]
    after, error = sum(job in later for job in ends), ends[-1]["detail"] if ends else "-"
    if noted.get("reason") and after <= 1:
        error = f"{error}; {noted['reason']}" if after else noted["reason"]
    seconds = median(line["step_seconds"] for line in train) if train else None
    step, steps = noted.get("step", 0), noted.get("steps")
    latest = folder / "checkpoints" / "latest"
    return {
        "stage": f"{STAGES[name].number} {name}", "state": state, "step": f"{step}/{steps}" if steps else "-",
        "s/step": f"{seconds:.2f}" if seconds else "-",
        "left": _clock((steps - step) * seconds) if seconds and steps and state == "running" else "-",
        "restarts": max((line.get("restarts", 0) for line in jobs), default=0),
        "checkpoint": latest.read_text().strip() if latest.exists() else "-",
        "job": jobs[-1]["job"] if jobs else "-", "last error": error,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.status", description="Where a run stands, from its files alone.")
    parser.add_argument("run", type=Path, help="the recipes' `output` folder")
    run = parser.parse_args(argv).run
    rows = [row for name in STAGES if (row := stage_status(run, name, time.time()))]
    if not rows:
        print(f"error: {run} holds no stage ({', '.join(STAGES)}) and no slurm.jsonl: give the recipes' `output`",
              file=sys.stderr)
        return 2
    print(tabulate(rows, headers="keys"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
