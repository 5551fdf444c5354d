"""chain.sh, and the functions of common.sh that submit: with stand-ins for Slurm's commands, which note what they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.slurm.conftest import Assets, Project
from train.config import load_recipe


class Site(Project):
    """A project on a login node. submitted: the arguments of each sbatch, whose jobs are 101, 102, ..."""

    def __init__(self, folder: Path):
        super().__init__(folder / "project", None)
        self.programs, self.notes = folder / "programs", folder / "sbatch"
        self.programs.mkdir()
        self.notes.mkdir()
        self.program("sbatch", f'n=$((101 + $(ls {self.notes}/*.args 2>/dev/null | wc -l)))\nenv >{self.notes}/$n.env\n'
                     f'printf "%s\\n" "$@" >{self.notes}/$n.args; echo $n')
        self.program("squeue", f"cat {folder}/queue 2>/dev/null || true")
        self.program("scontrol", '[ "$1" != ping ] || { echo "Slurmctld(primary) at here is UP"; exit 0; }\n'
                     '[ "$1" != requeue ] || { echo "Requested operation is presently disabled"; exit 1; }\nexit 0')
        for number, stage in enumerate(Assets.STAGES, start=1):
            self.recipe(stage, number, "data: {train: [{shards: none}]}\n")

    def program(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.programs / name).chmod(0o755)

    def shell(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120,
                              env={"PATH": f"{self.programs}:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", **environment})

    def call(self, script: str, **environment: str) -> subprocess.CompletedProcess:
        """Lines of bash behind common.sh, in a job."""
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n",
                     **environment}
        lines = f"set -euo pipefail\nsource slurm/common.sh\nJOB=$PWD/slurm/jobs/7; mkdir -p $JOB\n{script}"
        (self.folder / "job.sh").write_text(f"#SBATCH --signal=B:USR1@600\n{lines}\n")
        return self.shell("bash", "job.sh", **variables)

    @property
    def submitted(self) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(self.notes.glob("*.args"))]

    def environment(self, job: int) -> str:
        return (self.notes / f"{job}.env").read_text()


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


STATE = ('TASKS=1 CPUS=1 CODE=$PWD RECIPE=r.yaml ARGUMENTS=(a=1) WARNED=0 WARNING="" BEGAN=$(date +%s) STAGE=alignment '
         'OUTPUT=$PWD/out FAULT="" CULPRITS="" LOG=soundwave-7.log; mkdir -p out\n')


def test_a_chain_from_inside_an_allocation_knows_its_own_jobs(site):
    """salloc's and Jupyter's shells have a job of their own."""
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes", SLURM_JOB_ID="999", SLURM_NTASKS="4")
    assert done.returncode == 0, done.stderr
    assert [arguments[0] for arguments in site.submitted] == ["--parsable"] * 3
    assert "SLURM_" not in site.environment(101), "nothing of the interactive job goes along"
    events = [json.loads(line) for line in (site.output / "slurm.jsonl").read_text().splitlines()]
    assert [event["job"] for event in events] == ["101", "102", "103"]


def test_a_mistake_in_the_last_recipe_is_told_before_the_first_stage_waits(site):
    site.recipe("sft", 3, "optim: {stepz: 3}\n")
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes")
    assert done.returncode == 2 and "did you mean 'optim.steps'" in done.stderr and site.submitted == []


def finish(site: Site, number: int) -> Path:
    """Leave a stage's folder as a trainer does that the recipe of now has run; returns it."""
    recipe = load_recipe(site.folder / "recipes" / f"stage{number}.yaml")
    folder = site.output / recipe.stage
    (folder / "model").mkdir(parents=True)
    described = {"config": asdict(recipe.model), "stage": recipe.stage, "frozen": {}, "step": recipe.optim.steps,
                 "recipe": asdict(recipe)}
    (folder / "model" / "soundwave.json").write_text(json.dumps(described))
    (folder / "run.json").write_text(json.dumps({"status": "done", "steps": recipe.optim.steps}))
    return folder


def test_a_finished_stage_that_another_recipe_made_stops_the_chain(site):
    finish(site, 1)
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes", "--stages", "1,2", "optim.lr_adapters=0.5")
    assert done.returncode == 2 and site.submitted == []
    assert "alignment/model was made with another recipe (optim.lr_adapters: 0.001 -> 0.5)" in done.stderr, done.stderr


def test_a_finished_stage_whose_start_is_to_be_trained_stops_the_chain(site):
    folder = finish(site, 2)
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes", "--stages", "1,2")
    assert done.returncode == 2 and site.submitted == []
    assert f"stage 2 is done, but stage 1, its start, is not: remove {folder.relative_to(site.folder)}" in done.stderr


