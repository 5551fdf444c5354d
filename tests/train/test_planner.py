"""The plan of a stage on named GPUs, against closed formulas and hand-made values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from core.options import RecipeError
from recipe.config import load_recipe
from train import dry_run
from train import run as entry
from train.dry_run import meta_model
from train.gpus import GPU, gpu_named, peak_of
from train.memory import LiveBytes, activation_bytes, fused_attention
from train.planner import GLOO, Planner, check_options, epoch_line

GIB = 2**30


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Overrides for sizes that are traced in a moment: a config.json is all that a plan reads."""
    folder = tmp_path_factory.mktemp("llm")
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=3000, tie_word_embeddings=True).save_pretrained(
        folder
    )
    return ["model.encoder.name=whisper-tiny", f"model.llm.name={folder}"]


@pytest.fixture
def planner(small):
    def make(stage: int, count: int, gpu: str, *overrides: str) -> Planner:
        recipe = load_recipe(f"train/recipes/stage{stage}.yaml", [*small, *overrides])
        return Planner(recipe, meta_model(recipe), count, gpu)

    return make


def test_live_bytes_follow_storages_not_views():
    live = LiveBytes()
    with live:
        x = torch.empty(1000, device="meta")
        y = x.view(10, 100).t()
        z = torch.empty(500, device="meta", dtype=torch.bfloat16)
        assert live.now == 4000 + 1000
        del x
        assert live.now == 5000  # y is a view of it
        del y
        assert live.now == 1000
        del z
    assert (live.now, live.peak) == (0, 5000)


def test_live_bytes_of_a_chain_of_layers():
    """ReLU keeps its output, a frozen linear layer nothing: n layers keep n outputs of both until backward."""
    layers, rows, width = 5, 7, 64
    net = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width, device="meta"), nn.ReLU()) for _ in range(layers))
    )
    net.requires_grad_(False)
    live = LiveBytes()
    live.exclude(net.parameters())
    with live:
        x = torch.empty(rows, width, device="meta", requires_grad=True)
        out = net(x)
        one = 4 * rows * width
        assert live.now == one * (1 + layers)
        out.sum().backward()
    assert live.peak <= one * (1 + layers + 3)  # the gradient of an output, and of its input


def test_fused_attention_stores_no_scores():
    live = LiveBytes()
    with live, fused_attention(on_gpu=True):
        query = torch.empty(1, 2, 4096, 8, device="meta", requires_grad=True)
        out = nn.functional.scaled_dot_product_attention(query, query, query)
        out.sum().backward()
    assert live.peak < 4096 * 4096
    assert nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).sum() == 4


def test_activations_and_plan_follow_the_trained_part_of_the_encoder(small):
    sizes, plans = [], []
    for choice in ("none", "last_2", "all"):
        for checkpointing in (True, False):
            overrides = [f"train.encoder={choice}", f"optim.activation_checkpointing={checkpointing}".lower()]
            recipe = load_recipe("train/recipes/stage1.yaml", [*small, *overrides])
            model = meta_model(recipe)
            plans.append(Planner(recipe, model, 8, "a100-80"))
            sizes.append(
                activation_bytes(model, recipe, micro_batch_seconds=240, tokens=0, zero_stage=2, on_gpu=True)
            )
    none, last, everything = sizes[1], sizes[3], sizes[5]
    assert sizes[0] == none < last < everything
    assert sizes[2] < last and sizes[4] < everything, "layers that are computed again keep less"
    # Whisper tiny: of a layer of 4 the attention's four products and the feed-forward's two, width 384.
    layer = 4 * 384 * 384 + 3 * 384 + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert plans[2].trained - plans[0].trained == 2 * layer
    assert plans[4].trained + plans[4].frozen == plans[0].trained + plans[0].frozen
    assert plans[0].step_flops() < plans[2].step_flops() < plans[4].step_flops()
    assert plans[0].network_bytes(3, 1) < plans[2].network_bytes(3, 1)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(small):
    recipe = load_recipe("train/recipes/stage2.yaml", [*small, "optim.activation_checkpointing=false"])
    few, many = (
        activation_bytes(
            meta_model(recipe), recipe, micro_batch_seconds=seconds, tokens=60 * seconds, zero_stage=2
        )
        for seconds in (240, 480)
    )
    # Each phase needs a constant and a part in proportion, so twice the micro-batch needs at most twice as much.
    assert few < many <= 2.02 * few
    recipe.optim.activation_checkpointing = True
    assert (
        activation_bytes(meta_model(recipe), recipe, micro_batch_seconds=480, tokens=28800, zero_stage=2)
        < many
    )


