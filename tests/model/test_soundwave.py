"""The whole network: stages, losses against a plain computation, masks, families, folders."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from model import artifact
from model.artifact import FolderError
from model.config import EncoderConfig, LLMConfig, SoundwaveConfig
from model.inheritance import differing_options, find_base, inherited_options
from model.language_model import base_of
from model.pretrained import NotOnHub, SourceError, fingerprint, locate, presets
from model.soundwave import Soundwave
from tests.model import tiny
from tests.model.conftest import build
from tests.model.tiny import chat

CHATS = [chat("What?", "the wall"), chat("Say it.", "a"), chat("2 + 2?", "four", audio=False)]


def mixed(model, **options):
    return tiny.batch(model, CHATS, [0.9, 0.4], ["the wall", "a"], **options)


def by_hand(model, batch, row: int, audio: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One conversation: (cross-entropy sum, CTC / target length, logits), nothing batched, every logit
    there."""
    ids, labels = (
        batch.input_ids[row][batch.attention_mask[row].bool()],
        batch.labels[row][batch.attention_mask[row].bool()],
    )
    text = base_of(model.llm).get_input_embeddings()(ids.masked_fill(ids == model.audio_id, 0))
    ctc = torch.zeros(())
    if audio is not None:
        size = int(batch.audio_lengths[audio])
        features, frames = model.encoder(batch.waveforms[audio : audio + 1, :size], torch.tensor([size]))
        hidden, length = model.alignment(features, frames)
        head = model.ctc_head
        table = head.weight if head.blank_row is None else torch.cat([head.weight, head.blank_row[None]])
        log = (hidden[0] @ table.T).log_softmax(-1)
        target = batch.ctc_targets[audio, : batch.ctc_target_lengths[audio]]
        ctc = F.ctc_loss(
            log,
            target,
            length[0],
            torch.tensor(len(target)),
            blank=head.blank,
            reduction="sum",
            zero_infinity=True,
        )
        ctc = ctc / len(target)
        best, runs = log.argmax(-1).tolist(), []
        for t, token in enumerate(best):
            if t and token == best[t - 1]:
                runs[-1].append(t)
            else:
                runs.append([t])
        kept = [
            max(run, key=lambda t: float(log[t].detach().amax()))
            for run in runs
            if best[run[0]] != head.blank
        ]
        kept = kept or [int(log[:, head.blank].argmin())]
        shrunk = model.shrinking.compress(hidden, length, torch.tensor([kept]), torch.tensor([len(kept)]))[0]
        at = int((ids == model.audio_id).nonzero())
        text = torch.cat([text[:at], shrunk, text[at + 1 :]])
        labels = torch.cat([labels[:at], labels.new_full((len(kept),), -100), labels[at + 1 :]])
    logits = model.llm(inputs_embeds=text[None]).logits[0]
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"), ctc, logits


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_losses_and_gradients_equal_one_conversation_at_a_time(folders, family):
    """Every LLM family, tied and untied, blank in a row of its own behind a padded vocabulary."""
    model = build(folders, family, llm_options={"spare_rows": 3})
    assert model.ctc_head.blank == model.ctc_head.weight.shape[0] and model.audio_id < model.ctc_head.blank
    batch = mixed(model)
    output = model(batch, losses=("ce", "ctc"))
    (output.ce_sum + 0.3 * output.ctc_sum).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in trained.items()}
    model.zero_grad()
    parts = [by_hand(model, batch, row, audio) for row, audio in ((0, 0), (1, 1), (2, None))]
    ce, ctc = sum(p[0] for p in parts), sum(p[1] for p in parts)
    (ce + 0.3 * ctc).backward()
    torch.testing.assert_close(output.ce_sum, ce, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.ctc_sum, ctc, rtol=1e-5, atol=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert int(output.frames) == 23 + 10 and 2 <= int(output.kept) <= 33


@pytest.mark.parametrize("head", ["initialised", "free"])
def test_trained_heads(folders, head):
    model = build(folders, ctc_head=head)
    batch = mixed(model)
    output = model(batch, losses=("ctc",))
    expected = by_hand(model, batch, 0, 0)[1] + by_hand(model, batch, 1, 1)[1]
    torch.testing.assert_close(output.ctc_sum, expected, rtol=1e-4, atol=1e-4)
    assert [n for n, _ in model.parameter_groups()["ctc_head"]] == [
        "ctc_head.weight"
    ] and model.shared_parameters() == []


def test_blank_inside_a_vocabulary_that_was_resized(folders):
    """An LLM folder that already knows <audio_patch>: the token keeps its number."""
    model = build(folders, "llama", llm_options={"extra_tokens": ("<audio_patch>",)})
    assert model.audio_id == model.ctc_head.weight.shape[0] - 1 and model.ctc_head.blank == model.audio_id + 1
    model(mixed(model), losses=("ce", "ctc")).ce_sum.backward()
    trained = build(
        folders, "llama", llm_options={"extra_tokens": ("<audio_patch>",)}, ctc_head="initialised"
    ).ctc_head
    assert trained.blank == model.audio_id and trained.weight.shape == model.ctc_head.weight.shape


def test_stages_train_what_the_method_says(folders):
    model = build(folders)

    def learns(stage):
        model.set_stage(stage)
        return {g: {n.split(".")[0] for n, _ in ps} for g, ps in model.parameter_groups().items()}

    assert learns("alignment") == {"adapters": {"alignment"}, "ctc_head": {"ctc_head"}, "lora": set()}
    assert learns("shrinking") == {
        "adapters": {"alignment", "shrinking"},
        "ctc_head": {"ctc_head"},
        "lora": {"llm"},
    }
    assert [n for n, _ in model.parameter_groups()["ctc_head"]] == ["ctc_head.blank_row"]
    assert learns("sft") == {"adapters": set(), "ctc_head": set(), "lora": {"llm"}}
    assert all("lora_" in n for n, _ in model.parameter_groups()["lora"])
    with pytest.raises(ValueError, match="stage 'three' is not known"):
        model.set_stage("three")
    first = build(folders, parts=("encoder", "adapters"))
    assert first.llm is None and first.shrinking is None and first.stage == "alignment"
    with pytest.raises(ValueError, match="needs the LLM"):
        first.set_stage("sft")


def test_frozen_parts_do_not_drop_out(folders):
    model = build(folders).train()
    model.set_stage("sft")
    assert not model.alignment.training and not model.encoder.training and not model.shrinking.training
    batch = mixed(model)
    assert torch.equal(
        model(batch.at_step(1), losses=("ce",)).ce_sum, model(batch.at_step(2), losses=("ce",)).ce_sum
    )
    model.set_stage("shrinking")
    assert model.alignment.training and model.shrinking.training and not model.encoder.training
    assert not torch.equal(
        model(batch.at_step(1), losses=("ce",)).ce_sum, model(batch.at_step(2), losses=("ce",)).ce_sum
    )


def test_stage_one_reads_only_the_embeddings_and_agrees(folders):
    """The CTC loss without the LLM equals that with it; its folder then starts stage 2."""
    first, second = build(folders, parts=("encoder", "adapters")), build(folders)
    second.alignment.load_state_dict(first.alignment.state_dict())
    second.ctc_head.blank_row.data.copy_(first.ctc_head.blank_row)
    batch = mixed(first)
    torch.testing.assert_close(first(batch).ctc_sum, second(batch).ctc_sum, rtol=1e-6, atol=0)
    assert second.ctc_head.weight is base_of(second.llm).get_output_embeddings().weight
    assert second.shared_parameters() == [(second.ctc_head, second.ctc_head.weight)]


def test_audio_reaches_the_llm_on_its_embeddings_scale(folders):
    config = tiny.config(folders("whisper"), folders("llama_tied"))
    model = Soundwave.build(config).eval()
    batch = mixed(model)
    shrunk = model.shrinking.compress(*(a := model.encode_audio(batch))[:2], a.kept, a.kept_lengths)[
        0, : a.kept_lengths[0]
    ]
    table = base_of(model.llm).get_input_embeddings().weight
    torch.testing.assert_close(shrunk.square().mean().sqrt(), table.square().mean().sqrt(), rtol=1e-2, atol=0)


def test_token_embeddings_are_added_to_what_is_not_blank(folders):
    config = tiny.config(folders("whisper"), folders("llama_tied"))
    model = Soundwave.build(config).eval()
    batch = mixed(model)
    audio = model.encode_audio(batch)
    audio.argmax[0, audio.kept[0, 0]] = model.ctc_head.blank
    plain = model.embeddings(batch, audio)[0]
    config.shrinking.token_embeddings = True
    added = model.embeddings(batch, audio)[0] - plain
    table, blank = base_of(model.llm).get_input_embeddings().weight, model.ctc_head.blank
    seen = set()
    for row in range(2):
        at = int((batch.input_ids[row] == model.audio_id).nonzero())
        for k in range(int(audio.kept_lengths[row])):
            token = int(audio.argmax[row, audio.kept[row, k]])
            seen.add(token == blank)
            torch.testing.assert_close(
                added[row, at + k], table[token] if token != blank else torch.zeros_like(added[row, 0])
            )
            added[row, at + k] = 0
    assert not added.any() and seen == {True, False}


def test_batch_without_audio_runs_the_audio_path_and_adds_zero(folders):
    model = build(folders)
    text = [chat("2 + 2?", "four", audio=False), chat("the?", "a", audio=False)]
    batch = tiny.batch(model, text, [], [])
    output = model(batch, losses=("ce", "ctc"))
    (output.ce_sum + output.ctc_sum).backward()
    assert int(output.frames) == int(output.kept) == 0 and output.ctc_sum.item() == 0
    torch.testing.assert_close(
        output.ce_sum, sum(by_hand(model, batch, row, None)[0] for row in (0, 1)), rtol=1e-5, atol=1e-4
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} took no part"
            if not name.startswith("llm."):
                assert float(parameter.grad.abs().max()) == 0, name


def test_batch_without_targets_still_runs_the_llm(folders):
    model = build(folders)
    batch = mixed(model)
    output = model(replace(batch, labels=torch.full_like(batch.labels, -100)), losses=("ce", "ctc"))
    (output.ce_sum + output.ctc_sum).backward()
    assert output.ce_sum.item() == 0
    assert all(p.grad is not None for _, p in model.parameter_groups()["lora"])


def test_every_batch_calls_the_same_modules_in_the_same_order(folders):
    """What ZeRO-3 needs: audio or text, targets or none, one audio or three."""
    model = build(folders)
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: called.append(name))
    batches = [
        mixed(model),
        tiny.batch(model, CHATS[2:], [], []),
        tiny.batch(model, CHATS[:1], [0.2], [None]),
        tiny.batch(
            model, [chat("x <audio_patch> y <audio_patch>", "a")], [0.2, 0.3, 0.4], ["a", None, "the"]
        ),
    ]
    orders = []
    for batch in batches:
        called.clear()
        model(batch, losses=("ce", "ctc"))
        orders.append(list(called))
    assert all(order == orders[0] for order in orders) and len(orders[0]) > 50


