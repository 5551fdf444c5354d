"""slurm/*.sh with stand-ins for Slurm's commands, which note what they are given: submissions, and a job's own decisions."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from recipe.config import load_recipe
from tests.slurm.conftest import Assets, Project

# What `scontrol -d show job 7` prints (22.05), as far as the scripts read it.
FACTS = """JobId=7 JobName={name}
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState={state} Reason=None Dependency=(null)
   Requeue={requeue} Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:10:00 TimeLimit={limit} TimeMin=N/A
   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted}
   Partition=gpu AllocNode:Sid=login:1
   ReqNodeList=(null) ExcNodeList=bad[1-2]
   NumNodes=2 NumCPUs=8 NumTasks=4 CPUs/Task=2 ReqB:S:C:T=0:0:*:*
   JOB_GRES={gres}
   MinCPUsNode=4 {memory} MinTmpDiskNode=0
   Features=a100 DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=/home/me/a JobState=FAILED/stage1.sh
   WorkDir=/home/me
   Comment=a b=c Restarts=9{blank}
   StdErr={log}
   StdIn=/dev/null
   StdOut={log}
   {tres}
"""


class Site(Project):
    """A project on a login node. `submitted`: the arguments of each sbatch, whose jobs are 101, 102, ..."""

    def __init__(self, folder: Path):
        super().__init__(folder / "project", None)
        self.programs, self.notes = folder / "programs", folder / "sbatch"
        self.programs.mkdir()
        self.notes.mkdir()
        self.program(
            "sbatch",
            f"n=$((101 + $(ls {self.notes}/*.args 2>/dev/null | wc -l)))\nenv >{self.notes}/$n.env\n"
            f'printf "%s\\n" "$@" >{self.notes}/$n.args; echo $n',
        )
        self.program("squeue", f"cat {folder}/queue 2>/dev/null || true")
        self.program("scancel", f'echo "$@" >>{folder}/cancelled')
        self.program("srun", "exit 0")
        self.program("sinfo", "true")
        self.program(
            "scontrol",
            f"""case "$*" in
            ping) echo "Slurmctld(primary) at here is UP" ;;
            *hostnames*) echo n1; echo n2 ;;
            *"show job 7") cat {folder}/facts ;;
            requeue*) echo "$@" >>{folder}/asked; [ -e {folder}/requeues ] || {{ echo "is disabled"; exit 1; }} ;;
            update*) echo "$@" >>{folder}/asked ;;
            esac""",
        )
        self.facts()
        for number, stage in enumerate(Assets.STAGES, start=1):
            self.recipe(stage, number, "data: {train: [{shards: none}]}\n")

    def facts(self, **values: object) -> None:
        text = FACTS.format(
            **{
                "name": "soundwave-1",
                "state": "RUNNING",
                "requeue": 1,
                "restarts": 0,
                "limit": "1-00:00:00",
                "preempted": "None",
                "gres": "gpu:4",
                "memory": "MinMemoryNode=0",
                "blank": " ",
                "tres": "Power=",
                "log": self.folder / "slurm/logs/soundwave-1-7.log",
                **values,
            }
        )
        (self.folder.parent / "facts").write_text(text)

    def program(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.programs / name).chmod(0o755)

    def shell(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            env={
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "DS_ACCELERATOR": "cpu",
                "BUSY_SECONDS": "0.01",
                **environment,
            },
        )

    def chain(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return self.shell("bash", "slurm/chain.sh", "--recipes", "recipes", *arguments, **options)

    def job(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Lines of bash in a batch job, behind `prepare`; OUTPUT and STAGE are known, as after the preflight."""
        spool = self.folder.parent / "spool"
        spool.mkdir(exist_ok=True)
        (spool / "slurm_script").write_text(
            f"#SBATCH --signal=B:USR1@600\nENVIRONMENT=venv:{sys.prefix}\n"
            'CODE=$PWD; [ "${1:-}" != --frozen ] || CODE=$2/code\nsource "$CODE/slurm/common.sh"\n'
            "RECIPE_LINE=recipes/stage1.yaml\n"
            f'prepare "$@"\nOUTPUT=$PWD/out STAGE=alignment; mkdir -p out\nsleep() {{ :; }}\n{script}\n'
        )
        variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "soundwave-1",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_TASKS_PER_NODE": "2(x2)",
            "SLURMD_NODENAME": "n1",
            **environment,
        }
        return self.shell("bash", str(spool / "slurm_script"), *arguments, **variables)

    def call(self, script: str, **environment: str) -> subprocess.CompletedProcess:
        """Lines of bash behind common.sh, outside of any job."""
        return self.shell("bash", "-c", f"set -euo pipefail\nsource slurm/common.sh\n{script}", **environment)

    @property
    def submitted(self) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(self.notes.glob("*.args"))]

    def environment(self, job: int) -> str:
        return (self.notes / f"{job}.env").read_text()

    def noted(self, name: str) -> str:
        path = self.folder.parent / name
        return path.read_text() if path.exists() else ""

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "out/slurm.jsonl").read_text().splitlines()]


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


# --- chain.sh: what the jobs are given -------------------------------------------------------------------------------------


def test_a_chain_from_inside_an_allocation_knows_its_own_jobs(site):
    """The shells of salloc and Jupyter have a job of their own."""
    done = site.chain(
        SLURM_JOB_ID="999",
        SLURM_NTASKS="4",
        SBATCH_ARRAY_INX="0-3",
        SBATCH_EXPORT="NONE",
        SRUN_CPUS_PER_TASK="1",
    )
    assert done.returncode == 0, done.stderr
    assert [arguments[0] for arguments in site.submitted] == ["--parsable"] * 3
    left = [
        line for line in site.environment(101).splitlines() if line.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    ]
    assert left == [], "nothing of the interactive job goes along"
    events = [json.loads(line) for line in (site.output / "slurm.jsonl").read_text().splitlines()]
    assert [event["job"] for event in events] == ["101", "102", "103"]


def test_a_jobs_contract_is_in_its_arguments_and_settings_of_the_command_in_its_folder(site):
    """Where no --export of a user or a site can undo it."""
    done = site.chain(
        "--stages=2", "--export=NONE", "--mem=200G", "optim.steps=3", LAUNCHER="torchrun", MAX_RESTARTS="3"
    )
    assert done.returncode == 0, done.stderr
    (arguments,) = site.submitted
    frozen = Path(arguments[arguments.index("--frozen") + 1])
    contract = arguments[arguments.index("--frozen") :]
    assert contract == [
        "--frozen",
        str(frozen),
        "--place",
        "stage2",
        "--recipe",
        str(frozen / "code/recipes/stage2.yaml"),
        "--",
        "optim.steps=3",
    ]
    assert not any(line.startswith(("SOUNDWAVE_", "RECIPE=")) for line in site.environment(101).splitlines())
    asked = site.shell(
        "bash",
        "-c",
        f'source {frozen}/code/slurm/common.sh; echo $LAUNCHER $MAX_RESTARTS "${{OPTIONS[@]}}"',
        "bash",
        *contract,
    )
    assert asked.stdout.split() == ["torchrun", "3", "--export=NONE", "--mem=200G"], asked.stderr


