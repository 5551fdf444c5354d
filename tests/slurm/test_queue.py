"""The job scripts in the queue of a real Slurm: chains, warnings, requeues, failures. The trainer is
stand_in/run.py."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.slurm


def warn(project, job: str) -> None:
    """Slurm's own warning, as --signal=B:USR1@N sends it: to the batch shell alone."""
    project.cluster.client("scancel", "--batch", "--signal=USR1", job)


def preempt(project, job: str) -> None:
    """What preemption sends at the start of its GraceTime: TERM to every process of the steps, nothing to the
    batch shell."""
    project.cluster.client("scancel", "--signal=TERM", job)


def value(project, stage: str) -> int:
    return json.loads((project.output / stage / "model" / "soundwave.json").read_text())["value"]


def after(steps: int) -> int:
    number = 1
    for _ in range(steps):
        number = number * 31 % 1000003
    return number


def test_chain_runs_to_its_end_with_the_code_it_was_submitted_with(project):
    jobs = project.chain()
    assert len(jobs) == 3
    run = project.folder / "train" / "run.py"
    run.write_text(
        run.read_text().replace('GENERATION = "first"', 'GENERATION = "edited"')
    )  # while stages 2 and 3 wait
    recipe = project.folder / "recipes" / "stage3.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 5", "steps: 7"))
    for job in jobs:
        project.expect(job, "COMPLETED")
    log = project.log()
    assert log.count("generation first") == 12 and "generation edited" not in log  # 3 stages, 4 ranks
    for node, rank, local in (("gpu-b7", 0, 0), ("gpu-b7", 1, 1), ("n1", 2, 0), ("n1", 3, 1)):
        assert f"rank {rank} of 4 local {local} on {node}: sft from step 0" in log
    assert value(project, "sft") == after(5)
    for stage in ("alignment", "shrinking", "sft"):
        assert [event for name, event in project.events() if name == stage] == [
            "submitted",
            "started",
            "done",
        ]
    assert project.chain("optim.steps=5") == []  # all done: nothing to submit


@pytest.mark.parametrize("signal, launcher", [(warn, "srun"), (preempt, "srun"), (preempt, "torchrun")])
def test_warning_saves_requeues_and_resumes(project, signal, launcher):
    job = project.sbatch(
        "slurm/stage1.sh", "optim.steps=40", env={"RECIPE": "recipes/stage1.yaml", "LAUNCHER": launcher}
    )
    project.wait_for_log("alignment from step 0", count=4)
    signal(project, job)
    project.wait_for_log("stopped in time: requeue, stop 1 of at most 200")
    facts = project.expect(job, "COMPLETED")
    assert facts["Restarts"] == "1"
    assert value(project, "alignment") == after(40)
    states = [
        json.loads((project.output / "alignment" / f"state-{rank}.json").read_text()) for rank in range(4)
    ]
    assert {state["starts"] for state in states} == {2} and {state["step"] for state in states} == {40}
    assert [event for _, event in project.events()] == ["started", "requeued", "started", "done"]


def test_a_stop_file_stops_for_good(project):
    job = project.sbatch("slurm/stage1.sh", "optim.steps=10000", env={"RECIPE": "recipes/stage1.yaml"})
    project.wait_for_log("alignment from step 0", count=4)
    (project.output / "alignment" / "STOP").touch()
    project.expect(job, "FAILED")
    assert "as its STOP file asked; not requeued" in project.log()
    assert (
        project.events()[-1] == ("alignment", "stopped")
        and not (project.output / "alignment" / "STOP").exists()
    )


def test_too_many_restarts_end_the_job(project):
    job = project.sbatch(
        "slurm/stage1.sh", "optim.steps=10000", env={"RECIPE": "recipes/stage1.yaml", "MAX_PREEMPTIONS": "1"}
    )
    project.wait_for_log("alignment from step", count=4)
    warn(project, job)
    project.wait_for_log("alignment from step", count=8)
    warn(project, job)
    project.expect(job, "FAILED")
    assert "restarted 1 times after it had saved (MAX_PREEMPTIONS)" in project.log()
    assert project.events()[-1] == ("alignment", "failed")


