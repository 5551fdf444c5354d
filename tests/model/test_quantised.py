"""A quantised LLM (`model.llm.quantization`): numbers against torchao's and bitsandbytes' own, gradients against
plain PyTorch with the dequantised weights, and model folders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model import artifact, lora_init, quantised
from model.config import LLMConfig
from model.export import export
from model.inheritance import differing_options, inherited_options
from model.language_model import target_loss, with_lora
from model.pretrained import SourceError
from model.quantised import KINDS, QuantisedLinear, quantise, saving
from model.soundwave import Soundwave
from tests.model import tiny
from tests.model.test_lora import small_llama
from tests.model.test_lora_init import gpt2

torchao = pytest.importorskip("torchao", reason="torchao is not installed (requirements-quantization.txt)")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the same)")
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def reference(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the package itself quantises and dequantises it."""
    if kind == "nf4":
        numbers, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return bitsandbytes.functional.dequantize_4bit(numbers, state)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    config = Int8WeightOnlyConfig()
    if kind == "torchao_int4":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(layer, config)
    return layer.weight.dequantize()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_a_plain_one_with_the_packages_own_weight(kind, bias):
    torch.manual_seed(0)
    plain = nn.Linear(96, 50, bias=bias)
    layer = QuantisedLinear(plain, kind)
    expected = reference(kind, plain.weight.detach())
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-7)
    error = (layer.weight - plain.weight).abs().max()
    assert 0 < error < {8: 1e-3, 4: 2e-2}[KINDS[kind].bits]
    x = torch.randn(3, 7, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    out, wanted = layer(x), nn.functional.linear(y, expected, plain.bias)
    torch.testing.assert_close(out, wanted)
    for result in (out, wanted):
        result.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_cast_rounds_it_and_no_checkpoint_holds_it(kind):
    layer = QuantisedLinear(nn.Linear(64, 32, bias=False), kind)
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, before)
    assert not layer.state_dict() and not list(layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [small_llama, gpt2])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_gradients_of_lora_are_those_of_the_dequantised_llm(kind, family, init):
    torch.manual_seed(2)
    config = LLMConfig(lora_r=4, lora_init=init)
    llm = with_lora(family(), config, "small")
    llm.requires_grad_(False)
    twin = copy.deepcopy(llm)
    quantise(llm, kind, "small")
    weights = {name: m.weight for name, m in llm.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(weights) == (14 if family is small_llama else 8)
    with torch.no_grad():
        for name, weight in weights.items():
            own = twin.get_submodule(name).weight
            own.copy_(weight if family is small_llama else weight.T)
    gradients = []
    for model in (llm, twin):
        if init == "pissa":
            lora_init.decompose(model, init, torch.float32)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        embeddings = model.get_base_model().get_input_embeddings()(IDS)
        loss = target_loss(model, embeddings, torch.ones_like(IDS), IDS)
        loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------- model folders


def soundwave(bases: tuple[str, str], **options) -> Soundwave:
    return tiny.soundwave(*bases, **{"lora_r": 4, "quantization": "torchao_int8", **options})


def logits(model: Soundwave) -> torch.Tensor:
    with torch.no_grad():
        return model.llm(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_copies_are_not_quantised(kind, bases):
    model = soundwave(bases, quantization=kind, lora_modules_to_save=["lm_head", "layers.0.mlp.down_proj"])
    plain = soundwave(bases, quantization="none")
    base = model.llm.get_base_model()
    table = plain.llm.get_base_model().get_output_embeddings().weight
    assert torch.equal(model.ctc_head.weight, table)
    assert torch.equal(
        base.get_input_embeddings().weight, plain.llm.get_base_model().get_input_embeddings().weight
    )
    copy_of = base.model.layers[0].mlp.down_proj.modules_to_save["default"]
    assert type(copy_of) is nn.Linear and isinstance(base.model.layers[1].mlp.down_proj, QuantisedLinear)
    assert model.frozen_hash() == plain.frozen_hash()  # of the files


def test_a_folder_brings_its_quantisation(bases, tmp_path):
    model = soundwave(bases)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    artifact.save(model, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert inherited_options(tmp_path / "model")["llm.quantization"] == "torchao_int8"
    config = tiny.config(*bases)
    config.llm = LLMConfig(name=bases[1], lora_r=4)
    differ = differing_options(config, tmp_path / "model")
    assert differ["model.llm.quantization"] == ("torchao_int8", "none")
    merged = artifact.load(export(tmp_path / "model", tmp_path / "merged", merge=True))
    whole = soundwave(bases, quantization="none")
    artifact.load_trained(whole, tmp_path / "model")
    torch.testing.assert_close(logits(merged), logits(whole), rtol=1e-4, atol=1e-5)  # unquantised weights


def test_generation_is_that_of_the_dequantised_llm(bases):
    model, twin = soundwave(bases), soundwave(bases, quantization="none")
    with torch.no_grad():
        for name, module in model.llm.named_modules():
            if isinstance(module, QuantisedLinear):
                twin.llm.get_submodule(name).weight.copy_(module.weight)
    twin.load_state_dict(model.state_dict(), strict=False)
    waves = [torch.randn(8000), torch.randn(12000)]
    chats = [[{"role": "user", "content": "<audio_patch>\nWhat?"}]] * 2
    answers = [m.answer(chats, waves, sampling_rate=16000, max_new_tokens=8) for m in (model, twin)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_that_are_saved_are_those_of_the_buffers(kind):
    llm = small_llama()
    expected = saving(llm, kind, 4)
    plain = sum(4 * layer.weight.numel() for _, _, layer in quantised.quantised_layers(llm))
    quantise(llm, kind, "small")
    held = sum(
        b.numel() * b.element_size() for n, b in llm.named_buffers() if "numbers" in n or "scale_bits" in n
    )
    assert expected.plain == plain and expected.quantised == held < plain / 2


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SourceError, match="quantization=nf4 needs the package bitsandbytes, which is not"
    ) as caught:
        quantise(small_llama(), "nf4", "small")
    assert "\n" not in str(caught.value)
