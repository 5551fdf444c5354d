"""CI fails on a skipped test that it could run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNEXPECTED = """
import pytest
def test_inside(): pytest.skip("needs a thing")
@pytest.mark.skipif(True, reason="needs another thing")
def test_marked(): pass
"""
EXPECTED = """
import pytest
def test_runs(): pass
@pytest.mark.skipif(True, reason="no CUDA GPU")
def test_on_a_gpu(): pass
"""
FILE = "import pytest\npytest.importorskip('no_such_package')\n"


@pytest.mark.parametrize("files, code", [([EXPECTED, UNEXPECTED, FILE], 1), ([EXPECTED], 0)])
def test_a_skip_that_is_not_expected_fails_in_ci(tmp_path, files, code):
    for number, text in enumerate(files):
        (tmp_path / f"test_{number}.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.ci_skips",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CI": "true", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == code, done.stdout
    for words in (
        "test_1.py::test_inside: needs a thing",
        "test_1.py::test_marked: needs another thing",
        "could not import",
    ):
        assert (words in done.stdout) == (code == 1)
    assert "test_on_a_gpu: " not in done.stdout
