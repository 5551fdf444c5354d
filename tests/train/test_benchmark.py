"""benchmarks/train_step.py on tiny models: both ways run, and what it says of a step adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train_step import librispeech_lengths
from tests.train.tiny import workspace

ROOT = Path(__file__).resolve().parents[2]


def test_lengths_are_like_librispeech():
    seconds = librispeech_lengths(5000)
    assert 11.5 < seconds.mean() < 12.5 and seconds.max() <= 35 and 30 < seconds.max() and 1.5 <= seconds.min() < 3
    assert np.array_equal(librispeech_lengths(5000), seconds)


@pytest.mark.slow  # both sides of the benchmark, if tiny
def test_a_step_is_accounted_for(tmp_path):
    folder = workspace(tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-m", "benchmarks.train_step", str(folder / "stage2.yaml"), "--clips", "3", "--steps",
                           "1", "--plain-steps", "1", "--joined", "4", "--json", str(tmp_path / "out.json"),
                           "deepspeed=ds_configs/zero1.json"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["commit"] and report["machine"]["cpu"]
    assert set(report["results"]) == {"clips as they are", "LibriSpeech-like"}
    for name, result in report["results"].items():
        mine = result["ours"]
        assert sum(mine["parts"].values()) == pytest.approx(1) and all(share >= 0 for share in mine["parts"].values())
        assert {"encoder", "alignment", "ctc", "llm", "cross-entropy"} <= set(result["bare"]["parts_seconds"])
        assert 0 < result["bare"]["share_of_ours"] and mine["loss"] > 0 and 0 < mine["shrink_ratio"] <= 1
        assert mine["audio_seconds_per_second"] == pytest.approx(
            result["times_plain"] * result["plain"]["audio_seconds_per_second"])
        assert name in done.stdout and result["longest_seconds"] <= 35
    wrong = subprocess.run([sys.executable, "-m", "benchmarks.train_step", str(folder / "stage2.yaml"), "optim.step=3"], cwd=ROOT,
                           capture_output=True, text=True, timeout=600)
    assert wrong.returncode == 2 and "optim.steps" in wrong.stderr
