"""The stream under real training: faults, ranks without audio, kills. What was consumed is what was
planned."""

from __future__ import annotations

import io
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from recipe.config import load_recipe
from stream import Plan, sample_log
from tests.stream.conftest import record, sound, write_folder
from tests.train.ranks import LIMIT, Running, Server
from tests.train.tiny import workspace


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return workspace(tmp_path_factory.mktemp("stream"))


def start(server: Server, recipe: Path, *overrides: str, ranks: int = 2) -> Running:
    return server.start(
        [recipe, "data.valid=[]", "log.sample_ids=true", "log.tensorboard=false", *overrides], ranks=ranks
    )


def run(server: Server, recipe: Path, *overrides: str, ranks: int = 2) -> tuple[list[int], str]:
    """Exit codes and what all ranks printed."""
    running = start(server, recipe, *overrides, ranks=ranks)
    return running.wait(patience=20), running.text()


def metrics(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def planned(recipe: Path, steps: int, *overrides: str) -> list[list[str]]:
    """The ids of each step's global batch, from the index and the JSON in the shards."""
    plan = Plan.open((told := load_recipe(recipe, list(overrides))).data, told.stage, steps)
    return [
        sorted(plan.indexes[e["corpus"]].read(int(e["row"]))[1]["id"] for e in plan.global_batch(step))
        for step in range(steps)
    ]


def of_step(ranks: dict[int, list[list[str]]]) -> list[str]:
    return sorted(name for parts in ranks.values() for part in parts for name in part)


def float_wav(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def faulty(folder: Path) -> Path:
    """30 clips in three shards: one without samples, one with NaN in it, one without text, and a tar whose
    end is cut off."""
    samples = []
    for number in range(30):
        seconds = 0.5 + 0.02 * number
        entry, audio = (
            record(number, seconds, text=f"clip {number % 7}"),
            sound(seconds, number, container="wav"),
        )
        if number == 3:
            audio = float_wav(np.zeros(0))
        if number == 12:
            audio = float_wav(np.where(np.arange(10_000) == 5_000, np.nan, 0.1))
        if number == 17:
            del entry["text"]  # the index counts its characters, as it would of a JSON that was spoilt later
            entry = {**entry, "text": ""}
        samples.append((entry, audio, "wav"))
    write_folder(folder, samples, per_shard=10)
    table = np.load(folder / "samples.npy")
    table["characters"][17] = 6
    np.save(folder / "samples.npy", table)
    shard = folder / "toy-000002.tar"
    shard.write_bytes(shard.read_bytes()[: int(table["audio_offset"][29]) + 1000])
    return folder


BROKEN = {3: "no samples", 12: "NaN", 17: "no transcript", 29: "ends inside sample 29"}


@pytest.fixture(scope="module")
def faults(tiny, server) -> Path:
    """The stage folder of a run over broken shards that was stopped by them once."""
    folder, output = faulty(tiny / "faulty"), tiny / "faults"
    options = [f"output={output}", f"data.train=[{{shards: {folder}}}]", "optim.steps=6"]
    codes, told = run(server, tiny / "stage1.yaml", *options, "data.max_rejected_share=0.002")
    assert codes == [2, 2] and re.search(r"\d of \d+ utterances .* data.max_rejected_share=0.002", told), (
        told[-3000:]
    )
    assert sum(f"asr-{number} (" in told or f"row {number} of" in told for number in BROKEN) >= 2
    codes, told = run(server, tiny / "stage1.yaml", *options, "data.max_rejected_share=1")
    assert codes == [0, 0] and "resuming at step" in told, told[-3000:]
    return output / "alignment"


def test_faults_cost_one_counted_named_sample_each(tiny, faults):
    told = [json.loads(line) for line in (faults / "rejected.jsonl").read_text().splitlines()]
    assert len(told) == len(BROKEN) and {line["row"] for line in told} == set(BROKEN)
    assert all(BROKEN[line["row"]] in line["reason"] for line in told)
    plan = Plan.open(
        load_recipe(tiny / "stage1.yaml", [f"data.train=[{{shards: {tiny / 'faulty'}}}]"]).data,
        "alignment",
        6,
    )
    lines, steps = metrics(faults), sample_log.read(faults)
    assert len(lines) == len(steps) == 6 and all(np.isfinite(line["loss"]) for line in lines)
    for step, line in enumerate(lines):  # met again in the second pass, they count again and are named once
        meant = plan.global_batch(step)["row"].tolist()
        assert len(of_step(steps[step])) == len(meant) and bool(line["rejected"]) == bool(
            set(meant) & set(BROKEN)
        )
    seen = {name for ranks in steps.values() for name in of_step(ranks)}
    assert not {f"asr-{number}" for number in BROKEN} & seen and all(
        line["replaced_by"] in seen for line in told
    )


def test_a_rank_that_has_only_text(tiny, server, faults):
    """Under ZeRO-3, beside a rank with audio, in more than one step; the largest micro-batch is tried
    before."""
    samples = [
        (
            record(i, None, "text", text=None, prompt="Two and two?", response="Four, of course. " * 4),
            None,
            "",
        )
        for i in range(24)
    ]
    samples += [(record(30 + i, 1.0, text=f"clip {i}"), sound(1.0, i), "flac") for i in range(12)]
    folder = write_folder(tiny / "mostly-text", samples, per_shard=12)
    output = tiny / "text"
    codes, told = run(
        server,
        tiny / "stage2.yaml",
        f"output={output}",
        f"init_from={faults / 'model'}",
        "optim.steps=6",
        f"data.train=[{{shards: {folder}}}]",
        "data.batch_seconds=12",
        "data.mixture.task_weights={asr: 1, text: 2}",
        "data.try_largest=true",
        "data.max_seconds=2",
        "data.micro_batch_tokens=2000",
    )
    assert codes == [0, 0] and "the largest micro-batch of the recipe fits" in told, told[-3000:]
    steps = sample_log.read(output / "shrinking")
    kinds = [
        {rank: {name.split("-")[0] for part in parts for name in part} for rank, parts in ranks.items()}
        for ranks in steps.values()
    ]
    assert len(kinds) == 6
    assert (
        sum(
            any(k == {"text"} for k in step.values()) and any("asr" in k for k in step.values())
            for step in kinds
        )
        > 1
    )
    assert all(np.isfinite(line["loss"]) for line in metrics(output / "shrinking"))


@pytest.mark.slow  # four starts, two are killed
@pytest.mark.parametrize("worlds", [pytest.param((2, 2, 2), marks=pytest.mark.long), (2, 1, 2)])
def test_killed_at_random_steps_consumes_what_was_planned(tiny, server, worlds):
    """kill -9 wherever it stands, twice, and on with another number of ranks: every step's ids are the
    plan's. On the same number all is bit-identical to an uninterrupted run, the memory probe included."""
    options, steps = ["optim.steps=30", "checkpoint.every_steps=4"], 30
    killed = tiny / f"killed-{worlds[1]}"
    chance = random.Random(repr(worlds))
    for number, ranks in enumerate(worlds[:-1]):
        running = start(
            server, tiny / "stage1.yaml", f"output={killed}", *options, "data.try_largest=true", ranks=ranks
        )
        target, deadline = chance.randint(5 + 9 * number, 12 + 9 * number), time.monotonic() + LIMIT
        while len(sample_log.read(killed / "alignment")) <= target:
            assert time.monotonic() < deadline and None in running.codes(), running.text()[-3000:]
            time.sleep(0.01)
        running.kill()
        running.wait()
    codes, told = run(
        server, tiny / "stage1.yaml", f"output={killed}", *options, "data.try_largest=true", ranks=worlds[-1]
    )
    assert codes == [0] * worlds[-1] and "resuming at step" in told, told[-3000:]
    found = sample_log.read(killed / "alignment")
    assert [of_step(found[step]) for step in range(steps)] == planned(tiny / "stage1.yaml", steps)
    if len(set(worlds)) > 1:
        return
    whole = tiny / "whole"
    assert run(server, tiny / "stage1.yaml", f"output={whole}", *options)[0] == [0, 0]
    ours, theirs = metrics(killed / "alignment"), metrics(whole / "alignment")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    ours, theirs = (
        load_file(folder / "alignment" / "model" / "adapters.safetensors") for folder in (killed, whole)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_too_large_a_micro_batch_names_the_key_to_lower(tiny, server):
    codes, told = run(
        server,
        tiny / "stage1.yaml",
        f"output={tiny / 'large'}",
        "data.try_largest=true",
        "data.max_seconds=6000000",
        "data.micro_batch_seconds=6000000",
        "data.batch_seconds=6000000",
        ranks=1,
    )
    assert codes == [2] and "does not fit into memory: lower data.max_seconds=6e+06 (" in told, told