def test_network_volume_is_that_of_ring_collectives(planner):
    plan = planner(2, 4, "h100")
    trained, frozen, encoder = plan.trained, plan.frozen, plan.encoder
    assert 0 < encoder < frozen
    # Hand-made: 3 of 4 parts of each tensor leave a rank. ZeRO-1 and ZeRO-2: all-reduce of bf16 gradients
    # (twice its bytes), all-gather of bf16 weights.
    assert plan.network_bytes(1, 5) == pytest.approx(0.75 * (4 + 2) * trained)
    assert plan.network_bytes(2, 5) == pytest.approx(0.75 * (5 * 4 + 2) * trained)
    # ZeRO-3, fewer parameters than stage3_max_reuse_distance: a micro-batch gathers the weights once, and the
    # frozen encoder's layers stay for the next ones. Small tensors stay, which are few.
    assert trained + frozen < 0.5e9
    layers = sum(p.numel() for p in plan.model.encoder.layers.layers.parameters())
    gathered = trained + frozen - 4 / 5 * layers
    assert plan.network_bytes(3, 5) == pytest.approx(0.75 * 5 * 2 * (trained + gathered), rel=0.01)
    assert plan.network_bytes(3, 5, GLOO) == pytest.approx(0.75 * 5 * 2 * (2 * trained + gathered), rel=0.01)
    assert planner(1, 1, "h100").network_bytes(1, 5) == 0


def test_zero3_gathers_weights_again_beyond_the_reuse_distance(planner, tmp_path):
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(config))
    plan = planner(2, 4, "h100", f"deepspeed={path}")
    trained, frozen, encoder = plan.trained, plan.frozen, plan.encoder
    # The frozen encoder has no backward. The LLM's table serves the CTC head, the embeddings and the output
    # head: three times in forward, and once in backward, where the head's gradient exists already.
    table = 3000 * 256
    rest = trained + frozen - encoder - table
    expected = 0.75 * 5 * 2 * (trained + encoder + 2 * rest + 4 * table)
    assert plan.network_bytes(3, 5) == pytest.approx(expected, rel=0.01)


def test_the_largest_micro_batch_fits_and_one_more_clip_does_not(planner):
    plan = planner(2, 1, "l4", "data.batch_seconds=3000")
    plan.gpu = GPU(1e12, 2, "a small one")
    choice = plan.choice(2)
    limit = 0.9 * 2 * GIB
    assert 0 < choice.micro_batch_seconds < 3000
    assert choice.memory.total <= limit
    more = plan.activations(choice.micro_batch_seconds + plan.recipe.data.max_seconds, 2)
    assert plan.memory(2, more).total > limit


def test_the_proposal_sends_the_fewest_bytes(planner):
    plan = planner(2, 8, "a100-80")
    plan.activations = lambda seconds, zero_stage: seconds * GIB / 120
    # With one micro-batch ZeRO-1 and ZeRO-2 send the same, and ZeRO-2 needs less memory.
    assert plan.proposal(plan.choices()).zero_stage == 2
    plan.recipe.data.batch_seconds = 8 * 50000.0
    assert plan.proposal(plan.choices()).zero_stage == 1


def test_a_model_that_fits_on_no_gpu_alone_gets_zero3():
    recipe = load_recipe(
        "train/recipes/stage2.yaml", ["model.encoder.name=whisper-tiny", "data.batch_seconds=240"]
    )
    plan = Planner(recipe, meta_model(recipe), 8, "l4")  # 16 GB of weights, 20 GiB usable
    plan.activations = lambda seconds, zero_stage: 4 * GIB * seconds / 30
    choices = plan.choices()
    assert choices[2].micro_batch_seconds == 30  # a GPU's part of the global batch
    assert plan.proposal(choices).zero_stage == 3
    assert not choices[0].fits