def test_recipes_are_read_inside_a_container_that_the_login_node_has(site):
    site.program("apptainer", f'while [ "$1" != image.sif ]; do shift; done; shift\nPATH={sys.prefix}/bin:$PATH exec "$@"')
    (site.folder / "image.sif").touch()
    script = site.folder / "slurm" / "stage1.sh"
    script.write_text(script.read_text().replace(f"ENVIRONMENT=venv:{sys.prefix}", "ENVIRONMENT=apptainer:image.sif"))
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes", "optim.stepz=3")
    assert done.returncode == 2 and "did you mean 'optim.steps'" in done.stderr and site.submitted == []


@pytest.mark.parametrize("base, words", [
    ('"stage1.yaml"', None), ("'stage1.yaml'  # ours", None),
    ("/tmp/other.yaml", "is an absolute path"), ("../../other.yaml", "lies on the other side of"),
])
def test_the_recipes_that_a_recipe_is_based_on_are_frozen_with_it(site, base, words):
    site.recipe("shrinking", 2, f"base: {base}\n")
    done = site.call('freeze "$PWD/frozen" recipes/stage2.yaml')
    assert (done.returncode == 0) == (words is None) and (words or "") in done.stderr
    if words is None:
        assert done.stdout.strip() == str(site.folder / "frozen/recipes/stage2.yaml")
        assert (site.folder / "frozen/recipes/stage1.yaml").exists()


def test_a_new_job_in_this_one_s_place_is_of_the_same_kind(site):
    """Where a site does not requeue: options of the command line go along, folders of the dead job's own disk do not."""
    done = site.call(STATE + 'export LOCAL_DISK SOUNDWAVE_JOB=7\nstart_again "stopped in time"', SLURM_TMPDIR="/scratch/job.7",
                     SOUNDWAVE_OPTIONS="--mem=200G --begin=now+1hour --comment=a\\ b ")
    assert done.returncode == 85, done.stderr
    assert {"--mem=200G", "--comment=a b", "a=1"} <= set(site.submitted[0]) and "--begin=now+1hour" not in site.submitted[0]
    assert "SOUNDWAVE_JOB=7\n" in site.environment(101)
    assert "LOCAL_DISK" not in site.environment(101) and "SLURM_JOB_ID" not in site.environment(101)
    site.call(STATE + 'export LOCAL_DISK\nstart_again "stopped in time"', LOCAL_DISK="/mine")
    assert "LOCAL_DISK=/mine" in site.environment(102)
    events = [json.loads(line) for line in (site.folder / "out/slurm.jsonl").read_text().splitlines()]
    assert [(event["job"], event["event"]) for event in events[-3:]] == [
        ("7", "requeued"), ("7", "resubmitted"), ("102", "submitted")]


def test_a_busy_controller_is_asked_again_for_a_new_job_but_not_for_a_second_one(site):
    """It may have taken the job whose number it did not tell."""
    took = site.programs.parent / "asked"
    busy = '{ echo "sbatch: error: Socket timed out" >&2; exit 1; }'
    site.program("sbatch", f"echo x >>{took}; [ $(wc -l <{took}) -gt 2 ] || {busy}\necho 103")
    done = site.call(STATE + 'start_again "stopped in time"', BUSY_SECONDS="0.01")
    assert done.returncode == 85 and "submitted as job 103" in done.stdout, done.stderr
    took.unlink()
    site.program("squeue", 'case "$*" in *%k*) echo "55 another"; echo "101 in place of 7" ;; *) true ;; esac')
    done = site.call(STATE + 'start_again "stopped in time"', BUSY_SECONDS="0.01")
    assert done.returncode == 85 and "submitted as job 101" in done.stdout and took.read_text() == "x\n"
    site.program("sbatch", f'echo x >>{took}; echo "sbatch: error: invalid partition" >&2; exit 1')
    site.program("squeue", "true")
    took.unlink()
    done = site.call(STATE + 'start_again "stopped in time"', BUSY_SECONDS="0.01")
    assert done.returncode == 1 and "sbatch refused" in done.stderr and took.read_text() == "x\n", "a refusal is not repeated"


def test_a_disk_that_takes_no_line_costs_neither_a_requeue_nor_a_finished_stage(site):
    site.program("scontrol", 'echo "$1" >>called; exit 0')
    full = STATE + "ln -sf /dev/full out/slurm.jsonl\nsleep() { :; }\n"
    done = site.call(full + "finish 0")
    assert done.returncode == 0 and "takes no line" in done.stdout, done.stderr
    done = site.call(full + "finish 85")
    assert done.returncode == 85 and "requeue" in (site.folder / "called").read_text()


def test_a_stop_file_of_an_earlier_run_does_not_keep_a_preempted_job_from_its_requeue(site):
    site.program("scontrol", "exit 0")
    script = STATE + ('mkdir -p out/alignment; echo \'"reason": "STOP file on rank 0"\' >out/alignment/run.json\n'
                      'start_again() { echo again; exit 0; }\n')
    assert site.call(script + "finish 85").stdout.strip().endswith("again"), "in the preflight, or while shards are copied"
    assert "as its STOP file asked" in site.call(script + "STOP_FILE=out/alignment/STOP; finish 85").stdout


