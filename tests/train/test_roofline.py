"""Lower bounds of a micro-batch's time, against sizes counted here."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from recipe.config import load_recipe
from train.dry_run import meta_model
from train.planner import Planner
from train.roofline import network_seconds, parts_of

WIDTH, ROWS, LAYERS, MIDDLE = 256, 3000, 3, 512


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> Planner:
    """Stage 2 with LoRA, a frozen encoder and activation checkpointing, on 16 GPUs."""
    folder = tmp_path_factory.mktemp("llm")
    sizes = dict(hidden_size=WIDTH, intermediate_size=MIDDLE, num_hidden_layers=LAYERS, num_attention_heads=4)
    LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=ROWS, tie_word_embeddings=True).save_pretrained(
        folder
    )
    overrides = ["model.encoder.name=whisper-tiny", f"model.llm.name={folder}"]
    recipe = load_recipe("train/recipes/stage2.yaml", overrides)
    return Planner(recipe, meta_model(recipe), 16, "h100")


def test_each_product_reads_its_matrix_once(planner):
    parts = {part.name: part for part in parts_of(planner, 120.0)}
    llm = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MIDDLE)
    assert parts["llm"].weight_bytes == pytest.approx(2 * 2 * llm)  # bf16; forward, and the input's gradient
    assert parts["recomputed"].weight_bytes == pytest.approx(2 * llm)
    assert parts["lm_head"].weight_bytes == pytest.approx(2 * 2 * WIDTH * ROWS)
    assert parts["lora"].weight_bytes == pytest.approx(3 / 2 * 2 * 2 * planner.flops.counts["lora"])
    assert parts["encoder"].weight_bytes == pytest.approx(2 * planner.flops.counts["encoder"])
    more = {part.name: part for part in parts_of(planner, 240.0)}
    assert more["llm"].weight_bytes == pytest.approx(parts["llm"].weight_bytes)
    assert more["llm"].flops == pytest.approx(2 * parts["llm"].flops)


def test_the_parts_sum_to_the_planned_step(planner):
    parts = parts_of(planner, planner.recipe.data.batch_seconds)
    assert sum(part.flops for part in parts) == pytest.approx(planner.step_flops())
    # H100: 989 TFLOP/s and 3.35 TB/s; A100: 312 TFLOP/s and 2.039 TB/s.
    part = parts[0]
    assert part.seconds("h100") == pytest.approx((part.flops / 989e12, part.weight_bytes / 3.35e12))
    assert part.seconds("a100-80") == pytest.approx((part.flops / 312e12, part.weight_bytes / 2.039e12))


def test_eight_adapters_carry_what_leaves_a_node(planner):
    sent = planner.network_bytes(3, 1)
    assert network_seconds(planner, "h100") == pytest.approx((sent / 450e9, sent / 400e9))
    assert network_seconds(planner, "a100-80") == pytest.approx((sent / 300e9, sent / 200e9))
