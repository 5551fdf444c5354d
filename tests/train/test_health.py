"""Which steps are applied: the statistics of the gradient norm, and a spike in real training."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipe.config import HealthConfig, LossConfig, Recipe, load_recipe
from recipe.stages import losses_of
from stream import Plan
from tests.train.ranks import Server
from tests.train.tiny import workspace
from train.engine import Engine
from train.health import Health


@pytest.fixture(scope="module")
def server():
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("health"))


def limit_of(norms: list[float], sigma: float) -> float:
    """Median and 1.4826 x median absolute deviation (at least 5 % of the median), by numpy."""
    centre = np.median(norms)
    return float(centre + sigma * max(1.4826 * np.median(np.abs(np.array(norms) - centre)), 0.05 * centre))


def accepted(norms: list[float], **settings) -> Health:
    health = Health(HealthConfig(**settings))
    assert all(health.reason_to_skip(1.0, norm) is None for norm in norms)
    return health


# Norms that spread, and norms that hardly vary, where the floor under the deviation counts.
SPREAD = np.random.default_rng(0).uniform(0.8, 1.2, 32).tolist()
STEADY = [1.0 + 1e-4 * (i % 5) for i in range(32)]


@pytest.mark.parametrize("norms", [SPREAD, STEADY], ids=["spread", "steady"])
@pytest.mark.parametrize("sigma", [3.0, 8.0])
def test_a_spike_lies_beyond_so_many_robust_deviations(norms, sigma):
    limit = limit_of(norms, sigma)
    below, above = accepted(norms, spike_sigma=sigma), accepted(norms, spike_sigma=sigma)
    assert below.reason_to_skip(1.0, limit * (1 - 1e-9)) is None and below.skipped == 0
    reason = above.reason_to_skip(1.0, limit * (1 + 1e-9))
    assert "is a spike (median" in reason and (above.skipped, above.consecutive) == (1, 1)
    assert list(above.norms) == norms, "a refused norm is no part of what the next one is compared with"
    assert above.reason_to_skip(1.0, norms[0]) is None and (above.skipped, above.consecutive) == (1, 0)


def test_31_accepted_steps_are_too_few_to_call_anything_a_spike():
    health = accepted(SPREAD[:31])
    assert health.reason_to_skip(1.0, 1e6) is None
    assert "is a spike" in accepted(SPREAD).reason_to_skip(1.0, 1e6)


def test_only_the_last_window_of_norms_counts():
    health = accepted([1000.0] * 40 + [1000.0 * 0.97**i for i in range(200)], window=32)
    assert limit_of(list(health.norms), 8.0) < 50 and "is a spike" in health.reason_to_skip(1.0, 50.0)


@pytest.mark.parametrize(
    "loss, norm, told",
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (1.0, math.nan, "gradient is not finite"),
        (1.0, -1.0, "gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_refused_from_the_first_step(loss, norm, told):
    assert Health(HealthConfig()).reason_to_skip(loss, norm) == told


def test_statistics_survive_a_restart():
    health = accepted(SPREAD)
    health.reason_to_skip(1.0, 1e6)
    again = Health(HealthConfig())
    again.load(json.loads(json.dumps(health.state())))
    assert (
        again.state() == health.state()
        and "is a spike" in again.reason_to_skip(1.0, 1e6)
        and again.consecutive == 2
    )


@pytest.mark.slow  # real ranks, 38 steps each
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ["deepspeed=ds_configs/zero1.json", "model.dtype=bfloat16"],
            id="zero1-bf16",
            marks=pytest.mark.long,
        ),
        pytest.param(["deepspeed=ds_configs/zero2.json"], id="zero2", marks=pytest.mark.long),
        pytest.param([], id="zero3"),
    ],
)
def test_a_spike_after_34_steps_changes_nothing_and_training_continues(server, tiny, tmp_path, options):
    """On both ranks of every ZeRO stage: weights and moments stay, utterances are named, the next step is
    applied."""
    options = [
        "optim.steps=37",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "data.valid=[]",
        "log.tensorboard=false",
        "checkpoint.every_steps=100",
        *options,
    ]
    run = server.start([tiny / "stage1.yaml", f"output={tmp_path}", *options], fault=["steep_step", 34, 1e4])
    assert run.wait() == [0, 0], run.text()
    held = {
        (int(rank), when): digest
        for rank, when, digest in re.findall(
            r"held on rank (\d) (before|after|later) ([0-9a-f]{64})", run.text()
        )
    }
    for rank in (0, 1):
        assert held[rank, "before"] == held[rank, "after"] != held[rank, "later"]
    lines = {
        line["step"]: line
        for line in map(json.loads, (tmp_path / "alignment/metrics.jsonl").read_text().splitlines())
        if line["kind"] == "train"
    }
    assert sorted(lines) == list(range(37)) and [step for step in lines if "skipped" in lines[step]] == [34]
    norms = [lines[step]["grad_norm"] for step in range(34)]
    centre = np.median(norms)
    deviation = max(1.4826 * np.median(np.abs(np.array(norms) - centre)), 0.05 * centre)
    assert f"is a spike (median {centre:.3g}, robust deviation {deviation:.3g})" in lines[34]["skipped"]
    assert "grad_norm" not in lines[34] and lines[36]["skipped_steps"] == 1
    (told,) = map(json.loads, (tmp_path / "alignment/skipped.jsonl").read_text().splitlines())
    plan = Plan.open(load_recipe(tiny / "stage1.yaml", options).data, "alignment", 37)
    meant = [plan.indexes[e["corpus"]].read(int(e["row"]))[1]["id"] for e in plan.global_batch(34)]
    assert told["step"] == 34 and sorted(told["ids"]) == sorted(meant)


# ---- the loss that is minimised


@pytest.mark.parametrize(
    "stage, expected", [("alignment", 5 / 2), ("shrinking", 12 / 8 + 0.7 * 5 / 2), ("sft", 12 / 8)]
)
def test_ctc_weight_counts_where_there_are_two_losses(stage, expected):
    """12 nats over 8 target tokens, 5 over 2 transcribed utterances, of the global batch. (In training:
    test_independent.py.)"""
    engine = SimpleNamespace(losses=losses_of(Recipe(stage=stage, loss=LossConfig(ctc_weight=0.7))))
    sums = {name: torch.tensor(value, requires_grad=True) for name, value in (("ce", 12.0), ("ctc", 5.0))}
    loss = Engine.weighted_loss(engine, SimpleNamespace(sums=sums), {"ce": 8.0, "ctc": 2.0})
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.backward()
    assert sums["ce"].grad == (None if stage == "alignment" else torch.tensor(1 / 8))
    if stage != "sft":
        torch.testing.assert_close(sums["ctc"].grad, torch.tensor((1.0 if stage == "alignment" else 0.7) / 2))
