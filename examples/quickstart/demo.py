"""Run the quick start: fetch, pack, train three stages on real speech, score.

    python -m examples.quickstart.demo [--quick] [--dry-run] [--ranks N] [--plan FILE.yaml]

    fetch -> pack -> for each stage: score, train, score -> picture -> table

Each step is an ordinary command of the project, done once (examples/steps.py). The recipes hold
what is trained and how long; demo.yaml holds what is scored and on how much. --quick takes quick.yaml:
stage 1 alone, on fewer clips.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from core.command_line import CommandParser
from data_tools.shards import SAMPLE_DTYPE
from examples.quickstart import results
from examples.steps import (
    BIN,
    State,
    Step,
    StepError,
    digest,
    file_digest,
    rank_count,
    run,
    scoring,
    show,
    training,
    what_is_learnt,
)
from model.generation.joint import JointSearch
from recipe.config import Recipe, RecipeError, load_recipe

HERE = Path(__file__).resolve().parent
WHEN = {
    "before": "before training",
    "after": "after training",
    "joint": "after training, LLM and CTC head together",
}
MANIFESTS = [
    f"{corpus}-{split}"
    for corpus in ("dialogues", "prompts", "instruct")
    for split in ("train", "valid", "test")
]


class Plan:
    """demo.yaml or quick.yaml as a list of steps."""

    def __init__(self, path: Path, ranks: int | None) -> None:
        self.settings = OmegaConf.load(path)
        self.cache = Path(self.settings.cache)
        self.ranks = ranks or rank_count(self.settings.ranks)
        self.recipes: list[tuple[object, Recipe]] = [
            (stage, load_recipe(stage.recipe)) for stage in self.settings.stages
        ]
        self.output = Path(self.recipes[0][1].output)
        self.record = self.output / "demo.json"
        self.trained: dict[
            str, str
        ] = {}  # stage -> key of its training step, which the steps behind it depend on

    def fingerprint(self, shards: str) -> str:
        index = self.cache / "shards" / shards / "index.json"
        return json.loads(index.read_text())["fingerprint"] if index.exists() else "missing"

    def data_steps(self) -> list[Step]:
        """Models and packed corpora."""
        settings, python = self.settings, sys.executable
        scripts = sorted(HERE.glob("*.py"))
        steps = [
            Step(
                "fetch",
                "download and convert models and corpora",
                settings.fetch_minutes,
                [python, "-m", "examples.quickstart.fetch", "--cache", str(self.cache)],
                lambda: [file_digest(path) for path in scripts if path.name not in ("demo.py", "results.py")],
                self.cache / "manifests",
            )
        ]
        packed = settings.get("packed", MANIFESTS)
        return steps + [self.pack(name, self.cache / "manifests" / f"{name}.jsonl") for name in packed]

    def pack(self, name: str, manifest: Path) -> Step:
        """A manifest to shards."""
        settings, shards = self.settings, self.cache / "shards" / name
        return Step(
            f"pack-{name}",
            f"pack {name}",
            settings.pack.minutes,
            [
                sys.executable,
                "data_tools/pack.py",
                "--manifest",
                str(manifest),
                "--out",
                str(shards),
                "--workers",
                str(os.cpu_count() or 1),
                "--shard-mb",
                str(settings.pack.shard_mb),
            ],
            lambda: [file_digest(manifest), settings.pack.shard_mb, str(SAMPLE_DTYPE)],
            shards / "index.json",
            set_aside=shards,
            processes=os.cpu_count() or 1,
        )

    def steps(self) -> list[Step]:
        steps = self.data_steps()
        for stage, recipe in self.recipes:
            steps += self.stage_steps(stage, recipe)
        if "transcribe" in self.settings:
            steps += self.transcription()
        steps.append(self.picture())
        return steps

    @property
    def first_model(self) -> Path:
        _, recipe = self.recipes[0]
        return Path(recipe.output) / recipe.stage / "model"

    @property
    def word_times(self) -> Path:
        """The transcript of one clip with the time of each word."""
        return self.output / "clip.ctm"

    def data_of(self, recipe: Recipe) -> list[str]:
        return [
            self.fingerprint(Path(corpus.shards).name) for corpus in [*recipe.data.train, *recipe.data.valid]
        ]

    def stage_steps(self, stage: object, recipe: Recipe) -> list[Step]:
        folder = Path(recipe.output) / recipe.stage

        def train_key() -> str:
            key = digest(what_is_learnt(recipe), self.data_of(recipe), dict(self.trained), self.ranks)
            self.trained[recipe.stage] = key
            return key

        train = Step(
            f"train-{recipe.stage}",
            f"{stage.title}: train ({recipe.optim.total_steps} steps, {self.ranks} ranks)",
            stage.minutes,
            training(self.ranks, stage.recipe),
            train_key,
            folder / "model" / "soundwave.json",
            set_aside=folder,
            processes=self.ranks,
        )
        scores = {when: self.score(stage, recipe, when) for when in WHEN if when in stage}
        before = [scores.pop("before")] if "before" in scores else []
        return [*before, train, *scores.values()]

    def scores(self, recipe: Recipe, when: str) -> Path:
        """Where the predictions on each folder go, the scores beside them as .scores.json: of a trained model
        where evaluation.run puts them by default, so that an exported model's card shows them."""
        if when != "before":
            return (
                Path(recipe.output)
                / recipe.stage
                / "model"
                / {"after": "evaluation", "joint": "evaluation-joint"}[when]
            )
        return self.output / "evaluation" / f"{recipe.stage}-{when}"

    def transcribed(self) -> dict[str, Path]:
        """Return name -> predictions of the picture's test set: by the CTC head, the LLM and both."""
        data, paths = self.settings.picture.shards, {}
        named = [("CTC", self.recipes[0], "after")]
        if len(self.recipes) > 1:
            named += [("LLM", self.recipes[-1], "after"), ("joint", self.recipes[-1], "joint")]
        for name, (stage, recipe), when in named:
            if when in stage and data in stage[when].shards:
                scores = sorted(self.scores(recipe, when).glob(f"{data}-*.scores.json"))
                if scores:
                    paths[name] = scores[0].with_name(scores[0].name.replace(".scores.json", ".jsonl"))
        return paths

    def score(self, stage: object, recipe: Recipe, when: str) -> Step:
        evaluation, out = stage[when], self.scores(recipe, when)
        shards = [str(self.cache / "shards" / name) for name in evaluation.shards]
        options = [
            "--shards",
            *shards,
            "--task",
            *evaluation.tasks,
            "--decode",
            evaluation.decode,
            "--limit",
            str(evaluation.limit),
            "--out",
            str(out),
        ]
        if "max_new_tokens" in evaluation:
            options += ["--max-new-tokens", str(evaluation.max_new_tokens)]
        model = [
            "--untrained",
            stage.recipe,
        ]  # as the stage begins: what earlier stages have learnt, the rest fresh
        if when != "before":
            model = ["--model", str(Path(recipe.output) / recipe.stage / "model")]
        settings = {
            name: value for name, value in OmegaConf.to_container(evaluation).items() if name != "minutes"
        }
        if evaluation.decode == "joint":
            settings["search"] = asdict(JointSearch())
        sets = ", ".join(evaluation.shards)
        title = f"{stage.title}: score {WHEN[when]} ({sets}; {evaluation.limit} utterances each)"
        return Step(
            f"score-{recipe.stage}-{when}",
            title,
            evaluation.minutes,
            scoring(self.ranks, *options, *model),
            lambda: [
                settings,
                [self.fingerprint(name) for name in evaluation.shards],
                dict(self.trained),
                asdict(recipe.model),
                recipe.seed,
            ],
            out,
            set_aside=out,
            processes=self.ranks,
        )

    def transcription(self) -> list[Step]:
        """Take one held-out clip out of its shard, and transcribe it with word times."""
        settings = self.settings.transcribe
        shards, clip = self.cache / "shards" / settings.shards, self.output / "clip.wav"

        def key() -> list:
            return [self.fingerprint(settings.shards), settings.index]

        show = [sys.executable, "-m", "data_tools.show", str(shards), "--index", str(settings.index)]
        transcribe = [sys.executable, "-m", "soundwave.transcribe", str(self.first_model), str(clip)]
        return [
            Step(
                "clip", "take one held-out clip out of its shard", 0.1, [*show, "--out", str(clip)], key, clip
            ),
            Step(
                "transcribe",
                "transcribe it, with the time of each word",
                settings.minutes,
                [*transcribe, "--format", "ctm", "--quiet", "--out", str(self.output)],
                lambda: [key(), dict(self.trained)],
                self.word_times,
            ),
        ]

    def picture(self) -> Step:
        out = self.output / "picture.png"
        return Step(
            "picture",
            "picture of one held-out clip",
            0.3,
            [
                sys.executable,
                "-m",
                "evaluation.picture",
                "--model",
                str(self.first_model),
                "--shards",
                str(self.cache / "shards" / self.settings.picture.shards),
                "--index",
                str(self.settings.picture.index),
                "--out",
                str(out),
            ],
            lambda: [dict(self.trained), OmegaConf.to_container(self.settings.picture)],
            out,
        )


