"""The mean of model folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import artifact
from model.average import main as average
from model.soundwave import Soundwave
from tests.model import tiny

FILES = ("adapters.safetensors", "lora/adapter_model.safetensors")


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory) -> list[Path]:
    """Two folders of one configuration with different weights."""
    root, found = tmp_path_factory.mktemp("average"), []
    config = tiny.config(folders("whisper"), folders("llama"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Soundwave.build(config)
        with torch.no_grad():
            for parameter in artifact.trained_tensors(model).values():
                parameter.normal_()
        model.set_stage("sft")
        found.append(artifact.save(model, root / f"model-{seed}", {"step": 7, "best": None}))
    return found


def test_each_tensor_is_the_mean_and_the_folder_loads(models, tmp_path):
    assert average([*map(str, models), str(models[1]), "--out", str(tmp_path / "mean")]) == 0
    for file in FILES:
        one, two = (load_file(folder / file) for folder in models)
        mean = load_file(tmp_path / "mean" / file)
        assert mean.keys() == one.keys()
        for name in mean:
            torch.testing.assert_close(mean[name], (one[name] + 2 * two[name]) / 3)
    loaded = artifact.load(tmp_path / "mean")
    assert loaded.stage == "sft"
    described = json.loads((tmp_path / "mean" / "soundwave.json").read_text())
    assert described["averaged"] == [str(models[0]), str(models[1]), str(models[1])]
    assert "step" not in described and "best" not in described


def edited(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    described = json.loads((out / "soundwave.json").read_text())
    change(described)
    (out / "soundwave.json").write_text(json.dumps(described))
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(stage="shrinking"), "is of stage sft"),
        (lambda d: d["frozen"].update(llm="0" * 64), "were trained on different llms"),
        (lambda d: d["config"]["llm"].update(lora_alpha=99), "model.llm.lora_alpha is "),
    ],
)
def test_folders_that_do_not_go_together_are_one_line(models, tmp_path, capsys, change, words):
    other = edited(models[1], tmp_path / "other", change)
    assert average([str(models[0]), str(other), "--out", str(tmp_path / "mean")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "mean").exists()


def test_damaged_weights_are_one_line(models, tmp_path, capsys):
    def case(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(models[1], folder)
        tensors = load_file(folder / FILES[0])
        change(tensors)
        save_file(tensors, folder / FILES[0])
        assert average([str(models[0]), str(folder), "--out", str(tmp_path / "mean")]) == 2
        return capsys.readouterr().err

    def infinite(tensors):
        tensors["alignment.norm.weight"][0] = float("inf")

    assert "'alignment.norm.weight' holds values that are not finite" in case("inf", infinite)
    assert "'ctc_head" in case("lost", lambda t: [t.pop(n) for n in list(t) if n.startswith("ctc_head")])
    shorter = case("short", lambda t: t.update({"alignment.norm.weight": torch.ones(3)}))
    assert "'alignment.norm.weight' has the sizes" in shorter


def test_one_folder_and_other_files_in_the_way_are_errors(models, tmp_path, capsys):
    assert average([str(models[0]), "--out", str(tmp_path / "mean")]) == 2
    assert "give at least two" in capsys.readouterr().err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    assert average([*map(str, models), "--out", str(tmp_path / "notes")]) == 2
    assert "holds diary.txt and is no model folder" in capsys.readouterr().err
    assert (tmp_path / "notes" / "diary.txt").exists()
