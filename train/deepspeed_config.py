"""The DeepSpeed configuration: a JSON of ds_configs/, completed by the recipe and checked against it.

The JSON decides how the work is split (ZeRO stage, buckets, offload) and what DeepSpeed logs. The recipe
decides what is computed: a value of the JSON that contradicts it is an error, one that is missing or "auto"
is filled in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from core.near_names import did_you_mean, near_names
from recipe.config import Recipe, RecipeError

LAYER = 20  # parameters of a decoder layer over the square of its width: Llama-3.1-8B 13, Qwen2.5-7B 18
REPOSITORY = Path(__file__).resolve().parent.parent

# Sections that DeepSpeed takes and that change neither the gradient nor the update.
_SPLITTING = (
    "zero_optimization",
    "aio",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
)
_LOGGING = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
)
_OBJECTS = (
    "bf16",
    "data_types",
    "zero_optimization",
    "aio",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
)
_SWITCHES = (
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)
_KINDS = {
    **dict.fromkeys(_OBJECTS, (dict, "{...}")),
    **dict.fromkeys(_SWITCHES, (bool, "true or false")),
    "steps_per_print": (int, "a whole number"),
    "communication_data_type": (str, "bf16 or fp32"),
}
# What the recipe says in place of a section.
_RECIPES = {
    "optimizer": "optim.lr_*, betas, eps and weight_decay (AdamW)",
    "scheduler": "optim.schedule, warmup_steps and min_lr_share",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "bfloat16": "model.dtype (its section here is bf16)",
    "activation_checkpointing": "optim.activation_checkpointing",
}


def _read(name: str) -> dict:
    # First beside the code: a job runs from a frozen copy of it, while its working folder is the user's live
    # checkout.
    path = REPOSITORY / name  # an absolute name stays as it is
    if not path.exists():
        path = Path(name)
    if not path.exists():
        have = ", ".join(sorted(p.name for p in (REPOSITORY / "ds_configs").glob("*.json")))
        raise RecipeError(f"deepspeed: {name} does not exist; ds_configs/ has {have}")

    def once(pairs: list[tuple[str, object]]) -> dict:
        for place, (key, _) in enumerate(pairs):
            if key in (before for before, _ in pairs[:place]):
                raise RecipeError(f"deepspeed: {path}: '{key}' is given twice: keep one")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise RecipeError(f"deepspeed: {path} line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"deepspeed: {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed: {path} holds no object: give {{...}} with DeepSpeed's sections")
    return config


def resolve(recipe: Recipe, hidden_size: int) -> dict:
    """The dictionary for deepspeed.initialize. `hidden_size` is the LLM's: buckets are sized by it, as
    Hugging Face's are.

    The number of micro-batches changes from step to step, so the engine marks accumulation boundaries itself
    and gradient_accumulation_steps stays 1; micro-batches are counted in seconds of audio, so DeepSpeed's
    samples are steps.
    Errors: RecipeError naming the file, the key and what it contradicts.
    """
    config = _read(recipe.deepspeed)
    if recipe.model.dtype == "float16":
        raise RecipeError("model.dtype: float16 overflows in training: use bfloat16 (or float32 on CPU)")
    half = recipe.model.dtype == "bfloat16"
    seconds = "batches are counted in seconds (data.batch_seconds, data.micro_batch_seconds)"
    # Key -> its one right value, and what decides it.
    decided: dict[str, tuple[object, str]] = {
        "train_micro_batch_size_per_gpu": (1, seconds),
        "gradient_accumulation_steps": (1, seconds),
        "gradient_clipping": (recipe.optim.grad_clip, f"optim.grad_clip is {recipe.optim.grad_clip:g}"),
        "bf16.enabled": (half, f"model.dtype is {recipe.model.dtype}"),
        "bf16.check_grad_overflow": (True, "a gradient that is not finite must be found before the update"),
        "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
    }
    free = {  # "auto" ones; any other value is the user's
        "zero_optimization.reduce_bucket_size": max(hidden_size * hidden_size, 1_000_000),
        "zero_optimization.allgather_bucket_size": max(hidden_size * hidden_size, 1_000_000),
        # A Transformer layer is gathered as one (train/engine.py): what is not prefetched of it is waited
        # for.
        "zero_optimization.stage3_prefetch_bucket_size": LAYER * hidden_size * hidden_size,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.overlap_comm": torch.cuda.is_available(),
    }
    _check_sections(recipe, config, decided)
    stage = config["zero_optimization"].get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, (bool, float)):
        raise RecipeError(
            f"deepspeed: {recipe.deepspeed}: zero_optimization.stage is {json.dumps(stage)}; give 1, 2 or 3"
        )
    if half and stage == 1:  # DeepSpeed 0.19.8 adds the first of several bf16 micro-batches twice without it
        decided["bf16.immediate_grad_update"] = (
            True,
            "ZeRO-1 in bf16 adds the first micro-batch twice without it",
        )
    for key, (value, reason) in decided.items():
        section, _, name = key.rpartition(".")
        values = config.setdefault(section, {}) if section else config
        given = values.get(name, "auto")
        if given != "auto" and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            raise RecipeError(
                f"deepspeed: {recipe.deepspeed}: {key} is {json.dumps(given)}, but {reason}: "
                + ('it must be "auto"' if reason == seconds else 'make the two agree, or write "auto" there')
            )
        values[name] = value
    _fill(config, free, recipe.deepspeed, (*decided, *free))
    _check_zero(config["zero_optimization"], recipe.deepspeed)
    return config


def _check_sections(recipe: Recipe, config: dict, decided: dict) -> None:
    """Errors: RecipeError for a section or key that is not ours to pass on, and for one of the wrong
    shape."""
    where = f"deepspeed: {recipe.deepspeed}"
    fp16 = config.pop("fp16", {})
    if not isinstance(fp16, dict) or fp16.get("enabled", False) not in (False, "auto"):
        raise RecipeError(
            f"{where}: fp16 is switched on, and it overflows in training: remove the section; model.dtype: "
            "bfloat16 "
            "gives 16 bits"
        )
    if config.pop("train_batch_size", "auto") != "auto":
        raise RecipeError(
            f'{where}: train_batch_size must be "auto": batches are counted in seconds (data.batch_seconds, '
            "data.micro_batch_seconds)"
        )
    sections = {
        "bf16": [key.partition(".")[2] for key in decided if key.startswith("bf16.")]
        + ["immediate_grad_update"],
        "data_types": ["grad_accum_dtype"],
    }
    supported = [*(key for key in decided if "." not in key), *sections, *_SPLITTING, *_LOGGING]
    for key, value in config.items():
        if key in _RECIPES:
            raise RecipeError(
                f"{where}: the section {key} would be ignored, or contradict the recipe, whose "
                f"{_RECIPES[key]} "
                "decide: "
                "remove it"
            )
        if key not in supported:
            near = near_names(key, [*supported, "fp16"])
            raise RecipeError(
                f"{where}: '{key}' "
                f"{f'is not known; {did_you_mean(near)}' if near else 'is not supported here'}; "
                f"these keys are: {', '.join(supported)}"
            )
        kind, words = _KINDS.get(key, (object, ""))
        if not isinstance(value, kind) or kind is int and isinstance(value, bool):
            raise RecipeError(f"{where}: {key} is {json.dumps(value)}: give {words}")
    for section, keys in sections.items():
        for key in config.get(section, {}):
            if key not in keys:
                raise RecipeError(
                    f"{where}: {section}.{key} is not supported here: remove it; known: {', '.join(keys)}"
                )
    if config.get("communication_data_type") in ("fp16", "float16"):
        raise RecipeError(
            f"{where}: communication_data_type is fp16, which overflows: write bf16 or fp32, or remove it"
        )
    config.setdefault("zero_optimization", {})


def _fill(
    node: dict, values: Mapping[str, object], name: str, can: tuple[str, ...], prefix: str = ""
) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _fill(value, values, name, can, f"{prefix}{key}.")
        elif value == "auto":
            if prefix + key not in values:
                raise RecipeError(
                    f"deepspeed: {name}: '{prefix}{key}' cannot be \"auto\"; these can: {', '.join(can)}"
                )
            node[key] = values[prefix + key]


def _check_zero(section: dict, name: str) -> None:
    """Errors: RecipeError for a key or value that DeepSpeed's own configuration refuses, or would ignore."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it greets while it is imported
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    names = {
        alias
        for field, info in DeepSpeedZeroConfig.model_fields.items()
        for alias in (field, info.alias)
        if alias
    }
    fields = DeepSpeedZeroConfig.model_fields
    old_names = {field: (info.json_schema_extra or {}).get("new_param") for field, info in fields.items()}
    for key in section:
        if key not in names:
            near = near_names(key, sorted(names))
            raise RecipeError(
                f"deepspeed: {name}: zero_optimization.{key} is not known"
                + (f"; {did_you_mean(near)}" if near else ": remove it")
            )
        renamed = old_names.get(key)
        if renamed:
            raise RecipeError(f"deepspeed: {name}: zero_optimization.{key} is an old name: write {renamed}")
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"deepspeed: {name}: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def stage_number(config: dict) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict) -> bool:
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
