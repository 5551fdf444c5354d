"""serving stands above model and soundwave: it imports neither train nor evaluation, and nothing imports it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BELOW = {"core", "model", "soundwave", "serving"}
OURS = BELOW | {"data_tools", "recipe", "stream", "evaluation", "train", "examples", "benchmarks"}


def imported(path: Path) -> set[str]:
    """The project's packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found & OURS


def test_serving_imports_what_is_below_it():
    for path in (ROOT / "serving").glob("*.py"):
        assert imported(path) <= BELOW, path


def test_nothing_below_imports_serving():
    for package in OURS - {"serving", "benchmarks"}:
        for path in (ROOT / package).rglob("*.py"):
            assert "serving" not in imported(path), path