def test_cancelled_stays_cancelled_and_takes_the_chain_with_it(project):
    jobs = project.chain("optim.steps=10000")
    project.wait_for_log("alignment from step 0", count=4)
    project.cluster.client("scancel", jobs[0])
    for job in jobs:
        project.expect(job, "CANCELLED")
    assert "requeue, " not in project.log() and project.cluster.client("squeue", "-h") == ""
    again = project.chain()  # the same command, fewer steps than were done before the cancellation
    for job in again:
        project.expect(job, "COMPLETED")
    assert "alignment is done" in (project.folder / f"slurm/logs/soundwave-1-{again[0]}.log").read_text()


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_failure_ends_the_chain_and_the_same_command_resumes(project, launcher):
    project.output.mkdir(parents=True)
    (project.output / "FAIL-shrinking").write_text("1")
    steps = "optim.steps=20"  # the ranks that do not fail are at work when they are stopped
    jobs = project.chain(steps, env={"LAUNCHER": launcher})
    project.expect(jobs[0], "COMPLETED")
    project.expect(jobs[1], "FAILED")
    project.expect(jobs[2], "CANCELLED")  # not pending for ever
    log = project.log()
    assert "node n1, rank 3: run.py ended with exit code 1" in log
    assert "shrinking failed, exit code 1 of rank 3 on n1" in log and "requeue, " not in log
    rows = project.status()
    assert [rows[stage]["state"] for stage in ("alignment", "shrinking", "sft")] == [
        "done",
        "failed",
        "cancelled",
    ]
    assert "of rank 3" in rows["shrinking"]["last error"]
    (project.output / "FAIL-shrinking").unlink()
    again = project.chain(steps, env={"LAUNCHER": launcher})
    assert len(again) == 2  # stage 1 is done
    for job in again:
        project.expect(job, "COMPLETED")
    assert value(project, "sft") == after(20)


def test_a_crash_is_not_taken_for_a_preemption(project):
    """137, as after the kernel's out-of-memory killer; the other ranks get TERM because of it, and save."""
    project.output.mkdir(parents=True)
    (project.output / "FAIL-alignment").write_text("137")
    job = project.sbatch("slurm/stage1.sh", "optim.steps=40", env={"RECIPE": "recipes/stage1.yaml"})
    assert project.expect(job, "FAILED")["Restarts"] == "0"
    assert "requeue, " not in project.log()
    assert "of rank 3" in project.status()["alignment"]["last error"]


def test_wrong_input_is_never_requeued(project):
    project.output.mkdir(parents=True)
    (project.output / "FAIL-alignment").write_text("2")
    job = project.sbatch("slurm/stage1.sh", env={"RECIPE": "recipes/stage1.yaml"})
    facts = project.expect(job, "FAILED")
    assert facts["ExitCode"] == "2:0" and facts["Restarts"] == "0"
    assert "wrong recipe or input" in project.log()


def test_a_misspelt_key_stops_the_chain_before_the_queue_and_the_job_in_its_preflight(project):
    with pytest.raises(RuntimeError, match="did you mean 'optim.steps'"):
        project.chain("optim.stepz=3")
    assert project.cluster.client("squeue", "-h") == ""
    job = project.sbatch("slurm/stage1.sh", "optim.stepz=3", env={"RECIPE": "recipes/stage1.yaml"})
    assert project.expect(job, "FAILED")["ExitCode"] == "2:0"
    assert "did you mean 'optim.steps'" in project.log() and "training" not in project.log()


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_where_requeueing_is_forbidden_a_new_job_takes_the_place_and_the_chain_follows(project, launcher):
    jobs = project.chain("--no-requeue", "--gres=gpu:2", "optim.steps=30", env={"LAUNCHER": launcher})
    project.wait_for_log("alignment from step 0", count=4)
    warn(project, jobs[0])
    project.wait_for_log("submitted as job")
    new = re.search(r"submitted as job (\d+)", project.log()).group(1)
    assert f"afterok:{new}" in project.cluster.job(jobs[1])["Dependency"]
    for job in (new, *jobs[1:]):
        project.expect(job, "COMPLETED")
    assert value(project, "alignment") == value(project, "sft") == after(30)
    states = [
        json.loads((project.output / "alignment" / f"state-{rank}.json").read_text()) for rank in range(4)
    ]
    assert {state["starts"] for state in states} == {2}
    assert ("alignment", "resubmitted") in project.events()


def test_time_limit_is_a_chain_of_jobs(project):
    # Slurm counts in minutes and may warn up to a minute early: 4,000 steps of 0.2 s would take 13 minutes.
    job = project.sbatch(
        "--time=2",
        "--signal=B:USR1@60",
        "slurm/stage1.sh",
        "optim.steps=4000",
        env={"RECIPE": "recipes/stage1.yaml"},
    )
    project.wait_for_log("stopped in time: requeue, stop 1 of at most 200")
    project.wait_for_log("alignment from step", count=8)
    second = re.findall(r"alignment from step (\d+)", project.log())[4:]
    assert min(map(int, second)) > 5
    project.cluster.client("scancel", job)
    project.expect(job, "CANCELLED")