def test_utterance_without_transcript_takes_no_part_in_ctc(folders):
    model = build(folders)
    both = tiny.batch(model, CHATS[:2], [0.9, 0.4], ["the wall", None])
    torch.testing.assert_close(
        model(both).ctc_sum, by_hand(model, mixed(model), 0, 0)[1], rtol=1e-5, atol=1e-5
    )


@settings(max_examples=10, deadline=None)
@given(
    seconds=st.lists(st.floats(0.02, 1.2), min_size=1, max_size=3),
    extra=st.integers(0, 4000),
    fill=st.floats(-3, 3),
    left=st.booleans(),
    text_padding=st.integers(0, 5),
)
def test_no_output_knows_companions_or_padding(folders, seconds, extra, fill, left, text_padding):
    """The whole network: each conversation's losses and logits are those it has alone."""
    model = build(folders)
    prompts = ["What?", "Say it, please.", "Hm"]
    chats = [chat(p, a) for p, a in zip(prompts, ["the wall", "a", "all the"], strict=True)][: len(seconds)]
    texts = ["the wall", "a", "all"][: len(seconds)]
    batch = tiny.batch(model, chats, seconds, texts, left=left)
    waveforms = F.pad(batch.waveforms, (0, extra))
    behind = torch.arange(waveforms.shape[1]) >= batch.audio_lengths[:, None]
    side = (text_padding, 0) if left else (0, text_padding)
    padded = replace(
        batch,
        waveforms=waveforms.masked_fill(behind, fill),
        input_ids=F.pad(batch.input_ids, side, value=7),
        attention_mask=F.pad(batch.attention_mask, side),
        labels=F.pad(batch.labels, side, value=-100),
    )
    with torch.no_grad():
        output = model(padded, losses=("ce", "ctc"))
        alone = [by_hand(model, batch, row, row) for row in range(len(seconds))]
        torch.testing.assert_close(output.ce_sum, sum(a[0] for a in alone), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(output.ctc_sum, sum(a[1] for a in alone), rtol=1e-4, atol=1e-3)
        embeddings, mask, _ = model.embeddings(padded, model.encode_audio(padded), left_padded=left)
        logits = model.llm(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
        for row, (_, _, expected) in enumerate(alone):
            torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=0, atol=2e-4)


def test_cached_features_are_the_encoders(folders):
    model = build(folders)
    batch = mixed(model)
    features, frames = model.encode(batch)
    cached = replace(
        batch, waveforms=None, features=F.pad(features, (0, 0, 0, 3), value=5.0), audio_lengths=frames
    )
    headless = build(folders, parts=("adapters", "llm"))
    assert headless.encoder is None
    for losses in (("ctc",), ("ce", "ctc")):
        torch.testing.assert_close(
            model(batch, losses=losses)[:2], headless(cached, losses=losses)[:2], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="cached features"):
        headless(batch)


def test_audio_and_text_must_agree(folders):
    model = build(folders)
    with pytest.raises(ValueError, match=r"2 audios and 1 <audio_patch>"):
        model(tiny.batch(model, CHATS[:1], [0.2, 0.2], ["a", "a"]), losses=("ce",))


def test_checkpointing_activations_changes_no_gradient(folders):
    model = build(folders)
    model.set_stage("sft")
    model.train()
    batch, gradients = mixed(model), []
    for _ in range(2):
        model.zero_grad()
        model(batch, losses=("ce",)).ce_sum.backward()
        gradients.append([p.grad.clone() for _, p in model.parameter_groups()["lora"]])
        model.enable_activation_checkpointing()
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_attention_implementations_agree(folders):
    outputs = []
    for name in ("sdpa", "eager"):
        config = tiny.config(folders("whisper"), folders("llama_tied"))
        config.attention_implementation = name
        torch.manual_seed(5)
        model = Soundwave.build(config).eval()
        assert (
            base_of(model.llm).config._attn_implementation
            == model.encoder.layers.config._attn_implementation
            == name
        )
        outputs.append(model(mixed(model), losses=("ce", "ctc"))[:2])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-4)