def test_options_that_the_scripts_need_too_are_completed(site):
    given = [
        "--export=NCCL_DEBUG=INFO",
        "--export=ALL,A=1",
        "--export=NONE",
        "--job-name=exp7",
        "-Jexp7",
        "--time=5",
    ]
    done = site.call(
        f"for option in {shlex.join(given)}; do OPTIONS=() JOB_NAME=-\n"
        'take_option "$option"; echo "${OPTIONS[*]} $JOB_NAME"; done'
    )
    assert done.stdout.splitlines() == [
        "--export=ALL,NCCL_DEBUG=INFO -",
        "--export=ALL,A=1 -",
        "--export=NONE -",
        " exp7",
        " exp7",
        "--time=5 -",
    ], done.stderr
    done = site.chain("--stages=1", "--job-name=exp7")
    assert (
        "--job-name=exp7-1" in site.submitted[0]
        and f"log {site.folder}/slurm/logs/exp7-1-101.log" in done.stdout
    )


def test_a_dry_run_names_the_options_that_replace_lines_of_the_script(site):
    done = site.chain("--stages=1", "--dry-run", "--nodes=3", "--comment=mine", "--time=1:00:00")
    assert done.returncode == 0, done.stderr
    assert "(instead of the #SBATCH lines below: --nodes=3, --time=1:00:00)\n" in done.stdout
    assert "instead of" not in site.chain("--stages=1", "--dry-run").stdout


REFUSED = {
    "--output=runs/a": "the run's folder is output=DIR",
    "-oruns/a": "output=DIR",
    "--outp=runs/a": "options in full",
    "--array=0-3": "no array",
    "-a0-3": "no array",
    "--wait": "nothing is waited for",
    "-W": "nothing is waited for",
    "--parsable": "given already",
    "--chdir=/tmp": "where this is called",
    "-D/tmp": "where this is called",
    "--wrap=true": "the jobs' scripts",
    "--test-only": "--dry-run",
    "--clusters=b": "that cluster",
    "-Mb": "that cluster",
    "--job-name": "=VALUE",
    "--job-name=a/b": "without /",
    "--exp=A": "options in full",
}


def test_options_that_would_undo_what_the_jobs_need_are_refused(site):
    for script in (["chain.sh", "--output=runs/a"], ["pack.sh", "--output=runs/a", "--", "--out", "x"]):
        done = site.shell("bash", f"slurm/{script[0]}", *script[1:])
        assert done.returncode == 2 and REFUSED["--output=runs/a"] in done.stderr and site.submitted == []
    done = site.call(
        f'for option in {shlex.join(REFUSED)}; do (take_option "$option") && echo "$option is accepted"; done; true'
    )
    assert done.stdout == "" and len(done.stderr.splitlines()) == len(REFUSED)
    for (option, words), line in zip(REFUSED.items(), done.stderr.splitlines(), strict=True):
        assert words in line and option.split("=")[0][:2] in line


def test_a_dependency_of_the_user_s_does_not_replace_the_scripts_own(site):
    assert site.chain("--dependency=afterok:55", "--stages=1,2").returncode == 0
    wanted = [
        ["--dependency=afterok:55"],
        ["--dependency=afterok:55", "--dependency=afterok:101"],
    ]  # of two, sbatch takes the last
    assert [[o for o in arguments if o.startswith("--dependency")] for arguments in site.submitted] == wanted
    done = site.shell("bash", "slurm/pack.sh", "--dependency=afterok:55", "--nodes=3", "--", "--out", "x")
    assert done.returncode == 0, done.stderr
    array, merge = site.submitted[2:]
    assert [o for o in merge if o.startswith("--dependency")][-1] == "--dependency=afterok:103"
    assert [o for o in array if o.startswith("--nodes")][-1] == "--nodes=1"


def test_logs_are_named_as_the_script_says_and_their_folder_is_made(site):
    shutil.rmtree(site.folder / "slurm/logs")
    script = site.folder / "slurm/stage1.sh"
    script.write_text(
        script.read_text().replace(
            "#SBATCH --output=slurm/logs/%x-%j.log", f"#SBATCH --output={site.folder.parent}/l/%j.out"
        )
    )
    done = site.chain("--stages", "1,2")
    assert f"job 101, log {site.folder.parent}/l/101.out" in done.stdout, done.stderr
    assert f"job 102, log {site.folder}/slurm/logs/soundwave-2-102.log" in done.stdout
    assert (site.folder.parent / "l").is_dir() and (site.folder / "slurm/logs").is_dir()