def finish(plan: Plan) -> None:
    """The table, and where the rest is."""
    state = State(plan.record)
    rows = results.collect(plan)
    summary = results.summary(plan, rows, {name: step.get("seconds") for name, step in state.steps.items()})
    path = plan.output / "results.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print("\n" + results.table(summary) + "\n")
    if text := results.transcripts(plan.transcribed()):
        print(f"{text}\n")
    if plan.word_times.exists() and "transcribe" in plan.settings:
        print(f"{plan.output / 'clip.wav'} with word times:\n\n{plan.word_times.read_text()}")
    print(f"machine      {results.machine_line(summary)}")
    print(f"results      {path}")
    before = ""
    if (plan.output / "evaluation").exists():
        before = f"; before training: {plan.output / 'evaluation'}/*/*.jsonl"
    print(f"predictions  {plan.output}/*/model/evaluation*/*.jsonl{before}")
    print(f"picture      {plan.output / 'picture.png'}")
    print(f"TensorBoard  {BIN / 'tensorboard'} --logdir {plan.output}")


def main() -> int:
    parser = CommandParser("python -m examples.quickstart.demo", __doc__.split("\n")[0], example="--quick")
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--plan", type=Path, help="what is trained and scored (default: demo.yaml)")
    plans.add_argument(
        "--quick",
        dest="plan",
        action="store_const",
        const=HERE / "quick.yaml",
        help="stage 1 alone on fewer clips, about four minutes: transcript, word times, picture",
    )
    parser.add_argument("--ranks", type=int, help="processes of training and scoring (default: the plan's)")
    parser.add_argument("--dry-run", action="store_true", help="only list the steps and their commands")
    options = parser.parse_args()
    try:
        plan = Plan(options.plan or HERE / "demo.yaml", options.ranks)
        if options.dry_run:
            show(plan.steps())
            return 0
        if shutil.disk_usage(".").free < 8e9:
            raise StepError(
                f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here, about 8 GB needed: free some"
            )
        run(plan.record, plan.steps())
        finish(plan)
    except (StepError, RecipeError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