# ---- sizes and folders ----


def test_sizes_of_the_published_system_without_weights():
    model = Soundwave.build(SoundwaveConfig(), meta=True)
    model.set_stage("shrinking")
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("encoder", "alignment", "shrinking")
    }
    assert round(counts["encoder"] / 1e6) in (635, 637) and round(counts["alignment"] / 1e6) == 145
    assert round(counts["shrinking"] / 1e6) == 67
    assert round(sum(p.numel() for _, p in model.parameter_groups()["lora"]) / 1e6, 1) == 54.5
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "name", [n for n, preset in presets().items() if preset["config"]["model_type"] != "whisper"]
)
def test_every_preset_builds(name):
    encoder = "openai/whisper-tiny"
    model = Soundwave.build(
        SoundwaveConfig(encoder=EncoderConfig(encoder), llm=LLMConfig(name)),
        meta=True,
        parts=("encoder", "adapters"),
    )
    assert model.ctc_head.weight.shape == (model.ctc_head.blank, model.alignment.norm.weight.shape[0])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-32b", 32_762_123_264),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-3.3-70b", 70_553_706_496),
        ("qwen2.5-72b", 72_706_203_648),
        ("whisper-large-v2", 1_543_304_960),
        ("whisper-large-v3-turbo", 808_878_080),
        ("distil-large-v3", 756_405_760),
        ("distil-small.en", 166e6),
        ("distil-medium.en", 394e6),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    """Exact where the publisher's checkpoint says it, else as rounded in its model card."""
    source = locate(name, sizes_only=True)
    kind = AutoModel if source.config.model_type == "whisper" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(source.config)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == pytest.approx(parameters, rel=5e-3 if source.config.model_type == "whisper" else 0)


