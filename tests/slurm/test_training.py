"""Real training (tiny random models, ZeRO-3, two nodes) through the real scripts: what an interruption leaves must not show."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Assets, Project

ONE_RANK_A_NODE = {"ntasks-per-node": 1, "gpus-per-node": 1, "cpus-per-task": 1}
STEPS = 40


def steps_done(project: Project, stage: str) -> int:
    path = project.output / stage / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line.get("step", 0) for line in lines), default=0)


def weights(folder: Path) -> dict:
    """Every trained tensor of a model folder, by file and name."""
    return {f"{path.relative_to(folder)}:{name}": tensor for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    different = [name for name in ours if not ours[name].equal(theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"


def real_project(folder: Path, cluster: Cluster, assets: Assets) -> Project:
    project = Project(folder, cluster)
    project.edit_top_lines(ONE_RANK_A_NODE)
    assets.recipes(project, steps=STEPS)
    return project


def run_chain(project: Project, disturb=()) -> None:
    """Submit the three stages and wait for their end. `disturb`: stage -> what to do to its job once 12 steps are done."""
    disturb = dict(disturb)
    for stage, job in zip(Assets.STAGES, project.chain(), strict=True):
        if stage in disturb:
            wait_for(lambda stage=stage: steps_done(project, stage) >= 12, 900, lambda: f"12 steps:\n{project.log()}")
            disturb[stage](job)
        project.expect(job, "COMPLETED", timeout=900)


def undisturbed(tmp_path: Path, cluster: Cluster, assets: Assets) -> Project:
    project = real_project(tmp_path / "undisturbed", cluster, assets)
    run_chain(project)
    assert all(event in ("submitted", "started", "done") for _, event in project.events())
    return project


@pytest.mark.slurm
@pytest.mark.slurm_ci
def test_a_chain_preempted_in_stage_ii_ends_with_the_weights_of_one_that_was_not(cluster, assets, tmp_path):
    preempted = real_project(tmp_path / "preempted", cluster, assets)
    run_chain(preempted, {"shrinking": lambda job: cluster.client("scancel", "--batch", "--signal=USR1", job)})
    assert [event for stage, event in preempted.events() if stage == "shrinking"] == [
        "submitted", "started", "requeued", "started", "done"]
    assert_same_weights(preempted.output / "sft" / "model", undisturbed(tmp_path, cluster, assets).output / "sft" / "model")


@pytest.mark.slurm
@pytest.mark.parametrize("victim", ["gpu-b7", "n1"], ids=["first-node", "other-node"])
def test_a_preemption_in_stage_ii_and_a_dead_node_in_stage_iii_leave_no_trace(slurm_installed, assets, tmp_path, victim):
    # Slurm's usual 300 s until a silent node counts as dead would only make the test slower.
    with Cluster("netns", SlurmdTimeout=12) as cluster:
        project = real_project(tmp_path / "disturbed", cluster, assets)

        def kill(job: str) -> None:
            cluster.kill_node(victim)
            cluster.wait(job, {"PENDING", "COMPLETING", "REQUEUED"}, timeout=120)
            time.sleep(3)
            cluster.revive_node(victim)

        run_chain(project, {"shrinking": lambda job: cluster.client("scancel", "--batch", "--signal=USR1", job), "sft": kill})
        assert [event for stage, event in project.events() if stage == "sft"].count("started") == 2
        assert_same_weights(project.output / "sft" / "model", undisturbed(tmp_path, cluster, assets).output / "sft" / "model")


@pytest.mark.slurm
def test_torchrun_saves_at_the_warning_too(cluster, assets, tmp_path):
    project = real_project(tmp_path / "project", cluster, assets)
    job = project.sbatch("slurm/stage1.sh", f"optim.steps={STEPS}", env={"RECIPE": "recipes/stage1.yaml", "LAUNCHER": "torchrun"})
    wait_for(lambda: steps_done(project, "alignment") >= 12, 900, lambda: f"12 steps:\n{project.log()}")
    cluster.client("scancel", "--batch", "--signal=USR1", job)
    assert project.expect(job, "COMPLETED", timeout=300)["Restarts"] == "1"
    assert "resuming at step" in project.log()
