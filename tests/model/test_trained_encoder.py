"""Encoder and LLM trained by choice (`train` of a recipe): which parameters learn, their gradients against
transformers' own networks, model folders that hold them, and their exports."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, WhisperModel

from model import artifact, trained_encoder
from model.average import average
from model.config import OptionError
from model.encoder import build_encoder
from model.export import export
from model.features import log_mel
from model.pretrained import locate
from model.soundwave import Soundwave
from model.stages import STAGES, chosen
from tests.model import tiny
from tests.model.test_features_encoder import waveform_encoder  # noqa: F401, a fixture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    tiny.whisper(root / "whisper")
    tiny.llm(root / "llm")
    return root


def config_of(place, *, lora: int = 4, encoder_lora: int = 0):
    config = tiny.config(str(place / "whisper"), str(place / "llm"))
    config.llm.lora_r, config.encoder.lora_r = lora, encoder_lora
    config.attention_implementation, config.ops.implementation = "eager", "reference"
    return config


def built(place, stage: str = "shrinking", *, lora: int = 4, encoder_lora: int = 0, **choices) -> Soundwave:
    torch.manual_seed(1)
    model = Soundwave.build(config_of(place, lora=lora, encoder_lora=encoder_lora))
    model.set_stage(chosen(STAGES[stage], choices))
    return model


def groups(model: Soundwave) -> dict[str, set[str]]:
    return {g: {n for n, _ in ps} for g, ps in model.parameter_groups().items() if ps}


WHISPER_LAST = "encoder.layers.layers.1."


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"encoder": "none"}, {"adapters", "ctc_head", "lora"}),
        ({"encoder": "last_1"}, {"adapters", "ctc_head", "lora", "encoder"}),
        ({"encoder": "all", "adapters": "none", "ctc_head": "none"}, {"lora", "encoder"}),
        ({"adapters": "shrinking", "llm": "none"}, {"adapters", "ctc_head"}),
        ({"encoder": "last_2", "llm": "none", "adapters": "none", "ctc_head": "none"}, {"encoder"}),
    ],
)
def test_the_chosen_parts_learn_and_no_others(place, choice, expected):
    model = built(place, **choice)
    found = groups(model)
    assert found.keys() == expected
    if choice.get("encoder") == "last_1":
        assert found["encoder"] and all(name.startswith(WHISPER_LAST) for name in found["encoder"])
    if choice.get("encoder") == "all":
        fixed = {f"encoder.{n}" for n, _ in model.encoder.named_parameters()} - found["encoder"]
        assert fixed == {"encoder.layers.embed_positions.weight"}
    if choice.get("adapters") == "shrinking":
        assert {name.partition(".")[0] for name in found["adapters"]} == {"shrinking"}
    assert not any(module.training for module in model.train().encoder.modules())


def test_a_whole_llm_learns_but_its_tables(place):
    model = built(place, "sft", lora=0, llm="all")
    names = groups(model)
    assert names.keys() == {"llm"}
    everything = {f"llm.{name}" for name, _ in model.llm.named_parameters()}
    assert everything - names["llm"] == {"llm.model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("options", "choices", "words"),
    [
        ({}, {"encoder": "last_3"}, "train.encoder is last_3, and the encoder has 2 layers"),
        ({}, {"encoder": "lora"}, "model.encoder.lora_r is 0"),
        ({"encoder_lora": 2}, {"encoder": "last_1"}, "train.encoder=lora, or model.encoder.lora_r=0"),
        ({}, {"llm": "all"}, "set model.llm.lora_r=0"),
    ],
)
def test_choices_that_do_not_fit_the_model_are_one_line(place, options, choices, words):
    with pytest.raises(OptionError, match=words) as error:
        built(place, **options, **choices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("choice", "layers"), [("last_1", 1), ("all", 2)])
def test_gradients_of_the_encoder_are_those_of_transformers_whisper(place, choice, layers):
    """The same loss on the encoder's output: through our forward at true length, and through the layers of
    transformers' WhisperModel called one by one, for one clip without padding."""
    model = built(place, encoder=choice)
    wave = 0.1 * torch.randn(1, 12000, generator=torch.Generator().manual_seed(3))
    features, lengths = model.encoder(wave, torch.tensor([12000]))
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
    (features * weight).sum().backward()
    ours = {n: p.grad for n, p in model.encoder.named_parameters() if p.requires_grad}

    mel, _ = log_mel(wave, torch.tensor([12000]), 16, None)
    theirs = WhisperModel.from_pretrained(place / "whisper", attn_implementation="eager").encoder.eval()
    x = F.gelu(theirs.conv2(F.gelu(theirs.conv1(mel)))).transpose(1, 2)
    x = x + theirs.embed_positions.weight[: x.shape[1]]
    for layer in theirs.layers:
        x = layer(x, None)
    x = theirs.layer_norm(x)
    assert x.shape == features.shape and int(lengths[0]) == x.shape[1]
    (x * weight).sum().backward()
    expected = dict(theirs.named_parameters())
    assert len({n.split(".")[2] for n in ours if n.startswith("layers.layers.")}) == layers
    for name, gradient in ours.items():
        reference = expected[name.removeprefix("layers.")].grad
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def loss_of(model: Soundwave, batch) -> torch.Tensor:
    output = model.train()(batch.at_step(5), losses=("ce", "ctc"))
    return output.ce_sum + output.ctc_sum


