"""Reports that are published name no folder of the machine that made them."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from benchmarks.machine import settings

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_settings_name_paths_relative_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(
        model=tmp_path / "runs" / "model",
        shards=str(tmp_path.parent / "elsewhere" / "test"),
        out=Path("report.json"),
        llm="owner/name",
        backends=["torch", "/opt/venv/python"],
        batches=[1, 8],
        limit=None,
    )
    assert settings(options) == {
        "model": "runs/model",
        "shards": "test",
        "out": "report.json",
        "llm": "owner/name",
        "backends": "[torch, python]",
        "batches": "[1, 8]",
        "limit": "None",
    }


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("file", sorted(RESULTS.iterdir()), ids=lambda file: file.name)
def test_no_published_result_holds_an_absolute_path(file):
    text = file.read_text()
    found = strings(json.loads(text)) if file.suffix == ".json" else text.splitlines()
    # A slash that begins a word, and a second one: "a / b" and "audio/s" are no paths.
    assert not [entry for entry in found if re.search(r"""(?:^|[\s"'=,(\[])/[\w.-]+/""", entry)]
