"""The DeepSpeed configuration: a JSON of ds_configs/ with every "auto" filled in from the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from train.config import Recipe, RecipeError

LAYER = 20  # parameters of a decoder layer over the square of its width: Llama-3.1-8B 13, Qwen2.5-7B 18
REPOSITORY = Path(__file__).resolve().parent.parent


def _read(name: str) -> dict:
    # First beside the code: a job runs from a frozen copy of it, while its working folder is the user's live checkout.
    path = REPOSITORY / name  # an absolute name stays as it is
    if not path.exists():
        path = Path(name)
    if not path.exists():
        have = ", ".join(sorted(p.name for p in (REPOSITORY / "ds_configs").glob("*.json")))
        raise RecipeError(f"deepspeed: {name} does not exist; ds_configs/ has {have}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecipeError(f"deepspeed: {path} line {error.lineno}: {error.msg}") from None


def resolve(recipe: Recipe, hidden_size: int) -> dict:
    """The dictionary for deepspeed.initialize. `hidden_size` is the LLM's: buckets are sized by it, as Hugging Face's are.

    The number of micro-batches changes from step to step, so the engine marks accumulation boundaries itself and
    gradient_accumulation_steps stays 1; micro-batches are counted in seconds of audio, so DeepSpeed's samples are steps.
    """
    config = _read(recipe.deepspeed)
    if recipe.model.dtype == "float16":
        raise RecipeError("model.dtype: float16 overflows in training: use bfloat16 (or float32 on CPU)")
    auto = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.grad_clip,
        "bf16.enabled": recipe.model.dtype == "bfloat16",
        "zero_optimization.reduce_bucket_size": max(hidden_size * hidden_size, 1_000_000),
        "zero_optimization.allgather_bucket_size": max(hidden_size * hidden_size, 1_000_000),
        # A Transformer layer is gathered as one (train/engine.py): what is not prefetched of it is waited for.
        "zero_optimization.stage3_prefetch_bucket_size": LAYER * hidden_size * hidden_size,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.overlap_comm": torch.cuda.is_available(),
    }

    def fill(node: dict, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                fill(value, f"{prefix}{key}.")
            elif value == "auto":
                if prefix + key not in auto:
                    raise RecipeError(f"deepspeed: {recipe.deepspeed}: '{prefix}{key}' cannot be \"auto\"; "
                                      f"these can: {', '.join(auto)}")
                node[key] = auto[prefix + key]

    fill(config, "")
    stage = stage_number(config)
    if stage not in (1, 2, 3):
        raise RecipeError(f"deepspeed: {recipe.deepspeed}: zero_optimization.stage is {stage}; give 1, 2 or 3")
    for key, value in (("train_micro_batch_size_per_gpu", 1), ("gradient_accumulation_steps", 1)):
        if config.setdefault(key, value) != value:
            raise RecipeError(f"deepspeed: {recipe.deepspeed}: {key} must be \"auto\": batches are counted in seconds "
                              "(data.batch_seconds, data.micro_batch_seconds)")
    return config


def stage_number(config: dict) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict) -> bool:
    return config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