def test_a_hub_name_of_a_preset_is_fetched_itself(monkeypatch):
    """Not the first name of its preset, which has other weights."""
    asked = []

    def fetch(repository, *_, **__):
        asked.append(repository)
        raise NotOnHub("offline")

    monkeypatch.setattr("model.pretrained.hub_folder", fetch)
    for name in ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"):
        with pytest.raises(SourceError):
            locate(name)
    assert asked == ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("whisper-basic", "did you mean 'whisper-base'"),
        ("qwen2.5-7", "did you mean 'qwen2.5-7b'"),
        ("my-model", "give a folder, a hub name (OWNER/NAME), or a known size: distil"),
    ],
)
def test_an_unknown_name_without_an_owner_gets_the_nearest_sizes(name, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="is neither a folder, a known size nor in the hub cache") as caught:
        locate(name, sizes_only=True)
    assert words in str(caught.value)


def test_unknown_model_names_the_known_sizes():
    with pytest.raises(SourceError, match="llama-3.1-8b"):
        Soundwave.build(SoundwaveConfig(llm=LLMConfig("unknown/model")), meta=True)


def test_relative_frozen_parts_are_found_above_the_model_folder(folders, tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, family in (("whisper", "whisper"), ("llm", "llama_tied")):
        shutil.copytree(folders(family), project / "models" / name)
    monkeypatch.chdir(project)
    model = Soundwave.build(tiny.config("models/whisper", "models/llm")).eval()
    artifact.save(model, project / "runs" / "mine" / "model")
    assert artifact.read_config(project / "runs" / "mine" / "model").llm.name == "models/llm"
    monkeypatch.chdir(elsewhere)
    again = artifact.load(project / "runs" / "mine" / "model")
    assert again.config.encoder.name == str(project / "models" / "whisper")
    assert inherited_options(project / "runs" / "mine" / "model")["llm.name"] == str(
        project / "models" / "llm"
    )
    assert find_base(project / "runs" / "mine" / "model", "models/other") == "models/other"
    assert find_base(project / "runs" / "mine" / "model", "../models/llm") == "../models/llm"


def test_folder_gives_the_model_back(folders, tmp_path):
    model = build(folders)
    artifact.save(model, tmp_path / "model", {"step": 7})
    again = artifact.load(tmp_path / "model")
    batch = mixed(model)
    assert torch.equal(model(batch, losses=("ce", "ctc")).ce_sum, again(batch, losses=("ce", "ctc")).ce_sum)
    assert again.stage == "shrinking" and artifact.describe(tmp_path / "model")["step"] == 7
    # plain peft loads the LoRA onto the plain base
    base = AutoModelForCausalLM.from_pretrained(folders("llama_tied"))
    peft = PeftModel.from_pretrained(base, tmp_path / "model" / "lora").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(peft(ids).logits, again.llm(ids).logits)
    # what was trained and nothing else is stored; saving again replaces it
    stored = artifact.load_file(tmp_path / "model" / "adapters.safetensors")
    assert (
        "ctc_head.blank_row" in stored
        and "ctc_head.weight" not in stored
        and not any("llm" in n for n in stored)
    )
    for leftover in ("model.previous", "model.partial"):  # of a replacement that was interrupted
        shutil.copytree(tmp_path / "model", tmp_path / leftover)
    (tmp_path / "model" / "old").mkdir()
    artifact.save(model, tmp_path / "model")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["model"] and not (tmp_path / "model" / "old").exists()
    )


