"""examples/librispeech/run.sh to its end, on a generated tree in LibriSpeech's layout with tiny models.

The clips are tones. Speech is not in the tests' reach: CI has no download, and audio is never committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config import load_recipe
from tests.model import tiny
from tests.stream.conftest import sound

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "librispeech" / "run.sh"
SUBSETS = {
    "train-clean-100": 80,
    "train-clean-360": 40,
    "train-other-500": 40,
    "dev-clean": 10,
    "dev-other": 10,
    "test-clean": 10,
    "test-other": 10,
}
WORDS = "CHAPTER ONE MISSUS RACHEL LYNDE IS SURPRISED".split()


def write_tree(data: Path) -> Path:
    """Write LibriSpeech/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac with its transcripts, as the
    archives unpack: five clips a chapter, one chapter a speaker."""
    root = data / "LibriSpeech"
    speaker = 100
    for subset, clips in SUBSETS.items():
        for first in range(0, clips, 5):
            speaker += 1
            chapter = root / subset / str(speaker) / str(120000 + speaker)
            chapter.mkdir(parents=True)
            name, lines = f"{speaker}-{chapter.name}", []
            for number in range(5):
                seconds = 0.4 + 0.1 * ((first + number) % 8)
                (chapter / f"{name}-{number:04d}.flac").write_bytes(sound(seconds, first + number))
                lines.append(f"{name}-{number:04d} {' '.join(WORDS[: 1 + (first + number) % 7])}\n")
            (chapter / f"{name}.trans.txt").write_text("".join(lines))
    for text in ("README.TXT", "SPEAKERS.TXT", "CHAPTERS.TXT", "BOOKS.TXT", "LICENSE.TXT"):
        (root / text).write_text(f"; {text}\n")
    return data


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=3600,
        env=os.environ
        | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        | environment,
    )


@pytest.mark.parametrize("setup", ["8gpu", "24gb"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_recipes_are_read(setup, number, monkeypatch):
    monkeypatch.setenv("LIBRISPEECH_SHARDS", "/shards")
    recipe = load_recipe(ROOT / "examples" / "librispeech" / setup / f"stage{number}.yaml", [])
    names = {1: "train", 2: "train", 3: "instructions"}
    assert [corpus.shards for corpus in recipe.data.train] == [f"/shards/{names[number]}"]
    assert recipe.data.max_seconds > 35.2  # the longest clip of train-960
    assert recipe.data.micro_batch_seconds >= recipe.data.max_seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setup", "4gpu"], "write 8gpu or 24gb"),
        (["--fast"], "--fast is not known"),
        (["train"], "neither an option nor key=value"),
        (["--data", "/nowhere"], "give --data, or --download"),
    ],
)
def test_wrong_options_give_one_line(arguments, message, tmp_path):
    done = run(*arguments, "--work", tmp_path / "work") if "--data" in arguments else run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow  # five packs, three plans, three stages, an evaluation and an export: 14 processes
def test_from_the_archives_tree_to_the_model_card(tmp_path):
    data, work = write_tree(tmp_path / "data"), tmp_path / "work"
    overrides = [
        f"model.encoder.name={tiny.whisper(tmp_path / 'whisper')}",
        f"model.llm.name={tiny.llm(tmp_path / 'llm', 'llama')}",
        "model.llm.lora_r=4",
        "model.dtype=float32",
        "data.batch_seconds=8",
        "data.micro_batch_seconds=4",
        "data.max_seconds=2",
        "data.workers=0",
        "optim.steps=2",
        "optim.warmup_steps=1",
        "log.validate_at_start=false",
        "log.validate_utterances=4",
        "log.tensorboard=false",
    ]
    arguments = ["--setup", "24gb", "--data", data, "--work", work, *overrides]
    done = run(*arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = {
        name: json.loads((work / "shards" / name / "index.json").read_text())["samples"]
        for name in ("train", "valid", "test-clean", "test-other", "instructions")
    }
    assert counts == {"train": 160, "valid": 20, "test-clean": 10, "test-other": 10, "instructions": 80}
    plan = (work / "plan.txt").read_text()
    assert plan.count("Plan for 1 x rtx4090") == 3 and plan.count("epochs of") == 3
    predictions = list((work / "model" / "sft" / "model" / "evaluation").glob("*.jsonl"))
    scored = [path for path in predictions if "test-" in path.name]
    ids = {json.loads(line)["id"] for path in scored for line in path.read_text().splitlines()}
    assert len(ids) == 20
    card = (work / "export" / "README.md").read_text()
    assert "wer" in card and "model-index" in card
