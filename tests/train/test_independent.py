"""Training on two ranks under ZeRO-3 against a plain PyTorch loop that shares no code with it
(independent.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import artifact
from model.config import SoundwaveConfig
from model.soundwave import Soundwave
from stream import sample_log
from tests.model import tiny
from tests.stream.conftest import record, sound, write_folder
from tests.train import independent
from tests.train.ranks import Server
from tests.train.tiny import losses, weights

pytestmark = pytest.mark.slow  # each a start of real ranks, and the same steps by the plain loop
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lfm2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
STEPS, CTC_WEIGHT = 6, 0.7


@pytest.fixture(scope="module")
def server():
    with Server() as started:
        yield started


def corpus(folder: Path) -> Path:
    """Transcripts, translations (with transcript), clips with an answer alone, and text; answers of very
    unequal length."""
    samples = []
    for i in range(40):
        seconds, kind = 0.3 + 0.1 * (i % 10), i % 5
        if kind == 4:
            entry = record(i, None, "text", text=None, prompt="Two and two?", response="Four. " * (1 + i % 9))
        elif kind == 3:
            entry = record(i, seconds, "translation", prompt="To French.", response="les mots")
        elif kind == 2:
            entry = record(i, seconds, "emotion", text=None, prompt="How?", response="sad")
        else:
            entry = record(i, seconds, prompt="Write it." * (1 + i % 3), text=f"Clip {i % 7}")
        samples.append((entry, None if kind == 4 else sound(seconds, i), "" if kind == 4 else "flac"))
    return write_folder(folder, samples, per_shard=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("independent")
    torch.manual_seed(0)
    tiny.whisper(root / "whisper")
    corpus(root / "train")
    return root


@pytest.fixture(scope="module", params=TARGETS)
def family(request, root) -> str:
    """An LLM of the family, a model folder to start from in which no part is zero, and recipes."""
    name = request.param
    torch.manual_seed(3)
    config = SoundwaveConfig()
    config.encoder.name, config.llm.name = str(root / "whisper"), tiny.llm(root / name / "llm", name)
    config.llm.lora_r, config.llm.lora_targets = 4, TARGETS[name]
    config.alignment.dropout = config.shrinking.dropout = 0.0
    model = Soundwave.build(config)
    model.set_stage("shrinking")
    with torch.no_grad():
        for group in model.parameter_groups().values():
            for parameter_name, parameter in group:
                if "lora_B" in parameter_name or parameter_name.startswith("shrinking.out"):
                    parameter.normal_(0, 0.1)
    artifact.save(model, root / name / "start")
    for stage in ("shrinking", "sft"):
        recipe = {
            "stage": stage,
            "output": str(root / name / "run"),
            "init_from": str(root / name / "start"),
            "seed": 5,
            "deepspeed": "ds_configs/zero3.json",
            "model": {
                "encoder": {"name": config.encoder.name},
                "alignment": {"dropout": 0.0},
                "shrinking": {"dropout": 0.0},
                "llm": {"name": config.llm.name, "lora_r": 4, "lora_targets": TARGETS[name]},
            },
            "data": {
                "train": [{"shards": str(root / "train")}],
                "batch_seconds": 9.0,
                "micro_batch_seconds": 3.0,
                "workers": 0,
            },
            "optim": {"steps": STEPS, "warmup_steps": 2, "weight_decay": 0.05, "grad_clip": 0.5},
            "loss": {"ctc_weight": CTC_WEIGHT},
            "log": {"sample_ids": True, "tensorboard": False},
            "checkpoint": {"every_steps": 1000},
        }
        (root / name / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return name


def cheaper_joined(lengths: list[int], width: int = 32) -> bool:
    tokens, padded = sum(lengths), len(lengths) * max(lengths)
    return tokens * (6 * width + tokens) < padded * (6 * width + max(lengths))


@pytest.mark.parametrize(("stage", "number"), [("shrinking", 2), ("sft", 3)])
def test_losses_and_weights_are_those_of_a_plain_loop(server, root, family, stage, number):
    run = server.start([root / family / f"{stage}.yaml"], ranks=2)
    assert run.wait() == [0, 0], run.text()
    assert (
        "rows of a micro-batch are joined" if family == "llama" else "rows of a micro-batch are padded"
    ) in run.text()
    folder = root / family / "run" / stage
    steps = sample_log.read(folder)
    clips, start = independent.read_corpus(root / "train"), root / family / "start"
    network = independent.Network(start, str(root / "whisper"), str(root / family / "llm"))
    texts = {
        name: len(network.words.encode(meta["prompt"] + (meta.get("response") or meta["text"])))
        for name, (meta, _) in clips.items()
    }
    parts = [part for ranks in steps.values() for micro_batches in ranks.values() for part in micro_batches]
    assert any(len(part) > 1 and cheaper_joined([texts[name] for name in part]) for part in parts), (
        "no row would be joined"
    )
    batches = [
        [name for rank in sorted(steps[step]) for part in steps[step][rank] for name in part]
        for step in range(STEPS)
    ]
    expected = independent.train(
        network,
        clips,
        batches,
        stage=number,
        ctc_weight=CTC_WEIGHT,
        rates={"adapters": 1e-3, "ctc_head": 1e-3, "lora": 2e-4},
        betas=(0.9, 0.98),
        eps=1e-8,
        decay=0.05,
        warmup=2,
        least=0.05,
        clip=0.5,
    )
    found = losses(folder)
    torch.testing.assert_close(
        torch.tensor([found[step] for step in range(STEPS)]), torch.tensor(expected), rtol=1e-5, atol=0
    )
    before = {f"adapters.safetensors:{n}": t for n, t in load_file(start / "adapters.safetensors").items()}
    before |= {
        f"lora/adapter_model.safetensors:{n}": t
        for n, t in load_file(start / "lora/adapter_model.safetensors").items()
    }
    ours, theirs = weights(folder), plain_weights(network)
    assert ours.keys() == theirs.keys() == before.keys()
    moved = {name: float((theirs[name] - before[name]).norm()) for name in before}
    apart = {name: float((theirs[name] - ours[name]).norm()) for name in before}
    assert {name for name in before if moved[name]} == {
        name for name in before if stage == "shrinking" or "lora" in name
    }
    for name in before:  # seen: 1e-5 of the way at most
        # Part of this bias, the keys', has no gradient but rounding, which Adam blows up.
        assert (
            apart[name] <= (0.1 if name.endswith(("qkv.bias", "key_value.bias")) else 1e-3) * moved[name]
        ), name


def plain_weights(network: independent.Network) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in network.named_parameters():
        value = value.detach()
        if name.startswith("llm.") and name.endswith((".a", ".b")):
            place = name.removeprefix("llm.")
            found[
                f"lora/adapter_model.safetensors:base_model.model.{place[:-2]}.lora_{place[-1].upper()}.weight"
            ] = value
        elif not name.startswith(("llm.", "whisper.")):
            found[f"adapters.safetensors:{name.replace('__', '.')}"] = value
    return found