@pytest.mark.parametrize("how", ["bash", "sh", "link"])
def test_a_chain_from_another_folder_takes_paths_relative_to_it(site, tmp_path, how):
    elsewhere = tmp_path / "my experiments"
    elsewhere.mkdir()
    (site.folder / "recipes").rename(elsewhere / "recipes")
    os.symlink(site.folder / "slurm/chain.sh", tmp_path / "link")
    command = {
        "bash": ["bash", f"{site.folder}/slurm/chain.sh"],
        "sh": ["sh", f"{site.folder}/slurm/chain.sh"],
        "link": [f"{tmp_path}/link"],
    }
    done = site.shell(*command[how], "--recipes", "recipes", "--stages", "1", "output=run 1", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"--chdir={elsewhere}" in site.submitted[0] and (elsewhere / "run 1" / "slurm.jsonl").exists()
    follow = next(line for line in done.stdout.splitlines() if "train.status" in line)
    if how == "link":
        status = site.shell("bash", "-c", follow.strip(), cwd=elsewhere)
        assert status.returncode == 0 and "1 alignment" in status.stdout, status.stderr
    assert not (site.folder / "run 1").exists()


@pytest.mark.parametrize("script", ["chain.sh", "pack.sh"])
def test_a_script_that_submits_is_not_for_sbatch(site, tmp_path, script):
    (tmp_path / "spool").mkdir()
    copy = tmp_path / "spool" / "slurm_script"
    copy.write_text((site.folder / "slurm" / script).read_text())
    done = site.shell("bash", str(copy), "--out", "out", SLURM_JOB_ID="999")
    assert (
        done.returncode == 2
        and f"run slurm/{script} itself, on a login node" in done.stderr
        and site.submitted == []
    )


def test_a_mistake_in_the_last_recipe_is_reported_before_the_first_stage_waits(site):
    site.recipe("sft", 3, "optim: {stepz: 3}\n")
    done = site.chain()
    assert done.returncode == 2 and "did you mean 'optim.steps'" in done.stderr and site.submitted == []


def finish(site: Site, number: int) -> Path:
    """Leave a stage's folder as a trainer does that the recipe of now has run; returns it."""
    recipe = load_recipe(site.folder / "recipes" / f"stage{number}.yaml")
    folder = site.output / recipe.stage
    (folder / "model").mkdir(parents=True)
    described = {
        "config": asdict(recipe.model),
        "stage": recipe.stage,
        "frozen": {},
        "step": recipe.optim.steps,
        "recipe": asdict(recipe),
    }
    (folder / "model" / "soundwave.json").write_text(json.dumps(described))
    (folder / "run.json").write_text(json.dumps({"status": "done", "steps": recipe.optim.steps}))
    return folder


def test_a_finished_stage_that_another_recipe_made_stops_the_chain(site):
    finish(site, 1)
    done = site.shell(
        "bash", "slurm/chain.sh", "--recipes", "recipes", "--stages", "1,2", "optim.lr_adapters=0.5"
    )
    assert done.returncode == 2 and site.submitted == []
    assert "alignment/model was made with another recipe (optim.lr_adapters: 0.001 -> 0.5)" in done.stderr, (
        done.stderr
    )


def test_a_finished_stage_whose_start_is_to_be_trained_stops_the_chain(site):
    folder = finish(site, 2)
    done = site.shell("bash", "slurm/chain.sh", "--recipes", "recipes", "--stages", "1,2")
    assert done.returncode == 2 and site.submitted == []
    assert (
        f"stage 2 is done, but stage 1, its start, is not: remove {folder.relative_to(site.folder)}"
        in done.stderr
    )


def test_recipes_are_read_inside_a_container_that_the_login_node_has(site):
    site.program(
        "apptainer",
        f'while [ "$1" != "$PWD/image.sif" ]; do shift; done; shift\nPATH={sys.prefix}/bin:$PATH exec "$@"',
    )
    (site.folder / "image.sif").touch()
    script = site.folder / "slurm" / "stage1.sh"
    script.write_text(
        script.read_text().replace(f"ENVIRONMENT=venv:{sys.prefix}", "ENVIRONMENT=apptainer:image.sif")
    )
    done = site.chain("optim.stepz=3")
    assert done.returncode == 2 and "did you mean 'optim.steps'" in done.stderr and site.submitted == []


# --- what other programs print ---------------------------------------------------------------------------------------------


def test_what_modules_and_profiles_print_is_no_stage(site):
    (site.folder / "mod/init").mkdir(parents=True)
    (site.folder / "mod/init/bash").write_text(
        'module() { echo "Loading $2 (remember to cite the centre)"; }\n'
    )
    (site.folder / "noise.sh").write_text("echo Welcome to the cluster\n")
    done = site.chain(
        "--stages=1",
        MODULES="cuda/12.4",
        MODULESHOME=str(site.folder / "mod"),
        BASH_ENV=str(site.folder / "noise.sh"),
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("stage")] == [
        f"stage 1 (alignment): job 101, log {site.folder}/slurm/logs/soundwave-1-101.log"
    ], done.stderr
    assert len((site.output / "slurm.jsonl").read_text().splitlines()) == 1


def test_a_banner_before_the_job_s_number_is_no_number(site):
    site.program(
        "sbatch",
        f'echo "--> Verifying valid submit host 3 (login3)...OK"\necho x >>{site.programs.parent}/calls\n'
        f'echo $((100 + $(wc -l <{site.programs.parent}/calls)))";cluster"',
    )
    done = site.chain("--stages=1,2")
    assert "cancel: scancel 101 102\n" in done.stdout and "--> Verifying" in done.stderr


LATE = (
    'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
)


def test_a_job_that_was_accepted_without_an_answer_is_found_in_the_queue(site):
    queue = site.folder.parent / "queue"
    site.program(
        "sbatch",
        f'for a in "$@"; do case $a in */stage[123].sh) script=$a ;; esac; done\n'
        f'n=$((101 + $(cat {queue} 2>/dev/null | wc -l))); echo "$n|$script --frozen x" >>{queue}\n{LATE}',
    )
    site.program("squeue", f'case "$*" in *%o*) cat {queue} ;; esac')
    done = site.chain("--stages=1,2")
    assert done.returncode == 0 and "cancel: scancel 101 102\n" in done.stdout, done.stderr


def test_a_chain_that_sbatch_refuses_is_given_up(site):
    """The jobs before it are cancelled; one that sbatch accepts later ends by itself."""
    site.program(
        "sbatch",
        'case "$*" in *stage2.sh*) echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac; echo 101',
    )
    done = site.chain()
    assert (
        done.returncode == 1
        and "sbatch refused stage 2" in done.stderr
        and site.noted("cancelled") == "101\n"
    )
    (frozen,) = (site.folder / "slurm/jobs").glob("chain-*")
    late = site.job("echo continued", "--frozen", str(frozen), "--place", "stage2", "--recipe", "x", "--")
    assert (
        late.returncode == 1
        and "gave up the chain of this job" in late.stderr
        and "continued" not in late.stdout
    )
    (frozen / "given-up").unlink()
    (frozen / "stage2.job").write_text("8\n")
    twice = site.job("echo continued", "--frozen", str(frozen), "--place", "stage2", "--recipe", "x", "--")
    assert twice.returncode == 1 and "job 8 was submitted in this one's place" in twice.stderr
    assert (
        "continued"
        in site.job(
            "echo continued",
            "--frozen",
            str(frozen),
            "--place",
            "stage2",
            "--recipe",
            "x",
            "--instead-of",
            "8",
            "--",
        ).stdout
    )


def test_display_settings_of_the_user_do_not_reach_slurm(site):
    site.program(
        "squeue",
        f'env | grep -E "^(SQUEUE|SCANCEL|SINFO|SACCT|SLURM_TIME)" >>{site.folder.parent}/seen; true',
    )
    done = site.chain(
        "--stages=1",
        SQUEUE_STATES="RUNNING",
        SQUEUE_FORMAT="%i",
        SQUEUE_PARTITION="x",
        SCANCEL_INTERACTIVE="1",
        SLURM_TIME_FORMAT="%s",
        SINFO_FORMAT="x",
        SACCT_FORMAT="x",
    )
    assert done.returncode == 0 and site.noted("seen") == "", done.stderr


def test_lines_of_a_chain_hold_no_terminal_escapes_and_can_be_pasted(site):
    recipe = site.folder / "recipes/stage1.yaml"
    recipe.write_text(recipe.read_text().replace("output: runs/test", 'output: "runs/a \\e[31mb"'))
    done = site.chain("--stages", "1")
    assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr  # such a name is refused
    assert "output is 'runs/a \\x1b[31mb': give a name" in done.stderr and site.submitted == []
    recipe.write_text(recipe.read_text().replace('output: "runs/a \\e[31mb"', "output: runs/test"))
    done = site.chain("--stages", "1", "output=runs/with 'quotes' $(id)")
    command = next(line for line in done.stdout.splitlines() if "train.status" in line)
    assert shlex.split(command)[-1] == "runs/with 'quotes' $(id)"


def test_a_line_of_the_state_file_is_json_whatever_it_quotes(site):
    text = 'a "quoted" \\ back\\slash\nnew line\ttab \x1b[31m red'
    done = site.job('event started "$TEXT"', TEXT=text)
    assert done.returncode == 0 and site.lines()[-1]["detail"] == text.replace("\x1b", " "), done.stderr


# --- frozen copies -----------------------------------------------------------------------------------------------------------


BASES = [
    ('"stage1.yaml"', None),
    ("'stage1.yaml'  # ours", None),
    ("my first stage.yaml   # ours", None),
    ('"my first stage.yaml"', None),
    ("'it''s one.yaml'", None),
    ('"say \\"one\\".yaml"', None),
    ("a#b.yaml", None),
    ("null", None),
    ("/tmp/other.yaml", "is an absolute path"),
    ("../../other.yaml", "lies on the other side of"),
    ("nowhere.yaml", "does not exist"),
    ("stage2.yaml", "is based on this recipe itself"),
    ("[stage1.yaml]", "write base: FILE on one line"),
]


def test_the_recipes_that_a_recipe_is_based_on_are_frozen_with_it(site):
    names = ["my first stage.yaml", "it's one.yaml", 'say "one".yaml', "a#b.yaml"]
    for name in names:
        shutil.copy(site.folder / "recipes/stage1.yaml", site.folder / "recipes" / name)
    (site.folder.parent / "other.yaml").touch()
    for base, words in BASES:
        site.recipe("shrinking", 2, f"base: {base}\n")
        shutil.rmtree(site.folder / "frozen/recipes", ignore_errors=True)
        done = site.call('freeze "$PWD/frozen" recipes/stage2.yaml')
        assert (done.returncode == 0) == (words is None) and (words or "") in done.stderr, (base, done.stderr)
        if words is None:
            assert done.stdout.strip() == str(site.folder / "frozen/recipes/stage2.yaml")
            frozen = [
                name for name in ["stage1.yaml", *names] if (site.folder / "frozen/recipes" / name).exists()
            ]
            assert len(frozen) == (base != "null")
            if frozen:
                assert (
                    load_recipe(site.folder / "frozen/recipes/stage2.yaml").stage == "shrinking"
                )  # reads the same base


def test_half_a_copy_of_the_code_is_no_copy(site):
    site.program(
        "tar", '[ "$1" != -xf ] || [ -e extracted ] || { touch extracted; exit 1; }\nexec /usr/bin/tar "$@"'
    )
    done = site.call('RECIPE=$(freeze "$PWD/frozen" recipes/stage1.yaml)\necho on')
    assert done.returncode == 1 and "no frozen copy" in done.stderr and not (site.folder / "frozen").exists()


def test_a_plain_job_keeps_to_its_copy_over_restarts_and_a_new_job_of_the_same_number_does_not(site):
    common = site.folder / "slurm/common.sh"
    assert site.job("echo first").stdout.endswith("first\n")
    common.write_text(
        common.read_text().replace(
            "# read_contract ARGUMENTS:", "edited() { :; }\n# read_contract ARGUMENTS:"
        )
    )
    asked = "type edited >/dev/null 2>&1 && echo edited || echo frozen"
    site.facts(restarts=1)
    assert site.job(asked).stdout.endswith("frozen\n")
    site.facts(restarts=0)  # Slurm's database was made anew
    done = site.job(asked)
    assert done.stdout.endswith("edited\n") and list((site.folder / "slurm/jobs").glob("7-until-*")), (
        done.stderr
    )


def test_a_copy_that_was_deleted_stops_the_job(site):
    assert (
        "needs a new submission" in site.shell("bash", "slurm/stage1.sh", "--frozen", "/nowhere", "--").stderr
    )
    script = 'run=$(declare -f run_stage); OUTPUT=$PWD/runs/test STAGE=alignment; mkdir -p "$OUTPUT"; event started ""'
    assert site.job(script).returncode == 0
    shutil.rmtree(site.folder / "slurm/jobs/7")
    site.facts(restarts=1)
    (site.folder / "slurm/stage1.sh").write_text((site.folder / "slurm/stage1.sh").read_text())
    spool = site.folder.parent / "spool/slurm_script"
    spool.write_text((site.folder / "slurm/stage1.sh").read_text())
    done = site.shell(
        "bash",
        str(spool),
        SLURM_JOB_ID="7",
        SLURM_JOB_NAME="x",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_TASKS_PER_NODE="2(x2)",
        RECIPE="recipes/stage1.yaml",
    )
    assert (
        done.returncode == 2 and "the frozen copy of this job" in done.stderr and "was deleted" in done.stderr
    ), done.stdout + done.stderr


# --- in a job: whose variables count -----------------------------------------------------------------------------------------


def test_variables_of_other_jobs_and_launchers_count_for_nothing(site):
    leaked = {
        "SLURM_RESTART_COUNT": "5",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_MEM_PER_CPU": "1",
        "SLURM_DISTRIBUTION": "cyclic",
        "SLURM_CPU_BIND": "map_cpu:0",
        "SLURM_NTASKS_PER_NODE": "9",
        "SLURM_CPUS_PER_TASK": "9",
        "SLURM_GPUS_ON_NODE": "9",
        "SLURM_HINT": "nomultithread",
        "SLURM_EXIT_ERROR": "3",
        "SLURM_JOB_END_TIME": "1",
        "SLURM_STEP_NUM_TASKS": "1",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "PET_NNODES": "4",
        "MASTER_PORT": "1",
        "SBATCH_MEM_BIND": "x",
        "SRUN_CPUS_PER_TASK": "9",
        "SOUNDWAVE_RESTARTS": "7",
        "SOUNDWAVE_CODE": "/nowhere",
        "OPTIONS": "--x",
    }
    done = site.job(
        "env; echo FACTS $RESTARTS $TASKS $CPUS $GPUS =$ARRAY_TASK= ${#OPTIONS[@]} $SOUNDWAVE_RANKS", **leaked
    )
    assert "FACTS 0 2 2 2 == 0 4\n" in done.stdout, done.stdout + done.stderr
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert not {
        name: environment[name]
        for name in leaked
        if environment.get(name) == leaked[name] and name != "OPTIONS"
    }
    assert (
        23 * 3600
        < int(environment["SLURM_JOB_END_TIME"]) - os.stat(site.folder / "slurm/jobs/7").st_mtime
        <= 24 * 3600
    )


def test_an_option_that_the_script_asks_for_keeps_its_variable(site, tmp_path):
    script = site.folder / "slurm/common.sh"
    done = site.job("env", SLURM_HINT="nomultithread", SLURM_GPU_BIND="none")
    assert "SLURM_HINT" not in done.stdout
    keep = "OPTIONS=(--hint=nomultithread); export SLURM_HINT=nomultithread SLURM_CPU_BIND=x; keep_own_variables; env | grep ^SLURM_"
    assert (
        "SLURM_HINT=nomultithread" in site.call(keep).stdout
        and "CPU_BIND" not in site.call(keep).stdout
        and script.exists()
    )


@pytest.mark.parametrize("limit", ["UNLIMITED", "Partition_Limit", "2026-01-01T00:00:00"])
def test_an_unknown_end_of_the_job_is_none(site, limit):
    site.facts(limit=limit)
    done = site.job('echo "=${SLURM_JOB_END_TIME:-}="', SLURM_JOB_END_TIME="17")
    assert done.stdout.strip().endswith("=="), done.stdout + done.stderr
    site.program(
        "scontrol",
        '[ "$2" != hostnames ] || { echo n1; echo n2; exit; }; echo slurm_load_jobs error: Unexpected message; exit 1',
    )
    done = site.job('echo "=${SLURM_JOB_END_TIME:-}="')
    assert done.stdout.strip().endswith("==") and "its time limit is not known" in done.stdout, (
        done.stdout + done.stderr
    )


def test_tasks_that_are_not_spread_evenly_are_refused(site):
    done = site.job("true", SLURM_TASKS_PER_NODE="2,1")
    assert done.returncode == 2 and "give --ntasks-per-node" in done.stderr


@pytest.mark.parametrize(
    "gres, visible, refused",
    [
        ("(null)", "0", True),
        ("(null)", "0,1", False),
        ("(null)", "", False),
        ("gpu:4", "0", False),
        ("gpu:a100:4", "0,1", False),
    ],
)
def test_a_gpu_list_of_another_job_is_refused(site, gres, visible, refused):
    site.facts(gres=gres)
    done = site.job("check_visible_gpus; echo on", CUDA_VISIBLE_DEVICES=visible)
    assert ("on\n" in done.stdout) != refused and ("names 1 GPUs for 2 tasks" in done.stderr) == refused, (
        done.stderr
    )


def test_a_wrapper_s_banner_is_no_node(site):
    scontrol = (site.programs / "scontrol").read_text()
    (site.programs / "scontrol").write_text(
        scontrol.replace("echo n1; echo n2", "echo Welcome; echo 'to the cluster'; echo n1; echo n2")
    )
    assert "n1 n2 =n1=" in site.job('echo "$SOUNDWAVE_NODES=$MASTER_ADDR="').stdout
    (site.programs / "scontrol").write_text(scontrol.replace("echo n1; echo n2", "exit 1"))
    done = site.job("true")
    assert done.returncode == 1 and "does not name 2 nodes" in done.stderr


def test_settings_that_sbatch_kept_back_are_said(site):
    assert (
        "RECIPE and other settings of the environment have not come here"
        in site.job("true", SLURM_EXPORT_ENV="NONE").stdout
    )
    assert "have not come here" not in site.job("true", SLURM_EXPORT_ENV="ALL,A=1").stdout


@pytest.mark.parametrize(
    "tasks, words", [("3", "srun started 3 tasks, but this job has 4"), ("4", "rank 1 of 4 local 1 of 2")]
)
def test_a_rank_takes_its_number_from_its_step_and_the_count_must_be_the_job_s(site, tasks, words):
    (site.folder / "rank.py").write_text(
        "import os\nprint('rank {RANK} of {WORLD_SIZE} local {LOCAL_RANK} of {LOCAL_WORLD_SIZE}'.format(**os.environ))\n"
    )
    done = site.job(
        "export SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=$TASKS_OF_STEP RANK=0 WORLD_SIZE=1\n"
        'bash "$CODE/slurm/common.sh" worker rank.py',
        TASKS_OF_STEP=tasks,
    )
    assert words in done.stdout and done.returncode == (0 if tasks == "4" else 2), done.stdout + done.stderr


def test_rank_0_must_run_where_the_others_look_for_it(site):
    done = site.job(
        "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=4 SLURMD_NODENAME=n2\n"
        'bash "$CODE/slurm/common.sh" worker rank.py'
    )
    assert done.returncode == 2 and "rank 0 runs on n2, but the others look for it on n1" in done.stdout


def test_signals_while_a_rank_s_end_is_noted_do_not_change_its_code(site):
    """bash 5.2 runs a trap in the middle of parsing, and then ends with a syntax error."""
    (site.folder / "end.py").write_text(
        "import os, signal, time\nparent = os.getppid()\nif os.fork() == 0:\n    for _ in range(300):\n"
        "        time.sleep(0.0003)\n        os.kill(parent, signal.SIGTERM)\n    os._exit(0)\n"
        "time.sleep(0.02)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = site.job(
        "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=4 STOPS_AT_WARNING=1\nfor _ in 1 2 3 4 5; do\n"
        'bash "$CODE/slurm/common.sh" worker end.py >/dev/null || echo "ended $?"\n'
        'cut -d " " -f 1 "$JOB/exit.0"; rm "$JOB/exit.0"; done'
    )
    assert done.stdout.splitlines()[-10:] == ["ended 143", "143"] * 5, done.stdout + done.stderr


def test_a_warning_between_two_steps_reaches_the_second_one(site):
    site.program(
        "srun",
        "trap 'echo caught it; exit 0' USR1\nfor _ in {1..60}; do /bin/sleep 0.3; done; echo missed it",
    )
    done = site.job("STOP_FILE=$PWD/out/STOP WARNED=1; command -p sleep 0.1; step --ntasks=1; ls out")
    assert "STOP" in done.stdout.splitlines() and "missed it" not in done.stdout, done.stdout + done.stderr


# --- after a step ------------------------------------------------------------------------------------------------------------


def test_a_new_job_in_this_one_s_place_is_of_the_same_kind(site):
    """Where a site does not requeue: options go along, folders of the dead job's own disk and what was waited for do not."""
    site.facts(
        memory="MinMemoryNode=2000M",
        tres="TresPerTask=gres:gpu:a100:1",
        requeue=0,
        log=site.folder / "mine 7-7.log",
    )
    site.program("sacct", 'echo "sbatch --signal=B:USR1@120 slurm/stage1.sh"')
    done = site.job(
        'export LOCAL_DISK; OPTIONS=(--qos=low --begin=now+1hour --dependency=afterok:3 "--comment=x y"); RESTARTS=4 STOPS=3\n'
        'start_again stop "stopped in time"',
        SLURM_TMPDIR="/scratch/job.7",
        A="1 2",
    )
    assert done.returncode == 85 and "submitted as job 101" in done.stdout, done.stdout + done.stderr
    (arguments,) = site.submitted
    options = arguments[: arguments.index(str(site.folder.parent / "spool/slurm_script"))]
    assert {
        "--mem=2000M",
        "--gpus-per-task=a100:1",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--constraint=a100",
        "--exclude=bad[1-2]",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=2",
        "--no-requeue",
        "--signal=B:USR1@120",
        "--qos=low",
        f"--output={site.folder}/mine 7-%j.log",
        f"--chdir={site.folder}",
    } <= set(options), options
    assert options[-1] == "--comment=x y" and "--comment=a b=c Restarts=9" in options
    assert not [
        o
        for o in options
        if o.startswith(("--begin", "--dependency", "--error", "--nodelist", "--exclusive"))
    ]
    contract = arguments[len(options) + 1 :]
    assert (
        contract[:2] == ["--frozen", str(site.folder / "slurm/jobs/7")]
        and contract[contract.index("--stops") + 1] == "4"
    )
    assert contract[contract.index("--instead-of") + 1] == "7"
    environment = site.environment(101)
    assert "A=1 2\n" in environment and "LOCAL_DISK" not in environment and "SLURM_" not in environment
    assert [(event["job"], event["event"]) for event in site.lines()[-3:]] == [
        ("7", "requeued"),
        ("7", "resubmitted"),
        ("101", "submitted"),
    ]


@pytest.mark.parametrize(
    "tres, script, option",
    [
        ("TresPerNode=gres:gpu:a100:2", "", "--gres=gpu:a100:2"),
        ("TresPerNode=gres/gpu:a100=2", "", "--gres=gpu:a100:2"),
        ("TresPerNode=gres:gpu:a100:2", "#SBATCH --gpus-per-node=8\n", "--gpus-per-node=a100:2"),
        ("TresPerJob=gres:gpu:4", "", "--gpus=4"),
        ("MemPerTres=gres:gpu:100", "", "--mem-per-gpu=100"),
    ],
)
def test_gpus_are_asked_for_as_before(site, tres, script, option):
    site.facts(tres=tres)
    done = site.job(
        f'printf "{script.strip()}\\n" >>"$0"\nsame_options; printf "%s\\n" "${{SAME_OPTIONS[@]}}"'
    )
    assert option in done.stdout.splitlines(), done.stdout + done.stderr
    assert ("--mem=0" in done.stdout.splitlines()) == ("MemPerTres" not in tres)


@pytest.mark.parametrize("left, signal", [(1700, "B:USR1@1700"), (250, "B:USR1@250"), (640, ""), (80000, "")])
def test_a_warning_of_the_command_line_is_asked_for_again(site, left, signal):
    """The script asks for 600 seconds. Slurm does not show what it was asked for; when it came tells."""
    done = site.job(f'WARNING=USR1 WARNED_AT=$((END - {left})); echo "=$(warning_asked_for)="')
    assert f"={signal}=" in done.stdout, done.stdout + done.stderr


def test_of_jobs_that_wait_only_our_own_part_is_replaced(site):
    site.program(
        "squeue",
        """case "$*" in *PENDING*) printf '%s\\n' '3 afterok:7(unfulfilled),afterok:8(unfulfilled)' \
        '4 afterok:17(unfulfilled)' '5 after:7+10(unfulfilled)?afterany:77(failed)' \
        '6_[1-3] afternotok:7(unfulfilled)' '9 (null)' ;; esac""",
    )
    assert site.job('start_again stop "stopped in time"').returncode == 85
    assert [line for line in site.noted("asked").splitlines() if line.startswith("update")] == [
        "update JobId=3 Dependency=afterok:101,afterok:8",
        "update JobId=5 Dependency=after:101+10?afterany:77",
        "update JobId=6_[1-3] Dependency=afternotok:101",
    ]


@pytest.mark.parametrize(
    "error",
    [
        "Socket timed out on send/recv operation",
        "Slurm temporarily unable to accept job, sleeping and retrying",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_a_busy_controller_and_a_limit_on_jobs_are_waited_for_but_not_twice_submitted(site, error):
    took = site.programs.parent / "took"
    busy = f'{{ echo "sbatch: error: {error}" >&2; exit 1; }}'
    site.program("sbatch", f"echo x >>{took}; [ $(wc -l <{took}) -gt 2 ] || {busy}\necho 103")
    done = site.job('start_again stop "stopped in time"')
    assert done.returncode == 85 and "submitted as job 103" in done.stdout, done.stdout + done.stderr
    took.unlink()
    spool = site.folder.parent / "spool/slurm_script"
    site.program(
        "squeue",
        f'case "$*" in *%o*) echo "7|{spool} --frozen"; echo "101|{spool} --frozen"; echo "102|{spool}x" ;; esac',
    )
    done = site.job('start_again stop "stopped in time"')
    assert done.returncode == 85 and "submitted as job 101" in done.stdout and took.read_text() == "x\n", (
        done.stdout + done.stderr
    )


def test_a_refusal_is_not_repeated(site):
    took = site.programs.parent / "took"
    site.program("sbatch", f'echo x >>{took}; echo "sbatch: error: invalid partition" >&2; exit 1')
    done = site.job('start_again stop "stopped in time"')
    assert (
        done.returncode == 1
        and "sbatch does not accept a new job" in done.stderr
        and took.read_text() == "x\n"
    )


def test_a_disk_that_takes_no_line_costs_neither_a_requeue_nor_a_finished_stage(site):
    (site.folder.parent / "requeues").touch()
    for code, ended in ((0, 0), (85, 85)):
        full = "rm -f out/slurm.jsonl; ln -sf /dev/full out/slurm.jsonl\n"
        assert "takes no line" in site.job(full + f"finish {code}").stdout
        done = site.job(full + f"exec >/dev/full; finish {code}")
        assert done.returncode == ended, done.stderr
        done = site.job(full + f"exec >/dev/full 2>&1; finish {code}")
        assert done.returncode == ended
    assert site.noted("asked").splitlines() == ["requeue 7"] * 3


@pytest.mark.parametrize("folder, code", [("", 85), ("out", 85), ("", 0), ("", 1)])
def test_an_exit_code_that_cannot_be_noted_in_the_job_s_folder_is_not_lost(site, folder, code):
    """The job's folder is full; the stage's is another one's, or full too: then the code itself tells."""
    script = (
        "JOB=/proc/1 STEP_FOLDER=$WHERE\n"
        "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=4\n"
        'bash -c "sleep() { :; }; export -f sleep; exec bash $CODE/slurm/common.sh worker end.py" && echo ended 0 \\\n'
        "    || echo ended $?\n"
        "judge 0; echo judged $CODE_OF_STEP"
    )
    (site.folder / "end.py").write_text(f"raise SystemExit({code})\n")
    done = site.job(script, WHERE=folder)
    ended = 0 if folder or code == 0 else code
    assert f"ended {ended}\n" in done.stdout, done.stdout + done.stderr
    assert f"judged {85 if folder else 0}\n" in done.stdout


def test_a_stop_file_of_an_earlier_run_does_not_keep_a_preempted_job_from_its_requeue(site):
    script = (
        'mkdir -p out/alignment; echo \'"reason": "STOP file on rank 0"\' >out/alignment/run.json\n'
        "start_again() { echo again; exit 0; }\n"
    )
    assert site.job(script + "finish 85").stdout.strip().endswith("again"), (
        "in the preflight, or while shards are copied"
    )
    assert "as its STOP file asked" in site.job(script + "STOP_FILE=out/alignment/STOP; finish 85").stdout


@pytest.mark.parametrize(
    "preempted, restarts, state, code, words",
    [
        ("2026-01-01T00:00:00", 0, "PREEMPTED", 85, "submitted as job 101"),  # PreemptMode=CANCEL
        ("2026-01-01T00:00:00", 0, "COMPLETING", 137, "submitted as job 101"),  # without grace
        ("None", 0, "COMPLETING", 85, "Slurm ends this job (COMPLETING)"),  # scancel
        (
            "None",
            1,
            "COMPLETING",
            85,
            "put this job back into the queue",
        ),  # PreemptMode=REQUEUE, scontrol requeue
    ],
)
def test_a_job_that_slurm_ends_is_submitted_again_only_after_a_preemption(
    site, preempted, restarts, state, code, words
):
    script = (
        f'sed -i "s/PreemptTime=.*/PreemptTime={preempted}/; s/JobState=RUNNING/JobState={state}/" ../facts\n'
    )
    script += f'sed -i "s/Restarts=0/Restarts={restarts}/" ../facts\n'
    done = site.job(script + f"finish {code}")
    assert done.returncode == 85 and words in done.stdout and len(site.submitted) == ("submitted" in words), (
        done.stdout + done.stderr
    )
    if restarts:
        stop = site.folder / "slurm/jobs/7/stop.1"
        assert not stop.exists(), "an administrator's requeue counts as a fault"
        site.facts()
        site.job(
            script + f'SRUN_WORDS="*** STEP 7.0 ON n1 CANCELLED AT 2026 DUE TO PREEMPTION ***"\nfinish {code}'
        )
        assert stop.exists(), "a preemption that saved does not"


def test_a_job_that_is_cancelled_while_it_asks_for_its_requeue_stays_cancelled(site):
    facts = site.folder.parent / "facts"
    site.program("requeue", f"sed -i s/JobState=RUNNING/JobState=COMPLETING/ {facts}; exit 1")
    scontrol = (site.programs / "scontrol").read_text()
    (site.programs / "scontrol").write_text(
        scontrol.replace("requeue*)", f"requeue*) {site.programs}/requeue; exit 1 ;; no)")
    )
    done = site.job('start_again stop "stopped in time"')
    assert (
        done.returncode == 85 and "Slurm ends this job (COMPLETING)" in done.stdout and site.submitted == []
    ), done.stderr


def test_restarts_that_saved_are_counted_apart_from_faults(site):
    """Slurm's own requeues (dead nodes, an administrator) are faults; a saved stop leaves a note."""
    site.facts(restarts=5)
    job = site.folder / "slurm/jobs/7"
    (job / "code/slurm").mkdir(parents=True)
    shutil.copytree(
        site.folder / "slurm",
        job / "code/slurm",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("jobs", "logs"),
    )
    for number in (1, 2, 4):
        (job / f"stop.{number}").touch()
    counted = site.job(
        'echo "$RESTARTS $STOPS $FAULTS"; limit_restarts "$STOPS" "$FAULTS" x; echo on', MAX_RESTARTS="2"
    )
    assert counted.stdout.endswith("5 3 2\non\n"), counted.stdout + counted.stderr
    for limits, words in (
        ({"MAX_RESTARTS": "1"}, "(MAX_RESTARTS)"),
        ({"MAX_PREEMPTIONS": "2"}, "(MAX_PREEMPTIONS)"),
    ):
        done = site.job('limit_restarts "$STOPS" "$FAULTS" "Slurm has started this job again"', **limits)
        assert done.returncode == 1 and words in done.stderr and site.lines()[-1]["event"] == "failed"


NODES = 'case "$*" in *"%T"*) echo "n1|mixed|none"; echo "n2|{state}|{reason}" ;; esac'


@pytest.mark.parametrize(
    "state, full, one, dead",
    [
        ("down*", 0, 0, "n2 is down* (Not responding)"),
        ("mixed", 0, 0, None),
        ("draining", 0, 0, None),
        ("mixed", 1, 0, "one does not answer"),  # Slurm has not noticed yet
        ("mixed", 1, 1, None),  # srun refuses this node too, which is alive: a configuration
    ],
)
def test_a_dead_node_differs_from_an_srun_that_refuses(site, state, full, one, dead):
    site.program("sinfo", NODES.format(state=state, reason="Not responding"))
    site.program(
        "srun",
        f'case "$*" in *nodelist*) exit {one} ;; esac; echo "srun: error: Unable to create step" >&2; exit {full}',
    )
    done = site.job('if nodes_fail; then echo "dead: $FAULT_OF_NODE"; else echo alive; fi')
    assert (f"dead: {dead}" if dead else "alive\n") in done.stdout, done.stdout + done.stderr


WORDS = {
    "killed": [
        "srun: error: n2: task 3: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=1.0",
        "srun: error: n1: tasks 0-1: Terminated",
    ],
    "oom": [
        "slurmstepd-n2: error: Detected 1 oom_kill event in StepId=1.0",
        "srun: error: n2: task 2: Out Of Memory",
        "srun: error: n1: task 0: Exited with exit code 1",
    ],
    "exit": ["srun: error: n1: tasks 0-1: Exited with exit code 1", "srun: error: n2: task 2: Killed"],
    "term": [
        "slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED ***",
        "srun: error: n2: tasks 2-3: Terminated",
        "srun: error: n1: tasks 0-1: Exited with exit code 143",
    ],
    "refused": [
        "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive."
    ],
    "none": [],
}


@pytest.mark.parametrize(
    "words, noted, launcher, status, culprit",
    [
        (
            "killed",
            {0: 143, 1: 143, 2: 143},
            "srun",
            137,
            "exit code 137 of rank 3 on n2 (killed: out of memory?)",
        ),
        (
            "killed",
            {0: 137, 1: 137},
            "srun",
            137,
            "exit code 137 of rank 3 on n2",
        ),  # f_real: the others' shells noted that they were killed
        ("oom", {0: 1, 1: 143}, "srun", 1, "exit code 137 of rank 2 on n2 (killed: out of memory)"),
        ("exit", {0: 1, 1: 1, 2: 137}, "srun", 137, "exit code 1 of rank 1 on n1"),  # noted before rank 0
        ("none", {0: 1, 3: 139, 1: 143}, "torchrun", 1, "exit code 139 of rank 3 on n"),
        ("none", {0: 137, 1: 143}, "torchrun", 1, "exit code 137 of rank 0"),
        ("term", {0: 143, 1: 143}, "srun", 143, ""),
        ("refused", {}, "srun", 1, ""),
    ],
)
def test_the_rank_that_failed_first_is_named(site, words, noted, launcher, status, culprit):
    order = {0: 9, 1: 5, 2: 8, 3: 4}
    notes = "".join(
        f'echo "{code} {order[rank]}.0 n{1 + rank // 2}" >"$JOB/exit.{rank}"\n'
        for rank, code in noted.items()
    )
    lines = shlex.quote("\n".join(WORDS[words]))
    done = site.job(
        f'{notes}SRUN_WORDS={lines} LAUNCHER={launcher}\njudge {status}; echo "culprit: $CULPRIT"; echo "code: $CODE_OF_STEP"'
    )
    assert f"culprit: {culprit}" in done.stdout and f"code: {status}\n" in done.stdout, (
        done.stdout + done.stderr
    )
    if not culprit:
        assert "culprit: \n" in done.stdout
    if words == "refused":
        done = site.job(f"SRUN_WORDS={lines}\njudge 1; finish 1")
        assert (
            done.returncode == 1
            and "srun refuses the step (fatal: SLURM_MEM_PER_CPU" in done.stderr
            and "requeue" not in done.stdout
        )
    if words in ("killed", "term"):  # packing and evaluation, which have nothing to save
        done = site.job(
            f"{notes}SRUN_WORDS={lines} STOPS_AT_WARNING=1\njudge {143 if words == 'term' else status}\n"
            'echo "code: $CODE_OF_STEP"'
        )
        assert f"code: {85 if words == 'term' else 137}\n" in done.stdout


@pytest.mark.parametrize(
    "words, calls, code",
    [
        (
            "srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)",
            3,
            0,
        ),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", 1, 1),
        ("srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure", 1, 1),
    ],
)
def test_a_step_waits_for_a_controller_that_does_not_answer(site, words, calls, code):
    called = site.folder.parent / "called"
    site.program(
        "srun", f'echo x >>{called}; [ $(wc -l <{called}) -lt 3 ] || exit 0; echo "{words}" >&2; exit 1'
    )
    done = site.job('launch "" program.py; echo "code $CODE_OF_STEP"')
    assert f"code {code}\n" in done.stdout and len(called.read_text().splitlines()) == calls, (
        done.stdout + done.stderr
    )


def test_a_port_that_is_taken_is_named_and_the_next_one_used(site):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = site.job(f'MASTER_PORT={port}; choose_port; echo "port $MASTER_PORT"')
    assert (
        f"port {port} of n1 is taken by another program: using" in done.stdout
        and f"port {port}\n" not in done.stdout
    ), done.stderr
    free = site.job(f'MASTER_PORT={port}; choose_port; echo "port $MASTER_PORT"')
    assert f"port {port}\n" in free.stdout


def test_a_stage_that_another_job_trains_is_left_to_it(site):
    script = 'EVENT_JOB=6 event started ""; EVENT_JOB=5 event started ""; EVENT_JOB=5 event "done" ""; alone; echo on'
    assert site.job(script).stdout.strip().endswith("on")
    site.program("squeue", 'case "$*" in *"-j 6 -t RUNNING"*) echo 6 ;; *"-j 5"*) echo 5 ;; esac')
    done = site.job(script)
    assert done.returncode == 2 and "job 6 is training alignment in" in done.stderr
    assert site.job(script.replace("alone;", "SLURM_JOB_ID=6; alone;")).returncode == 0, (
        "itself, started again"
    )
    assert site.job(script.replace("alone;", "STAGE=shrinking; alone;")).returncode == 0


@pytest.mark.parametrize(
    "began, ends, options, code",
    [
        (5, 595, "", 2),  # --time=10 and the script's 600 s: no start would ever train
        (700, 600, "", 85),
        (5, 50000, "", 85),  # a preemption that sends the same signal
        (5, 295, "--signal=B:USR1@300", 2),
        (5, 595, "--signal=B:USR1@300", 85),
    ],
)
def test_a_time_limit_that_the_warning_fills_ends_the_job(site, began, ends, options, code):
    done = site.job(
        f'finish() {{ exit "$1"; }}\nWARNED=1 WARNING=USR1 CODE_OF_STEP=0 BEGAN=$(($(date +%s) - {began}))\n'
        f"END=$(($(date +%s) + {ends})); OPTIONS=({options})\nnext_step"
    )
    assert done.returncode == code, done.stderr
    assert ("give --time more than twice" in done.stderr) == (code == 2)


def test_an_interactive_run_is_not_requeued_and_takes_the_code_and_recipe_of_its_moment(site):
    run = "source slurm/common.sh; RECIPE_LINE=recipes/stage1.yaml; prepare; echo $CODE; cat $RECIPE; {}"
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "interactive",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "ENVIRONMENT": f"venv:{sys.prefix}",
    }
    first = site.shell("bash", "-c", run.format("true"), **job)
    site.recipe("alignment", 1, "data: {train: [{shards: edited}]}\n")
    second = site.shell("bash", "-c", run.format('start_again stop "stopped in time"'), **job)
    assert "shards: none" in first.stdout and "shards: edited" in second.stdout, first.stderr + second.stderr
    assert (
        second.returncode == 1
        and "the same command again continues" in second.stderr
        and site.noted("asked") == ""
    )


# --- packing and evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_knows_its_job_over_restarts(site):
    """By which --restart throws away what was there before, and not what the job itself has answered."""
    script = site.folder.parent / "spool/slurm_script"
    script.parent.mkdir()
    script.write_text(
        (site.folder / "slurm/evaluate.sh")
        .read_text()
        .replace("run_resumable -m", "echo $SOUNDWAVE_JOB; : run_resumable -m")
    )
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "e",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_TASKS_PER_NODE": "2(x2)",
    }
    assert site.shell("bash", str(script), "--model", "x", SOUNDWAVE_JOB="3", **job).stdout.endswith("\n7\n")
    frozen = ["--frozen", str(site.folder / "slurm/jobs/7"), "--first-job", "5", "--"]
    assert site.shell("bash", str(script), *frozen, "--model", "x", **job).stdout.endswith("\n5\n")


def test_a_part_of_an_array_is_not_submitted_alone(site):
    done = site.job('PLACE=part ARRAY_TASK=3; start_again stop "stopped in time"')
    assert (
        done.returncode == 1
        and "run the same slurm/pack.sh command again" in done.stderr
        and site.submitted == []
    )


@pytest.mark.parametrize(
    "arguments, options, program",
    [
        (["--manifest", "a -- b.jsonl", "--out", "d"], [], ["--manifest", "a -- b.jsonl", "--out", "d"]),
        (
            ["--time=1:00", "--", "--manifest", "a -- b.jsonl", "--out=d"],
            ["--time=1:00"],
            ["--manifest", "a -- b.jsonl", "--out=d"],
        ),
        (
            ["--manifest", 'my "$(id)" m.jsonl', "--out", "out dir/*"],
            [],
            ["--manifest", 'my "$(id)" m.jsonl', "--out", "out dir/*"],
        ),
    ],
)
def test_arguments_of_packing_go_through_as_they_are(site, arguments, options, program):
    done = site.shell("bash", "slurm/pack.sh", *arguments, SLURM_JOB_ID="999")
    assert done.returncode == 0 and len(site.submitted) == 2, done.stderr
    for given, place in zip(site.submitted, ("part", "merge"), strict=True):
        assert given[given.index("--place") :] == ["--place", place, "--", *program] and set(options) <= set(
            given
        )


def test_packing_without_a_folder_is_refused(site):
    done = site.shell("bash", "slurm/pack.sh", "--manifest", "x --out y", "a --out=b")
    assert done.returncode == 2 and "say what and where to" in done.stderr and site.submitted == []


def test_faults_of_many_ranks_are_lines_without_a_traceback(site, assets):
    """Rank 0 holds the store: it must not leave before the others have its answer."""
    assets.recipes(site.folder)
    port = str(20000 + os.getpid() % 10000)
    command = [
        sys.executable,
        "-m",
        "train.preflight",
        "recipes/stage2.yaml",
        "init_from=fresh",
        "model.llm.name=./nowhere",
    ]
    environment = {
        **os.environ,
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            command,
            cwd=site.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2, 2], told
    assert "model.llm" in told[0] and not any("Traceback" in text for text in told), told
