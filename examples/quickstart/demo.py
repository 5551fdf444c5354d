"""The whole road on real speech, in one command: `make demo`, or

    python -m examples.quickstart.demo [--dry-run] [--ranks N] [--plan examples/quickstart/demo.yaml]

    fetch -> pack -> for each stage: score, train, score -> picture -> table

Each step is an ordinary command of the project, printed before it runs, so that it can be run alone. A step that is done is
not done again, unless something that it depends on has changed; an interrupted one goes on where it stopped. What is trained how
long stands in the recipes, what is scored on how much in demo.yaml: nothing of that is in here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf

from data_tools.shards import SAMPLE_DTYPE
from examples.quickstart import results
from train.config import Recipe, RecipeError, load_recipe

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
MANIFESTS = [f"{corpus}-{split}" for corpus in ("dialogues", "prompts", "instruct") for split in ("train", "valid", "test")]


class DemoError(Exception):
    """One line: which step stopped, why, what to do."""


@dataclass
class Step:
    """One command, and what decides whether it has to run."""

    name: str
    title: str
    minutes: float  # expected, see demo.yaml
    command: list[str]
    key: Callable[[], object]  # what the result depends on; read when the step's turn has come
    output: Path  # is there when the step is done
    processes: int = 1  # among which the cores are shared
    set_aside: Path | None = None  # moved out of the way when the key has changed since it was begun


def digest(*of: object) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


class Plan:
    """demo.yaml as a list of steps."""

    def __init__(self, path: Path, ranks: int | None) -> None:
        self.settings = OmegaConf.load(path)
        self.cache = Path(self.settings.cache)
        self.ranks = ranks or rank_count(self.settings.ranks)
        self.recipes: list[tuple[object, Recipe]] = [(stage, load_recipe(stage.recipe)) for stage in self.settings.stages]
        self.output = Path(self.recipes[0][1].output)
        self.trained: dict[str, str] = {}  # stage -> key of its training step, which the steps behind it depend on

    def fingerprint(self, shards: str) -> str:
        index = self.cache / "shards" / shards / "index.json"
        return json.loads(index.read_text())["fingerprint"] if index.exists() else "missing"

    def steps(self) -> list[Step]:
        settings, python = self.settings, sys.executable
        scripts = sorted(HERE.glob("*.py"))
        steps = [Step("fetch", "download and convert models and corpora", settings.fetch_minutes,
                      [python, "-m", "examples.quickstart.fetch", "--cache", str(self.cache)],
                      lambda: [file_digest(path) for path in scripts if path.name not in ("demo.py", "results.py")],
                      self.cache / "manifests")]
        for name in MANIFESTS:
            manifest, shards = self.cache / "manifests" / f"{name}.jsonl", self.cache / "shards" / name
            steps.append(Step(f"pack-{name}", f"pack {name}", settings.pack.minutes,
                              [python, "data_tools/pack.py", "--manifest", str(manifest), "--out", str(shards),
                               "--workers", str(os.cpu_count() or 1), "--shard-mb", str(settings.pack.shard_mb)],
                              lambda manifest=manifest: [file_digest(manifest), settings.pack.shard_mb, str(SAMPLE_DTYPE)],
                              shards / "index.json", set_aside=shards, processes=os.cpu_count() or 1))
        for stage, recipe in self.recipes:
            steps += self.stage_steps(stage, recipe)
        steps.append(self.picture())
        return steps

    def data_of(self, recipe: Recipe) -> list[str]:
        return [self.fingerprint(Path(corpus.shards).name) for corpus in [*recipe.data.train, *recipe.data.valid]]

    def stage_steps(self, stage: object, recipe: Recipe) -> list[Step]:
        folder = Path(recipe.output) / recipe.stage

        def train_key() -> str:
            learnt = {name: value for name, value in asdict(recipe).items() if name not in ("log", "checkpoint")}
            key = digest(learnt, self.data_of(recipe), dict(self.trained), self.ranks)
            self.trained[recipe.stage] = key
            return key

        launcher = [str(BIN / "deepspeed"), "--num_gpus", str(self.ranks), "--master_port", str(free_port())]
        train = Step(f"train-{recipe.stage}", f"{stage.title}: train ({recipe.optim.steps} steps, {self.ranks} ranks)",
                     stage.minutes, [*launcher, "train/run.py", stage.recipe], train_key, folder / "model" / "soundwave.json",
                     set_aside=folder, processes=self.ranks)
        return [self.score(stage, recipe, "before"), train, self.score(stage, recipe, "after")]

    def scores(self, recipe: Recipe, when: str) -> Path:
        """Where the predictions on each folder go, the scores beside them as .scores.json: of a trained model where
        evaluation.run puts them without being told, so that an exported model's card shows them."""
        if when == "after":
            return Path(recipe.output) / recipe.stage / "model" / "evaluation"
        return self.output / "evaluation" / f"{recipe.stage}-{when}"

    def score(self, stage: object, recipe: Recipe, when: str) -> Step:
        wanted, out = stage[when], self.scores(recipe, when)
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(self.ranks), "-m", "evaluation.run"]
        shards = [str(self.cache / "shards" / name) for name in wanted.shards]
        options = ["--shards", *shards, "--task", *wanted.tasks, "--decode", wanted.decode, "--limit", str(wanted.limit),
                   "--max-new-tokens", str(wanted.get("max_new_tokens", 40)), "--out", str(out)]
        model = ["--untrained", stage.recipe]  # as the stage begins: what earlier stages have learnt, the rest fresh
        if when == "after":
            model = ["--model", str(Path(recipe.output) / recipe.stage / "model")]
        asked = {name: value for name, value in OmegaConf.to_container(wanted).items() if name != "minutes"}
        title = f"{stage.title}: score {when} training ({', '.join(wanted.shards)}; {wanted.limit} utterances each)"
        return Step(f"score-{recipe.stage}-{when}", title, wanted.minutes, [*launcher, *options, *model],
                    lambda: [asked, [self.fingerprint(name) for name in wanted.shards], dict(self.trained), asdict(recipe.model),
                             recipe.seed],
                    out, set_aside=out, processes=self.ranks)

    def picture(self) -> Step:
        _, recipe = self.recipes[0]
        out = self.output / "picture.png"
        return Step("picture", "picture of one held-out clip", 0.3,
                    [sys.executable, "-m", "evaluation.picture", "--model", str(Path(recipe.output) / recipe.stage / "model"),
                     "--shards", str(self.cache / "shards" / self.settings.picture.shards),
                     "--index", str(self.settings.picture.index), "--out", str(out)],
                    lambda: [dict(self.trained), OmegaConf.to_container(self.settings.picture)], out)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_count(wanted: int) -> int:
    import torch

    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def child_environment(processes: int) -> dict[str, str]:
    """What every command gets, unless the user has set it."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                "PYTHONWARNINGS": "ignore::FutureWarning", "PYTHONPATH": os.getcwd(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not sys.stderr.isatty():
        defaults["TQDM_MININTERVAL"] = "15"  # a line now and then where there is no terminal to draw a bar in
    return {**defaults, **os.environ}


class State:
    """What is done, in <output>/demo.json: step name -> key, status, seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict] = json.loads(path.read_text())["steps"] if path.exists() else {}

    def note(self, name: str, **values: object) -> None:
        self.steps[name] = {**self.steps.get(name, {}), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"steps": self.steps}, indent=1))
        partial.replace(self.path)


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


