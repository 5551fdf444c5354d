"""Print the state of a run's stages and jobs.

    python -m train.status RUN

RUN/<stage>/run.json         state, steps, last error (the trainer writes it)
RUN/<stage>/metrics.jsonl    speed, loss and time left from the last steps; WER of the validations
RUN/<stage>/checkpoints/     the last good checkpoint
RUN/slurm.jsonl              jobs and restarts (slurm/ writes it), also of stages that only wait in the queue
squeue, sacct                the jobs of stages that are not done, asked once, where the machine has Slurm and
                             it answers
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median

from tabulate import tabulate

from core.command_line import CommandParser
from core.files import read_lines
from recipe.stages import STAGES, stages_in, title_of

SILENT_SECONDS = 600  # a running stage that has not written for so long is called silent
NO_END = {
    "submitted",
    "started",
    "done",
    "resubmitted",
}  # events of slurm.jsonl after which nothing has gone wrong
ANSWER_SECONDS = 20  # that Slurm has for each question
# Display settings of the user that would change what Slurm's commands print or select.
_DISPLAY = re.compile(r"SQUEUE_|SACCT_|SLURM_(TIME_FORMAT|CLUSTERS|BITSTR_LEN)")
_ALIVE = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING"}
_WAITS = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"}
_TAIL_BYTES = 1 << 16
_RECENT_STEPS = 50


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _time_of(event: dict) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _slurm_jobs(*command: str) -> dict[str, tuple[str, str]] | None:
    """Job -> (state, reason), of lines JOB|STATE|REASON that a Slurm command prints; None where there is no
    answer."""
    environment = {name: value for name, value in os.environ.items() if not _DISPLAY.match(name)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    lines = [line.strip().split("|") for line in done.stdout.splitlines()]
    return {
        job: (state, reason)
        for job, state, reason in (fields for fields in lines if len(fields) == 3)
        if job.isdigit()
    }


def slurm_states(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Job -> (state, reason) as Slurm knows them; UNKNOWN for a job that it has forgotten; nothing where it
    does not answer."""
    if not jobs:
        return {}
    several = ",".join([*jobs, jobs[0]])  # of one alone, squeue fails where it does not know it
    states = _slurm_jobs("squeue", "-h", "-t", "all", "-j", several, "-o", "%A|%T|%r")
    if states is None:
        return {}
    if missing := [job for job in jobs if job not in states]:  # squeue drops a job some minutes after its end
        recorded = (
            _slurm_jobs("sacct", "-X", "-n", "-P", "-j", ",".join(missing), "-o", "JobIDRaw,State,Reason")
            or {}
        )
        states |= {job: recorded.get(job, ("UNKNOWN", "")) for job in missing}
    return states


def slurm_word(state: str, reason: str) -> str | None:
    """How a stage is shown whose last job Slurm has in this state; None where the run's own files know
    more."""
    state = state.split()[0]  # sacct: CANCELLED by 1000
    if state in _ALIVE or state == "COMPLETED":
        return None
    if state == "UNKNOWN":
        return "not in the queue"
    if state in _WAITS and state != "SUSPENDED" and ("Held" in reason or "HOLD" in state):
        state = "held"
    shown = "" if reason in ("None", "NonZeroExitCode", "") or state == "CANCELLED" else f" ({reason})"
    return state.lower() + shown


def validation_wer(path: Path) -> tuple[str, str]:
    """Return the last and the best WER of metrics.jsonl in percent; "-" if no validation had words."""
    rates = []
    if path.exists():
        with open(path, errors="replace") as file:
            for line in file:
                if '"valid"' not in line:  # most lines are steps: they are not parsed
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # cut by a kill
                if record.get("kind") == "valid" and record.get("words"):
                    rates.append(100 * record["wer"])
    return (f"{rates[-1]:.1f} %", f"{min(rates):.1f} %") if rates else ("-", "-")


