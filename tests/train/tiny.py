"""A whole training set-up in miniature: random Whisper and LLM, a packed folder of tones, and a recipe for
each stage.

`python -m tests.train.tiny DIR` writes one; train it with `python -m train.run DIR/stage1.yaml`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from core.files import read_lines
from tests.model import tiny
from tests.stream.conftest import record, sound, write_folder

STAGES = {1: "alignment", 2: "shrinking", 3: "sft"}


def corpus(folder: Path, number: int) -> Path:
    """ASR, translation and text-only turns, 0.3 to 1.2 s."""
    samples = []
    for i in range(number):
        seconds = 0.3 + 0.1 * (i % 10)
        if i % 5 == 4:
            samples.append(
                (
                    record(i, None, "text", text=None, prompt="What is two and two?", response="Four."),
                    None,
                    "",
                )
            )
        elif i % 5 == 3:
            entry = record(i, seconds, "translation", prompt="To French.", response="les mots")
            samples.append((entry, sound(seconds, i), "flac"))
        else:
            samples.append((record(i, seconds, text=f"clip {i % 7}"), sound(seconds, i), "flac"))
    return write_folder(folder, samples, per_shard=10)


def workspace(root: Path, **overrides) -> Path:
    """Models, shards and recipes under `root`; returns it. Sizes: width 32, 2 layers each, 40 utterances."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    encoder, llm = tiny.whisper(root / "whisper"), tiny.llm(root / "llm")
    corpus(root / "train", 40)
    corpus(root / "valid", 10)
    for number, stage in STAGES.items():
        recipe = {
            "stage": stage,
            "output": str(root / "run"),
            "seed": 1,
            "deepspeed": "ds_configs/zero3.json",
            "model": {"encoder": {"name": encoder}, "llm": {"name": llm, "lora_r": 4}},
            "data": {
                "train": [{"shards": str(root / "train")}],
                "valid": [{"shards": str(root / "valid")}],
                "batch_seconds": 6.0,
                "micro_batch_seconds": 2.0,
                "workers": 1,
            },
            "optim": {"steps": 8, "warmup_steps": 2},
            "checkpoint": {"every_steps": 3},
            "log": {"every_steps": 2, "validate_every_steps": 4, "validate_utterances": 6},
        }
        (root / f"stage{number}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root


def losses(stage_folder: Path) -> dict[int, float]:
    """Step -> loss over all ranks, of a run that may be unfinished; of a step that was done again, the last
    one."""
    return {
        line["step"]: line["loss"]
        for line in read_lines(stage_folder / "metrics.jsonl")
        if line["kind"] == "train"
    }


def weights(stage_folder: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor of a stage, by file and name."""
    folder = stage_folder / "model"
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


if __name__ == "__main__":
    print(workspace(Path(sys.argv[1])))
