"""The scripts as text: what can be tested without Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
LIB = sorted((ROOT / "slurm/lib").glob("*.sh"))


def test_bash_and_shellcheck_find_nothing():
    assert len(LIB) > 3
    for script in [*SCRIPTS, *LIB]:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    shellcheck = [Path(sys.prefix) / "bin" / "shellcheck", "-x", *SCRIPTS]
    done = subprocess.run(shellcheck, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "\n#SBATCH" in path.read_text()], ids=lambda path: path.name
)
def test_every_option_stands_before_the_first_command(script):
    """sbatch stops reading #SBATCH lines at the first line that is neither a comment nor empty."""
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    output = re.search(r"(?m)^#SBATCH --output=(\S+)/", script.read_text()).group(1)
    assert (ROOT / output / ".gitignore").exists()  # a missing folder fails the job, without a word


def test_stages_differ_only_where_they_should():
    texts = [
        re.sub(r"Stage [123],.*", "", (ROOT / "slurm" / f"stage{n}.sh").read_text())
        .replace(f"stage{n}", "stageN")
        .replace(f"soundwave-{n}", "soundwave-N")
        for n in (1, 2, 3)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_busy_controller_is_asked_again_and_a_refusal_is_not(tmp_path):
    """A stand-in for `scontrol`: what it says comes from a file, a line a call."""
    (tmp_path / "scontrol").write_text(
        "#!/bin/bash\nread -r line <" + str(tmp_path / "answers") + f"; sed -i 1d {tmp_path / 'answers'}\n"
        'echo "asked" >>' + str(tmp_path / "calls") + '\necho -e "${line#* }"; exit "${line%% *}"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    busy = "1 slurm_load_jobs error: Socket timed out on send/recv operation\n"

    def answer(*lines: str) -> tuple[str, int]:
        (tmp_path / "answers").write_text("".join(lines))
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BUSY_SECONDS": "0.01", "SLURM_JOB_ID": "7"}
        ask = 'set -euo pipefail; source slurm/common.sh; said=$(job_field JobState); echo "=$said"'
        done = subprocess.run(
            ["bash", "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip(), len((tmp_path / "calls").read_text().splitlines())

    assert answer(busy, busy, "0 JobId=7 JobName=a\\n   JobState=RUNNING Reason=None\n") == ("=RUNNING", 3)
    assert answer("1 slurm_load_jobs error: Invalid job id specified\n", "0 JobState=RUNNING\n") == ("=", 1)
    assert answer(*[busy] * 20) == ("=", 8)


def test_conda_from_a_module_is_opened_from_a_shell_that_knows_neither(tmp_path):
    """Stand-ins for a site's `module` and conda, which read unset variables as the real ones do."""
    for folder in ("init", "bin", "etc/profile.d", "env"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "init" / "bash").write_text(
        f'module() {{ : $UNSET_BY_SITE; [ "$*" = "load forge/1" ] && PATH={tmp_path}/bin:$PATH; }}\n'
    )
    (tmp_path / "bin" / "conda").write_text(f'#!/bin/bash\n[ "$*" = "info --base" ] && echo {tmp_path}\n')
    (tmp_path / "bin" / "conda").chmod(0o755)
    (tmp_path / "etc/profile.d/conda.sh").write_text(
        f': $CONDA_UNSET\nconda() {{ [ "$*" = "activate speech" ] && PATH={tmp_path}/env:$PATH; }}\n'
    )

    def path(**settings: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": "/usr/bin:/bin",
            "MODULESHOME": str(tmp_path),
            "ENVIRONMENT": "conda:speech",
            **settings,
        }
        ask = 'set -euo pipefail; source slurm/common.sh; open_environment; echo "$PATH"; echo "$UNSET"'
        return subprocess.run(
            ["bash", "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    done = path(MODULES="forge/1")
    assert done.stdout.startswith(f"{tmp_path}/env:{tmp_path}/bin:"), done.stderr
    assert "UNSET: unbound variable" in done.stderr  # the scripts' own mistakes are found as before
    assert "module load forge/2 failed" in path(MODULES="forge/2").stderr
    assert "no conda on the PATH" in path().stderr
