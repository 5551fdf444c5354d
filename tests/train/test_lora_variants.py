"""LoRA's variants on two ranks: another rank than the start folder's, DoRA, PiSSA, and what ZeRO-3 refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import artifact, lora_init
from model.config import LLMConfig, SoundwaveConfig
from model.pretrained import read_tensor
from model.quantised import QuantisedLinear, quantise, quantised_layers
from model.soundwave import Soundwave
from recipe.config import load_recipe
from tests.model import tiny
from tests.train.test_independent import corpus
from tests.train.test_trained_parts import error_of
from train.dry_run import meta_model
from train.planner import Planner
from train.run import main as train

STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    torch.manual_seed(0)
    encoder, llm = tiny.whisper(root / "whisper"), tiny.llm(root / "llm", "llama")
    corpus(root / "train")
    config = SoundwaveConfig()
    config.encoder.name, config.llm = encoder, LLMConfig(name=llm, lora_r=4)
    model = Soundwave.build(config)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    artifact.save(model, root / "start")
    recipe = {
        "stage": "shrinking",
        "init_from": str(root / "start"),
        "data": {
            "train": [{"shards": str(root / "train")}],
            "batch_seconds": 9.0,
            "micro_batch_seconds": 3.0,
            "workers": 0,
        },
        "optim": {"steps": STEPS, "warmup_steps": 0, "schedule": "constant", "lr_lora": 3e-3},
        "log": {"tensorboard": False},
        "checkpoint": {"every_steps": 2, "accept_changes": ["recipe"]},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora" / "adapter_model.safetensors")


def products(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    found = lora(folder)
    return {
        name: scale * found[name.replace("lora_A", "lora_B")] @ value
        for name, value in found.items()
        if "lora_A" in name
    }


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_higher_rank_starts_with_the_product_of_the_old_one(server, root, zero, tmp_path):
    ranks = ["model.llm.lora_r=7", "init_accept=[model.llm.lora_r]", "optim.lr_lora=0"]
    arguments = [root / "recipe.yaml", f"output={tmp_path}", f"deepspeed=ds_configs/zero{zero}.json", *ranks]
    run = server.start([*arguments, "optim.steps=1"], ranks=2)
    assert run.wait() == [0, 0], run.text()
    before = products(root / "start", 16 / 4)
    after = products(tmp_path / "shrinking" / "model", 16 / 7)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    down = [value for name, value in lora(tmp_path / "shrinking" / "model").items() if "lora_A" in name]
    assert all(len(value) == 7 and value[4:].abs().min() > 0 for value in down)


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dora_trains_and_resumes_bit_equally(server, root, zero, dtype, tmp_path):
    options = ["model.llm.lora_dora=true", "init_from=fresh"]
    once, _ = trained_once_and_resumed(server, root, tmp_path, zero, dtype, options)
    magnitudes = [value for name, value in once.items() if "magnitude" in name]
    weights = Soundwave.build(dora_config(root)).llm.state_dict()
    start = [value for name, value in weights.items() if "magnitude" in name]
    assert len(magnitudes) == len(start) > 0
    assert all(not torch.equal(a.float(), b.float()) for a, b in zip(magnitudes, start, strict=True))


def bases(root: Path) -> list[str]:
    names = {"encoder": root / "whisper", "llm": root / "llm"}
    return [*(f"model.{part}.name={folder}" for part, folder in names.items()), "model.llm.lora_r=4"]


def trained_once_and_resumed(
    server, root: Path, tmp_path: Path, zero: int, dtype: str, options: list[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Train stage 2 on two ranks at once, and to step 2 and then on. The LoRA must be equal to the bit. Return
    it, and what the three runs printed."""
    folders, texts = [], []
    for name, ends in (("once", [STEPS]), ("twice", [2, STEPS])):
        for steps in ends:
            arguments = [f"output={tmp_path / name}", f"deepspeed=ds_configs/zero{zero}.json"]
            arguments += [f"model.dtype={dtype}", f"optim.steps={steps}", *options, *bases(root)]
            run = server.start([root / "recipe.yaml", *arguments], ranks=2)
            assert run.wait() == [0, 0], run.text()
            texts.append(run.text())
        folders.append(lora(tmp_path / name / "shrinking" / "model"))
    once, twice = folders
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
    return once, texts


def dora_config(root: Path) -> SoundwaveConfig:
    config = SoundwaveConfig()
    config.encoder.name = str(root / "whisper")
    config.llm = LLMConfig(name=str(root / "llm"), lora_r=4, lora_dora=True)
    return config


def test_dora_under_zero_3_is_refused(root, tmp_path, capsys):
    arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", "init_from=fresh"]
    arguments += [*bases(root), "model.llm.lora_dora=true", "deepspeed=ds_configs/zero3.json"]
    assert "model.llm.lora_dora needs whole base weights, and " in error_of(arguments, capsys)


def test_a_lower_rank_is_refused_by_the_dry_run(root, tmp_path, capsys):
    arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run"]
    arguments += ["model.llm.lora_r=2", "init_accept=[model.llm.lora_r]"]
    assert "its LoRA has rank 4 " in error_of(arguments, capsys)


