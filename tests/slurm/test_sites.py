"""What real sites and their users do to the job scripts, on a real Slurm: options, leftovers, full disks,
preemption, limits.

The trainer is stand_in/run.py. Every test here is of one kind of site; test_submitting.py holds the
variants, with stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Project
from tests.slurm.test_queue import after, value, warn

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 16 MB. Mounted before the nodes start, because they have mounts of their own."""
    folder = tmp_path_factory.mktemp("small") / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True, timeout=10)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


@pytest.fixture(scope="module")
def cluster(slurm_installed, small_disk):
    """Memory is allocated, GPUs have a type, and jobs of `high` preempt those of the other partitions at
    once."""
    partitions = {
        "debug": "PriorityTier=1 PreemptMode=CANCEL GraceTime=0",
        "again": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
        "high": "PriorityTier=10 PreemptMode=OFF",
    }
    with Cluster(
        gpus=2,
        gpu_type="a100",
        partitions=partitions,
        SelectTypeParameters="CR_CPU_Memory",
        KillWait=20,
        PreemptType="preempt/partition_prio",
        PreemptMode="REQUEUE",
    ) as running:
        yield running


RECIPE = {"RECIPE": "recipes/stage1.yaml"}


def processes(cluster: Cluster, job: str, rank: int) -> list[int]:
    """The processes of one rank of the job's running step: its shell, the program and what that started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables, words = (
                    (entry / "environ").read_bytes().split(b"\0"),
                    (entry / "cmdline").read_bytes(),
                )
            except OSError:
                continue
            wanted = (
                f"SLURM_JOB_ID={job}",
                f"SLURM_CONF={cluster.folder}/slurm.conf",
                f"SLURM_PROCID={rank}",
            )
            if all(word.encode() in variables for word in wanted) and (
                b"common.sh" in words or b".py" in words
            ):
                found.append(int(entry.name))
    return found


def fill(folder: Path, *logs: Path) -> None:
    """Leave no byte in the folder's disk, nor in the last page of these files there."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (65536, 4096, 512):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    for log in logs:
        try:
            with open(log, "ab", buffering=0) as file:
                while True:
                    file.write(b".")
        except OSError:
            pass


def test_the_environment_of_a_job_does_not_change_what_it_runs(project):
    """sbatch's --export keeps the environment back. The recipe and the code stay those of the submission."""
    jobs = [
        *project.chain("--stages=1", "--export=NONE", "output=runs/none"),
        *project.chain("--stages=1", "--export=NCCL_DEBUG=INFO", "output=runs/one"),
        *project.chain("--stages=1", "output=runs/site", env={"SBATCH_EXPORT": "NONE"}),
    ]
    recipe = project.folder / "recipes/stage1.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 5", "steps: 7"))
    for job in jobs:
        project.expect(job, "COMPLETED")
    for name in ("none", "one", "site"):
        assert json.loads((project.folder / f"runs/{name}/alignment/model/soundwave.json").read_text())[
            "value"
        ] == after(5)
    assert sorted(path.name for path in (project.folder / "runs").iterdir()) == ["none", "one", "site"]


@pytest.mark.slurm_ci
def test_leftovers_of_other_jobs_and_launchers_count_for_nothing(project):
    """sbatch called from an salloc shell, a task of an array, a job that was requeued, or a script that
    torchrun runs."""
    leftovers = {
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_DISTRIBUTION": "cyclic",
        "SLURM_CPU_BIND": "map_cpu:0",
        "SLURM_RESTART_COUNT": "20",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_EXIT_ERROR": "3",
        "SLURM_TIME_FORMAT": "relative",
        "SQUEUE_STATES": "PENDING",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_PORT": "29500",
        "SOUNDWAVE_CODE": "/nowhere",
        "SOUNDWAVE_RESTARTS": "20",
    }
    job = project.sbatch(
        "--time=9-00:00:00", "slurm/stage1.sh", "optim.steps=15", env={**RECIPE, **leftovers}
    )
    project.wait_for_log("alignment from step 0", count=4)
    step = project.cluster.client("scontrol", "show", "step", job)
    assert "TRES=cpu=8,mem=2000000M,node=2" in step, "all of the job's memory"
    project.expect(job, "COMPLETED")
    log = project.log()
    for node, rank, local in (("gpu-b7", 0, 0), ("gpu-b7", 1, 1), ("n1", 2, 0), ("n1", 3, 1)):
        assert f"rank {rank} of 4 local {local} on {node}: alignment from step 0" in log
    end = int(re.search(r"end (\d+)", log).group(1))
    assert 8.9 < (end - time.time()) / 86400 < 9


