"""benchmarks/train_step.py and dropout.py on tiny models: all sides run, and what they print adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import dropout
from benchmarks.train_step import librispeech_lengths
from model.soundwave import Soundwave
from recipe.config import load_recipe
from tests.model import tiny as tiny_models
from tests.train.tiny import workspace

ROOT = Path(__file__).resolve().parents[2]


def test_lengths_are_like_librispeech():
    seconds = librispeech_lengths(5000)
    assert (
        11.5 < seconds.mean() < 12.5
        and seconds.max() <= 35
        and seconds.max() > 30
        and 1.5 <= seconds.min() < 3
    )
    assert np.array_equal(librispeech_lengths(5000), seconds)


@pytest.mark.slow
@pytest.mark.long  # both sides of the benchmark
def test_a_step_is_accounted_for(tmp_path):
    folder = workspace(tmp_path / "tiny")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.train_step",
            str(folder / "stage2.yaml"),
            "--clips",
            "3",
            "--steps",
            "1",
            "--plain-steps",
            "1",
            "--joined",
            "4",
            "--out",
            str(tmp_path / "out.json"),
            "deepspeed=ds_configs/zero1.json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["commit"] and report["machine"]["cpu"]
    assert set(report["results"]) == {"clips as they are", "LibriSpeech-like"}
    for name, result in report["results"].items():
        mine = result["ours"]
        assert sum(mine["parts"].values()) == pytest.approx(1) and all(
            share >= 0 for share in mine["parts"].values()
        )
        assert {"encoder", "alignment", "ctc", "llm", "cross-entropy"} <= set(result["bare"]["parts_seconds"])
        assert result["bare"]["share_of_ours"] > 0 and mine["loss"] > 0 and 0 < mine["shrink_ratio"] <= 1
        assert mine["audio_seconds_per_second"] == pytest.approx(
            result["times_plain"] * result["plain"]["audio_seconds_per_second"]
        )
        assert name in done.stdout and result["longest_seconds"] <= 35
    wrong = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", str(folder / "stage2.yaml"), "optim.step=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert wrong.returncode == 2 and "optim.steps" in wrong.stderr


@pytest.mark.slow  # nine steps
def test_what_dropout_costs_is_measured_with_its_masks_torch_s_and_none(tmp_path, capsys):
    folder = workspace(tmp_path / "tiny")
    asked = [
        str(folder / "stage2.yaml"),
        "model.llm.lora_dropout=0.1",
        "data.valid=[]",
        "--clips",
        "1",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert dropout.main(asked) == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())["result"]
    assert {side: len(taken) for side, taken in result["samples"].items()} == {
        "keyed": 2,
        "torch": 2,
        "none": 2,
    }
    assert result["rates"] == {"alignment": 0.1, "shrinking": 0.1, "lora": 0.1} and all(
        result["seconds"].values()
    )
    assert "keyed / torch" in output and (tmp_path / "out.txt").exists()
    assert dropout.main([asked[0], "optim.step=3"]) == 2 and "optim.steps" in capsys.readouterr().err


def loss_of(model, batch) -> float:
    return float(model(batch, losses=("ce", "ctc")).ctc_sum.detach())


def test_each_side_of_the_benchmark_has_its_own_masks(tmp_path):
    """torch's masks follow its generator, the keyed ones do not, and without any all rates are zero for a
    while."""
    folder = workspace(tmp_path / "tiny")
    torch.manual_seed(0)
    recipe = load_recipe(folder / "stage2.yaml", ["model.llm.lora_dropout=0.1"])
    model = Soundwave.build(recipe.model)
    model.set_stage("shrinking")
    batch = tiny_models.batch(model, [tiny_models.chat("What?", "the wall")], [0.9], ["the wall"])

    def loss() -> float:
        return loss_of(model.train(), batch)

    keyed = loss()
    assert loss() == keyed
    with dropout.masks_of_torch(model):
        assert loss() != loss()
    with dropout.no_masks(model):
        bare = loss()
    assert bare != keyed and loss() == keyed
    model.eval()
    assert loss_of(model, batch) == pytest.approx(bare)
