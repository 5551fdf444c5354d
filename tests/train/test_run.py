"""Training as a user starts it: real ranks, real DeepSpeed, tiny random models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core import distributed
from recipe.config import Corpus, DataConfig, Recipe, RecipeError, load_recipe
from tests.train.tiny import STAGES, losses, workspace
from train.checkpoint.compatibility import recipe_facts
from train.checks import check
from train.dry_run import missing
from train.preemption import PORT_TAKEN
from train.run import main as train_main

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds for any one run: a hang is a failure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return workspace(tmp_path_factory.mktemp("train"))


def command(recipe: Path, *overrides: str, ranks: int = 2) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "train/run.py",
    ]
    return [*(launcher if ranks > 1 else [sys.executable, "-m", "train.run"]), str(recipe), *overrides]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def test_misspelt_key_stops_with_the_nearest_right_one(tiny):
    done = run(tiny / "stage1.yaml", "optim.lr_adapter=1", ranks=1)
    assert done.returncode == 2 and "did you mean 'optim.lr_adapters'" in done.stderr
    assert not (tiny / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.train=data/train", "write data.train=[{shards: DIR}]"),
        ("data.train=[data/train]", "write data.train=[{shards: DIR}]"),
        ("data.valid=null", "write data.valid=[{shards: DIR}], or []"),
        ("stepz=3", "did you mean 'optim.steps'"),
        ("model.lora_r=3", "or 'model.llm.lora_r'?"),
        ("optim.lr=1", "did you mean 'optim.lr_"),
    ],
)
def test_likely_mistakes_in_a_recipe_are_reported_in_one_line(override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "train/recipes/stage1.yaml", [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.shrinking.keep=middle", "model.shrinking.keep is 'middle': give peak or first"),
        ("checkpoint.best_by=bleu", "checkpoint.best_by: 'bleu' is not one of wer, cer, mer, loss, ctc"),
        ("optim.schedule=step", "optim.schedule is 'step': give cosine, linear or constant"),
        ("data.ctc_text=lowered", "data.ctc_text: 'lowered' is not one of raw, lower"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps is 0: must be at least 1"),
        ("log.every_steps=0", "log.every_steps is 0: must be at least 1"),
        ("log.validate_every_steps=0", "log.validate_every_steps is 0: must be at least 1"),
        ("health.max_consecutive_skips=0", "health.max_consecutive_skips is 0: must be at least 1"),
        (
            "health.window=16",
            "health.window is 16: must be at least 32: fewer steps say nothing about a spike",
        ),
    ],
)
def test_invalid_option_is_rejected_in_stage_1(override, words):
    with pytest.raises(RecipeError, match=words):
        check(load_recipe(ROOT / "train/recipes/stage1.yaml", [override]))


def test_dry_run_misses_weights_where_the_hub_s_cache_holds_sizes_alone(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    overrides = ["model.llm.name=some/llm", "data.train=[{shards: 'pipe:cat x.tar'}]"]
    recipe = load_recipe(ROOT / "train/recipes/stage1.yaml", overrides)
    absent = missing(recipe)
    assert any("model.llm.name: some/llm" in line for line in absent) and not any(
        "pipe:" in line for line in absent
    )


@pytest.mark.parametrize(
    "ranks, environment, threads",
    [
        (2, {}, 4),
        (8, {}, 1),
        (2, {"OMP_NUM_THREADS": "3"}, 3),  # meant
        (2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4),  # torchrun's own doing
        (2, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 3),  # it leaves what it finds
        (1, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1),  # with one rank it sets nothing
        (2, {"SLURM_CPUS_PER_TASK": "8"}, 8),  # bound by srun already
    ],
)
def test_threads_are_shared_among_the_ranks_of_a_node(monkeypatch, ranks, environment, threads):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(8)))
    now = [int(environment.get("OMP_NUM_THREADS", 2))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.append(number))
    assert distributed.set_threads(ranks) == threads == now[-1]


@pytest.mark.parametrize(
    "leftover, refused",
    [
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),  # of another job of the same size
        ({"RANK": "3", "WORLD_SIZE": "4"}, False),  # set from Slurm's own variables
        (
            {"RANK": "3", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"},
            False,
        ),  # a torchrun in each task
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({}, False),
    ],
)
def test_ranks_of_another_launcher_are_refused_in_a_slurm_step(monkeypatch, leftover, refused):
    """Each task would be the only rank, and all would write one output."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        **leftover,
    }.items():
        monkeypatch.setenv(name, value)
    if not refused:
        return distributed.check_launcher()
    with pytest.raises(RecipeError, match="are not of this Slurm step, which has 4 tasks"):
        distributed.check_launcher()