def test_srun_that_refuses_a_step_is_no_dead_node(project):
    """An option that srun does not accept: starting again would not help."""
    options = {"STEP_OPTIONS": "--mem=9999999999"}
    stage = project.sbatch("slurm/stage1.sh", env={**RECIPE, **options})
    evaluation = project.sbatch("slurm/evaluate.sh", "--model", "x", env=options)
    for job in (stage, evaluation):
        assert project.expect(job, "FAILED")["Restarts"] == "0"
    assert project.log().count("srun refuses the step (error: Unable to create step for job") == 2
    assert "srun refuses the step" in project.status()["alignment"]["last error"]


@pytest.mark.slurm_ci
@pytest.mark.parametrize("program", ["training", "evaluation"])
def test_a_rank_that_is_killed_is_named_and_not_taken_for_a_preemption(project, program):
    """All of its processes at once, as the kernel does with a task's memory group."""
    if program == "training":
        job = project.sbatch("slurm/stage1.sh", "optim.steps=4000", env=RECIPE)
        project.wait_for_log("alignment from step 0", count=4)
    else:
        (project.folder / "train/sleep.py").write_text(
            "import time\nprint('sleeps', flush=True)\ntime.sleep(600)\n"
        )
        script = (project.folder / "slurm/evaluate.sh").read_text().replace("--nodes=1", "--nodes=2")
        (project.folder / "slurm/sleep.sh").write_text(
            script.replace('run_resumable -m evaluation.run "$@"', 'run_resumable "$CODE/train/sleep.py"')
        )
        job = project.sbatch("slurm/sleep.sh")
        project.wait_for_log("sleeps", count=4)
    for process in processes(project.cluster, job, 2):
        os.kill(process, signal.SIGKILL)
    assert project.expect(job, "FAILED")["Restarts"] == "0"
    assert (
        "exit code 137 of rank 2 on n1 (killed: out of memory?)" in project.log()
        and "requeue, " not in project.log()
    )
    if program == "training":
        assert project.status()["alignment"]["last error"].startswith("exit code 137 of rank 2 on n1")


def test_a_port_that_is_taken_is_named_and_the_next_one_used(project):
    probe = project.cluster.client(
        "sbatch", "--parsable", "--nodes=1", "--mem=1", "--output=/dev/null", "--wrap=true"
    ).strip()
    port = 20000 + int(probe) + 1
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", port))
        taken.listen()
        job = project.sbatch("slurm/stage1.sh", env=RECIPE)
        assert int(job) == int(probe) + 1
        project.expect(job, "COMPLETED")
    assert f"port {port} of gpu-b7 is taken by another program: using {port + 1}" in project.log()


def test_full_disks_cost_neither_a_saved_stage_nor_a_finished_one(project, small_disk):
    """The disk of slurm/jobs and slurm/logs, while stage 1 trains; then Slurm warns."""
    for name in ("jobs", "logs"):
        shutil.rmtree(project.folder / "slurm" / name)
        (small_disk / name).mkdir()
        (project.folder / "slurm" / name).symlink_to(small_disk / name)
    jobs = project.chain("optim.steps=25", "--stages=1,2")
    project.wait_for_log("alignment from step 0", count=4)
    fill(small_disk, project.folder / f"slurm/logs/soundwave-1-{jobs[0]}.log")
    warn(project, jobs[0])
    for job in jobs:
        project.expect(job, "COMPLETED")
    assert value(project, "alignment") == value(project, "shrinking") == after(25)
    assert [event for stage, event in project.events() if stage == "alignment"] == [
        "submitted",
        "started",
        "requeued",
        "started",
        "done",
    ]
    assert not (project.folder / f"slurm/jobs/{jobs[0]}/stop.1").stat().st_size
    for name in ("filler", "jobs", "logs"):
        path = small_disk / name
        path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.slurm_ci
