"""Training on a CUDA GPU as a user starts it: the three stages there and on the CPU, side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.train.tiny import STAGES, losses, workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds for any one run: a hang is a failure
# Random numbers of CPU and GPU differ.
SAME = ["model.alignment.dropout=0", "model.llm.lora_dropout=0"]
KINDS = {
    "cpu": ["model.dtype=float32", "deepspeed=ds_configs/zero1.json"],
    "zero1": ["model.dtype=float32", "deepspeed=ds_configs/zero1.json"],
    "zero3": ["model.dtype=float32", "deepspeed=ds_configs/zero3.json"],
    "bf16": ["model.dtype=bfloat16", "deepspeed=ds_configs/zero1.json"],
    "bf16-zero3": ["model.dtype=bfloat16", "deepspeed=ds_configs/zero3.json"],
}


def train(folder: Path, number: int, kind: str, output: str | None = None) -> str:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {"NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "train.run",
            str(folder / f"stage{number}.yaml"),
            *SAME,
            *KINDS[kind],
            f"output={folder / (output or kind)}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **hidden, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, f"{kind}, stage {number}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All kinds at once, each its three stages."""
    folder = workspace(tmp_path_factory.mktemp("gpu"))

    def road(kind: str) -> None:
        for number in STAGES:
            train(folder, number, kind)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(road, KINDS))
    return folder


@pytest.mark.parametrize("number, stage", STAGES.items())
@pytest.mark.parametrize(
    "kind, relative", [("zero1", 2e-3), ("zero3", 2e-3), ("bf16", 0.05), ("bf16-zero3", 0.05)]
)
def test_losses_are_those_of_the_cpu(runs, kind, relative, number, stage):
    wanted, found = (losses(runs / name / stage) for name in ("cpu", kind))
    assert list(found) == list(wanted) and len(wanted) == 8
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=relative)


def test_a_killed_run_resumes(runs):
    """Its last checkpoint and its end are gone, as if it had been killed before: the same command does the
    rest again."""
    shutil.copytree(runs / "zero3", runs / "again")
    folder = runs / "again" / "shrinking"
    shutil.rmtree(folder / "model")
    first, *later = sorted(folder.glob("checkpoints/step-*"))
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    output = train(runs, 2, "zero3", output="again")
    assert later and f"resuming at step {int(first.name.removeprefix('step-'))} from" in output
    assert losses(folder) == pytest.approx(losses(runs / "zero3" / "shrinking"), rel=1e-4)