def jobs_of(run: Path, name: str) -> list[dict]:
    return [line for line in read_lines(run / "slurm.jsonl", _TAIL_BYTES) if line.get("stage") == name]


def stage_status(run: Path, name: str, now: float, slurm: dict[str, tuple[str, str]]) -> dict | None:
    """One stage's state; None where nothing of it is there yet. Of the trainer's record and the job's the
    later one counts, and `slurm` for a stage that neither calls done."""
    folder, jobs = run / name, jobs_of(run, name)
    train = [
        line for line in read_lines(folder / "metrics.jsonl", _TAIL_BYTES) if line.get("kind") == "train"
    ][-_RECENT_STEPS:]
    path = folder / "run.json"
    if not path.exists() and not jobs:
        return None
    noted = json.loads(path.read_text()) if path.exists() else {}
    updated = noted.get("updated", 0.0)
    state, later = noted.get("status", "unknown"), [job for job in jobs if _time_of(job) > updated]
    if later:
        state = later[-1]["event"]
    last_word = max([updated, *(line.get("time", 0.0) for line in train[-1:])])
    job = jobs[-1]["job"] if jobs else "-"
    from_slurm = slurm_word(*slurm[job]) if job in slurm else None
    if state == "running" and not later and now - last_word > SILENT_SECONDS:
        state = f"silent for {_clock(now - last_word)}"
    if from_slurm == "not in the queue" and state in ("submitted", "started", "requeued", "running"):
        state = f"{state}, {from_slurm}"
    elif from_slurm and from_slurm != "not in the queue" and state not in ("done", "stopped"):
        state = from_slurm
    # The first end that a job notes after the trainer's last word is the one that the trainer gave its reason
    # for.
    ends = [job for job in jobs if job["event"] not in NO_END]
    after, error = sum(job in later for job in ends), ends[-1]["detail"] if ends else "-"
    if noted.get("reason") and after <= 1:
        error = f"{error}; {noted['reason']}" if after else noted["reason"]
    seconds = median(line["step_seconds"] for line in train) if train else None
    step, steps = noted.get("step", 0), noted.get("steps")
    latest = folder / "checkpoints" / "latest"
    losses = [line["loss"] for line in train if isinstance(line.get("loss"), int | float)]
    last_wer, best_wer = validation_wer(folder / "metrics.jsonl")
    left = (steps - step) * seconds if seconds and steps and state == "running" else None
    row = {
        "stage": title_of(name),
        "state": state,
        "step": f"{step}/{steps}" if steps else "-",
        "s/step": f"{seconds:.2f}" if seconds else "-",
        "left": "-" if left is None else _clock(left),
        "done at": "-" if left is None else time.strftime("%a %H:%M", time.localtime(now + left)),
        "loss": f"{median(losses):.3g}" if losses else "-",
        "WER": last_wer,
        "best WER": best_wer,
        "restarts": max((line.get("restarts", 0) for line in jobs), default=0),
        "checkpoint": latest.read_text().strip() if latest.exists() else "-",
        "job": job,
        "last error": error,
    }
    return {column: _plain(value) if isinstance(value, str) else value for column, value in row.items()}


def _plain(text: str) -> str:
    """One line without control characters: reasons quote file names and other programs."""
    return "".join(character if character.isprintable() else " " for character in text)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m train.status", "Print the state of a run's stages and jobs.", example="runs/me"
    )
    parser.add_argument("run", type=Path, help="the recipes' `output` folder")
    run = parser.parse_args(argv).run
    names = stages_in(run)
    last = [jobs[-1] for name in names if (jobs := jobs_of(run, name))]
    slurm = slurm_states([job["job"] for job in last if job["event"] != "done"])
    rows = [row for name in names if (row := stage_status(run, name, time.time(), slurm))]
    if not rows:
        print(
            f"error: {run} holds no stage ({', '.join(STAGES)}) and no slurm.jsonl: give the recipes' "
            f"`output`",
            file=sys.stderr,
        )
        return 2
    print(tabulate(rows, headers="keys"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
