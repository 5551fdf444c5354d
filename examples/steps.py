"""A list of commands, each done once: what the examples run on.

A step is an ordinary command of the project, printed before it runs, so that it can be run alone. It is done
again only when something that it depends on has changed; an interrupted one resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from core.files import write_atomically
from recipe.config import Recipe
from train.checkpoint.compatibility import without_defaults

BIN = Path(sys.executable).parent
#: What the deepspeed launcher prints about itself: in the step's log, not on the console.
LAUNCHER = re.compile(r"\[[^\]]*\] \[(?:INFO|WARNING)\] \[(?:runner|launch)\.py:")


class StepError(Exception):
    """One line: which step stopped, why, what to do."""


@dataclass
class Step:
    """One command, and what decides whether it has to run."""

    name: str
    title: str
    minutes: float  # expected; only feeds the estimate of the time left
    command: list[str]
    key: Callable[[], object]  # what the result depends on; read when the step's turn has come
    output: Path  # is there when the step is done
    processes: int = 1  # among which the cores are shared
    set_aside: Path | None = None  # moved out of the way when the key has changed since it was begun
    after: tuple[str, ...] | None = None  # steps that it needs; None: all that stand before it
    alone: bool = False  # it measures time: nothing else may run beside it


def digest(*of: object) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def with_free_port(command: list[str]) -> list[str]:
    """What was free when the steps were listed may be taken hours later."""
    if "--master_port" not in command:
        return command
    place = command.index("--master_port") + 1
    return [*command[:place], str(free_port()), *command[place + 1 :]]


def rank_count(ranks: int) -> int:
    import torch

    return min(ranks, torch.cuda.device_count()) if torch.cuda.is_available() else ranks


def what_is_learnt(recipe: Recipe) -> dict:
    """What of a recipe its trained weights depend on, the data aside."""
    learnt = {
        name: value
        for name, value in asdict(recipe).items()
        if name not in ("log", "checkpoint", "init_accept")
    }
    if (
        learnt["model"]["llm"]["lora_targets"] is None
    ):  # what runs of earlier versions noted; the examples' LLM has these
        learnt["model"]["llm"]["lora_targets"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    corpora = {
        kind: [without_defaults(corpus) for corpus in learnt["data"][kind]] for kind in ("train", "valid")
    }
    return learnt | {"data": learnt["data"] | corpora}


def training(ranks: int, recipe: str, *overrides: str) -> list[str]:
    """The command that trains a recipe on this machine."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, "train/run.py", recipe, *overrides]


def scoring(ranks: int, *arguments: str, module: str = "evaluation.run") -> list[str]:
    """The command that answers and scores on this machine."""
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", module, *arguments]


def child_environment(processes: int) -> dict[str, str]:
    """What every command gets, unless the user has set it. processes: that run at one time."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONPATH": os.getcwd(),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not sys.stderr.isatty():
        defaults["TQDM_MININTERVAL"] = "15"  # a line now and then where there is no terminal to draw a bar in
    return {**defaults, **os.environ}


class State:
    """What is done, in one JSON file: step name -> key, status, seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict] = json.loads(path.read_text())["steps"] if path.exists() else {}

    def record(self, name: str, **values: object) -> None:
        self.steps[name] = {**self.steps.get(name, {}), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({"steps": self.steps}, indent=1))


def set_aside(path: Path) -> None:
    """Rename what an earlier, different run left, so that it is neither mixed with the new one nor lost."""
    family = sorted(path.parent.glob(path.stem + ".*")) + [path] if path.suffix else [path]
    family = [member for member in family if member.exists()]
    if not family:
        return
    number = 1
    while (path.parent / f"former-{number}" / path.name).exists():
        number += 1
    place = path.parent / f"former-{number}"
    place.mkdir(exist_ok=True)
    for member in dict.fromkeys(family):
        member.rename(place / member.name)
    print(f"      what it depends on has changed: the former result is kept in {place}")


def clock(minutes: float) -> str:
    return "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"


def show(steps: list[Step]) -> None:
    """What `run` would do."""
    for number, step in enumerate(steps, 1):
        print(
            f"[{number:2d}/{len(steps)}] {step.title} ({clock(step.minutes)})\n      "
            f"{shlex.join(step.command)}"
        )
    print(f"{clock(sum(step.minutes for step in steps))} in all")


@dataclass
class Running:
    """A step's command on its way; its output goes to the log, and to the console where it runs alone."""

    number: int
    step: Step
    key: str
    before: float  # seconds of attempts that were interrupted
    process: subprocess.Popen
    log: Path
    began: float
    console: threading.Thread | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def copy_output(process: subprocess.Popen, log: Path) -> None:
    """Copy a command's output to its log, and what is not the launcher's to the console."""
    with open(log, "a") as file:
        for line in process.stdout:
            file.write(line)
            if not LAUNCHER.match(line):
                sys.stdout.write(line)
                sys.stdout.flush()