STARTED = ["model.llm.lora_init=pissa", "init_from=fresh"]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "dtype"), [(1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_pissa_trains_and_resumes_bit_equally(server, root, zero, dtype, tmp_path):
    """Two ranks; the start is in the checkpoint, the folder's second half is the start."""
    once, texts = trained_once_and_resumed(server, root, tmp_path, zero, dtype, STARTED)
    assert ["decomposing" in text for text in texts] == [True, True, False]  # not on resume
    config = SoundwaveConfig()
    config.encoder.name, config.dtype = str(root / "whisper"), dtype
    config.llm = LLMConfig(name=str(root / "llm"), lora_r=4, lora_init="pissa")
    start = lora_init.file_state(Soundwave.build(config).llm)
    for name, value in once.items():
        axis = 0 if "lora_A" in name else 1
        (trained, kept), (first, same) = value.chunk(2, axis), start[name].chunk(2, axis)
        assert torch.equal(kept.float(), same.float())
        assert not torch.equal(trained.float(), first.float())
        assert float((trained.float() - first.float()).abs().max()) < 0.1
    loaded = artifact.load(tmp_path / "once" / "shrinking" / "model")
    assert len(lora_init.starts(loaded)) == len(once)


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
def test_pissa_resumes_on_another_number_of_ranks(server, root, zero, tmp_path):
    folders = []
    for name, halves in (("once", [(2, STEPS)]), ("moved", [(2, 2), (1, STEPS)])):
        for ranks, steps in halves:
            arguments = [f"output={tmp_path / name}", f"deepspeed=ds_configs/zero{zero}.json"]
            run = server.start(
                [root / "recipe.yaml", *arguments, f"optim.steps={steps}", *STARTED, *bases(root)],
                ranks=ranks,
            )
            assert run.wait() == [0] * ranks, run.text()
        folders.append(lora(tmp_path / name / "shrinking" / "model"))
    for name, value in folders[0].items():
        torch.testing.assert_close(folders[1][name], value, rtol=1e-3, atol=1e-5)


def test_another_init_on_resume_is_refused(server, root, tmp_path, capsys):
    arguments = [f"output={tmp_path}", "deepspeed=ds_configs/zero2.json", *bases(root), "init_from=fresh"]
    arguments += ["checkpoint.accept_changes=[]"]
    run = server.start([root / "recipe.yaml", *arguments, "optim.steps=1"], ranks=1)
    assert run.wait() == [0], run.text()
    said = error_of([str(root / "recipe.yaml"), *arguments, "model.llm.lora_init=pissa", "--dry-run"], capsys)
    assert "model.llm.lora_init: default -> pissa" in said


def test_the_dry_run_counts_the_start(root, tmp_path, capsys):
    rows = {}
    for kind in ("default", "pissa"):
        arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", "init_from=fresh"]
        assert train([*arguments, *bases(root), f"model.llm.lora_init={kind}"]) == 0
        printed = capsys.readouterr().out
        rows[kind] = next(line.split() for line in printed.splitlines() if line.startswith("lora "))
    assert rows["default"][2] == "0" and rows["pissa"][1] == rows["pissa"][2] == rows["default"][1]


WHOLE = ["model.llm.lora_modules_to_save=[lm_head,embed_tokens,norm]", "init_from=fresh"]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "dtype"), [(1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_whole_layers_train_and_resume_bit_equally(server, root, zero, dtype, tmp_path):
    once, _ = trained_once_and_resumed(server, root, tmp_path, zero, dtype, WHOLE)
    copies = {name.removeprefix("base_model.model."): v for name, v in once.items() if "lora_" not in name}
    assert len(copies) == 3
    for name, value in copies.items():
        assert not torch.equal(value.float(), read_tensor(root / "llm", name)), name
    table = artifact.load(tmp_path / "once" / "shrinking" / "model").ctc_head.weight
    assert torch.equal(table.float(), read_tensor(root / "llm", "lm_head.weight").to(table.dtype).float())


@pytest.mark.slow
def test_whole_layers_train_alike_under_zero_2_and_3(server, root, tmp_path):
    """And as ZeRO-3's other layers do: one step from the same start gives the same weights."""
    folders = []
    for zero in (2, 3):
        arguments = [f"output={tmp_path}/{zero}", f"deepspeed=ds_configs/zero{zero}.json", "optim.steps=2"]
        run = server.start([root / "recipe.yaml", *arguments, *WHOLE, *bases(root)], ranks=2)
        assert run.wait() == [0, 0], run.text()
        folders.append(lora(tmp_path / str(zero) / "shrinking" / "model"))
    for name, value in folders[0].items():
        torch.testing.assert_close(folders[1][name], value, rtol=1e-4, atol=2e-5)


def test_whole_layers_with_other_options_are_refused_by_the_dry_run(root, tmp_path, capsys):
    start = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", *WHOLE, *bases(root)]
    assert "trains layers beside LoRA, and model.llm.lora_r is 0" in error_of(
        [*start, "model.llm.lora_r=0"], capsys
    )
    said = error_of([*start, "loss.weights.kl=1"], capsys)
    assert "the loss 'kl' compares with the LLM's own embeddings" in said


def test_the_dry_run_counts_whole_layers(root, tmp_path, capsys):
    assert train([str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", *WHOLE, *bases(root)]) == 0
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("lora_modules_to_save"))
    names = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    expected = sum(read_tensor(root / "llm", name).numel() for name in names)
    assert row[1] == f"{expected:,}" and row[2] == "0"


QUANTISED = ["init_from=fresh", "model.llm.quantization=torchao_int8"]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "dtype", "kind"), [(1, "bfloat16", "torchao_int4"), (2, "float32", "nf4")])
def test_a_quantised_llm_trains_and_resumes_bit_equally(server, root, zero, dtype, kind, tmp_path):
    needed = "bitsandbytes" if kind == "nf4" else "torchao"
    pytest.importorskip(needed, reason=f"{needed} is not installed (requirements-quantization.txt)")
    options = [f"model.llm.quantization={kind}", "optim.activation_checkpointing=true", "init_from=fresh"]
    once, _ = trained_once_and_resumed(server, root, tmp_path, zero, dtype, options)
    assert all(value.any() for value in once.values())
    loaded = artifact.load(tmp_path / "once" / "shrinking" / "model")
    assert any(isinstance(module, QuantisedLinear) for module in loaded.modules())
    checkpoint = next((tmp_path / "once" / "shrinking" / "checkpoints").glob("step-*"))
    state = torch.load(next(checkpoint.glob("*model_states.pt")), weights_only=False)["module"]
    assert state and not any("numbers" in name or "scale_bits" in name for name in state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["deepspeed=ds_configs/zero3.json"], "is ZeRO-3, which cannot shard quantised weights"),
        (["train.llm=all", "model.llm.lora_r=0"], "quantised weights (torchao_int8) cannot be trained"),
        (["model.llm.lora_dora=true"], "model.llm.lora_dora needs whole base weights"),
        (["model.llm.quantization=int3"], "model.llm.quantization is 'int3': give none, nf4, torchao_int8"),
    ],
)
def test_what_a_quantised_llm_cannot_do_is_one_line(root, tmp_path, capsys, options, words):
    arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", *QUANTISED, *bases(root)]
    assert words in error_of([*arguments, "deepspeed=ds_configs/zero2.json", *options], capsys)