@pytest.mark.parametrize("signal", [warn, preempt])
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_program_that_may_be_killed_at_any_time_is_stopped_and_requeued(project, launcher, signal):
    """What pack.sh and evaluate.sh do, with a program that ends only when started for the second time."""
    (project.folder / "train" / "twice.py").write_text(
        "import os, pathlib, time\nmark = pathlib.Path(f'mark-{os.environ[\"RANK\"]}')\nagain = "
        "mark.exists()\nmark.touch()\n"
        "print('again' if again else 'first', flush=True)\nagain or time.sleep(600)\n"
    )
    script = (
        (project.folder / "slurm" / "evaluate.sh")
        .read_text()
        .replace("--nodes=1", "--nodes=2")
        .replace('run_resumable -m evaluation.run "$@"', 'run_resumable "$CODE/train/twice.py"')
    )
    (project.folder / "slurm" / "twice.sh").write_text(script)
    job = project.sbatch("slurm/twice.sh", env={"LAUNCHER": launcher})
    project.wait_for_log("first", count=4)
    signal(project, job)
    assert project.expect(job, "COMPLETED")["Restarts"] == "1"
    assert project.log().count("again") == 4


def test_a_chain_for_the_same_output_is_refused_while_one_is_queued(project):
    jobs = project.chain("optim.steps=10000", "--begin=now+1hour")
    with pytest.raises(RuntimeError, match=f"job {jobs[0]} of runs/test is still in the queue"):
        project.chain()
    project.cluster.client("scancel", *jobs)


def test_dry_run_prints_the_scripts_and_submits_nothing(project):
    text = project.run(
        "bash", "slurm/chain.sh", "--recipes", "recipes", "--dry-run", "--time=3:00:00", "optim.steps=9"
    )
    for number in (1, 2, 3):
        script = (project.folder / "slurm" / f"stage{number}.sh").read_text()
        assert script in text
    assert "--dependency=afterok:JOB_OF_STAGE_2 --kill-on-invalid-dep=yes" in text and "optim.steps=9" in text
    assert text.count("to start at") == 3  # sbatch --test-only
    assert project.cluster.client("squeue", "-h") == ""
    assert not list((project.folder / "slurm" / "jobs").iterdir()) or [
        p.name for p in (project.folder / "slurm" / "jobs").iterdir()
    ] == [".gitignore"]
    with pytest.raises(RuntimeError, match="invalid partition"):
        project.run("bash", "slurm/chain.sh", "--recipes", "recipes", "--dry-run", "--partition=nowhere")


def test_without_recipes_each_script_s_own_line_counts(project):
    for number in (1, 2, 3):
        script = project.folder / "slurm" / f"stage{number}.sh"
        script.write_text(script.read_text().replace("train/recipes/", "recipes/"))
    text = project.run("bash", "slurm/chain.sh", "--dry-run", env={"RECIPE": "another.yaml"})
    assert [f"recipes/stage{number}.yaml -- " in text for number in (1, 2, 3)] == [True] * 3
    script.write_text(script.read_text().replace("recipes/stage3.yaml", "recipes/mine.yaml"))
    with pytest.raises(
        RuntimeError, match="recipes/mine.yaml does not exist: .* the right RECIPE in slurm/stage3.sh"
    ):
        project.run("bash", "slurm/chain.sh", "--dry-run")


def test_tasks_that_do_not_match_the_gpus_stop_at_once(project):
    job = project.sbatch("--gpus-per-node=1", "slurm/stage1.sh", env={"RECIPE": "recipes/stage1.yaml"})
    project.expect(job, "FAILED")
    assert "1 GPUs but 2 tasks on a node: make --ntasks-per-node the number of GPUs" in project.log()


def test_submitted_from_another_folder_it_says_where_to_go(project, tmp_path):
    job = project.cluster.client(
        "sbatch",
        "--parsable",
        f"--output={tmp_path}/elsewhere.log",
        str(project.folder / "slurm" / "stage1.sh"),
        cwd=tmp_path,
    ).strip()
    project.expect(job, "FAILED")
    assert "call sbatch from the project's root" in (tmp_path / "elsewhere.log").read_text()
