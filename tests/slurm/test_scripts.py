"""The scripts as text: what can be said of them without Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def test_bash_and_shellcheck_find_nothing():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    shellcheck = [Path(sys.prefix) / "bin" / "shellcheck", "-x", *SCRIPTS]
    done = subprocess.run(shellcheck, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "#SBATCH" in path.read_text()], ids=lambda path: path.name)
def test_every_option_stands_before_the_first_command(script):
    """sbatch stops reading #SBATCH lines at the first line that is neither a comment nor empty."""
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    output = re.search(r"(?m)^#SBATCH --output=(\S+)/", script.read_text()).group(1)
    assert (ROOT / output / ".gitignore").exists()  # a missing folder fails the job, without a word


def test_stages_differ_only_where_they_should():
    texts = [re.sub(r"Stage I+,.*", "", (ROOT / "slurm" / f"stage{n}.sh").read_text()).replace(f"stage{n}", "stageN")
             .replace(f"soundwave-{n}", "soundwave-N") for n in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2]
