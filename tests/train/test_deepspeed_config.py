"""DeepSpeed's JSON against the recipe: values by formula, conflicts by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.config import OptimConfig, Recipe, RecipeError
from train import deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
FILES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def recipe(name: str = "ds_configs/zero3.json", dtype: str = "float32", **optim) -> Recipe:
    made = Recipe(deepspeed=name, optim=OptimConfig(**optim))
    made.model.dtype = dtype
    return made


@pytest.fixture
def resolved(tmp_path):
    def resolve(change: object, dtype: str = "float32", base: str = "zero3", **optim) -> dict:
        content = json.loads((ROOT / "ds_configs" / f"{base}.json").read_text())
        if isinstance(change, dict):
            content = {key: value for key, value in (content | change).items() if value is not ...}
        (tmp_path / "ds.json").write_text(json.dumps(content if isinstance(change, dict) else change))
        return deepspeed_config.resolve(recipe(str(tmp_path / "ds.json"), dtype, **optim), 4096)

    return resolve


@pytest.mark.parametrize("width", [576, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FILES)
def test_values_of_the_shipped_configurations(name, dtype, width):
    """Bucket sizes as in Hugging Face's integration (hidden^2, threshold 10 hidden), at least a million; one
    layer prefetched."""
    config = deepspeed_config.resolve(recipe(f"ds_configs/{name}.json", dtype, grad_clip=0.7), width)
    section, buckets = config["zero_optimization"], max(width**2, 10**6)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert config["gradient_clipping"] == 0.7 and config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert (
        config["bf16"]["enabled"] is (dtype == "bfloat16") and config["bf16"]["check_grad_overflow"] is True
    )
    assert config["bf16"].get("immediate_grad_update") is (True if name == "zero1" else None)
    assert (
        section["stage"] == FILES[name] == deepspeed_config.stage_number(config)
        and section["reduce_bucket_size"] == buckets
    )
    assert deepspeed_config.offloads_optimizer(config) is (name == "zero3_offload")
    assert section["overlap_comm"] is (torch.cuda.is_available() if name != "zero1" else False)
    if FILES[name] == 3:
        assert section["stage3_prefetch_bucket_size"] == 20 * width**2
        assert section["stage3_param_persistence_threshold"] == 10 * width
    else:
        assert section["allgather_bucket_size"] == buckets
    assert "auto" not in json.dumps(config)
    DeepSpeedZeroConfig(**section)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_clipping": ...},
        {"bf16": ...},
        {"bf16": {}},
        {"data_types": ...},
        {"fp16": {}},
        {"fp16": {"enabled": False}},
        {"fp16": {"enabled": "auto"}},
        {"train_batch_size": "auto"},
        {"train_micro_batch_size_per_gpu": ..., "gradient_accumulation_steps": 1},
        {"gradient_clipping": 1},
        {"bf16": {"enabled": True}},
    ],
)
def test_what_is_absent_or_agrees_gives_the_same_configuration(resolved, change):
    usual = resolved({}, "bfloat16")
    assert resolved(change, "bfloat16") == usual


def test_zero1_in_bf16_gets_the_update_that_it_needs(resolved):
    assert resolved({"bf16": {}}, "bfloat16", "zero1")["bf16"]["immediate_grad_update"] is True


@pytest.mark.parametrize(
    "change, dtype, words",
    [
        ({"gradient_clipping": 5.0}, "float32", "gradient_clipping is 5.0, but optim.grad_clip is 1"),
        ({"gradient_clipping": True}, "float32", "gradient_clipping is true, but optim.grad_clip is 1"),
        ({"bf16": {"enabled": True}}, "float32", "bf16.enabled is true, but model.dtype is float32"),
        ({"bf16": {"enabled": False}}, "bfloat16", "bf16.enabled is false, but model.dtype is bfloat16"),
        (
            {"bf16": {"check_grad_overflow": False}},
            "float32",
            "bf16.check_grad_overflow is false, but a gradient that is not finite",
        ),
        (
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "bfloat16",
            "bf16.bf16_master_weights_and_grads is not supported",
        ),
        ({"bf16": True}, "bfloat16", "bf16 is true: give {...}"),
        ({"fp16": {"enabled": True}}, "float32", "fp16 is switched on, and it overflows in training"),
        ({"fp16": 1}, "float32", "fp16 is switched on"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 5e-5}}},
            "float32",
            "the section optimizer would be ignored, or",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "float32",
            "whose optim.schedule, warmup_steps and min_lr_share decide",
        ),
        ({"activation_checkpointing": {}}, "float32", "optim.activation_checkpointing"),
        ({"amp": {"enabled": True}}, "float32", "the section amp"),
        ({"torch_autocast": {"enabled": True}}, "float32", "the section torch_autocast"),
        ({"train_batch_size": 64}, "float32", 'train_batch_size must be "auto"'),
        ({"train_micro_batch_size_per_gpu": 4}, "float32", 'must be "auto"'),
        ({"gradient_accumulation_steps": 8}, "float32", 'must be "auto"'),
        ({"gradient_cliping": 1.0}, "float32", "did you mean 'gradient_clipping'?"),
        ({"prescale_gradients": True}, "float32", "'prescale_gradients' is not supported here"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "bfloat16", "gradients are accumulated in fp32"),
        ({"communication_data_type": "fp16"}, "bfloat16", "communication_data_type is fp16, which overflows"),
        ({"steps_per_print": "often"}, "float32", 'steps_per_print is "often": give a whole number'),
        ({"zero_optimization": ...}, "float32", "zero_optimization.stage is null; give 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "float32", 'zero_optimization.stage is "3"'),
        ({"zero_optimization": {"stage": True}}, "float32", "zero_optimization.stage is true"),
        (
            {"zero_optimization": {"stage": 2, "reduce_buket_size": 3}},
            "float32",
            "did you mean 'reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            "float32",
            "zero_optimization.reduce_bucket_size: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            "float32",
            "is an old name: write offload_optimizer",
        ),
        ({"zero_optimization": {"stage": "auto"}}, "float32", 'zero_optimization.stage is "auto"'),
        (
            {"zero_optimization": {"stage": 3, "contiguous_gradients": "auto"}},
            "float32",
            'contiguous_gradients\' cannot be "auto"',
        ),
        ([1], "float32", "holds no object"),
        ("text", "float32", "holds no object"),
    ],
)
def test_a_conflict_names_file_key_and_both_values(resolved, tmp_path, change, dtype, words):
    with pytest.raises(RecipeError) as raised:
        resolved(change, dtype)
    line = str(raised.value)
    assert words in line and str(tmp_path / "ds.json") in line and "\n" not in line


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    for name, content, words in (
        ("twice.json", b'{"bf16": {}, "bf16": {}}', "'bf16' is given twice"),
        ("cut.json", b'{"bf16": ', "line 1: Expecting value"),
        ("bytes.json", b"\xff\xfe", "cannot be read"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=words):
            deepspeed_config.resolve(recipe(str(path)), 64)
    for name in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(RecipeError):
            deepspeed_config.resolve(recipe(str(name)), 64)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.floats(allow_nan=False),
    st.sampled_from(["auto", "cpu", ""]),
)
NAMES = st.sampled_from(["enabled", "stage", "device", "offload_optimizer", "x"])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        [
            "gradient_clipping",
            "bf16",
            "fp16",
            "data_types",
            "zero_optimization",
            "train_batch_size",
            "optimizer",
            "aio",
            "steps_per_print",
            "communication_data_type",
            "anything",
        ]
    ),
    VALUES,
)
def test_any_value_for_any_section_is_resolved_or_one_line(resolved, key, value):
    try:
        resolved({key: value})
    except RecipeError as error:
        assert "\n" not in str(error)
