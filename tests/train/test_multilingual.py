"""Several languages, as a user trains them: a folder of one language, and a folder that mixes two."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.files import read_lines
from evaluation.score import score_rows, table
from recipe.config import load_recipe
from stream import sample_log
from tests.stream.conftest import record, sound, write_folder
from tests.train.test_run import ROOT, command, run
from tests.train.tiny import workspace

TEXTS = {"de": "der hund liegt da", "gl": "o can está aí", "zh": "你好世界"}
STEPS = 30


def pack(folder: Path, codes: list[str], first: int = 0) -> str:
    clips = []
    for at, code in enumerate(codes):
        seconds = 0.5 + 0.1 * (at % 5)
        entry = record(at, seconds, text=TEXTS[code], lang=code, id=f"{folder.name}-{at}")
        clips.append((entry, sound(seconds, first + at), "flac"))
    return str(write_folder(folder, clips))


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """The recipe of stage 1, and what it changes."""
    root = workspace(tmp_path_factory.mktemp("languages"))
    train = [pack(root / "de", ["de"] * 30), pack(root / "mixed", ["gl", "zh"] * 5, 30)]
    valid = [pack(root / "de-valid", ["de"] * 3, 50), pack(root / "mixed-valid", ["gl", "zh"] * 2, 60)]
    shown = {
        kind: ", ".join(f"{{shards: {folder}}}" for folder in folders)
        for kind, folders in (("train", train), ("valid", valid))
    }
    return [
        str(root / "stage1.yaml"),
        f"data.train=[{shown['train']}]",
        f"data.valid=[{shown['valid']}]",
        "data.mixture.language_alpha=0",
        f"optim.steps={STEPS}",
        f"log.validate_every_steps={STEPS}",
        "log.validate_utterances=20",
        "log.sample_ids=true",
    ]


def ids_of(folder: Path) -> dict[int, list[str]]:
    """Step -> the ids of all ranks, sorted."""
    return {
        step: sorted(name for batches in ranks.values() for ids in batches for name in ids)
        for step, ranks in sample_log.read(folder).items()
    }


def table_of(log: str) -> set[tuple[str, ...]]:
    """Language, utterances and rate of each row of the last validation's table."""
    rows = log.split("validation by language\n")[-1].splitlines()[2:5]
    return {tuple(row.split()[:3]) for row in rows}


def test_dry_run_prints_the_languages(overrides):
    done = subprocess.run(
        [sys.executable, "-m", "train.run", *overrides, "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(de|gl|zh) +[\d.]+ +([\d.]+)% +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [(code, share) for code, share, _ in rows] == [("de", "33.3"), ("gl", "33.3"), ("zh", "33.3")]
    seconds = {"de": 21.0, "gl": 3.5, "zh": 3.5}  # of a pass: 0.7 on average
    for code, _, passes in rows:
        assert float(passes) == pytest.approx(STEPS * 6.0 / 3 / seconds[code], abs=0.02)


@pytest.mark.slow  # three starts of real training
def test_training_logs_languages_and_a_resume_on_other_ranks_reads_the_same(overrides, tmp_path):
    whole = run(*overrides, f"output={tmp_path / 'whole'}", ranks=1)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "whole" / "alignment"
    last = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "valid"][-1]
    named = {name: value for name, value in last.items() if name.startswith("language/")}
    assert set(named) == {"language/de/wer", "language/gl/wer", "language/zh/cer"}
    told = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name, value in named.items():
        assert told.Scalars(f"valid/{name}")[-1].value == pytest.approx(value)
    assert table_of(whole.stderr) == {("de", "3", "WER"), ("gl", "2", "WER"), ("zh", "2", "CER")}

    broken = tmp_path / "broken" / "alignment"
    process = subprocess.Popen(
        command(*overrides, f"output={tmp_path / 'broken'}", ranks=1), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (broken / sample_log.NAME).exists():  # its first step
        time.sleep(0.05)
    (broken / "STOP").touch()
    assert process.wait(120) == 85
    assert max(sample_log.read(broken)) < STEPS - 1
    resumed = run(*overrides, f"output={tmp_path / 'broken'}", ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert table_of(resumed.stderr) == table_of(whole.stderr), "utterances of both ranks"
    assert ids_of(broken) == ids_of(folder) and len(ids_of(folder)) == STEPS


def test_evaluation_has_a_row_for_each_language():
    rows = [
        {"id": str(at), "task": "asr", "lang": lang, "reference": reference, "prediction": prediction}
        for at, (lang, reference, prediction) in enumerate(
            [
                ("de", "der hund liegt da", "der hund liegt"),
                ("zh", "你好世界", "你好世间"),
                ("zh", "你好", "你好"),
            ]
        )
    ]
    scores = score_rows(rows)
    groups = scores["asr"]["groups"]
    assert (groups["lang de"]["wer"], groups["lang zh"]["cer"]) == (1 / 4, 1 / 6)
    shown = [[cell.strip() for cell in line.split("|")] for line in table(scores).splitlines()]
    assert [row[2] for row in shown[2:]] == ["all", "lang de", "lang zh"]


def test_the_recipe_names_the_folders_that_the_documentation_packs():
    recipe = load_recipe(ROOT / "train/recipes/multilingual.yaml")
    page = (ROOT / "docs/recipes.md").read_text()
    codes = re.search(r"for code in ([\w ]+); do\n.*--out data/cv-\$code\n", page)
    assert codes is not None
    for kind in ("train", "valid"):
        folders = [corpus.shards for corpus in getattr(recipe.data, kind)]
        assert folders == [f"data/cv-{code}/{kind}" for code in codes[1].split()]
    assert (recipe.stage, recipe.data.mixture.language_alpha) == ("shrinking", 0.5)
