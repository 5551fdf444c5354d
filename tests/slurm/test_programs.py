"""Packing and evaluation as jobs: the real programs, on corpora and models of no size."""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
import sys

import numpy
import pytest
import soundfile

from tests.slurm.conftest import ROOT, Project

pytestmark = pytest.mark.slurm


@pytest.fixture
def project(cluster, tmp_path) -> Project:
    made = Project(tmp_path / "project", cluster)
    made.edit_top_lines({"ntasks-per-node": 1, "gpus-per-node": 1}, "evaluate.sh")
    return made


@pytest.fixture
def manifest(tmp_path):
    """24 clips of half a second, and one that is broken."""
    random, lines = numpy.random.default_rng(0), []
    for clip in range(24):
        soundfile.write(tmp_path / f"{clip}.wav", 0.1 * random.standard_normal(8000), 16000)
        lines.append({"id": f"clip-{clip}", "audio": f"{clip}.wav", "text": "some words", "duration": 0.5})
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    lines.append({"id": "broken", "audio": "broken.wav", "text": "never decoded", "duration": 0.5})
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pack(project, *options: str, sbatch: tuple[str, ...] = ()) -> str:
    return project.run(
        "bash", "slurm/pack.sh", "--mem-per-cpu=100M", "--cpus-per-task=1", *sbatch, "--", *options
    )


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".tar", ".npy"))


def test_packed_by_an_array_is_packed_as_by_one_process(project, manifest, tmp_path):
    options = ("--manifest", str(manifest), "--shard-mb", "0.05", "--seed", "3", "--name", "clips")
    script = project.folder / "slurm" / "pack.sh"
    script.write_text(script.read_text().replace("PARTS=16", "PARTS=3"))
    text = pack(project, *options, "--out", str(tmp_path / "array"))
    array, merge = (
        re.search(r"pack: job (\d+), 3 parts", text).group(1),
        re.search(r"merge: job (\d+)", text).group(1),
    )
    assert f"afterok:{array}" in project.cluster.job(merge)["Dependency"]
    project.expect(merge, "COMPLETED")
    alone = [sys.executable, ROOT / "data_tools" / "pack.py", *options, "--out", tmp_path / "alone"]
    subprocess.run(alone, check=True, timeout=120, capture_output=True)
    names = names_in(tmp_path / "alone")
    assert len(names) > 4 and names == names_in(tmp_path / "array")
    assert filecmp.cmpfiles(tmp_path / "alone", tmp_path / "array", [*names, "index.json"], shallow=False)[
        1:
    ] == ([], [])


def test_a_part_that_fails_keeps_the_index_from_being_written(project, tmp_path):
    text = pack(
        project, "--manifest", "nowhere.jsonl", "--out", str(tmp_path / "out"), sbatch=("--export=NONE",)
    )
    merge = re.search(r"merge: job (\d+)", text).group(1)
    project.expect(merge, "CANCELLED")
    assert "nowhere.jsonl" in project.log() and not (tmp_path / "out" / "index.json").exists()


def test_evaluation_with_all_tasks_of_the_job(project, assets, tmp_path):
    import torch

    from model import artifact
    from model.config import EncoderConfig, LLMConfig, SoundwaveConfig
    from model.soundwave import Soundwave

    torch.manual_seed(0)
    config = SoundwaveConfig(
        encoder=EncoderConfig(name=assets.encoder), llm=LLMConfig(name=assets.llm, lora_r=4)
    )
    model = Soundwave.build(config, parts=("encoder", "adapters"))
    model.set_stage("alignment")
    artifact.save(model, tmp_path / "model")
    job = project.sbatch(
        "--nodes=2",
        "slurm/evaluate.sh",
        "--model",
        str(tmp_path / "model"),
        "--shards",
        str(assets.shards),
        "--task",
        "asr",
        "--out",
        str(tmp_path / "predictions.jsonl"),
    )
    project.expect(job, "COMPLETED")
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    ids = sorted(line["id"] for line in predictions if "id" in line)
    assert ids == sorted(f"{shard}-{clip}" for shard in range(2) for clip in range(12))


def test_a_container_is_entered_with_the_project_and_its_disks(cluster, tmp_path):
    """A stand-in for the `apptainer` command, which Debian does not package: it says its words and runs the
    rest."""
    project = Project(tmp_path / "project", cluster)
    project.use_stand_in()
    project.recipe("alignment", 1, "optim: {steps: 3}\ndata: {train: [{shards: none}]}\n")
    script = project.folder / "slurm" / "stage1.sh"
    script.write_text(re.sub(r"(?m)^ENVIRONMENT=\S+", "ENVIRONMENT=apptainer:image.sif", script.read_text()))
    (project.folder / "image.sif").touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apptainer").write_text(
        f'#!/bin/bash\necho "apptainer $*"\nshift 7\nPATH={sys.prefix}/bin:$PATH exec "$@"\n'
    )
    (programs / "apptainer").chmod(0o755)
    job = project.sbatch(
        "slurm/stage1.sh",
        env={
            "RECIPE": "recipes/stage1.yaml",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "MOUNTS": "/shards",
            "LOCAL_DISK": str(tmp_path),
        },
    )
    project.expect(job, "COMPLETED")
    folder = project.folder
    command = f"apptainer exec --nv --bind {folder},{tmp_path},/shards --pwd {folder} {folder}/image.sif bash"
    assert project.log().count(command) == 8  # preflight and training, 4 ranks each
