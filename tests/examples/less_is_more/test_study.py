"""The study's variants differ in what their titles say; what was scored is collected, compared and written
down."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from evaluation.score import score_file
from examples.less_is_more import table
from examples.less_is_more.study import HERE, Study
from examples.steps import StepError, digest, run, what_is_learnt
from tests.train.tiny import workspace

PLAN = HERE / "plan.yaml"


def flat(node: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_a_variant_differs_from_ours_in_what_it_is_about():
    study = Study(PLAN)
    ours = flat(what_is_learnt(study.recipe("ours", "shrinking", 0)))
    about = {
        "no-lookback": {"model.shrinking.lookback"},
        "no-ctc": {"loss.ctc_weight"},
        "blank-kept": {"model.shrinking.keep_blank_runs"},
        "frame": {"model.alignment.attention"},
        "alpha-16": {"model.llm.lora_alpha"},
        "no-token-embeddings": {"model.shrinking.token_embeddings"},
        "no-stage-1": {"optim.steps"},
        "longer": {"optim.steps"},
        "synthetic": set(),
        "synthetic-2": {"data.train"},
        "data-10": {"data.train"},
        "data-25": {"data.train"},
        "data-50": {"data.train"},
        "ours": set(),
        "ours-sft": set(),
        "synthetic-sft": set(),
        "projector": {
            "model.alignment.stack_frames",
            "model.alignment.layers",
            "model.shrinking.enabled",
            "model.shrinking.token_embeddings",
            "loss.ctc_weight",
            "optim.steps",
        },
    }
    about["projector-synthetic"] = about["projector"] | {"data.train"}
    assert about.keys() == study.variants.keys()
    for name, changed in about.items():
        recipe = study.recipe(name, "shrinking", 0)
        theirs = flat(what_is_learnt(recipe))
        assert {key for key in theirs if theirs[key] != ours.get(key)} - {"output", "init_from"} == changed, (
            name
        )
        assert not any("test" in corpus.shards or "valid" in corpus.shards for corpus in recipe.data.train)
        if study.plan.variants[name].alignment:
            first = study.recipe(name, "alignment", 0)
            assert recipe.init_from == f"{first.output}/alignment/model"
            assert first.data.train[0].share == recipe.data.train[0].share
            assert [Path(corpus.shards).name for corpus in first.data.train] == [
                "dialogues-train",
                *(["synthetic-train"] if name.startswith("synthetic") else []),
            ]
        else:
            assert recipe.init_from == "fresh"
    assert study.stages("synthetic-sft") == ["alignment", "shrinking", "sft"]
    second = study.recipe("synthetic", "shrinking", 1).output
    assert study.recipe("synthetic-sft", "sft", 1).init_from == f"{second}/shrinking/model"


def test_trials_stay_on_the_valid_split_and_the_baseline_has_as_many_as_ours():
    study = Study(HERE / "trials.yaml")
    assert [shards.endswith("-valid") for shards in study.plan.score.shards] == [True]
    names = list(study.variants)
    assert (
        sum(name.startswith("baseline") for name in names)
        >= sum(name.startswith("ours") for name in names)
        > 1
    )
    theirs = {name: flat(what_is_learnt(study.recipe(name, "shrinking", 0))) for name in names}
    for name in names:
        of = theirs[name.split("-")[0]]
        changed = {key for key in of if of[key] != theirs[name][key]} - {"output"}
        assert bool(changed) == ("-" in name), name
        assert study.recipe(name, "shrinking", 0).model.shrinking.enabled == name.startswith("ours")
        # A trial's batches may be smaller: the amount of audio is the same.
        assert theirs[name]["optim.steps"] * theirs[name]["data.batch_seconds"] == 64 * 30
    steps = [step.name for step in study.steps()]
    assert (
        len(steps) == len(set(steps)) == 2 + 2 * len(names)
    )  # stage 1 and each trial, trained and scored; nothing timed


def test_the_gpu_plan_is_the_study_with_other_numbers():
    small, large = Study(PLAN), Study(HERE / "gpu.yaml")
    assert "no-lookback" in large.variants and "longer" not in large.variants and large.plan.whole.ctc == []
    for name in large.variants:
        for stage in large.stages(name):
            before, now = (flat(what_is_learnt(study.recipe(name, stage, 0))) for study in (small, large))
            changed = {key for key in now if now[key] != before[key]} - {"output", "init_from"}
            assert changed == {
                "model.dtype",
                "optim.steps",
                "optim.warmup_steps",
                "data.cache_features",
                "data.speed_perturb",
                "data.spec_augment",
                "data.valid",
            } | ({"data.workers"} if stage == "alignment" else set()), name
            assert now["optim.steps"] > before["optim.steps"]
    steps = {step.name: step for step in large.steps()}
    assert all(set(step.after) <= set(steps) for step in steps.values())
    assert "train-stage-1-full-seed-1-alignment" in steps["train-ours-seed-1-shrinking"].after
    assert steps["score-ours-seed-1-joint"].after == ("train-ours-seed-1-shrinking",)
    assert steps["train-projector-seed-0-shrinking"].after == ("pack-synthetic-train",)


def test_variants_share_a_stage_one_and_every_step_has_a_name_of_its_own():
    steps = Study(PLAN, seeds=[0, 1], only=["ours", "no-ctc", "data-10"]).steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert (
        sum("alignment" in name and name.startswith("train") for name in names) == 4
    )  # full and data-10, of two seeds
    assert not any("synthetic" in name for name in names)
    for variant, first in (
        ("synthetic", "train-stage-1-synthetic-seed-1-alignment"),
        ("projector-synthetic", "train-projector-synthetic-seed-1-shrinking"),
    ):
        more = [step.name for step in Study(PLAN, seeds=[1], only=[variant]).steps()]
        assert more.index("synthetic") < more.index("pack-synthetic-train") < more.index(first)
    behind = {step.name: step for step in Study(PLAN, seeds=[1], only=["ours-sft"]).steps()}
    assert behind["train-ours-sft-seed-1-sft"].after == (
        "pack-synthetic-train",
        "train-ours-seed-1-shrinking",
    )
    assert (
        behind["score-ours-sft-seed-1-joint-whole"].after == ("train-ours-sft-seed-1-sft",)
        and len([name for name in behind if name.startswith("train")]) == 3
    )
    with pytest.raises(StepError, match="no variant others: .* has ours, .*projector"):
        Study(PLAN, only=["others"])


def scored(path: Path, answers: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"{i}",
            "corpus": "c",
            "task": "asr",
            "lang": "en",
            "duration": 2.0,
            "reference": "one good word more",
            "prediction": answer,
            "raw": answer,
            "frames": 25,
            "kept": 5,
        }
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(path)


def trained(folder: Path, seconds: list[float], commit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"commit": commit}))
    lines = [{"kind": "train", "step": step, "step_seconds": value} for step, value in enumerate(seconds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Of its first column: the other ones by their heads."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    heads, _, *rows = lines or [[], []]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


@pytest.mark.parametrize("former", [False, True])
def test_scores_in_folders_of_the_former_decode_name_are_found(tmp_path, former):
    """Earlier versions wrote `generate` for `greedy`."""
    study = Study(PLAN, seeds=[0])
    study.output = tmp_path
    folder, name = study.folder("ours", 0), "generate" if former else "greedy"
    written = folder / f"model/evaluation-{name}-whole/a-asr-{name}.jsonl"
    written.parent.mkdir(parents=True)
    assert study.predictions(folder, "greedy", "a", whole=True) == written


def test_what_was_scored_becomes_a_table_and_a_picture(tmp_path, monkeypatch):
    study = Study(PLAN, seeds=[0])
    study.output = tmp_path / "study"
    monkeypatch.setattr(
        table.Plan,
        "open",
        lambda *_: type("Planned", (), {"orders": [type("Order", (), {"total": 7_200_000})]}),
    )
    with pytest.raises(ValueError, match="no scored variant"):
        table.finish(study)
    for name, wrong in (("ours", 1), ("projector", 7), ("data-10", 3)):
        for data in study.plan.score.shards:
            answers = ["one bad word more"] * wrong + ["one good word more"] * (8 - wrong)
            scored(
                study.folder(name, 0) / "model/evaluation-generate" / f"{data}-asr-generate.jsonl", answers
            )
            if name == "ours":
                scored(
                    study.folder(name, 0) / "model/evaluation-joint" / f"{data}-asr-joint.jsonl",
                    ["one good word more"] * 8,
                )
        trained(study.folder(name, 0), [2.0, 4.0, 3.0], commit="c0ffee")
        if name != "data-10":
            scored(
                study.folder(name, 0) / "model/evaluation-generate-whole/dialogues-test-asr-generate.jsonl",
                ["one bad word more"] * wrong + ["one good word more"] * (20 - wrong),
            )
    scored(
        study.folder("ours", 0) / "model/evaluation-joint-whole/dialogues-test-asr-joint.jsonl",
        ["one good word more"] * 20,
    )
    scored(
        study.output
        / "stage-1-full-seed-0/alignment/model/evaluation-ctc-whole/dialogues-test-asr-ctc.jsonl",
        ["one"] * 20,
    )
    for kind in ("full", "data-10"):
        for data in study.plan.score.shards if kind == "full" else ():
            scored(
                study.output / "stage-1-full-seed-0/alignment/model/evaluation-ctc" / f"{data}-asr-ctc.jsonl",
                ["one"] * 8,
            )
        trained(study.output / f"stage-1-{kind}-seed-0" / "alignment", [60.0, 60.0], commit="bead")
    for data in study.plan.score.shards:
        scored(study.output / "whisper" / f"{data}.jsonl", ["one good word more"] * 8)
    text = table.finish(study, tmp_path)
    result = json.loads((study.output / "results.json").read_text())
    ours, joint, other, less = result["rows"]
    assert [row["variant"] for row in result["rows"]] == ["ours", "ours, joint", "projector", "data-10"]
    bars, curve = table.picture(result).axes
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        "data-10",
        "projector",
        "ours, joint",
        "ours",
    ]
    shown = {drawn.get_label(): sorted(map(float, drawn.get_ydata())) for drawn in curve.lines}
    assert shown == {
        "ours, seed 0": pytest.approx([1 / 32, 3 / 32]),
        "projector, seed 0": pytest.approx([7 / 32]),
    }
    assert ours["scores"]["dialogues-test"]["wer"] == pytest.approx(1 / 32)
    assert joint["scores"]["dialogues-test"]["wer"] == 0 and joint["stage_1"] == ours["stage_1"]
    assert joint["against_ours"]["dialogues-test"]["difference"] == pytest.approx(-1 / 32)
    assert joint["against_ctc"]["dialogues-test"]["difference"] == pytest.approx(-3 / 4)
    assert (
        ours["against_ctc"]["dialogues-test"]["difference"] == pytest.approx(1 / 32 - 3 / 4)
        and "against_ours" not in ours
    )
    assert other["scores"]["dialogues-test"]["wer"] == pytest.approx(7 / 32)
    assert ours["stage_2"] == {"steps": 3, "step_seconds": 3.0, "minutes": 0.15, "commit": "c0ffee"}
    assert "Trained at commit bead, c0ffee;" in text
    shown, whole, _ = map(read_table, text.split("\n\n"))
    assert shown["ours, 10 % of the data"]["S/D/I, dialogues-test"] == "3/0/0"
    assert shown["stage 1, CTC decoding (full)"]["S/D/I, dialogues-test"] == "0/24/0"
    assert shown["ours"]["training, min"] == "2.1" and shown["Whisper's own decoder, greedy"]["hours"] == ""
    assert "first token, ms" not in shown["ours"]  # nothing was timed here
    # The second table: all of the first test set, where that was scored.
    assert len(whole) == 4
    ctc, alone, both, baseline = (
        whole[title]
        for title in ("stage 1, CTC decoding (full)", ours["title"], joint["title"], other["title"])
    )
    assert ctc["WER, all of dialogues-test (20)"] == "0.750 [0.750, 0.750]" and ctc["S/D/I"] == "0/60/0"
    assert alone["against ours"] == "" and float(alone["p, against its stage 1"]) < 0.001
    assert both["against ours"].startswith("-0.013 [") and baseline["against ours"].startswith("+0.075 [")
    assert 0 < float(baseline["p"]) < 0.1
    assert ours["stage_1"]["minutes"] == 2.0
    assert "stage_1" not in other and ours["hours"] == 2.0
    assert other["against_ours"]["dialogues-test"]["difference"] == pytest.approx(6 / 32)
    assert 0 < other["against_ours"]["dialogues-test"]["p_value"] < 0.1
    flat = list(csv.DictReader((tmp_path / "less_is_more.csv").open()))
    (row,) = [row for row in flat if row["system"] == "ours" and row["test_set"] == "dialogues-test"]
    assert (row["wer"], row["substitutions"], row["deletions"], row["hours"]) == ("0.0312", "1", "0", "2.00")
    compared = list(csv.DictReader((tmp_path / "less_is_more-comparisons.csv").open()))
    (row,) = [
        row for row in compared if (row["system"], row["test_set"]) == ("projector", "dialogues-test (all)")
    ]
    assert row["against"] == "ours" and float(row["difference"]) == pytest.approx(0.075)
    assert (study.output / "picture.png").stat().st_size > 5000
    # What former runs kept stays until it is run again: here seed 1, and a seed 0 that this run replaces.
    kept = json.loads((tmp_path / "less_is_more.json").read_text())
    assert kept["rows"] == result["rows"]
    before = {
        data: {key: value for key, value in found.items() if key != "errors"}
        for data, found in ours["scores"].items()
    }
    former = [
        {**joint, "seed": 1},
        {**ours, "hours": 99.0},
        {**ours, "seed": 1, "scores": before},
        {**ours, "variant": "given-up"},
        {**ours, "variant": "no-ctc", "title": "an earlier one"},
    ]
    (tmp_path / "less_is_more.json").write_text(
        json.dumps({**kept, "rows": former, "stage_1_ctc": [], "whisper": {}})
    )
    (tmp_path / "less_is_more.json").write_text(
        json.dumps(
            {
                **json.loads((tmp_path / "less_is_more.json").read_text()),
                "over_seeds": [
                    {
                        "variant": name,
                        "title": name,
                        "against": "ours",
                        "seeds": [3, 4],
                        "wer": 0.5,
                        "difference": 0.0,
                        "ci95": [0, 0],
                        "p_value": 1.0,
                    }
                    for name in ("projector", "given-up")
                ],
            }
        )
    )
    text = table.finish(study, tmp_path)
    assert "| 3, 4 " in text and "given-up" not in text
    merged = json.loads((tmp_path / "less_is_more.json").read_text())
    assert [(row["variant"], row["seed"]) for row in merged["rows"]] == [
        ("ours", 0),
        ("ours", 1),
        ("ours, joint", 0),
        ("ours, joint", 1),
        ("projector", 0),
        ("no-ctc", 0),
        ("data-10", 0),
    ]
    (marked,) = [
        row for row in merged["rows"] if row.get("former")
    ]  # it was compared with an ours that is gone
    assert marked["variant"] == "no-ctc" and "† from a former run" in text
    assert merged["rows"][0] == ours and merged["whisper"] == kept["whisper"]


def test_runs_of_several_seeds_are_compared_as_the_same_utterances(tmp_path):
    def run_of(name: str, wrong: list[int]) -> Path:
        """Utterance i with so many of its four words wrong, in an order of its own."""
        path = tmp_path / f"{name}.jsonl"
        said = ["red", "green", "blue", "black"]
        rows = [
            {
                "id": str(i),
                "corpus": "c",
                "task": "asr",
                "lang": "en",
                "reference": " ".join(said),
                "prediction": " ".join(["no"] * count + said[count:]),
            }
            for i, count in enumerate(wrong)
        ]
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in (rows if name.startswith("a") else rows[::-1]))
        )
        return path

    pairs = [
        (run_of("a0", [1, 2, 0, 3] * 5), run_of("b0", [0, 2, 0, 2] * 5)),
        (run_of("a1", [1, 1, 1, 1] * 5), run_of("b1", [0, 1, 0, 1] * 5)),
    ]
    found = table.over_seeds(pairs)
    assert found["wer"] == pytest.approx((20 + 10) / (2 * 80)) and found["difference"] == pytest.approx(
        -20 / (2 * 80)
    )
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1] < 0 and found["p_value"] < 0.001
    opposite = table.over_seeds(
        [(run_of("a2", [1] * 9), run_of("b2", [0] * 9)), (run_of("a3", [0] * 9), run_of("b3", [1] * 9))]
    )
    assert opposite["difference"] == 0 and opposite["p_value"] == 1, "what one run gains another loses"


@pytest.mark.long  # twelve starts of real ranks and scorers, of some 12 s each
@pytest.mark.slow
def test_a_study_in_miniature_from_its_first_step_to_the_table(tmp_path):
    """The commands themselves, two at a time, with random models of width 32 and a few steps; then nothing is
    left to do, and a changed variant's steps alone would be done again."""
    root = workspace(tmp_path / "tiny")
    (root / "shards").mkdir()
    for name in ("train", "valid"):
        (root / "shards" / name).symlink_to(root / name)
    plan = {
        "name": "miniature",
        "output": str(tmp_path / "study"),
        "seeds": [3],
        "ranks": 2,
        "recipes": {
            "alignment": str(root / "stage1.yaml"),
            "shrinking": str(root / "stage2.yaml"),
            "sft": str(root / "stage3.yaml"),
        },
        "overrides": ["deepspeed=ds_configs/zero1.json", "optim.steps=3", "data.valid=[]"],
        "minutes": {"alignment": 0.2, "shrinking": 0.2, "sft": 0.2, "score": 0.2, "whole": 0.2, "speed": 0.2},
        "score": {"shards": ["valid"], "limit": 4, "max_new_tokens": 4},
        "joint": ["ours"],
        "whole": {"ctc": ["full"], "greedy": [], "joint": []},
        "speed": {"shards": "valid", "clips": 2},
        "synthetic": None,
        "whisper": None,
        "alignments": {"full": []},
        "variants": {
            "ours": {"title": "ours", "alignment": "full", "shrinking": []},
            "later": {
                "title": "after stage 3",
                "alignment": "full",
                "after": "ours",
                "sft": ["optim.steps=2"],
            },
            "projector": {
                "title": "baseline",
                "alignment": None,
                "shrinking": [
                    "model.alignment.layers=0",
                    "model.shrinking.enabled=false",
                    "loss.ctc_weight=0",
                ],
            },
        },
    }

    def study() -> Study:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        made = Study(tmp_path / "plan.yaml")
        made.data.cache = root
        return made

    def again() -> set[str]:
        """Names of the steps that ran."""
        record = tmp_path / "study" / "study.json"
        before = json.loads(record.read_text())["steps"] if record.exists() else {}
        run(record, study().steps(), at_once=2)
        return {
            name for name, step in json.loads(record.read_text())["steps"].items() if step != before.get(name)
        }

    first, second = "stage-1-full-seed-3", "ours-seed-3"
    assert again() == {
        f"train-{first}-alignment",
        f"score-{first}-ctc",
        f"score-{first}-ctc-whole",
        f"train-{second}-shrinking",
        *(f"score-{second}-{decode}" for decode in ("greedy", "joint")),
        f"speed-{second}",
        "train-later-seed-3-sft",
        "score-later-seed-3-greedy",
        "speed-later-seed-3",
        "train-projector-seed-3-shrinking",
        "score-projector-seed-3-greedy",
        "speed-projector-seed-3",
    }
    text = table.finish(study())
    result = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["later", "ours", "ours, joint", "projector"]
    later, ours, joint, projector = result["rows"]
    assert [row["stage_2"]["steps"] for row in result["rows"]] == [3, 3, 3, 3] and later["stage_3"][
        "steps"
    ] == 2
    assert later["minutes"] > ours["minutes"] and later["hours"] == ours["hours"] and "stage_3" not in ours
    assert ours["stage_1"]["steps"] == 3 and "stage_1" not in projector
    for row in result["rows"]:
        scored = row["scores"]["valid"]
        assert (
            scored["utterances"] == 4 and sum(scored["errors"].values()) > 0 and table.score(scored) in text
        )
    assert projector["scores"]["valid"]["kept_per_second"] > 20 > ours["scores"]["valid"]["kept_per_second"]
    assert {"p_value", "difference", "ci95"} <= projector["against_ours"]["valid"].keys()
    assert joint["against_ctc"]["valid"] and ours["first_token_ms"] > 0
    assert again() == set()
    before = {step.name: digest(step.key()) for step in study().steps()}
    plan["variants"]["projector"]["shrinking"].append("optim.steps=4")
    changed = {step.name for step in study().steps() if digest(step.key()) != before[step.name]}
    assert changed == {
        "train-projector-seed-3-shrinking",
        "score-projector-seed-3-greedy",
        "speed-projector-seed-3",
    }
