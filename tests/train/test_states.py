"""Model states per rank as the dry run prints them, against hand-made values and what DeepSpeed holds."""

from __future__ import annotations

import json
import re

import pytest

from tests.train.ranks import Server
from tests.train.tiny import workspace
from train.memory import states_per_rank


@pytest.mark.parametrize(
    ("arguments", "gigabytes"),
    [
        # All of 7.5 billion trained in 16 bits on 64 ranks (the example of Rajbhandari et al., 2020, with
        # gradients in fp32).
        ((7.5e9, 0, 64, 1, 2), 15 + 30 + 90 / 64),
        ((7.5e9, 0, 64, 2, 2), 15 + 120 / 64),
        ((7.5e9, 0, 64, 3, 2), 135 / 64),
        # Frozen weights have neither gradients nor states.
        ((0.2e9, 8.6e9, 8, 1, 2), 17.6 + 0.8 + 0.3),
        ((0.2e9, 8.6e9, 8, 2, 2), 17.6 + 0.4),
        ((0.2e9, 8.6e9, 8, 3, 2), 2.2 + 0.4),
        ((1e9, 1e9, 1, 1, 4), 8 + 4 + 12),
        ((1e9, 1e9, 1, 3, 4), 8 + 4 + 12),
    ],
)
def test_bytes_of_a_rank(arguments, gigabytes):
    assert states_per_rank(*arguments) == pytest.approx(gigabytes * 1e9)


@pytest.mark.long  # two starts of real ranks that nothing else needs: 50 s
def test_a_rank_holds_what_the_dry_run_says(tmp_path):
    folder = workspace(tmp_path / "tiny")
    with Server() as server:
        for zero, dtype in ((1, "bfloat16"), (3, "float32")):
            run = server.start(
                [
                    folder / "stage1.yaml",
                    f"output={tmp_path / str(zero)}",
                    "optim.steps=1",
                    "data.valid=[]",
                    "log.tensorboard=false",
                    f"deepspeed=ds_configs/zero{zero}.json",
                    f"model.dtype={dtype}",
                ],
                fault=["tell_states"],
            )
            assert run.wait() == [0, 0], run.text()
            told = [json.loads(found) for found in re.findall(r"states (\{.*?\})", run.text())]
            assert {held["rank"] for held in told} == {0, 1}
            for held in told:
                expected = states_per_rank(
                    held["trained"], held["frozen"], 2, zero, 2 if dtype == "bfloat16" else 4
                )
                gradients = 4 * held["trained"] / (1 if zero == 1 else 2)
                assert held["weights"] + held["masters"] + held["moments"] == pytest.approx(
                    expected - gradients, rel=0.01
                )