def run(plan: Plan) -> None:
    """All steps. Errors: DemoError."""
    state, steps = State(plan.output / "demo.json"), plan.steps()
    spent = expected = 0.0  # of the steps that ran now: how this machine compares with the one that `minutes` were taken on
    for number, step in enumerate(steps, 1):
        key, known = digest(step.key()), state.steps.get(step.name, {})
        label = f"[{number:2d}/{len(steps)}] {step.title}"
        if known.get("status") == "done" and known.get("key") == key and step.output.exists():
            print(f"{label}: done")
            continue
        pace = max(0.2, spent / expected) if expected > 1 else 1.0
        left = sum(later.minutes for later in steps[number:] if state.steps.get(later.name, {}).get("status") != "done")
        print(f"\n{label} ({clock(step.minutes * pace)}; after it {clock(left * pace)} to go)", flush=True)
        print(f"      {shlex.join(step.command)}", flush=True)
        if step.set_aside and known.get("key") not in (None, key):
            set_aside(step.set_aside)
        before = known.get("seconds", 0.0) if known.get("key") == key else 0.0  # of attempts that were interrupted
        began = time.monotonic()
        try:
            code = subprocess.run(step.command, env=child_environment(step.processes), stdin=subprocess.DEVNULL).returncode
        finally:
            seconds = time.monotonic() - began
            state.note(step.name, key=key, status="begun", seconds=round(before + seconds, 1))
        if code or not step.output.exists():
            why = "was preempted and has saved" if code == 85 else f"failed (exit {code}); its messages are above"
            raise DemoError(f"step {number}, {step.title}, {why}. The same command goes on from there")
        spent, expected = spent + seconds / 60, expected + step.minutes
        state.note(step.name, status="done")


def finish(plan: Plan) -> None:
    """The table, and where the rest is."""
    state = State(plan.output / "demo.json")
    rows = results.collect(plan)
    summary = results.summary(plan, rows, {name: step.get("seconds") for name, step in state.steps.items()})
    path = plan.output / "results.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print("\n" + results.table(summary) + "\n")
    print(f"machine      {results.machine_line(summary)}")
    print(f"results      {path}")
    print(f"predictions  {plan.output}/*/model/evaluation/*.jsonl; before training: {plan.output / 'evaluation'}/*/*.jsonl")
    print(f"picture      {plan.output / 'picture.png'}")
    print(f"TensorBoard  {BIN / 'tensorboard'} --logdir {plan.output}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=HERE / "demo.yaml", help="what is trained and scored (default: demo.yaml)")
    parser.add_argument("--ranks", type=int, help="processes of training and scoring (default: the plan's)")
    parser.add_argument("--dry-run", action="store_true", help="only list the steps and their commands")
    options = parser.parse_args()
    try:
        plan = Plan(options.plan, options.ranks)
        if options.dry_run:
            steps = plan.steps()
            for number, step in enumerate(steps, 1):
                print(f"[{number:2d}/{len(steps)}] {step.title} ({clock(step.minutes)})\n      {shlex.join(step.command)}")
            print(f"{clock(sum(step.minutes for step in steps))} in all")
            return 0
        if shutil.disk_usage(".").free < 8e9:
            raise DemoError(f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here, about 8 GB needed: free some")
        run(plan)
        finish(plan)
    except (DemoError, RecipeError) as error:
        print(f"\ndemo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
