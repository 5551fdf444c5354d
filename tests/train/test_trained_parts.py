"""Training the encoder and the whole LLM (`train` of a recipe) on two ranks under ZeRO-1/2/3 against the plain
PyTorch loop of independent.py, and what recipes may and may not ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import artifact
from model.config import SoundwaveConfig
from model.soundwave import Soundwave
from recipe.config import RecipeError, load_recipe
from stream import sample_log
from stream.cache import main as cache
from tests.model import tiny
from tests.train import independent
from tests.train.test_independent import corpus
from tests.train.tiny import losses, weights
from train.checkpoint.compatibility import recipe_differences, recipe_facts
from train.run import main as train

STEPS, CTC_WEIGHT = 4, 0.7
RATES = {"adapters": 1e-3, "ctc_head": 1e-3, "lora": 2e-4, "encoder": 3e-4, "llm": 1e-4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Base models, data, a model folder of stage 2 with LoRA and one without, and a recipe for each."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    encoder, llm = tiny.whisper(root / "whisper"), tiny.llm(root / "llm", "llama")
    corpus(root / "train")
    for name, rank in (("lora", 4), ("whole", 0)):
        torch.manual_seed(3)
        config = SoundwaveConfig()
        config.encoder.name, config.llm.name, config.llm.lora_r = encoder, llm, rank
        config.alignment.dropout = config.shrinking.dropout = 0.0
        model = Soundwave.build(config)
        model.set_stage("shrinking")
        with torch.no_grad():
            for group in model.parameter_groups().values():
                for parameter_name, parameter in group:
                    if "lora_B" in parameter_name or parameter_name.startswith("shrinking.out"):
                        parameter.normal_(0, 0.1)
        artifact.save(model, root / f"start-{name}")
        recipe = {
            "stage": "shrinking",
            "output": str(root / "run"),
            "init_from": str(root / f"start-{name}"),
            "seed": 5,
            "model": {
                "encoder": {"name": encoder},
                "alignment": {"dropout": 0.0},
                "shrinking": {"dropout": 0.0},
                "llm": {"name": llm, "lora_r": rank},
            },
            "data": {
                "train": [{"shards": str(root / "train")}],
                "batch_seconds": 9.0,
                "micro_batch_seconds": 3.0,
                "workers": 0,
            },
            "optim": {
                "steps": STEPS,
                "warmup_steps": 2,
                "weight_decay": 0.05,
                "grad_clip": 0.5,
                "lr_encoder": RATES["encoder"],
                "lr_llm": RATES["llm"],
            },
            "loss": {"ctc_weight": CTC_WEIGHT},
            "log": {"sample_ids": True, "tensorboard": False},
            "checkpoint": {"every_steps": 2},
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return root


CASES = {
    "last": ("lora", ["train.encoder=last_1"], {"encoder": "layers.1."}),
    "encoder": ("lora", ["train.encoder=all", "train.llm=none"], {"encoder": ""}),
    "llm": ("whole", ["train.llm=all", "train.encoder=last_1"], {"encoder": "layers.1.", "llm": True}),
    "sft": (
        "whole",
        ["stage=sft", "train.llm=all", "train.encoder=last_2"],
        {"encoder": "layers.", "llm": True},
    ),
}
LONG = [
    pytest.param(name, zero, checkpointing, marks=pytest.mark.long)
    for name in CASES
    for zero, checkpointing in ((1, False), (2, False), (3, False), (3, True))
]


def start_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def plain_weights(network: independent.Network) -> dict[str, torch.Tensor]:
    """The loop's weights by file and name of a model folder."""
    found = {}
    for name, value in network.named_parameters():
        value = value.detach()
        if name.startswith("whisper."):
            found[f"encoder.safetensors:encoder.layers.{name.removeprefix('whisper.')}"] = value
        elif name.startswith("llm.") and name.endswith((".a", ".b")):
            place = name.removeprefix("llm.")[:-2]
            found[
                f"lora/adapter_model.safetensors:base_model.model.{place}.lora_{name[-1].upper()}.weight"
            ] = value
        elif name.startswith("llm."):
            found[f"llm.safetensors:{name}"] = value
        else:
            found[f"adapters.safetensors:{name.replace('__', '.')}"] = value
    return found


