"""Train and score the variants of a plan: ablations, a projector baseline, less data.

    python -m examples.less_is_more.study [--seeds 0 1] [--only ours projector ...] [--dry-run]        (make
    less-is-more) python -m examples.less_is_more.study --plan examples/less_is_more/trials.yaml

    quick start's data -> for each seed: stage 1 of each kind -> for each variant: stage 2, score, speed ->
    table, picture

plan.yaml names what is compared, on what, with how many steps; trials.yaml what was tried on the valid split.
Each step is an ordinary command of the project, done once (examples/steps.py): a study that was interrupted,
or begun with --only, resumes with the same command.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from core.command_line import CommandParser
from core.decode_names import FORMER_DECODES
from examples.less_is_more import table
from examples.quickstart.demo import Plan as QuickStart
from examples.steps import (
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


def load(path: Path) -> DictConfig:
    """A plan, over the one beside it that its `base` names."""
    plan = OmegaConf.load(path)
    return OmegaConf.merge(load(path.parent / plan.base), plan) if "base" in plan else plan


class Study:
    """plan.yaml as a list of steps. Errors: StepError for a name that the plan does not know."""

    def __init__(self, path: Path, seeds: list[int] | None = None, only: list[str] | None = None) -> None:
        self.plan = load(path)
        self.data = QuickStart(HERE.parent / "quickstart" / "demo.yaml", ranks=None)
        self.output = Path(self.plan.output)
        self.ranks = rank_count(self.plan.ranks)
        self.seeds = list(self.plan.seeds) if seeds is None else seeds
        unknown = sorted(set(only or ()) - set(self.plan.variants))
        if unknown:
            raise StepError(f"no variant {', '.join(unknown)}: {path} has {', '.join(self.plan.variants)}")
        only = list(self.plan.only) if only is None and "only" in self.plan else only
        self.variants = {
            name: variant for name, variant in self.plan.variants.items() if only is None or name in only
        }
        self._keys: dict[
            Path, str
        ] = {}  # stage folder -> key of its training, which what comes behind it depends on

    def overrides(self, variant: str, stage: str, seed: int) -> list[str]:
        """Of the quick start's recipe: what makes this variant's stage."""
        of = self.plan.variants[variant]
        if "after" in of and stage != "sft":
            return self.overrides(of.after, stage, seed)
        common = [
            *self.plan.overrides,
            *self.plan.get("stages", {}).get(stage, []),
            f"seed={seed}",
            f"data.seed={seed}",
        ]
        like = self.plan.variants[of.like].shrinking if "like" in of else []
        if stage == "alignment":
            return [
                *common,
                *self.plan.alignments[of.alignment],
                f"output={self.first(of.alignment, seed).parent}",
            ]
        if stage == "sft":
            start, own = self.folder(of.after, seed) / "model", of.sft
        else:
            start, own = (
                self.first(of.alignment, seed) / "model" if of.alignment else "fresh",
                [*like, *of.shrinking],
            )
        return [*common, *own, f"init_from={start}", f"output={self.folder(variant, seed).parent}"]

    def recipe(self, variant: str, stage: str, seed: int) -> Recipe:
        return load_recipe(self.plan.recipes[stage], self.overrides(variant, stage, seed))

    def stages(self, variant: str) -> list[str]:
        of = self.plan.variants[variant]
        if "after" in of:
            return [*self.stages(of.after), "sft"]
        return ["alignment", "shrinking"] if of.alignment else ["shrinking"]

    def first(self, alignment: str, seed: int) -> Path:
        """The folder of a stage 1."""
        return self.output / f"stage-1-{alignment}-seed-{seed}" / "alignment"

    def folder(self, variant: str, seed: int) -> Path:
        """Of a variant's last stage: 2, or 3 where it comes after another variant."""
        return self.output / f"{variant}-seed-{seed}" / self.stages(variant)[-1]

    def predictions(self, folder: Path, decode: str, data: str, whole: bool = False) -> Path:
        """Of a stage's folder on one test set, or on the whole of it; their scores lie beside them."""

        def file(decode: str) -> Path:
            out = f"evaluation-{decode}{'-whole' if whole else ''}"
            return folder / "model" / out / f"{data}-asr-{decode}.jsonl"

        former = [file(old) for old, new in FORMER_DECODES.items() if new == decode]
        return next((path for path in former if path.parent.exists()), file(decode))

    def train(self, variant: str, stage: str, seed: int) -> Step:
        overrides = self.overrides(variant, stage, seed)
        recipe = load_recipe(self.plan.recipes[stage], overrides)
        folder = Path(recipe.output) / stage
        before = (
            Path(recipe.init_from).parent if stage != "alignment" and recipe.init_from != "fresh" else None
        )

        def key() -> str:
            self._keys[folder] = digest(
                what_is_learnt(recipe), self.data.data_of(recipe), self._keys.get(before), self.ranks
            )
            return self._keys[folder]

        name = folder.parent.name
        usual = load_recipe(self.plan.recipes[stage])
        minutes = self.plan.minutes[stage] * (
            recipe.optim.total_steps
            * recipe.data.batch_seconds
            / (usual.optim.total_steps * usual.data.batch_seconds)
        )
        return Step(
            self.trains(folder),
            f"{name}: train ({stage}, {recipe.optim.total_steps} steps)",
            minutes,
            training(self.ranks, self.plan.recipes[stage], *overrides),
            key,
            folder / "model" / "soundwave.json",
            set_aside=folder,
            processes=self.ranks,
            after=self.needs(before),
        )

    def trains(self, folder: Path) -> str:
        """The name of the step that trains a stage's folder."""
        return f"train-{folder.parent.name}-{folder.name}"

    def needs(self, before: Path | None) -> tuple[str, ...]:
        """Steps that must be done before a stage is trained: the one before it, and the synthetic speech
        where there is some."""
        speech = [f"pack-{self.plan.synthetic.shards}"] if self.plan.synthetic else []
        return (*speech, *([self.trains(before)] if before else []))

    def score(self, folder: Path, decode: str, whole: bool = False) -> Step:
        """On some utterances of each test set; whole: on every one of the first set, for what a few cannot
        tell from chance."""
        plan = self.plan.score
        names, limit = (plan.shards[:1], []) if whole else (plan.shards, ["--limit", str(plan.limit)])
        last = self.predictions(folder, decode, names[-1], whole)
        out, all_of_it = last.parent, " all of it" if whole else ""
        shards = [str(self.data.cache / "shards" / name) for name in names]
        batches = ["--batch-seconds", str(plan.batch_seconds)] if "batch_seconds" in plan else []
        options = [
            "--model",
            str(folder / "model"),
            "--shards",
            *shards,
            "--task",
            "asr",
            "--decode",
            decode,
            *limit,
            *batches,
            "--max-new-tokens",
            str(plan.max_new_tokens),
            "--out",
            str(out),
        ]
        return Step(
            f"score-{folder.parent.name}-{out.name.removeprefix('evaluation-')}",
            f"{folder.parent.name}: score{all_of_it} ({decode})",
            self.plan.minutes["whole" if whole else "score"],
            scoring(self.ranks, *options),
            lambda: [
                plan.max_new_tokens if whole else OmegaConf.to_container(plan),
                [self.data.fingerprint(name) for name in names],
                self._keys.get(folder),
                *([asdict(JointSearch())] if decode == "joint" else []),
            ],
            last.with_suffix(".scores.json"),
            set_aside=out,
            processes=self.ranks,
            after=(self.trains(folder),),
        )

    def speed(self, folder: Path) -> list[Step]:
        plan, out = self.plan.speed, folder / "speed.json"
        if plan is None:
            return []
        return [
            Step(
                f"speed-{folder.parent.name}",
                f"{folder.parent.name}: time to first token",
                self.plan.minutes.speed,
                [
                    sys.executable,
                    "-m",
                    "evaluation.speed",
                    "--model",
                    str(folder / "model"),
                    "--shards",
                    str(self.data.cache / "shards" / plan.shards),
                    "--limit",
                    str(plan.clips),
                    "--max-new-tokens",
                    "8",
                    "--out",
                    str(out),
                ],
                lambda: [
                    OmegaConf.to_container(plan),
                    self.data.fingerprint(plan.shards),
                    self._keys.get(folder),
                ],
                out,
                set_aside=out,
                after=(self.trains(folder),),
                alone=True,
            )
        ]

    def whisper(self) -> list[Step]:
        steps = []
        for name in self.plan.score.shards if self.plan.whisper else ():
            out = self.output / "whisper" / f"{name}.jsonl"
            shards = self.data.cache / "shards" / name
            steps.append(
                Step(
                    f"whisper-{name}",
                    f"Whisper's own decoder on {name}",
                    self.plan.minutes.score,
                    scoring(
                        self.ranks,
                        "--whisper",
                        self.plan.whisper,
                        "--shards",
                        str(shards),
                        "--limit",
                        str(self.plan.score.limit),
                        "--out",
                        str(out),
                        module="evaluation.whisper_baseline",
                    ),
                    lambda name=name: [
                        self.plan.whisper,
                        self.plan.score.limit,
                        self.data.fingerprint(name),
                        file_digest(Path(self.plan.whisper) / "config.json"),
                    ],
                    out.with_suffix(".scores.json"),
                    set_aside=out,
                    processes=self.ranks,
                    after=(),
                )
            )
        return steps

    def synthetic(self) -> list[Step]:
        """What a variant needs beyond the quick start's data; [] where none of those chosen does."""
        plan, cache = self.plan.synthetic, self.data.cache
        if plan is None:
            return []
        shards = str(cache / "shards" / plan.shards)
        recipes = [self.recipe(name, stage, 0) for name in self.variants for stage in self.stages(name)]
        if not any(corpus.shards == shards for recipe in recipes for corpus in recipe.data.train):
            return []
        manifest = cache / "synthetic" / "train.jsonl"
        speak = Step(
            "synthetic",
            f"make {plan.hours:g} h of synthetic speech",
            plan.minutes,
            [
                sys.executable,
                "-m",
                "examples.less_is_more.synthetic",
                "--cache",
                str(cache),
                "--hours",
                str(plan.hours),
            ],
            lambda: [
                plan.hours,
                file_digest(HERE / "synthetic.py"),
                file_digest(cache / "manifests" / "dialogues-train.jsonl"),
            ],
            manifest,
            after=(),
        )
        return [speak, replace(self.data.pack(plan.shards, manifest), after=(speak.name,))]

    def steps(self) -> list[Step]:
        steps, added = [*self.whisper(), *self.synthetic()], set()
        for seed in self.seeds:
            for name, variant in self.variants.items():
                kind = ("stage 1", variant.alignment, seed)
                if variant.alignment and kind not in added:
                    added.add(kind)
                    first = self.train(name, "alignment", seed)
                    folder = self.first(variant.alignment, seed)
                    steps += [first, self.score(folder, "ctc")]
                    if variant.alignment in self.plan.whole.ctc:
                        steps.append(self.score(folder, "ctc", whole=True))
                folder = self.folder(name, seed)
                second = variant.get("after", name)
                if (second, seed) not in added:
                    added.add((second, seed))
                    steps.append(self.train(second, "shrinking", seed))
                if "after" in variant:
                    steps.append(self.train(name, "sft", seed))
                steps.append(self.score(folder, "greedy"))
                if name in self.plan.joint:
                    steps.append(self.score(folder, "joint"))
                steps += [
                    self.score(folder, decode, whole=True)
                    for decode in ("greedy", "joint")
                    if name in self.plan.whole[decode]
                ]
                steps += self.speed(folder)
        return steps


def main() -> int:
    parser = CommandParser(
        "python -m examples.less_is_more.study",
        __doc__.split("\n")[0],
        example="--seeds 0 --only ours projector",
    )
    parser.add_argument(
        "--plan", type=Path, default=HERE / "plan.yaml", help="what is compared (default: plan.yaml)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="these variants alone (default: all of the plan's)"
    )
    parser.add_argument(
        "--at-once", type=int, help="steps side by side, e.g. on one large GPU (default: the plan's, or 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the steps and their commands")
    options = parser.parse_args()
    try:
        study = Study(options.plan, options.seeds, options.only)
        if options.dry_run:
            show(study.steps())
            return 0
        run(study.data.record, study.data.data_steps())
        run(study.output / "study.json", study.steps(), options.at_once or study.plan.get("at_once", 1))
        print("\n" + table.finish(study))
    except (StepError, RecipeError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