def test_offload_is_proposed_where_nothing_else_fits():
    """Llama-3.3-70B in bf16 is 141 GB: on two GPUs of 80 GiB a half does not fit beside the buffers."""
    recipe = load_recipe(
        "train/recipes/stage2.yaml",
        ["model.encoder.name=whisper-tiny", "model.llm.name=llama-3.3-70b", "data.batch_seconds=240"],
    )
    model = meta_model(recipe)
    for count, config in ((2, "ds_configs/zero3_offload.json"), (8, "ds_configs/zero3.json")):
        plan = Planner(recipe, model, count, "a100-80")
        plan.activations = lambda seconds, zero_stage: 4 * GIB * seconds / 30
        choices = plan.choices()
        assert plan.proposal(choices).config == config
        total = plan.trained + plan.frozen
        # ZeRO-3 without offload: weights, gradients and optimizer states in parts; with it only gradients.
        assert choices[2].memory.states == pytest.approx((2 * total + 16 * plan.trained) / count)
        assert choices[3].memory.states == pytest.approx(4 * plan.trained / count)
        assert plan.host_bytes() == pytest.approx((2 * total + 16 * plan.trained) / count)
    assert f"deepspeed={config}" in plan._proposal_line(choices[2])


@pytest.mark.parametrize(
    ("epochs", "warning"), [(0.5, "below 1"), (1.0, None), (20.0, None), (20.2, None), (20.6, "above 20")]
)
def test_epochs_out_of_bounds_are_warned_about(epochs, warning):
    line = epoch_line("train", epochs)
    assert (warning in line) if warning else "warning" not in line


def test_gpus_by_name_and_by_device():
    assert gpu_named("A100-40").memory == 40 and gpu_named("RTX 4090").peak == 165e12
    assert peak_of("NVIDIA A100-PCIE-40GB") == 312e12 and peak_of("AMD Instinct MI300X") == 1307e12
    assert peak_of("NVIDIA L4") == 121e12 and peak_of("NVIDIA L40S") == 362e12
    with pytest.raises(RecipeError, match="did you mean 'h100'"):
        gpu_named("h1000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((8, None, None), "together"),
        ((None, "h100", None), "together"),
        ((0, "h100", None), "1 or more"),
        ((8, "v100", None), "not known"),
        ((None, None, -1.0), "above 0"),
        ((None, None, float("nan")), "above 0"),
    ],
)
def test_wrong_options_of_a_plan_give_one_line(options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        check_options(*options)
    assert "\n" not in str(caught.value)


def test_a_plan_needs_a_dry_run(capsys):
    assert entry.main(["train/recipes/stage1.yaml", "--gpus", "8", "--gpu", "h100"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_the_dry_run_prints_the_plan(small, capsys):
    arguments = ["train/recipes/stage2.yaml", *small, "--dry-run", "--gpus", "16", "--gpu", "a100-80"]
    assert entry.main([*arguments, "--data-hours", "3"]) == 0
    out = capsys.readouterr().out
    for text in (
        "wall-clock",
        "GPU hours",
        "largest micro-batch",
        "checkpoint:",
        "GB sent a step",
        "proposal:",
    ):
        assert text in out
    assert "above 20" in out and "an assumption" in out and "lower it" not in out
    assert entry.main([*arguments, "--data-hours", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "warning: data.batch_seconds=3600, one step, is 200% of an epoch: lower it" in out


def test_a_model_that_fails_on_sizes_alone_still_gets_its_dry_run(small, capsys, monkeypatch):
    def fails(*args, **options):
        raise NotImplementedError("no kernel for meta tensors")

    monkeypatch.setattr(dry_run, "activation_bytes", fails)
    arguments = ["train/recipes/stage2.yaml", *small, "--dry-run", "--gpus", "2", "--gpu", "l4"]
    assert entry.main(arguments) == 0
    out = capsys.readouterr().out
    assert "no plan" in out and "no kernel for meta tensors" in out and "arithmetic:" in out
