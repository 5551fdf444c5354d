"""`make test` on a fresh machine: tests of what an extra installs are skipped without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from core.repository import ROOT

FILES = (
    *("tests/serving", "tests/evaluation/test_demo.py", "tests/stream/test_object_stores.py"),
    *("tests/data_tools/test_upload.py", "tests/train/test_trackers.py"),
    *("tests/model/test_quantised.py", "tests/train/test_lora_variants.py"),
)


@pytest.mark.slow  # 40 s: the tests of seven places
def test_nothing_fails_without_the_extras():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.ci.without_extras",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-m", "not slow and not long and not gpu and not slurm", *FILES]
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    last = done.stdout.strip().splitlines()[-1]
    assert "skipped" in last and "passed" in last
