"""Fine-tune a finished model: from the official checkpoint's layout to own data and back, and the length in
epochs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.files import read_lines
from evaluation.run import main as evaluate
from model import artifact
from model.convert import main as convert
from recipe.config import RecipeError, load_recipe, loadable
from stream.epochs import resolve_steps
from stream.plan import Plan
from tests.model.release import ReleasedSoundwave
from tests.model.test_official import expected_answers, release_tokenizer, released_configs, write_release
from tests.train.tiny import corpus
from train.run import main as train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train/recipes/finetune.yaml"
SMALL = [
    "model.dtype=float32",
    "data.batch_seconds=4",
    "data.micro_batch_seconds=4",
    "data.workers=0",
    "model.llm.lora_r=4",
    "optim.warmup_steps=2",
    "optim.lr_adapters=0.0002",
    "optim.lr_lora=0.003",
    "log.validate_every_steps=100",
    "log.validate_utterances=6",
    "deepspeed=ds_configs/zero2.json",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An official checkpoint in miniature, and own data: 40 utterances to train on, 10 for validation."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("finetune")
    words = release_tokenizer()
    write_release(root / "Soundwave", words, *released_configs(words))
    corpus(root / "train", 40)
    corpus(root / "valid", 10)
    return root


def settings(place: Path, *more: str) -> list[str]:
    return [
        f"init_from={place / 'official'}",
        f"output={place / 'tuned'}",
        f"data.train=[{{shards: {place / 'train'}}}]",
        f"data.valid=[{{shards: {place / 'valid'}}}]",
        *SMALL,
        *more,
    ]


def evaluated(model: Path, place: Path, out: Path) -> dict:
    arguments = ["--model", str(model), "--shards", str(place / "valid"), "--task", "asr", "--out", str(out)]
    assert evaluate([*arguments, "--max-new-tokens", "4"]) == 0
    return json.loads(next(out.glob("*.scores.json")).read_text())


@pytest.mark.slow  # one start of a real rank, two evaluations
def test_from_the_official_layout_to_a_tuned_model_and_back(server, place, capsys):
    """Convert, dry run, one epoch, evaluation before and after, export, load as the official code does."""
    assert convert(["--from-official", str(place / "Soundwave"), "--out", str(place / "official")]) == 0
    before = evaluated(place / "official", place, place / "before")

    capsys.readouterr()
    assert train([str(RECIPE), *settings(place), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    run = server.start([RECIPE, *settings(place)], ranks=1)
    assert run.wait() == [0], run.text()

    stage = place / "tuned" / "shrinking"
    noted = json.loads((stage / "run.json").read_text())
    lines = read_lines(stage / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    recipe = load_recipe(RECIPE, settings(place))
    assert resolve_steps(recipe) and steps == list(range(recipe.optim.total_steps))
    assert (noted["steps"], noted["epochs"]) == (len(steps), 1.0)
    assert f"{len(steps)} steps (optim.epochs=1)" in printed
    valid = [line["loss"] for line in lines if line["kind"] == "valid"]
    assert len(valid) == 2 and valid[1] < valid[0]
    written = yaml.safe_load((stage / "recipe.yaml").read_text())
    assert (written["optim"]["steps"], written["optim"]["epochs"]) == (None, 1.0)
    assert load_recipe(stage / "recipe.yaml").optim == loadable(recipe).optim
    rerun = server.start([stage / "recipe.yaml"], ranks=1)
    assert rerun.wait() == [0] and "is finished" in rerun.text()
    assert len(read_lines(stage / "metrics.jsonl")) == len(lines)

    after = evaluated(stage / "model", place, place / "after")
    assert before.keys() == after.keys()
    assert convert(["--to-official", str(stage / "model"), "--out", str(place / "back")]) == 0
    tuned = artifact.load(stage / "model").float().eval()
    expected_answers(tuned, place / "back")
    expected = load_file(place / "back" / "expected.safetensors")
    (place / "back" / "expected.safetensors").unlink()
    released = ReleasedSoundwave.load(place / "back")
    logits = released.logits(expected["input_ids"], expected["mel"])[:, : expected["logits"].shape[1]]
    assert (logits - expected["logits"]).abs().max() < 1e-4
    old = ReleasedSoundwave.load(place / "Soundwave").state_dict()
    new = released.state_dict()
    changed = [name for name, tensor in old.items() if not torch.equal(tensor, new[name])]
    assert any("lbm" in name for name in changed) and any("q_proj" in name for name in changed)
    assert not any("audio_tower" in name or "embed_tokens" in name for name in changed)


# ---- the length in epochs


def length(place: Path, *overrides: str) -> int:
    recipe = load_recipe(ROOT / "train/recipes/stage1.yaml", [*settings(place)[2:3], *overrides])
    resolve_steps(recipe)
    return recipe.optim.total_steps


@pytest.mark.parametrize("epochs", [0.5, 1, 3])
@pytest.mark.parametrize("seconds", [4, 7.5])
def test_steps_are_the_fewest_that_hold_the_epochs(place, epochs, seconds):
    """Of 40 clips of 0.3 to 1.2 s, 8 without audio: 32 clips hold 23.6 s (stage 1 trains on transcripts)."""
    given = [f"data.batch_seconds={seconds}", f"optim.epochs={epochs}"]
    recipe = load_recipe(ROOT / "train/recipes/stage1.yaml", [*settings(place)[2:3], *given])
    assert resolve_steps(recipe)
    steps = recipe.optim.total_steps
    plan = Plan.open(recipe.data, recipe.stage, steps, recipe.model)
    total = sum(order.total for order in plan.orders) / 1000
    assert steps * seconds >= epochs * total > (steps - 1) * seconds
    assert all(passes >= epochs - 1e-6 for passes in plan.passes(steps).values())


def test_a_later_layer_replaces_steps_by_epochs_and_back(place, tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {steps: 70}\n")
    (tmp_path / "middle.yaml").write_text("base: base.yaml\noptim: {epochs: 2}\n")
    (tmp_path / "last.yaml").write_text("base: middle.yaml\noptim: {steps: 90}\n")
    lengths = {
        name: (
            load_recipe(tmp_path / f"{name}.yaml").optim.steps,
            load_recipe(tmp_path / f"{name}.yaml").optim.epochs,
        )
        for name in ("base", "middle", "last")
    }
    assert lengths == {"base": (70, None), "middle": (None, 2.0), "last": (90, None)}
    assert load_recipe(tmp_path / "last.yaml", ["optim.epochs=3"]).optim.steps is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.steps=5", "optim.epochs=2"], "command line: optim.steps and optim.epochs are both set"),
        (["optim.steps=null"], "command line: optim.steps is null: give steps, or optim.epochs"),
        (["optim.epochs=0"], "command line: optim.epochs is 0.0: must be above 0"),
    ],
)
def test_exactly_one_of_steps_and_epochs(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(ROOT / "train/recipes/stage1.yaml", overrides)


def test_both_in_one_file_are_an_error(tmp_path):
    (tmp_path / "both.yaml").write_text("optim: {steps: 70, epochs: 1}\n")
    with pytest.raises(RecipeError, match="both.yaml: optim.steps and optim.epochs are both set"):
        load_recipe(tmp_path / "both.yaml", ["optim.epochs=2"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("data.train=[{shards: 'pipe:cat x.tar'}]", "optim.epochs needs an index"),
        ("data.train=[{shards: nowhere}]", "no index.json in 'nowhere'"),
    ],
)
def test_epochs_of_data_without_an_index_are_an_error(data, words, capsys, tmp_path):
    arguments = [str(ROOT / "train/recipes/stage1.yaml"), data, "optim.epochs=1", f"output={tmp_path}"]
    assert train([*arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_steps_that_are_not_resolved_are_no_number(place):
    recipe = load_recipe(ROOT / "train/recipes/stage1.yaml", ["optim.epochs=1"])
    with pytest.raises(RuntimeError, match="resolve_steps"):
        _ = recipe.optim.total_steps


def test_a_finished_run_whose_data_is_gone_keeps_its_steps(place, tmp_path):
    gone = ["optim.epochs=2", f"output={tmp_path}", "data.train=[{shards: gone}]"]
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "run.json").write_text(json.dumps({"steps": 12, "epochs": 2.0}))
    assert length(place, *gone) == 12
    with pytest.raises(RecipeError, match="no index.json in 'gone'"):
        length(place, *gone, "optim.epochs=3")


# ---- names of the official checkpoint


def test_the_official_checkpoint_is_found_by_hub_name(place, tmp_path, monkeypatch):
    """The hub's cache layout, as huggingface_hub writes it: refs/main names the snapshot."""
    cached = tmp_path / "hub" / "models--someone--Soundwave"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0123abc").symlink_to(place / "Soundwave")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert convert(["--from-official", "someone/Soundwave", "--out", str(tmp_path / "out")]) == 0
    assert artifact.describe(tmp_path / "out")["stage"] == "sft"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent/Soundwave", "'absent/Soundwave' is neither a folder nor in the hub cache"),
        ("./missing", "./missing does not exist: give the official checkpoint's folder, or its hub name"),
        ("missing", "missing does not exist"),
    ],
)
def test_an_official_checkpoint_that_cannot_be_found_is_one_line(name, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert convert(["--from-official", name, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()