def test_a_job_that_sbatch_accepts_without_an_answer_belongs_to_the_chain(project):
    """The real sbatch, behind one that loses every answer; and a banner before one that does not."""
    programs = project.folder / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text(
        "#!/bin/bash\necho '--> Verifying valid submit host 3 (login3)...OK'\n/usr/bin/sbatch \"$@\" "
        ">/dev/null\n"
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" '
        ">&2\nexit 1\n"
    )
    (programs / "sbatch").chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}"}
    jobs = project.chain("--begin=now+1hour", env=env)
    queue = project.cluster.client("squeue", "-h", "-o", "%i %E", "-S", "i").split("\n")[:-1]
    assert queue == [
        f"{jobs[0]} (null)",
        f"{jobs[1]} afterok:{jobs[0]}(unfulfilled)",
        f"{jobs[2]} afterok:{jobs[1]}(unfulfilled)",
    ]
    with pytest.raises(RuntimeError, match=f"job {jobs[0]} of runs/test is still in the queue"):
        project.chain(env={"SQUEUE_STATES": "RUNNING", "SQUEUE_PARTITION": "other"})
    rows = project.run(
        sys.executable,
        "-m",
        "train.status",
        "runs/test",
        env={"SQUEUE_FORMAT": "%j", "SQUEUE_STATES": "RUNNING"},
    )
    assert "pending (BeginTime)" in rows and rows.count("pending (Dependency)") == 2
    project.cluster.client("scontrol", "hold", jobs[0])
    assert project.status()["alignment"]["state"].startswith("held (JobHeld")  # by root: JobHeldAdmin
    project.cluster.client("scancel", jobs[0])
    wait_for(lambda: project.cluster.job(jobs[2])["JobState"] == "CANCELLED", 60, "the chain's end")
    assert [row["state"] for row in project.status().values()] == ["cancelled"] * 3


def test_a_new_job_in_a_job_s_place_asks_for_the_same_and_only_its_own_dependents_follow(project):
    """A site that does not requeue."""
    script = project.folder / "slurm/stage1.sh"
    script.write_text(re.sub(r"(?m)^#SBATCH --gpus-per-node.*\n", "", script.read_text()))
    job = project.sbatch(
        "--no-requeue",
        "--mem=2000",
        "--gpus-per-task=a100:1",
        "--output=mine-%j.log",
        "slurm/stage1.sh",
        "optim.steps=30",
        env=RECIPE,
    )
    other = project.sbatch("--nodes=1", "--mem=10", "--output=/dev/null", "--wrap=sleep 20")
    both = project.sbatch(
        "--nodes=1",
        "--mem=10",
        "--output=/dev/null",
        f"--dependency=afterok:{other},afterok:{job}",
        "--wrap=true",
    )
    log = project.folder / f"mine-{job}.log"
    wait_for(lambda: log.exists() and log.read_text().count("alignment from step 0") == 4, 120, "the start")
    facts = project.cluster.job(job)
    warn(project, job)
    wait_for(lambda: "submitted as job" in log.read_text(), 60, lambda: log.read_text())
    new = re.search(r"submitted as job (\d+)", log.read_text()).group(1)
    assert (
        project.cluster.job(both)["Dependency"] == f"afterok:{other}(unfulfilled),afterok:{new}(unfulfilled)"
    )
    again = project.cluster.job(new)
    for name in (
        "MinMemoryNode",
        "TresPerTask",
        "Partition",
        "TimeLimit",
        "NumTasks",
        "CPUs/Task",
        "Requeue",
    ):
        assert again[name] == facts[name], name
    assert (
        again["StdOut"] == str(project.folder / f"mine-{new}.log")
        and again["TresPerTask"] == "gres:gpu:a100:1"
    )
    project.expect(new, "COMPLETED")
    assert value(project, "alignment") == after(30)
    project.expect(both, "COMPLETED")


def preempt_for_real(project) -> None:
    high = project.sbatch(
        "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 2"
    )
    project.expect(high, "COMPLETED")


def test_a_preemption_that_cancels_submits_the_job_anew(project):
    """PreemptMode=CANCEL without a grace time: the ranks have KillWait seconds to save."""
    jobs = project.chain("--stages=1,2", "optim.steps=60")
    project.wait_for_log("alignment from step 0", count=4)
    preempt_for_real(project)
    log = (project.folder / f"slurm/logs/soundwave-1-{jobs[0]}.log").read_text()
    assert project.expect(jobs[0], "PREEMPTED") and "preempted, and cancelled by Slurm" in log
    new = re.search(r"submitted as job (\d+)", log).group(1)
    for job in (new, jobs[1]):
        project.expect(job, "COMPLETED")
    assert value(project, "alignment") == value(project, "shrinking") == after(60)
    assert "1 saved stops of at most" in (project.folder / f"slurm/logs/soundwave-1-{new}.log").read_text()


