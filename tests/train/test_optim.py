"""Learning rates by closed formula and by transformers' schedules; which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from recipe.config import OptimConfig
from tests.model.conftest import build, folders  # noqa: F401  the fixture
from train import optim

STEPS, WARMUP, PEAK = 100, 20, 3e-4


def rates(**settings) -> list[float]:
    config = OptimConfig(steps=STEPS, warmup_steps=WARMUP, lr_adapters=PEAK, **settings)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    groups = optim.parameter_groups({"adapters": [("w", parameter)]}, config)
    optimizer = torch.optim.AdamW(groups)
    found = []
    for step in range(STEPS):
        told = optim.set_lr(optimizer, config, step)
        assert told == {"adapters": optimizer.param_groups[0]["lr"]}
        found.append(told["adapters"])
    return found


@pytest.mark.parametrize("least", [0.0, 0.05])
def test_cosine_is_the_closed_formula(least):
    expected = [PEAK * (s + 1) / WARMUP for s in range(WARMUP)]
    expected += [
        PEAK * (least + (1 - least) * (1 + math.cos(math.pi * (s - WARMUP) / (STEPS - WARMUP))) / 2)
        for s in range(WARMUP, STEPS)
    ]
    assert rates(schedule="cosine", min_lr_share=least) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "schedule, theirs",
    [
        ("cosine", lambda o: get_cosine_schedule_with_warmup(o, WARMUP, STEPS)),
        ("linear", lambda o: get_linear_schedule_with_warmup(o, WARMUP, STEPS)),
        ("constant", lambda o: get_constant_schedule_with_warmup(o, WARMUP)),
    ],
)
def test_schedules_agree_with_those_of_transformers(schedule, theirs):
    """From the end of the warm-up. (In it, ours is one step ahead: theirs gives the first step a rate of
    0.)"""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, expected = theirs(optimizer), []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = rates(schedule=schedule, min_lr_share=0.0)
    assert ours[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-9, abs=1e-18)
    assert ours[:WARMUP] == pytest.approx(expected[1 : WARMUP + 1], rel=1e-9)


@pytest.mark.parametrize(
    "stage, trains",
    [
        ("alignment", ("adapters", "ctc_head")),
        ("shrinking", ("adapters", "ctc_head", "lora")),
        ("sft", ("lora",)),
    ],
)
def test_weights_decay_and_norms_and_biases_do_not(folders, stage, trains):  # noqa: F811
    model = build(folders)
    model.set_stage(stage)
    config = OptimConfig(lr_adapters=1.0, lr_ctc_head=2.0, lr_lora=3.0, weight_decay=0.125)
    groups = optim.parameter_groups(model.parameter_groups(), config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {names[id(p)]: group for group in groups for p in group["params"]}
    assert seen.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(seen), "each parameter once"
    for name, group in seen.items():
        still = name.endswith(".bias") or "norm" in name or name == "ctc_head.blank_row"
        assert group["weight_decay"] == (0.0 if still else 0.125), name
        rate = 3.0 if "lora_" in name else 2.0 if name.startswith("ctc_head.") else 1.0
        assert (group["lr"], group["peak_lr"]) == (rate, rate), name
    assert [group["name"] for group in groups if group["weight_decay"]] == [
        name for name in trains if name != "ctc_head"
    ]


def test_the_shape_that_counts_is_the_whole_ones():
    """A ZeRO-3 partition is flat; `ds_shape` holds the parameter's own shape."""
    weight, bias = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(3))
    weight.ds_shape, bias.ds_shape = torch.Size([2, 3]), torch.Size([3])
    groups = optim.parameter_groups({"lora": [("w", weight), ("b", bias)]}, OptimConfig())
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("lora", 0.01, 1),
        ("lora_no_decay", 0.0, 1),
    ]


def test_the_update_is_adamws_with_the_recipes_numbers():
    """Two steps against the formula of Loshchilov and Hutter (2019), algorithm 2."""
    config = OptimConfig(
        betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, lr_lora=0.01, warmup_steps=0, schedule="constant"
    )
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimizer = optim.build(
        optim.parameter_groups({"lora": [("w", parameter)]}, config), config, offload=False
    )
    w, m, v = parameter.detach().clone(), 0.0, 0.0
    for step, gradient in enumerate(
        (torch.tensor([[0.5, 1.0]]).double(), torch.tensor([[-1.0, 0.25]]).double())
    ):
        optim.set_lr(optimizer, config, step)
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        hat_m, hat_v = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        w = w - 0.01 * (hat_m / (hat_v.sqrt() + 1e-6) + 0.1 * w)
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=0)