def test_recomputed_layers_have_the_same_gradients(place):
    chats = [tiny.chat("What?", "the wall"), tiny.chat("Say it.", "a")]
    found = []
    for recompute in (False, True):
        model = built(place, encoder="last_1")
        if recompute:
            model.enable_activation_checkpointing()
            assert [layer.training for layer in model.train().encoder.layers.layers] == [False, True]
        loss_of(model, tiny.batch(model, chats, [0.9, 0.4], ["the wall", "a"])).backward()
        found.append({n: p.grad for ps in model.parameter_groups().values() for n, p in ps})
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
    assert any(name.startswith(WHISPER_LAST) for name in found[0])


def test_a_clip_has_the_same_encoder_gradient_beside_a_longer_one(place):
    """Padding has no gradient: the sum over two clips of a batch is that of each on its own."""
    sounds = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9000, 14400)]
    gradients = []
    for parts in ([sounds], [[sounds[0]], [sounds[1]]]):
        model = built(place, encoder="all")
        for clips in parts:
            waves = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
            features, lengths = model.encoder(waves, torch.tensor([len(clip) for clip in clips]))
            sum(features[i, :n].square().sum() for i, n in enumerate(lengths)).backward()
        gradients.append([p.grad for p in model.encoder.parameters() if p.requires_grad])
    for together, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", [1, None])
def test_gradients_of_waveform_encoders_are_those_of_transformers(waveform_encoder, choice):  # noqa: F811
    """One clip, layers computed again in backward here and not there."""
    ours, theirs = waveform_encoder
    for parameter in trained_encoder.trained_parameters(ours, choice):
        parameter.requires_grad_(True)
    ours.learns = True
    trained_encoder.checkpoint_layers(ours)
    trained_encoder.set_modes(ours, True)
    wave = torch.randn(1, 9000, generator=torch.Generator().manual_seed(2))
    features, _ = ours(wave, torch.tensor([9000]))
    features.square().sum().backward()
    clip = (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-7).sqrt()
    theirs(clip).last_hidden_state.square().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    learnt = {n.removeprefix("layers."): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert learnt and (choice is None or all(name.startswith("encoder.layers.1.") for name in learnt))
    for name, gradient in learnt.items():
        scale = float(expected[name].abs().max()) + 0.1  # the keys' bias has none but rounding
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale)


