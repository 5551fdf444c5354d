"""Messages are written for readers: no Python containers, no class names, one prefix for errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.console import shown

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "cli core data_tools evaluation examples install model recipe serving soundwave stream train".split()
)
#: Logs for operators with a traceback beside them, a message of one process to another, errors in a user's own code.
CLASS_NAMES = {"serving/engine.py", "soundwave/vllm_worker.py", "core/console.py", "core/plugins.py"}
PREFIXES = {"error", "warning", "note", "usage"}
CONTAINERS = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.Tuple


def printed(call: ast.Call) -> bool:
    """Return whether a call shows its arguments to users."""
    name = ast.unparse(call.func)
    return name in ("print", "print_error", "sys.exit", "SystemExit") or bool(
        re.match(r"(logger|log|logging|warnings)\.|(\w+\.)?error$", name)
    )


def messages(path: Path) -> Iterator[tuple[int, list[ast.expr]]]:
    """Yield (line, filled-in values) of each f-string in a raised, printed or logged message."""
    for node in ast.walk(ast.parse(path.read_text())):
        raised = isinstance(node, ast.Raise) and node.exc is not None
        if raised or (isinstance(node, ast.Call) and printed(node)):
            for text in ast.walk(node):
                if isinstance(text, ast.JoinedStr):
                    yield text.lineno, [v.value for v in text.values if isinstance(v, ast.FormattedValue)]


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_messages_show_no_python_containers():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {ast.unparse(value)}"
        for path in files()
        for line, values in messages(path)
        for value in values
        if isinstance(value, CONTAINERS) or re.match(r"(dict|set|frozenset|repr)\(", ast.unparse(value))
    ]
    assert found == []


def test_messages_name_no_classes():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {ast.unparse(value)}"
        for path in files()
        if str(path.relative_to(ROOT)) not in CLASS_NAMES
        for line, values in messages(path)
        for value in values
        if re.search(r"type\(.*\)\.__name__|__class__", ast.unparse(value))
    ]
    assert found == []


def test_errors_begin_with_the_same_word():
    found = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            to_stderr = any(ast.unparse(word.value) == "sys.stderr" for word in node.keywords)
            if name != "print_error" and not (name == "print" and to_stderr):
                continue
            first = node.args[0]
            first = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
            prefix = re.match(r"\n?([a-z][\w. -]*):( |$)", text)
            if prefix and prefix[1] not in PREFIXES:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text!r}")
    assert found == []


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        (True, "true"),
        ("a", "'a'"),
        (0.5, "0.5"),
        ([1, None], "[1, null]"),
        ({"asr": [1], "st": "x"}, "{asr: [1], st: 'x'}"),
        ((), "[]"),
        ("a\nb", "'a\\nb'"),
    ],
)
def test_values_are_shown_as_yaml(value, text):
    assert shown(value) == text


def test_long_values_are_cut():
    assert len(shown(list(range(1000)))) == 80 and shown(list(range(1000))).endswith(" ...")