def test_stage_one_folder_starts_stage_two(folders, tmp_path):
    first = build(folders, parts=("encoder", "adapters"))
    artifact.save(first, tmp_path / "one")
    assert not (tmp_path / "one" / "lora").exists() and artifact.load(tmp_path / "one").llm is None
    second = build(folders)
    fresh = copy.deepcopy(second.shrinking.state_dict())
    assert artifact.load_trained(second, tmp_path / "one") == ["alignment", "ctc_head"]
    second.config.shrinking.lookback, second.config.alignment.ctc_length = "kept", "full"
    differ = differing_options(second.config, tmp_path / "one")
    assert differ == {"model.alignment.ctc_length": ("true", "full")}, "stage 1 has not used the other"
    assert torch.equal(second.alignment.projection.weight, first.alignment.projection.weight)
    assert torch.equal(second.ctc_head.blank_row, first.ctc_head.blank_row)
    assert all(torch.equal(fresh[n], t) for n, t in second.shrinking.state_dict().items())


def test_wrong_base_and_wrong_settings_are_one_line(folders, tmp_path):
    artifact.save(build(folders), tmp_path / "model")
    other = Path(shutil.copytree(folders("llama_tied"), tmp_path / "other"))
    llm = AutoModelForCausalLM.from_pretrained(other)
    llm.model.norm.weight.data[3] += 1e-3
    llm.save_pretrained(other)
    with pytest.raises(
        FolderError, match=r"trained with another llm: its sha256 .* set model.llm.name"
    ) as error:
        artifact.load(tmp_path / "model", llm=str(other))
    assert "\n" not in str(error.value)
    assert artifact.load(tmp_path / "model", llm=str(other), verify=False).llm is not None
    with pytest.raises(FolderError, match="alignment does not fit model.alignment of this recipe"):
        artifact.load_trained(build(folders, ffn_multiple=3.0), tmp_path / "model")
    with pytest.raises(FolderError, match="soundwave.json is missing"):
        artifact.load(tmp_path)