def run(record: Path, steps: list[Step], at_once: int = 1) -> None:
    """Run all steps; `record`: the file that holds what is done. at_once: steps that may run side by side
    where `after` allows it.

    Each one's output goes to logs/NAME.log beside the record, and with one at a time to the console, too:
    progress bars only there, the launcher's lines only to the log. A failed step stops those that need it,
    not the others. Errors: StepError, of the first that failed, when no other can be done.
    """
    schedule = Schedule(record, steps, at_once)

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt  # as Ctrl-C: commands get the time to save

    on_term = signal.signal(signal.SIGTERM, interrupt)
    try:
        while schedule.start_ready():
            schedule.wait_for_one()
    finally:
        schedule.stop()
        signal.signal(signal.SIGTERM, on_term)
    if schedule.failed:
        raise StepError(schedule.failed[0])


class Schedule:
    """Which steps are done, run and wait."""

    def __init__(self, record: Path, steps: list[Step], at_once: int):
        self.record, self.steps, self.at_once = record, steps, at_once
        self.state = State(record)
        self.waiting = list(enumerate(steps, 1))
        self.running: list[Running] = []
        self.finished: set[str] = set()
        self.failed: list[str] = []
        # Minutes of the steps that ran now: this machine compared with the one that `minutes` were taken on.
        self.spent = self.expected = 0.0

    def label(self, number: int, step: Step) -> str:
        return f"[{number:2d}/{len(self.steps)}] {step.title}"

    def ready(self, number: int, step: Step) -> bool:
        before = {earlier.name for earlier in self.steps[: number - 1]}
        return (before if step.after is None else before & set(step.after)) <= self.finished

    def start_ready(self) -> bool:
        """Start what may run now. Return whether anything runs."""
        while True:
            for number, step in list(self.waiting):
                if self.running and (step.alone or self.running[0].step.alone):
                    continue
                if len(self.running) < self.at_once and self.ready(number, step):
                    self.waiting.remove((number, step))
                    if one := self.start(number, step):
                        self.running.append(one)
                    else:
                        self.finished.add(step.name)
            if self.running or not any(self.ready(*one) for one in self.waiting):
                return bool(self.running)

    def start(self, number: int, step: Step) -> Running | None:
        """Return None where the step is done already."""
        key, recorded = digest(step.key()), self.state.steps.get(step.name, {})
        if recorded.get("status") == "done" and recorded.get("key") == key and step.output.exists():
            print(f"{self.label(number, step)}: done")
            return None
        pace = max(0.2, self.spent / self.expected) if self.expected > 1 else 1.0
        after = [
            later.minutes
            for _, later in self.waiting
            if self.state.steps.get(later.name, {}).get("status") != "done"
        ]
        left = sum(after) / self.at_once
        print(
            f"\n{self.label(number, step)} "
            f"({clock(step.minutes * pace)}; after it {clock(left * pace)} to go)",
            flush=True,
        )
        command = with_free_port(step.command)
        print(f"      {shlex.join(command)}", flush=True)
        if step.set_aside and recorded.get("key") not in (None, key):
            set_aside(step.set_aside)
        log = self.record.parent / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # Recorded before it begins: whatever ends this process, what the step leaves belongs to this key.
        before = recorded.get("seconds", 0.0) if recorded.get("key") == key else 0.0
        self.state.record(step.name, key=key, status="begun", seconds=before)
        with open(log, "a") as output:
            process = subprocess.Popen(
                command,
                env=child_environment(step.processes * self.at_once),
                stdin=subprocess.DEVNULL,
                stdout=output if self.at_once > 1 else subprocess.PIPE,
                stderr=output if self.at_once > 1 else None,
                text=True,
                errors="replace",
            )
        one = Running(number, step, key, before, process, log, time.monotonic())
        if process.stdout:
            one.console = threading.Thread(target=copy_output, args=(process, log), daemon=True)
            one.console.start()
        return one

    def record_step(self, one: Running, status: str = "begun") -> None:
        seconds = round(one.before + one.seconds, 1)
        self.state.record(one.step.name, key=one.key, status=status, seconds=seconds)

    def wait_for_one(self) -> None:
        """Wait until a step ends, and record how."""
        while not (ended := [one for one in self.running if one.process.poll() is not None]):
            time.sleep(0.05)
        for one in ended:
            self.running.remove(one)
            if one.console:
                one.console.join(10)
            if one.process.returncode or not one.step.output.exists():
                self.fail(one)
                continue
            self.record_step(one, "done")
            self.finished.add(one.step.name)
            self.spent, self.expected = self.spent + one.seconds / 60, self.expected + one.step.minutes
            if self.at_once > 1:
                print(f"{self.label(one.number, one.step)}: done in {clock(one.seconds / 60)}", flush=True)

    def fail(self, one: Running) -> None:
        self.record_step(one)
        code = one.process.returncode
        messages = f"in {one.log}" if self.at_once > 1 else "above"
        failure = f"failed (exit {code}); its messages are {messages}"
        why = "was preempted and has saved" if code == 85 else failure
        self.failed.append(f"step {one.number}, {one.step.title}, {why}. The same command resumes from there")
        if self.at_once > 1:
            print(f"{self.label(one.number, one.step)}: failed (exit {code}), {one.log}", flush=True)

    def stop(self) -> None:
        """After an interruption: give running steps the time to save that a launcher gives its ranks."""
        for one in self.running:
            one.process.terminate()
        for one in self.running:
            try:
                one.process.wait(60)
            except subprocess.TimeoutExpired:
                one.process.kill()
            self.record_step(one)