def test_slurm_s_own_requeues_are_counted_and_preemptions_apart(project):
    """PreemptMode=REQUEUE is a saved stop; scontrol requeue, as an administrator types it, is a fault."""
    job = project.sbatch(
        "--partition=again", "slurm/stage1.sh", "optim.steps=4000", env={**RECIPE, "MAX_RESTARTS": "0"}
    )
    project.wait_for_log("alignment from step 0", count=4)
    preempt_for_real(project)
    project.wait_for_log("alignment from step", count=8)
    assert "restart 1 (1 saved stops of at most 200, 0 faults of at most 0)" in project.log()
    project.cluster.client("scontrol", "requeue", job)
    project.expect(job, "FAILED")
    assert "restart 2 (1 saved stops of at most 200, 1 faults of at most 0)" in project.log()
    assert "after faults (MAX_RESTARTS)" in project.log()
    assert project.status()["alignment"]["state"] == "failed"


@pytest.mark.slurm_ci
def test_a_stage_started_in_salloc_uses_the_code_and_recipe_of_its_start(project):
    """Two runs inside one salloc session, the code and the recipe edited between them."""
    (project.folder / "inner.sh").write_text(
        "export RECIPE=recipes/stage1.yaml\nbash slurm/stage1.sh optim.steps=2 || exit\n"
        'sed -i \'s/GENERATION = "first"/GENERATION = "edited"/\' train/run.py\n'
        "sed -i 's/steps: 5/steps: 3/' recipes/stage1.yaml\n"
        "rm -r runs/test/alignment/model\nbash slurm/stage1.sh\n"  # a finished stage of another recipe is refused
    )
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2")
    log = project.run("timeout", "110", "salloc", *options, "bash", "inner.sh")
    assert (
        log.count("alignment from step 0, generation first") == 4
        and log.count("from step 2, generation edited") == 4
    )
    assert value(project, "alignment") == after(3)


def test_a_chain_from_another_folder_without_a_folder_for_logs(project, tmp_path):
    elsewhere = tmp_path / "my experiments"
    elsewhere.mkdir()
    shutil.move(project.folder / "recipes", elsewhere / "recipes")
    shutil.rmtree(project.folder / "slurm/logs")
    (tmp_path / "chain").symlink_to(project.folder / "slurm/chain.sh")
    text = project.cluster.client(
        "../chain",
        "--recipes",
        "recipes",
        "--stages=1",
        "output=run 1",
        cwd=elsewhere,
        env={"DS_ACCELERATOR": "cpu"},
    )
    project.expect(re.search(r"job (\d+), log", text).group(1), "COMPLETED")
    assert (elsewhere / "run 1/alignment/model").is_dir() and not (project.folder / "run 1").exists()
    line = (elsewhere / "run 1/slurm.jsonl").read_text().splitlines()[-1]
    assert Path(json.loads(line)["log"]).is_file()


def test_a_frozen_copy_that_was_deleted_stops_the_jobs_that_need_it(project):
    jobs = project.chain("--stages=1", "--hold")
    (frozen,) = (project.folder / "slurm/jobs").glob("chain-*")
    shutil.rmtree(frozen)
    project.cluster.client("scontrol", "release", jobs[0])
    project.expect(jobs[0], "FAILED")
    assert "a frozen copy that was deleted needs a new submission" in project.log()


def test_a_stage_is_no_array(project):
    job = project.sbatch("--array=0-1", "slurm/stage1.sh", env=RECIPE)
    wait_for(lambda: project.log().count("this is one job: submit it without --array") == 2, 60, project.log)
    assert job and not (project.output / "alignment/run.json").exists()


def test_a_project_of_its_own(project: Project):
    """Names with blanks in every path that the scripts handle."""
    spaced = project.folder.parent / "my project"
    project.folder.rename(spaced)
    project.folder, project.output = spaced, spaced / "runs" / "test"
    jobs = project.chain("--stages=1,2", "--no-requeue", "optim.steps=30")
    project.wait_for_log("alignment from step 0", count=4)
    warn(project, jobs[0])
    project.expect(jobs[1], "COMPLETED")
    assert all(
        Path(json.loads(line)["log"]).parent == spaced / "slurm/logs"
        for line in (project.output / "slurm.jsonl").read_text().splitlines()
    )
    assert value(project, "shrinking") == after(30)