def test_a_stage_that_another_job_trains_is_left_to_it(site):
    script = STATE + 'EVENT_JOB=6 event started ""; EVENT_JOB=5 event started ""; EVENT_JOB=5 event "done" ""; alone; echo on'
    assert site.call(script).stdout.strip() == "on"
    site.program("squeue", 'case "$*" in *"-j 6 -t RUNNING"*) echo 6 ;; *"-j 5"*) echo 5 ;; esac')
    done = site.call(script)
    assert done.returncode == 2 and "job 6 is training alignment in" in done.stderr
    assert site.call(script, SLURM_JOB_ID="6").returncode == 0, "itself, started again"
    assert site.call(script.replace("alone;", "STAGE=shrinking; alone;")).returncode == 0


def test_half_a_copy_of_the_code_is_no_copy(site):
    site.program("tar", '[ "$1" != -xf ] || [ -e extracted ] || { touch extracted; exit 1; }\n'
                 'exec /usr/bin/tar "$@"')
    done = site.call('RECIPE=$(freeze "$PWD/frozen" recipes/stage1.yaml)\necho on')
    assert done.returncode == 1 and "no frozen copy" in done.stderr and not (site.folder / "frozen").exists()


def test_an_end_of_the_job_that_nobody_tells_is_none(site):
    site.program("scontrol", '[ "$2" = hostnames ] && echo n')
    done = site.call('CODE=$PWD; BUSY_SECONDS=0; set_variables; echo "=${SLURM_JOB_END_TIME:-}="')
    assert done.stdout.strip().endswith("=="), done.stderr


def test_evaluation_is_told_which_job_it_is_over_restarts(site):
    """By which --restart throws away what was there before, and not what the job itself has answered."""
    (site.folder / "slurm/common.sh").write_text("prepare() { :; }\nrun_resumable() { echo $SOUNDWAVE_JOB; }\n")
    assert site.shell("bash", "slurm/evaluate.sh", SLURM_JOB_ID="7").stdout == "7\n"
    assert site.shell("bash", "slurm/evaluate.sh", SLURM_JOB_ID="9", SOUNDWAVE_JOB="7").stdout == "7\n"


def test_a_part_of_an_array_is_not_submitted_alone(site):
    done = site.call(STATE + 'start_again "stopped in time"', SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 1 and "run the same slurm/pack.sh command again" in done.stderr and site.submitted == []


@pytest.mark.parametrize("began, ends, options, code", [
    (5, 595, "", 2),  # --time=10 and the script's 600 s: no start would ever train
    (700, 600, "", 85),
    (5, 50000, "", 85),  # a preemption that sends the same signal
    (5, 295, "--signal=B:USR1@300 ", 2),
    (5, 595, "--signal=B:USR1@300 ", 85),
])
def test_a_time_limit_that_the_warning_fills_ends_the_job(site, began, ends, options, code):
    script = STATE + (f'finish() {{ exit "$1"; }}\nWARNED=1 WARNING=USR1 CODE_OF_STEP=0 BEGAN=$(($(date +%s) - {began}))\n'
                      f'SLURM_JOB_END_TIME=$(($(date +%s) + {ends}))\ngo_on')
    done = site.call(script, SOUNDWAVE_OPTIONS=options)
    assert done.returncode == code, done.stderr
    assert ("give --time more than twice" in done.stderr) == (code == 2)


def test_pack_submits_from_inside_an_allocation_and_not_from_sbatch_s_copy(site, tmp_path):
    done = site.shell("bash", "slurm/pack.sh", "--manifest", "m.jsonl", "--out", "out", SLURM_JOB_ID="999")
    assert done.returncode == 0 and len(site.submitted) == 2, done.stderr
    (tmp_path / "spool").mkdir()
    copy = tmp_path / "spool" / "slurm_script"
    copy.write_text((site.folder / "slurm/pack.sh").read_text())
    done = site.shell("bash", str(copy), "--out", "out", SLURM_JOB_ID="999")
    assert done.returncode != 0 and "run slurm/pack.sh itself on the login node" in done.stderr and len(site.submitted) == 2


def test_faults_of_many_ranks_are_lines_without_a_traceback(site, assets):
    """Rank 0 holds the store: it must not leave before the others have heard."""
    assets.recipes(site.folder)
    port = str(20000 + os.getpid() % 10000)
    command = [sys.executable, "train/preflight.py", "recipes/stage2.yaml", "init_from=fresh", "model.llm.name=./nowhere"]
    environment = {**os.environ, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "DS_ACCELERATOR": "cpu"}
    ranks = [subprocess.Popen(command, cwd=site.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**environment, "RANK": str(rank)}) for rank in range(3)]
    try:
        told = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2, 2], told
    assert "model.llm" in told[0] and not any("Traceback" in text for text in told), told