def changed(model: Soundwave) -> Soundwave:
    """Another value in all that learns, as training would leave it."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for named in model.parameter_groups().values():
            for _, parameter in named:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


CASES = {
    "last": ({}, {"encoder": "last_1"}, ["encoder"]),
    "encoder_lora": ({"encoder_lora": 2}, {"encoder": "lora"}, ["encoder"]),
    "all": ({}, {"encoder": "all"}, ["encoder"]),
    "llm": ({"lora": 0}, {"llm": "all", "encoder": "last_1"}, ["encoder", "llm"]),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, place, tmp_path_factory):
    """(model, its folder, the parts that it has trained tensors of)"""
    options, choices, parts = CASES[request.param]
    model = changed(built(place, **options, **choices))
    return model, artifact.save(model, tmp_path_factory.mktemp(request.param) / "model"), parts


def answers(model: Soundwave) -> list[torch.Tensor]:
    chats = [tiny.chat("What?", "the wall"), tiny.chat("Say it.", "a")]
    batch = tiny.batch(model, chats, [0.9, 0.4], ["the wall", "a"])
    with torch.no_grad():
        output = model.eval()(batch, losses=("ce", "ctc"))
    return [output.ce_sum, output.ctc_sum]


def test_a_model_folder_holds_what_was_trained(trained, place):
    model, path, parts = trained
    described = artifact.describe(path)
    assert described["tuned"] == parts
    assert described["frozen"] == built(place).frozen_hash(), "the base is still named by its own files"
    loaded = artifact.load(path)
    torch.testing.assert_close(answers(loaded), answers(model), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.encoder.parameters()) and not loaded.encoder.learns
    again = artifact.save(loaded, path.with_name("again"))
    for name in (artifact.TUNED[part] for part in parts):
        first, second = load_file(path / name), load_file(again / name)
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_folder_without_its_trained_encoder_is_refused(trained, tmp_path):
    _, path, parts = trained
    copy_of = shutil.copytree(path, tmp_path / "copy")
    (copy_of / artifact.TUNED[parts[-1]]).unlink()
    with pytest.raises(
        artifact.FolderError, match=f"trained {parts[-1]}, and {parts[-1]}.safetensors is missing"
    ):
        artifact.load(copy_of)


def test_exports_answer_as_the_model(trained, tmp_path):
    model, path, parts = trained
    expected = answers(model)
    for name, options in (("plain", {}), ("merged", {"merge": True, "with_encoder": True})):
        out = export(path, tmp_path / name, **options)
        torch.testing.assert_close(answers(artifact.load(out)), expected, rtol=1e-4, atol=1e-3)
    assert (tmp_path / "merged" / "encoder.safetensors").exists() == ("encoder" in parts)
    assert not (tmp_path / "merged" / "llm.safetensors").exists()
    if "llm" in parts:
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "llm").state_dict()
        ours = {n: p for n, p in model.llm.named_parameters()}
        assert all(torch.equal(exported[name], value) for name, value in ours.items())


def test_the_hub_layout_has_the_trained_encoder(trained, tmp_path):
    """Its encoder's tensors, LoRA merged, give the same frames in a plain encoder of the base's class."""
    model, path, _ = trained
    out = export(path, tmp_path / "hub", hub_layout=True)
    tensors = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    source = locate(model.config.encoder.name)
    plain = build_encoder(replace(model.config.encoder, lora_r=0), source, torch.float32, "eager")
    plain.load_state_dict(
        {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    )
    wave, length = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1)), torch.tensor([8000])
    with torch.no_grad():
        torch.testing.assert_close(
            plain(wave, length)[0], model.encoder(wave, length)[0], rtol=1e-4, atol=1e-4
        )
    assert json.loads((out / "config.json").read_text())["soundwave"]["encoder"]["lora_r"] == 0


def test_lora_on_top_of_a_trained_llm_and_encoder(place, tmp_path):
    """A later stage may put LoRA on what an earlier one trained whole; both are in its folder."""
    first = changed(built(place, lora=0, llm="all", encoder="all"))
    start = artifact.save(first, tmp_path / "first")
    second = built(place, "sft", encoder_lora=2, encoder="lora")
    assert {"encoder", "llm"} <= set(artifact.load_trained(second, start))
    torch.testing.assert_close(answers(second), answers(first), rtol=1e-5, atol=1e-4)
    changed(second)
    loaded = artifact.load(artifact.save(second, tmp_path / "second"))
    torch.testing.assert_close(answers(loaded), answers(second), rtol=0, atol=0)
    merged = export(tmp_path / "second", tmp_path / "merged", merge=True)
    torch.testing.assert_close(answers(artifact.load(merged)), answers(second), rtol=1e-4, atol=1e-3)


def test_the_average_is_that_of_the_encoder_too(place, tmp_path):
    one = changed(built(place, encoder="last_1"))
    artifact.save(one, tmp_path / "one")
    two = copy.deepcopy(one)
    with torch.no_grad():
        for _, parameter in two.parameter_groups()["encoder"]:
            parameter.add_(1.0)
    artifact.save(two, tmp_path / "two")
    mean = artifact.load(average([tmp_path / "one", tmp_path / "two"], tmp_path / "mean"))
    for (_, a), (_, b) in zip(one.encoder.named_parameters(), mean.encoder.named_parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.5 if a.requires_grad else a)
    artifact.save(built(place), tmp_path / "frozen")
    with pytest.raises(artifact.FolderError, match="average folders that train the same"):
        average([tmp_path / "one", tmp_path / "frozen"], tmp_path / "no")


def test_wavlm_takes_no_lora():
    with pytest.raises(OptionError, match="WavLM's attention does not call its linear layers"):
        trained_encoder.add_lora(None, tiny.config("a", "b").encoder, "wavlm")
