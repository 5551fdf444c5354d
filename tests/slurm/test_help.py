"""Every job script prints its help, wherever it is called, with an example that the real command lines accept."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from docs import command_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_has_an_example_that_parses(script, option):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [script, option], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    if script.name == "common.sh":  # not for users: the part that the others share
        return
    usage, _, example = done.stdout.partition("example: ")
    assert f"slurm/{script.name} " in usage
    command_lines.check(shlex.split(example))
    assert not [line for line in done.stdout.splitlines() if "#SBATCH" in line or len(line) > 140]


def test_every_executable_script_is_tested():
    scripts = {path for path in (ROOT / "slurm").rglob("*.sh") if os.access(path, os.X_OK)}
    assert {path for path in scripts if "jobs" not in path.parts} == set(SCRIPTS)
