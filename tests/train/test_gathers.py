"""How often ZeRO-3 gathers weights: train/gathers.py against what DeepSpeed's own hooks gather in a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from model.losses import LOSSES
from recipe.config import load_recipe
from recipe.stages import losses_of
from tests.train import tiny
from train import deepspeed_config
from train.dry_run import meta_model
from train.gathers import Coordinator, Limits, ModuleOrder

NEVER = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
CASES = {
    "default": (2, {}, []),
    "no reuse": (2, NEVER, []),
    "no reuse, checkpointing": (2, NEVER, ["optim.activation_checkpointing=true"]),
    "part is reused": (2, {"stage3_max_reuse_distance": 25000, "stage3_prefetch_bucket_size": 0}, []),
    "prefetch keeps": (2, {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 20000}, []),
    "stage 1": (1, NEVER, []),
    "trained encoder": (2, NEVER, ["train.encoder=all"]),
    "last layer of the encoder": (2, NEVER, ["train.encoder=last_1"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.workspace(tmp_path_factory.mktemp("tiny"))


QUICK = ("part is reused", "trained encoder")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_gathered_weights_are_those_of_deepspeed(case, folder, server, tmp_path):
    stage, changes, overrides = CASES[case]
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"] |= changes
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    recipe_path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load((folder / f"stage{stage}.yaml").read_text())
    recipe |= {
        "init_from": "fresh",
        "deepspeed": str(tmp_path / "zero3.json"),
        "output": str(tmp_path / "run"),
    }
    recipe_path.write_text(yaml.safe_dump(recipe))
    overrides = [
        *overrides,
        "optim.steps=3",
        "optim.warmup_steps=1",
        "data.valid=[]",
        "log.tensorboard=false",
    ]

    run = server.start([recipe_path, *overrides], fault=["count_gathers"])
    assert run.wait() == [0, 0], run.text()
    steps = [json.loads(found) for found in re.findall(r"gathered (\{.*?\})", run.text())]
    steps = [step for step in steps if step["step"] > 0]  # DeepSpeed records the order in the first one
    assert len(steps) == 4

    recipe = load_recipe(recipe_path, overrides)
    model = meta_model(recipe)
    section = deepspeed_config.resolve(recipe, model.ctc_head.weight.shape[1])["zero_optimization"]
    uses_ctc = any(LOSSES[name].uses_ctc for name in losses_of(recipe))
    for step in steps:
        coordinator = Coordinator(ModuleOrder(model, uses_ctc), Limits.of(section))
        expected = sum(coordinator.micro_batch() for _ in range(step["batches"]))
        assert step["elements"] == pytest.approx(expected, rel=0.02), step