@pytest.mark.slow  # a start of two real ranks, and the same steps by the plain loop
@pytest.mark.parametrize(("case", "zero", "checkpointing"), [("last", 3, False), *LONG])
def test_losses_and_weights_are_those_of_a_plain_loop(server, root, case, zero, checkpointing, tmp_path):
    start, choices, more = CASES[case]
    run = server.start(
        [
            root / f"{start}.yaml",
            f"output={tmp_path}",
            f"deepspeed=ds_configs/zero{zero}.json",
            f"optim.activation_checkpointing={str(checkpointing).lower()}",
            *choices,
        ],
        ranks=2,
    )
    assert run.wait() == [0, 0], run.text()
    stage = "sft" if case == "sft" else "shrinking"
    folder, begin = tmp_path / stage, root / f"start-{start}"
    steps, clips = sample_log.read(folder), independent.read_corpus(root / "train")
    network = independent.Network(begin, str(root / "whisper"), str(root / "llm"))
    before = {name: value.clone() for name, value in plain_weights(network).items()}
    batches = [
        [name for rank in sorted(steps[step]) for part in steps[step][rank] for name in part]
        for step in range(STEPS)
    ]
    expected = independent.train(
        network,
        clips,
        batches,
        stage=3 if stage == "sft" else 2,
        ctc_weight=CTC_WEIGHT,
        rates=RATES,
        betas=(0.9, 0.98),
        eps=1e-8,
        decay=0.05,
        warmup=2,
        least=0.05,
        clip=0.5,
        lora="train.llm=none" not in choices,
        **more,
    )
    found = losses(folder)
    torch.testing.assert_close(
        torch.tensor([found[step] for step in range(STEPS)]),
        torch.tensor(expected),
        rtol=2e-5,
        atol=0,
    )
    ours, theirs = weights(folder), plain_weights(network)
    moved = {name: float((theirs[name] - before[name]).norm()) for name in before}
    changed = {name for name, way in moved.items() if way}
    tuned = {name for name in ours if name.startswith(("encoder.", "llm."))}
    assert tuned == {name for name in changed if name.startswith(("encoder.", "llm."))}
    assert changed <= ours.keys()
    for name in ours:
        apart = float((theirs[name] - ours[name]).norm())
        # The keys' bias has no gradient but rounding, which Adam blows up.
        bias = name.endswith(("qkv.bias", "key_value.bias", "k_proj.bias"))
        assert apart <= (0.1 if bias else 2e-3) * moved[name] + 1e-7, name


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    "choices", [["train.encoder=lora", "model.encoder.lora_r=2"], ["train.encoder=all", "train.llm=none"]]
)
def test_a_killed_run_resumes_bit_by_bit(server, root, zero, choices, tmp_path):
    """What the encoder learnt is in the checkpoint; the rest of it comes from its own files."""
    results = []
    for name, halves in (("once", [STEPS]), ("twice", [2, STEPS])):
        for steps in halves:
            arguments = [f"output={tmp_path / name}", f"deepspeed=ds_configs/zero{zero}.json", *choices]
            constant = [
                "optim.schedule=constant",
                f"optim.steps={steps}",
                "checkpoint.accept_changes=[recipe]",
            ]
            run = server.start([root / "lora.yaml", *arguments, *constant], ranks=2)
            assert run.wait() == [0, 0], run.text()
        results.append((losses(tmp_path / name / "shrinking"), weights(tmp_path / name / "shrinking")))
    (once, first), (twice, second) = results
    assert once == twice and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.startswith("encoder.safetensors") for name in first)


# ---- recipes