def test_a_package_that_is_missing_is_one_line(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    arguments = [str(root / "recipe.yaml"), f"output={tmp_path}", "--dry-run", *QUANTISED, *bases(root)]
    said = error_of([*arguments, "deepspeed=ds_configs/zero2.json"], capsys)
    assert "quantization=torchao_int8 needs the package torchao, which is not installed" in said


def test_the_planner_knows_what_quantisation_saves(root):
    pytest.importorskip("torchao", reason="torchao is not installed (requirements-quantization.txt)")
    totals = {}
    for kind in ("none", "torchao_int8"):
        recipe = load_recipe(
            root / "recipe.yaml", [*bases(root), f"model.llm.quantization={kind}", "init_from=fresh"]
        )
        planner = Planner(recipe, meta_model(recipe), 2, "h100")
        totals[kind] = {choice.zero_stage: choice.memory.states for choice in planner.choices()}
    assert totals["torchao_int8"].keys() == {1, 2} and 3 in totals["none"]
    llm = Soundwave.build(load_recipe(root / "recipe.yaml", bases(root)).model).llm
    before = sum(4 * layer.weight.numel() for _, _, layer in quantised_layers(llm))
    quantise(llm, "torchao_int8", "tiny")
    held = sum(b.nbytes for n, b in llm.named_buffers() if n.endswith(("numbers", "scale_bits")))
    for zero, states in totals["torchao_int8"].items():
        assert totals["none"][zero] - states == before - held


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_the_next_stage_takes_the_start_and_whole_layers_as_they_are(server, root, zero, tmp_path):
    """Two ranks; at a learning rate of 0 stage 3 leaves what stage 2 has learnt."""
    arguments = [root / "recipe.yaml", f"output={tmp_path}", f"deepspeed=ds_configs/zero{zero}.json"]
    first = [*STARTED, "model.llm.lora_modules_to_save=[norm,lm_head]", *bases(root), "optim.steps=1"]
    run = server.start([*arguments, *first], ranks=2)
    assert run.wait() == [0, 0], run.text()
    second = ["stage=sft", f"init_from={tmp_path}/shrinking/model", "optim.lr_lora=0", "optim.steps=1"]
    run = server.start([*arguments, *second], ranks=2)
    assert run.wait() == [0, 0], run.text()
    assert "decomposing" not in run.text()
    before, after = lora(tmp_path / "shrinking" / "model"), lora(tmp_path / "sft" / "model")
    assert before.keys() == after.keys() and any("lm_head" in name for name in after)
    assert all(torch.equal(before[name], value) for name, value in after.items())
