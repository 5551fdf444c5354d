"""`optim.ema_decay` on two ranks under ZeRO-1/2/3: against an average written out beside the plain PyTorch loop
of independent.py, resumed, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.files import read_lines
from model import artifact
from model.config import SoundwaveConfig
from model.soundwave import Soundwave
from stream import sample_log
from tests.model import tiny
from tests.train import independent
from tests.train.test_independent import corpus
from tests.train.test_trained_parts import error_of, plain_weights
from tests.train.tiny import weights
from train.weight_average import decay_at

STEPS, DECAY = 4, 0.2
RATES = {"adapters": 3e-3, "ctc_head": 3e-3, "lora": 3e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("averaged")
    torch.manual_seed(0)
    encoder, llm = tiny.whisper(root / "whisper"), tiny.llm(root / "llm", "llama")
    corpus(root / "train")
    config = SoundwaveConfig()
    config.encoder.name, config.llm.name, config.llm.lora_r = encoder, llm, 4
    config.alignment.dropout = config.shrinking.dropout = 0.0
    artifact.save(Soundwave.build(config), root / "start")
    recipe = {
        "stage": "shrinking",
        "output": str(root / "run"),
        "init_from": str(root / "start"),
        "seed": 5,
        "data": {
            "train": [{"shards": str(root / "train")}],
            "batch_seconds": 9.0,
            "micro_batch_seconds": 3.0,
            "workers": 0,
        },
        "optim": {
            "steps": STEPS,
            "warmup_steps": 2,
            "weight_decay": 0.05,
            "grad_clip": 0.5,
            "ema_decay": DECAY,
            **{f"lr_{name}": rate for name, rate in RATES.items()},
        },
        "loss": {"ctc_weight": 0.7},
        "log": {"sample_ids": True, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_decay_rises_to_the_recipes():
    assert [decay_at(0.2, n) for n in range(3)] == [1 / 10, 2 / 11, 0.2]
    assert decay_at(0.999, 10**6) == 0.999


@pytest.mark.slow  # a start of two real ranks, and the same steps by the plain loop
@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3]
)
def test_the_model_folder_holds_the_average_of_a_plain_loop(server, root, zero, tmp_path):
    arguments = [root / "recipe.yaml", f"output={tmp_path}", f"deepspeed=ds_configs/zero{zero}.json"]
    run = server.start(arguments, ranks=2)
    assert run.wait() == [0, 0], run.text()
    folder = tmp_path / "shrinking"
    assert "model holds the averaged weights, " in run.text()
    network = independent.Network(root / "start", str(root / "whisper"), str(root / "llm"))
    average = {name: value.clone() for name, value in plain_weights(network).items()}

    def count(step: int) -> None:
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in plain_weights(network).items():
            average[name] = decay * average[name] + (1 - decay) * value

    before = {name: value.clone() for name, value in average.items()}
    steps = sample_log.read(folder)
    independent.train(
        network,
        independent.read_corpus(root / "train"),
        [
            [name for rank in sorted(steps[i]) for part in steps[i][rank] for name in part]
            for i in range(STEPS)
        ],
        stage=2,
        ctc_weight=0.7,
        rates=RATES,
        betas=(0.9, 0.98),
        eps=1e-8,
        decay=0.05,
        warmup=2,
        least=0.05,
        clip=0.5,
        after_step=count,
    )
    plain, averaged = plain_weights(network), folder_weights(folder / "model")
    last = folder_weights(folder / "model-plain")
    assert averaged.keys() == last.keys()
    for name in averaged:
        moved = float((plain[name] - before[name]).norm())
        bias = name.endswith(("qkv.bias", "key_value.bias"))  # the keys' has no gradient but rounding
        limit = (0.1 if bias else 5e-3) * moved + 1e-7
        assert float((average[name] - averaged[name]).norm()) <= limit, name
        assert float((plain[name] - last[name]).norm()) <= limit, name
        if moved > 1e-3 and not bias:
            assert float((last[name] - averaged[name]).norm()) > 2 * limit, name


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_same_average(server, root, zero, dtype, tmp_path):
    """Validation in between takes the average in and out: the losses stay those of a run without it."""
    results = []
    valid = f"data.valid=[{{shards: {root / 'train'}}}]"
    for name, halves, more in (
        ("once", [STEPS], []),
        ("twice", [2, STEPS], [valid, "log.validate_every_steps=1", "checkpoint.best_by=loss"]),
        ("plain", [STEPS], ["optim.ema_decay=null"]),
    ):
        for steps in halves:
            arguments = [f"output={tmp_path / name}", f"deepspeed=ds_configs/zero{zero}.json", *more]
            arguments += ["optim.schedule=constant", f"optim.steps={steps}", f"model.dtype={dtype}"]
            arguments += ["log.validate_utterances=2", "checkpoint.accept_changes=[recipe]"]
            run = server.start([root / "recipe.yaml", *arguments], ranks=2)
            assert run.wait() == [0, 0], run.text()
        lines = read_lines(tmp_path / name / "shrinking" / "metrics.jsonl")
        found = [line["loss"] for line in lines if line["kind"] == "train"]
        results.append((found, weights(tmp_path / name / "shrinking")))
    (once, first), (twice, second), (plain, third) = results
    assert once == twice == plain and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = folder_weights(tmp_path / "twice" / "shrinking" / "model-plain")
    assert all(torch.equal(third[name], last[name]) for name in third)
    assert any(not torch.equal(first[name], third[name]) for name in third)


@pytest.mark.long
def test_another_number_of_ranks_is_refused_in_one_line(server, root, tmp_path):
    arguments = [root / "recipe.yaml", f"output={tmp_path}", "deepspeed=ds_configs/zero2.json"]
    changed = ["optim.schedule=constant", "checkpoint.accept_changes=[recipe]"]
    run = server.start([*arguments, *changed, "optim.steps=2"], ranks=2)
    assert run.wait() == [0, 0], run.text()
    run = server.start([*arguments, *changed], ranks=1)
    assert run.wait() == [2]
    assert "are of 2 ranks, and this run has 1: start 2 ranks, or" in run.text()
    run = server.start([*arguments, *changed, "optim.ema_decay=null"], ranks=1)
    assert run.wait() == [0], run.text()


def test_masters_on_nvme_are_refused(root, tmp_path, capsys):
    config = tmp_path / "nvme.json"
    config.write_text(
        '{"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "offload_optimizer": '
        '{"device": "nvme", "nvme_path": "/tmp"}}}'
    )
    arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", f"deepspeed={config}", "--dry-run"]
    assert "offloads them to NVMe: offload to cpu, or set" in error_of(arguments, capsys)