def test_fingerprint_ignores_how_tensors_are_spread_over_files(folders, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(folders("llama"))
    llm.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(Path(folders("llama"))) == fingerprint(tmp_path / "shards")
    llm.lm_head.weight.data[0, 0] += 1
    llm.save_pretrained(tmp_path / "changed")
    assert fingerprint(Path(folders("llama"))) != fingerprint(tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "config.json").read_text())["model_type"] == "llama"


def test_attention_that_a_model_lacks_is_one_line(folders):
    config = tiny.config(folders("whisper"), folders("gemma2"))
    config.attention_implementation = "sdpa"
    with pytest.raises(
        SourceError, match="does not run with model.attention_implementation=sdpa .* set it to eager or auto"
    ):
        Soundwave.build(config)
    config.attention_implementation = "fast"
    with pytest.raises(ValueError, match="model.attention_implementation is 'fast'"):
        Soundwave.build(config)


def test_frozen_parts_in_bfloat16_with_adapters_in_float32(folders):
    """Types differ between the parts; gradients reach what is trained, in its own type, and the losses stay
    near."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = tiny.config(folders("whisper"), folders("llama_tied"))
        config.dtype = dtype
        torch.manual_seed(5)
        model = Soundwave.build(config).eval()
        output = model(mixed(model), losses=("ce", "ctc"))
        (output.ce_sum + output.ctc_sum).backward()
        assert all(
            p.dtype == p.grad.dtype == torch.float32
            for group in model.parameter_groups().values()
            for _, p in group
        )
        losses.append(output.ctc_sum.float().detach())
    torch.testing.assert_close(*losses, rtol=0.03, atol=0)
