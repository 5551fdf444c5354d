"""Layers trained whole beside LoRA (`model.llm.lora_modules_to_save`): against plain peft, in files and export."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from model import artifact
from model.artifact import FolderError
from model.config import LLMConfig, official_switches
from model.export import export, export_llm
from model.language_model import target_loss, with_lora
from model.official import to_official
from model.pretrained import SourceError, read_tensor
from model.soundwave import Soundwave
from tests.model import tiny
from tests.model.test_lora import small_llama

IDS = torch.tensor([[1, 2, 3, 4, 5]])
ALL = ["lm_head", "embed_tokens", "norm"]
COPIES = ("lm_head", "model.embed_tokens", "model.norm")


def soundwave(bases: tuple[str, str], **options) -> Soundwave:
    return tiny.soundwave(*bases, **{"lora_r": 4, "lora_modules_to_save": ALL, **options})


def logits(llm: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return llm(input_ids=IDS).logits


@torch.no_grad()
def change(model: Soundwave) -> Soundwave:
    torch.manual_seed(1)
    for name, parameter in model.llm.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_losses_and_gradients_are_those_of_plain_peft():
    """target_loss, which takes the output embeddings as frozen where it may, against cross-entropy."""
    torch.manual_seed(2)
    ours = with_lora(small_llama(), LLMConfig(lora_r=4, lora_modules_to_save=ALL), "small")
    torch.manual_seed(2)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, modules_to_save=list(COPIES))
    theirs = get_peft_model(small_llama(), config)
    found = {}
    for name, llm in (("ours", ours), ("theirs", theirs)):
        with torch.no_grad():
            torch.manual_seed(4)
            for key, parameter in llm.named_parameters():
                if "lora_B" in key:
                    parameter.normal_()
        if name == "ours":
            embeddings = llm.get_base_model().get_input_embeddings()(IDS)
            loss = target_loss(llm, embeddings, torch.ones_like(IDS), IDS)
        else:
            scores = llm(input_ids=IDS).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(scores, IDS[0, 1:], reduction="sum")
        loss.backward()
        gradients = {key: p.grad for key, p in llm.named_parameters() if p.grad is not None}
        found[name] = (loss.detach(), gradients)
    torch.testing.assert_close(found["ours"][0], found["theirs"][0])
    assert found["ours"][1].keys() == found["theirs"][1].keys()
    assert sum(".modules_to_save." in key for key in found["ours"][1]) == 3
    for key, gradient in found["ours"][1].items():
        torch.testing.assert_close(gradient, found["theirs"][1][key], rtol=1e-4, atol=1e-6)


def test_copies_are_trained_and_the_llm_and_the_ctc_targets_are_not(bases):
    model = soundwave(bases)
    model.set_stage("shrinking")
    trained = {name for name, _ in model.parameter_groups()["lora"]}
    copies = {name for name in trained if ".modules_to_save." in name}
    assert len(copies) == 3 and all("lora_" in name for name in trained - copies)
    assert not any("original_module" in name for name, p in model.named_parameters() if p.requires_grad)
    head = model.llm.get_base_model().get_output_embeddings()
    assert model.ctc_head.weight is head.original_module.weight
    before = dict(model.frozen_hash())
    change(model)
    assert soundwave(bases, lora_modules_to_save=[]).frozen_hash() == before


def test_a_folder_is_loaded_here_and_by_plain_peft_and_merged(bases, tmp_path):
    model = change(soundwave(bases))
    expected = logits(model.llm)
    artifact.save(model, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded.llm), expected)
    assert torch.equal(loaded.ctc_head.weight, model.ctc_head.weight)
    base = AutoModelForCausalLM.from_pretrained(bases[1])
    original = logits(base)
    plain = PeftModel.from_pretrained(base, tmp_path / "model" / "lora")
    torch.testing.assert_close(logits(plain), expected)
    with loaded.llm.disable_adapter():  # the teacher of distillation
        torch.testing.assert_close(logits(loaded.llm), original)
    merged = AutoModelForCausalLM.from_pretrained(export_llm(tmp_path / "model", tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_exports_keep_the_ctc_head_or_refuse(bases, tmp_path):
    model = change(soundwave(bases))
    artifact.save(model, tmp_path / "model")
    plain = artifact.load(export(tmp_path / "model", tmp_path / "plain"))
    assert torch.equal(logits(plain.llm), logits(model.llm))
    for options in ({"merge": True}, {"hub_layout": True}):
        with pytest.raises(FolderError, match="tied to the LLM's original output embeddings") as caught:
            export(tmp_path / "model", tmp_path / "out", **options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    artifact.save(change(soundwave(bases, lora_modules_to_save=["norm", "embed_tokens"])), tmp_path / "norm")
    merged = artifact.load(export(tmp_path / "norm", tmp_path / "norm-merged", merge=True))
    expected = logits(artifact.load(tmp_path / "norm").llm)
    torch.testing.assert_close(logits(merged.llm), expected, rtol=1e-4, atol=1e-4)


def test_the_next_stage_may_begin_to_train_whole_layers(bases, tmp_path):
    old = change(soundwave(bases, lora_modules_to_save=["norm"]))
    artifact.save(old, tmp_path / "old")
    new = soundwave(bases)
    artifact.load_trained(new, tmp_path / "old")
    assert torch.equal(logits(new.llm), logits(old.llm))
    with pytest.raises(FolderError, match="its LoRA does not fit model.llm"):
        artifact.load_trained(soundwave(bases, lora_modules_to_save=[]), tmp_path / "old")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lm_hed"], "has no layer 'lm_hed' with weights of its own; did you mean 'lm_head'?"),
        (["mlp"], "has no layer 'mlp'"),
        (["q_proj"], "'model.layers.0.self_attn.q_proj' has LoRA already"),
    ],
)
def test_names_that_do_not_fit_are_one_line(names, words):
    with pytest.raises(SourceError) as caught:
        with_lora(small_llama(), LLMConfig(lora_r=4, lora_modules_to_save=names), "small")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_tables_are_refused(name):
    llm = small_llama()
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    with pytest.raises(SourceError, match="ties its input and output embeddings") as caught:
        with_lora(llm, LLMConfig(lora_r=4, lora_modules_to_save=[name]), "small")
    assert "\n" not in str(caught.value)
    with_lora(llm, LLMConfig(lora_r=4, lora_modules_to_save=["norm"]), "small")


def test_the_official_layout_keeps_the_original_ctc_targets(bases, tmp_path):
    config = tiny.config(*bases)
    config.llm = LLMConfig(name=bases[1], lora_r=4, lora_modules_to_save=ALL)
    official_switches(config).alignment.ctc_head = "tied"
    model = change(Soundwave.build(config))
    artifact.save(model, tmp_path / "model")
    out = to_official(tmp_path / "model", tmp_path / "official")
    rows = model.ctc_head.weight.shape[0]
    table = read_tensor(out, "model.audio_feature_head.weight")[:rows]
    same = (table == model.ctc_head.weight).all(1)
    assert int(same.sum()) >= rows - 1  # the blank's row
    head = model.llm.get_base_model().get_output_embeddings().weight
    torch.testing.assert_close(read_tensor(out, "lm_head.weight")[:rows], head)