def error_of(arguments: list[str], capsys, command=train) -> str:
    capsys.readouterr()
    assert command(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


CONFLICTS = [
    (["train.encoder=last_0"], "train.encoder is 'last_0': give none, lora, all or last_N, e.g. last_4"),
    (["train.encoder=last_9"], "train.encoder is last_9, and the encoder has 2 layers"),
    (["train.encoder=lora"], "train.encoder is lora, and model.encoder.lora_r is 0"),
    (["train.encoder=last_1", "model.encoder.lora_r=2"], "set train.encoder=lora, or model.encoder.lora_r=0"),
    (["model.encoder.lora_r=2"], "model.encoder.lora_r is 2, and nothing trains it"),
    (["train.llm=all"], "train.llm is all, and model.llm.lora_r is 4: set model.llm.lora_r=0"),
    (["train.llm=many"], "train.llm is 'many': give none, lora or all"),
    (["train.adapters=none", "train.llm=none", "train.ctc_head=none"], "train: nothing of stage 2"),
    (["train.encoder=last_1", "data.cache_features=cache"], "train.encoder=last_1 trains it: set"),
    (["stage=alignment", "train.llm=lora"], "train.llm: stage 1 (alignment) does not load the LLM"),
    (["stage=alignment", "train.adapters=shrinking"], "stage 1 (alignment) has no shrinking adapter"),
    (["stage=sft", "train.ctc_head=all"], "train.ctc_head is all, and no loss of stage 3 (sft) trains it"),
    (["train.enc=all"], "unknown key 'train.enc'; did you mean 'train.encoder'?"),
]


@pytest.mark.parametrize(("overrides", "words"), CONFLICTS)
def test_conflicts_are_one_line_in_the_dry_run(root, overrides, words, capsys, tmp_path):
    arguments = [str(root / "lora.yaml"), f"output={tmp_path}", *overrides, "--dry-run"]
    assert words in error_of(arguments, capsys)


def test_conflicts_without_lora(root, capsys, tmp_path):
    arguments = [str(root / "whole.yaml"), f"output={tmp_path}", "--dry-run"]
    assert "train.llm is lora, and model.llm.lora_r is 0" in error_of([*arguments, "train.llm=lora"], capsys)
    compared = error_of([*arguments, "train.llm=all", "loss.weights.kl=0.5"], capsys)
    assert "the loss 'kl' compares with the LLM's own weights" in compared


def test_features_are_not_cached_over_a_trained_encoder(root, capsys, tmp_path):
    """Neither for this stage nor, from the folder of an earlier one that trained it, for a later stage."""
    config = SoundwaveConfig()
    config.encoder.name, config.llm.name, config.llm.lora_r = str(root / "whisper"), str(root / "llm"), 4
    config.alignment.dropout = config.shrinking.dropout = 0.0
    model = Soundwave.build(config)
    model.tuned.add("encoder.layers.layer_norm.weight")
    start = artifact.save(model, tmp_path / "start")
    arguments = [str(root / "lora.yaml"), f"output={tmp_path}", f"data.cache_features={tmp_path / 'cache'}"]
    later = error_of([*arguments, "stage=sft", f"init_from={start}", "--dry-run"], capsys)
    assert f"{start} holds a trained encoder" in later and "data.cache_features=null" in later
    assert "train.encoder=all trains it" in error_of([*arguments, "train.encoder=all"], capsys, cache)


def test_the_dry_run_counts_what_is_trained(root, capsys, tmp_path):
    """Parameters, states and the plan follow the choice."""
    shown = {}
    for choice in ("none", "last_1", "all"):
        capsys.readouterr()
        arguments = [str(root / "lora.yaml"), f"output={tmp_path}", f"train.encoder={choice}", "--dry-run"]
        assert train([*arguments, "--gpus", "2", "--gpu", "a100-80"]) == 0
        lines = capsys.readouterr().out.splitlines()
        row = next(line.split() for line in lines if line.startswith("encoder "))
        shown[choice] = int(row[1].replace(",", "")), int(row[2].replace(",", ""))
        assert any(line.startswith("proposal: deepspeed=") for line in lines)
    layer = 4 * 24 * 24 + 3 * 24 + 2 * 24 * 48 + 48 + 24 + 4 * 24  # attention, feed-forward, two norms
    total = sum(shown["none"])
    assert shown == {
        "none": (0, total),
        "last_1": (layer, total - layer),
        "all": (total - 1500 * 24, 1500 * 24),
    }


def test_a_choice_that_is_the_stages_own_changes_no_recipe(root, tmp_path):
    def facts(*overrides: str) -> dict:
        return recipe_facts(load_recipe(root / "lora.yaml", [f"output={tmp_path}", *overrides]))

    plain = facts()
    same = ["train.encoder=none", "train.adapters=all", "train.ctc_head=all", "train.llm=lora"]
    assert recipe_differences(plain, facts(*same)) == []
    assert recipe_differences(plain, facts("optim.lr_llm=1")) == [], "has no effect on this stage"
    old = {key: value for key, value in plain.items() if not key.startswith(("train.", "model.encoder.lora"))}
    assert recipe_differences(old, plain) == [], "of a checkpoint made before there was a choice"
    tuned = facts("train.encoder=last_1")
    assert recipe_differences(plain, tuned) == [
        "optim.lr_encoder: 1e-05 -> 0.0003",
        "train.encoder: None -> last_1",
    ]
    assert recipe_differences(tuned, facts("train.encoder=last_1", "optim.lr_encoder=1")) == [
        "optim.lr_encoder: 0.0003 -> 1.0"
    ]
    adapters = ["stage=sft", "train.adapters=all"]
    assert recipe_differences(facts(*adapters), facts(*adapters, "optim.lr_adapters=1")) == [
        "optim.lr_adapters: 0.001 -> 1.0"
    ], "which has none in stage 3 as it is"


def test_lora_on_the_encoder_is_inherited_and_cannot_be_contradicted(root, tmp_path):
    config = SoundwaveConfig()
    config.encoder.name, config.llm.name = str(root / "whisper"), str(root / "llm")
    config.encoder.lora_r, config.llm.lora_r = 3, 4
    config.alignment.dropout = config.shrinking.dropout = 0.0
    start = artifact.save(Soundwave.build(config), tmp_path / "start")
    given = [f"init_from={start}", "train.encoder=lora"]
    assert load_recipe(root / "lora.yaml", given).model.encoder.lora_r == 3
    with pytest.raises(RecipeError, match="model.encoder.lora_r: 3 in the folder, 5 in"):
        load_recipe(root / "lora.yaml", [*given, "model.encoder.lora_r=5"])
    assert load_recipe(root / "lora.yaml", ["model.encoder.lora_r=5"]).model.encoder.lora_r == 5