def test_a_taken_port_has_an_exit_code_of_its_own(monkeypatch, tiny, capsys):
    def taken(timeout_minutes):
        raise RuntimeError(
            "The server socket has failed to listen. port: 29500, name: EADDRINUSE, message: address in use"
        )

    monkeypatch.setattr("train.run.connect", taken)
    monkeypatch.setattr("train.run.fill_environment", lambda: None)
    monkeypatch.setattr("train.run.check_master_port", lambda: None)  # it was free a moment before
    for name, value in (("MASTER_ADDR", "gpu03"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert train_main([str(tiny / "stage1.yaml"), f"output={tiny / 'port'}"]) == PORT_TAKEN
    assert "port 29500 of gpu03 is taken by another program" in capsys.readouterr().err


def test_missing_previous_stage_is_named(tiny):
    done = run(tiny / "stage2.yaml", f"output={tiny / 'alone'}", ranks=1)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "alignment" in done.stderr and str(tiny / "alone") in done.stderr


def test_missing_validation_shards_are_named_before_models_are_read(tiny):
    done = run(
        tiny / "stage1.yaml",
        f"output={tiny / 'alone'}",
        "data.valid=[{shards: nowhere}]",
        "model.encoder.name=nowhere",
        ranks=1,
    )
    assert done.returncode == 2 and "nowhere" in done.stderr and "index.json" in done.stderr, done.stderr


def test_a_checkpoint_from_before_a_corpus_could_begin_later_still_fits():
    recipe = Recipe(
        data=DataConfig(train=[Corpus(shards="x"), Corpus(shards="y", share=0.25, share_from=0.75)])
    )
    assert ["share_from" in corpus for corpus in recipe_facts(recipe)["data.train"]] == [False, True]


@pytest.mark.parametrize("number", STAGES)
def test_dry_run_of_the_full_recipes_needs_nothing(number):
    done = subprocess.run(
        [sys.executable, "-m", "train.run", f"train/recipes/stage{number}.yaml", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert "ZeRO-3" in done.stdout and "alignment" in done.stdout


def test_three_stages_on_two_ranks_under_zero3(tiny):
    output = tiny / "road"
    for number, stage in STAGES.items():
        done = run(
            tiny / f"stage{number}.yaml", f"output={output}", *(["--profile", "2"] if number == 1 else [])
        )
        assert done.returncode == 0, done.stderr[-3000:]
        steps = losses(output / stage)
        assert sorted(steps) == list(range(8)) and all(torch.isfinite(torch.tensor(list(steps.values()))))
        assert (output / stage / "model" / "soundwave.json").exists()
        best = [
            json.loads((output / stage / name).read_text())
            for name in ("model-best/soundwave.json", "model/soundwave.json")
        ]
        assert best[0]["step"] == best[0]["best"]["step"] == best[1]["best"]["step"], (
            "the folder of the best validation"
        )
        assert (
            output / stage / "report.html"
        ).exists() and f"{output / stage / 'report.html'}" in done.stderr
        told = EventAccumulator(str(output / stage / "tensorboard")).Reload()
        assert (
            [event.step for event in told.Images("valid/clip")]
            == [0, 4, 8]
            == [
                int(path.stem.removeprefix("step-"))
                for path in sorted((output / stage / "pictures").iterdir())
            ]
        )
        assert {"train/rejected", "train/retries", "train/peak_memory_gib", "passes/train/asr"} <= set(
            told.Tags()["scalars"]
        )
        assert all(event.value > 0 for event in told.Scalars("train/flops_per_second"))
    assert list((output / "alignment" / "profile").glob("*.pt.trace.json.gz"))
    assert "backward" in (output / "alignment" / "profile" / "summary.txt").read_text()
    one, two, three = (
        load_file(output / stage / "model" / "adapters.safetensors") for stage in STAGES.values()
    )
    assert any(not torch.equal(one[name], two[name]) for name in one), "stage 2 trains the alignment adapter"
    assert all(torch.equal(two[name], three[name]) for name in two), "stage 3 trains LoRA alone"


@pytest.mark.slow  # several starts of real ranks
def test_killed_and_started_again_equals_undisturbed(tiny):
    """kill -9 of all ranks after a checkpoint; the same command resumes with bit-identical losses."""
    options = ["optim.steps=24", "checkpoint.every_steps=4", "data.valid=[]"]
    whole, killed = tiny / "whole", tiny / "killed"
    assert run(tiny / "stage1.yaml", f"output={whole}", *options).returncode == 0
    again = command(tiny / "stage1.yaml", f"output={killed}", *options)
    launcher = subprocess.Popen(again, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while not (killed / "alignment" / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.02)
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.send_signal(signal.SIGKILL)
    launcher.wait()
    assert not (killed / "alignment" / "model").exists(), "it was over before the kill"
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and "resuming at step" in done.stdout + done.stderr
    assert losses(killed / "alignment") == losses(whole / "alignment")
    ours, theirs = (
        load_file(folder / "alignment" / "model" / "adapters.safetensors") for folder in (killed, whole)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
