"""Real training (tiny random models, ZeRO-3, two nodes) through the real scripts: what an interruption leaves
must not show."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Assets, Project
from tests.train.tiny import losses, weights

ONE_RANK_A_NODE = {"ntasks-per-node": 1, "gpus-per-node": 1, "cpus-per-task": 1}


def real_project(folder: Path, cluster: Cluster, assets: Assets) -> Project:
    project = Project(folder, cluster)
    project.edit_top_lines(ONE_RANK_A_NODE)
    assets.recipes(project.folder)
    return project


def assert_no_trace(output: Path, undisturbed: Path, *stages: str) -> None:
    """Losses and weights are bit-identical to an uninterrupted run."""
    for stage in stages:
        assert (
            losses(output / stage) == losses(undisturbed / stage)
            and len(losses(output / stage)) == Assets.STEPS[stage]
        )
        ours, theirs = weights(output / stage), weights(undisturbed / stage)
        assert ours.keys() == theirs.keys() and len(ours) > 4
        different = [name for name in ours if not ours[name].equal(theirs[name])]
        assert not different, f"{stage}: {len(different)} of {len(ours)} tensors differ: {different[:5]}"


def wait_for_steps(project: Project, stage: str, steps: int) -> None:
    wait_for(
        lambda: len(losses(project.output / stage)) >= steps, 1800, lambda: f"{steps} steps:\n{project.log()}"
    )


def preempt(project: Project, stage: str, job: str) -> None:
    """Slurm's warning, when a few steps are done that no checkpoint holds yet."""
    wait_for_steps(project, stage, 4)
    project.cluster.client("scancel", "--batch", "--signal=USR1", job)


def kill(project: Project, stage: str, job: str, *, first: bool) -> None:
    """Take a node's power, the first one's or another's, some steps past a checkpoint; give it back when
    Slurm has noticed."""
    wait_for_steps(project, stage, 8)
    batch_host = project.cluster.job(job)["BatchHost"]
    node = next(node for node in project.cluster.nodes if (node == batch_host) == first)
    project.cluster.kill_node(node)
    project.cluster.wait(job, {"PENDING", "COMPLETING", "REQUEUED"}, timeout=300)
    time.sleep(3)
    project.cluster.revive_node(node)


@pytest.mark.slurm
@pytest.mark.slurm_ci
def test_a_chain_preempted_in_stage_2_ends_with_the_weights_of_one_that_was_not(
    cluster, assets, undisturbed, tmp_path
):
    project = real_project(tmp_path / "project", cluster, assets)
    jobs = project.chain()
    assert [(stage, row["state"]) for stage, row in project.status().items()][1:] == [
        ("shrinking", "pending (Dependency)"),
        ("sft", "pending (Dependency)"),
    ]
    preempt(project, "shrinking", jobs[1])
    row = project.status()["shrinking"]
    assert row["job"] == jobs[1] and row["step"].endswith("/24") and float(row["s/step"]) > 0
    for job in jobs:
        project.expect(job, "COMPLETED", timeout=1800)
    assert [event for stage, event in project.events() if stage == "shrinking"] == [
        "submitted",
        "started",
        "requeued",
        "started",
        "done",
    ]
    assert [(row["state"], row["restarts"]) for row in project.status().values()] == [
        ("done", "0"),
        ("done", "1"),
        ("done", "0"),
    ]
    assert_no_trace(project.output, undisturbed, *Assets.STAGES)


@pytest.fixture
def mortal_cluster(slurm_installed):
    # Slurm's usual 300 s until a silent node counts as dead would only make the tests slower.
    with Cluster("netns", SlurmdTimeout=12) as running:
        yield running


@pytest.mark.slurm
def test_a_preemption_in_stage_2_and_a_dead_first_node_in_stage_3_leave_no_trace(
    mortal_cluster, assets, undisturbed, tmp_path
):
    """The first node runs the job's batch shell, which dies with it: only Slurm itself is left to requeue the
    job."""
    project = real_project(tmp_path / "project", mortal_cluster, assets)
    jobs = project.chain()
    preempt(project, "shrinking", jobs[1])
    project.expect(jobs[1], "COMPLETED", timeout=1800)
    kill(project, "sft", jobs[2], first=True)
    assert project.expect(jobs[2], "COMPLETED", timeout=1800)["Restarts"] == "1"
    assert [event for stage, event in project.events() if stage == "sft"] == [
        "submitted",
        "started",
        "started",
        "done",
    ]
    assert project.status()["sft"]["restarts"] == "1"
    assert_no_trace(project.output, undisturbed, *Assets.STAGES)


@pytest.mark.slurm
def test_another_dead_node_leaves_no_trace(mortal_cluster, assets, undisturbed, tmp_path):
    project = real_project(tmp_path / "project", mortal_cluster, assets)
    for stage in ("alignment", "shrinking"):
        shutil.copytree(undisturbed / stage, project.output / stage)
    (job,) = project.chain()  # stages 1 and 2 are done
    kill(project, "sft", job, first=False)
    project.expect(job, "COMPLETED", timeout=1800)
    assert [event for _, event in project.events()].count("started") == 2
    assert_no_trace(project.output, undisturbed, "sft")


@pytest.mark.slurm
def test_torchrun_saves_at_the_warning_and_resumes_with_equal_losses(cluster, assets, undisturbed, tmp_path):
    project = real_project(tmp_path / "project", cluster, assets)
    shutil.copytree(undisturbed / "alignment", project.output / "alignment")
    job = project.sbatch("slurm/stage2.sh", env={"RECIPE": "recipes/stage2.yaml", "LAUNCHER": "torchrun"})
    preempt(project, "shrinking", job)
    assert project.expect(job, "COMPLETED", timeout=1800)["Restarts"] == "1"
    assert "resuming at step" in project.log()
    assert_no_trace(project.output, undisturbed, "shrinking")
