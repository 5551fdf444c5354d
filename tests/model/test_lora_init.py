"""How LoRA starts (`model.llm.lora_init`): against plain peft on the same LLM, in files, export and averages."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model import artifact, lora_init
from model.artifact import FolderError
from model.average import average
from model.config import LLMConfig, OptionError, SoundwaveConfig
from model.export import export_llm
from model.inheritance import inherited_options
from model.language_model import token_keys_in_use, with_lora
from model.losses.distillation import teach
from model.pretrained import SourceError
from model.soundwave import Soundwave
from tests.model import tiny
from tests.model.test_lora import small_llama

IDS = torch.tensor([[1, 2, 3, 4, 5]])
KINDS = ("pissa", "olora", "pissa_niter_8")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(5)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            resid_pdrop=0,
            attn_pdrop=0,
            embd_pdrop=0,
        )
    )


def started(llm: torch.nn.Module, kind: str, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    model = with_lora(llm, LLMConfig(lora_r=4, lora_alpha=6, lora_init=kind, **options), "small")
    lora_init.decompose(model, kind, dtype)
    return model


def train(llm: torch.nn.Module, steps: int = 3) -> list[torch.Tensor]:
    """Logits before, between and after steps of AdamW on LoRA."""
    trained = [p for name, p in llm.named_parameters() if "lora_" in name]
    for parameter in llm.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer, seen = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), []
    for _ in range(steps):
        logits = llm(input_ids=IDS).logits
        seen.append(logits.detach())
        torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, llm(input_ids=IDS).logits.detach()]


@pytest.mark.parametrize(
    ("family", "kind"), [(small_llama, "pissa"), (small_llama, "olora"), (gpt2, "pissa")]
)
@pytest.mark.parametrize("options", [{}, {"lora_rslora": True, "lora_rank_pattern": {"c_attn|q_proj": 2.0}}])
def test_it_trains_as_pefts_own(family, kind, options):
    base = {name: tensor.clone() for name, tensor in family().state_dict().items()}
    ours = started(family(), kind, **options)
    targets = {"target_modules": ["c_attn", "attn.c_proj"]} if family is gpt2 else {}
    targets = targets or {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=kind,
        use_rslora=bool(options),
        rank_pattern={"c_attn|q_proj": 2} if options else {},
        fan_in_fan_out=family is gpt2,
        **targets,
    )
    theirs = get_peft_model(family(), config)
    for mine, plain in zip(train(ours), train(theirs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    for name, tensor in ours.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")])  # the base stays as it is


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [small_llama, gpt2])
def test_the_start_computes_the_llms_own_function(kind, dtype, family):
    expected = family()(input_ids=IDS).logits
    llm = started(family(), kind, dtype)
    torch.testing.assert_close(llm(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    for _, layer in lora_init.lora_layers(llm):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            assert torch.equal(factor.weight, factor.start) and factor.start.any()
            assert torch.equal(factor.start, factor.start.to(dtype).float())


def test_random_inits_are_pefts():
    for kind in ("gaussian", "orthogonal", "default"):
        torch.manual_seed(11)
        ours = with_lora(small_llama(), LLMConfig(lora_r=4, lora_init=kind), "small")
        torch.manual_seed(11)
        how = True if kind == "default" else kind
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=how, target_modules=targets)
        theirs = get_peft_model(small_llama(), config).state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"lora_init": "orthogonal", "lora_r": 5},
            "lora_r is 5, and model.llm.lora_init=orthogonal needs even",
        ),
        (
            {"lora_init": "orthogonal", "lora_r": 4, "lora_rank_pattern": {"q_proj": 3.0}},
            "lora_rank_pattern.q_proj is 3",
        ),
        (
            {"lora_init": "pissa", "lora_r": 20},
            "self_attn.k_proj has rank 20, and its weight has 16 components",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_one_line(options, words):
    with pytest.raises(SourceError) as caught:
        with_lora(small_llama(), LLMConfig(**options), "small")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["pisa", "pissa_niter_0", "pissa_niter_", "loftq"])
def test_another_name_is_one_line(value):
    config = SoundwaveConfig()
    config.llm.lora_init = value
    with pytest.raises(OptionError, match="model.llm.lora_init is .*: give default, gaussian"):
        Soundwave.build(config, meta=True)


# ----------------------------------------------------------------------------------------------- model folders


def soundwave(bases: tuple[str, str], **options) -> Soundwave:
    return tiny.soundwave(*bases, **{"lora_r": 4, "lora_init": "pissa", **options})


def logits(model: Soundwave) -> torch.Tensor:
    assert model.llm is not None
    with torch.no_grad():
        return model.llm(input_ids=IDS).logits


@torch.no_grad()
def change(model: Soundwave, seed: int = 1) -> Soundwave:
    torch.manual_seed(seed)
    for name, parameter in model.llm.named_parameters():
        if "lora_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dora": True},
        {"lora_rslora": True, "lora_rank_pattern": {"q_proj": 2.0}, "lora_alpha_pattern": {"v_proj": 5.0}},
        {"lora_init": "olora"},
    ],
)
def test_a_folder_holds_an_ordinary_lora_of_the_original_llm(bases, options, tmp_path):
    model = change(soundwave(bases, **options))
    expected = logits(model)
    artifact.save(model, tmp_path / "model")
    assert model.llm.peft_config["default"].r == 4  # as it is trained
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded), expected)
    assert {n: t.tolist() for n, t in lora_init.starts(model).items()} == {
        n: t.tolist() for n, t in lora_init.starts(loaded).items()
    }
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[1]), tmp_path / "model/lora")
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(export_llm(tmp_path / "model", tmp_path / "merged"))
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_next_stage_continues_from_the_same_start(bases, tmp_path):
    old = change(soundwave(bases))
    artifact.save(old, tmp_path / "old")
    assert inherited_options(tmp_path / "old")["llm.lora_init"] == "pissa"
    new = soundwave(bases)
    assert "lora" in artifact.load_trained(new, tmp_path / "old")
    for (name, mine), (_, theirs) in zip(
        new.llm.state_dict().items(), old.llm.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    scaled = soundwave(bases, lora_alpha=32)
    artifact.load_trained(scaled, tmp_path / "old")
    torch.testing.assert_close(logits(scaled), logits(old), rtol=1e-4, atol=1e-5)


def test_what_does_not_continue_is_one_line(bases, tmp_path):
    artifact.save(change(soundwave(bases)), tmp_path / "pissa")
    artifact.save(change(soundwave(bases, lora_init="default")), tmp_path / "default")
    for options, folder, words in (
        (
            {"lora_r": 6},
            "pissa",
            "its LoRA has rank 4 .* asks for 6, which model.llm.lora_init=pissa cannot change",
        ),
        ({}, "default", "trained with model.llm.lora_init=default, and cannot start again as pissa"),
        ({"lora_init": "default"}, "pissa", "its LoRA has rank 8 .* asks for 4"),
    ):
        with pytest.raises(FolderError, match=words) as caught:
            artifact.load_trained(soundwave(bases, **options), tmp_path / folder)
        assert "\n" not in str(caught.value)
    whole = soundwave(bases, lora_init="default", lora_r=8)  # of the sum of both ranks, all trained
    artifact.load_trained(whole, tmp_path / "pissa")
    torch.testing.assert_close(logits(whole), logits(artifact.load(tmp_path / "pissa")), rtol=1e-4, atol=1e-5)


def test_averages_are_of_one_start(bases, tmp_path):
    one = soundwave(bases)
    start = {name: tensor.clone() for name, tensor in one.llm.state_dict().items()}
    artifact.save(change(one, 1), tmp_path / "one")
    one.llm.load_state_dict(start)
    artifact.save(change(one, 2), tmp_path / "two")
    average([tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    first, second, mean = (artifact.load(tmp_path / name).llm.state_dict() for name in ("one", "two", "mean"))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    for factor in lora_init.starts(one.llm).values():
        factor.mul_(1.5)
    artifact.save(one, tmp_path / "other")
    with pytest.raises(FolderError, match="started at other components"):
        average([tmp_path / "one", tmp_path / "other"], tmp_path / "bad")


def test_the_teacher_is_the_original_llm(bases):
    """KL of a student whose hidden states are the original LLM's own is 0, whatever LoRA has learnt."""
    model = change(soundwave(bases))
    plain = AutoModelForCausalLM.from_pretrained(bases[1]).eval()
    embeddings, mask = plain.get_input_embeddings()(IDS), torch.ones_like(IDS)
    hidden = plain.model(inputs_embeds=embeddings).last_hidden_state[0, :-1]
    counted = torch.ones(1, dtype=torch.bool)
    assert float(teach(model.llm, hidden, embeddings, mask, IDS, counted, None).detach()) < 1e-6
    changed = 1.1 * hidden
    assert float(teach(model.llm, changed, embeddings, mask, IDS, counted, None).detach()) > 1e-4


def test_dropout_reads_both_halves_alike(bases):
    """Training starts at the LLM's own function, with dropout on."""
    expected = logits(soundwave(bases, lora_r=0))
    model = soundwave(bases, lora_dropout=0.5)
    model.train()
    with torch.no_grad(), token_keys_in_use(model.llm, torch.arange(5)[None]):
        torch.testing.assert_close(model.llm(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
