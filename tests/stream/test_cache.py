"""Cached encoder features: the same numbers as the encoder gives, written once, found again after packing
anew."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperModel

from core.distributed import Ranks
from data_tools.shards import ShardIndex
from model.features import log_mel
from model.stages import STAGES
from recipe.config import Corpus, Recipe, RecipeError
from stream import EvalStream, Stream, validation_samples
from stream import cache as cache_module
from stream.cache import FeatureStore, Interrupted, ensure_features
from stream.rejected import BrokenSample
from tests.stream.conftest import data_config, record, sound, write_folder
from train.validate import clip_mel, validation_set


@pytest.fixture
def recipe(packed, tmp_path):
    """A recipe whose encoder is a tiny random Whisper."""
    torch.manual_seed(0)
    sizes = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(sizes).save_pretrained(tmp_path / "whisper")
    recipe = Recipe(data=data_config(packed, cache_features=str(tmp_path / "cache"), micro_batch_seconds=6.0))
    recipe.data.valid = [Corpus(shards=str(packed))]
    recipe.model.encoder.name = str(tmp_path / "whisper")
    return recipe


def waveform_batches(recipe, tokenizer):
    data = recipe.data
    data.cache_features, kept = None, data.cache_features
    steps = list(Stream(data, "alignment", tokenizer, recipe.model, 0, 1, 0, 3))
    data.cache_features = kept
    return steps


def test_batches_hold_what_the_encoder_gives(recipe, tokenizer):
    store = ensure_features(recipe)
    assert len(store) == 23 and store.width == 16
    cached = list(Stream(recipe.data, "alignment", tokenizer, recipe.model, 0, 1, 0, 3))
    source = cache_module.locate(recipe.model.encoder.name)
    encoder = cache_module.build_encoder(recipe.model.encoder, source, torch.float32, "sdpa")
    for ours, plain in zip(cached, waveform_batches(recipe, tokenizer), strict=True):
        assert ours.seconds == pytest.approx(plain.seconds, rel=0.02)
        for a, b in zip(ours.micro_batches, plain.micro_batches, strict=True):
            assert a.ids == b.ids and a.waveforms is None and torch.equal(a.ctc_targets, b.ctc_targets)
            features, frames = encoder(b.waveforms, b.audio_lengths)
            assert torch.equal(frames, a.audio_lengths)
            torch.testing.assert_close(a.features, features, atol=5e-3, rtol=1e-3)
    validation = EvalStream(recipe.data.valid, tokenizer, recipe.model, "alignment", data=recipe.data)
    assert all(batch.features is not None for batch, _ in validation)


def test_validation_of_several_folders_finds_all_its_features(recipe, tokenizer, packed, tmp_path, caplog):
    """Cache and validation take the same utterances, and leave out what the encoder does not take."""
    recipe.data.valid = [
        Corpus(shards=str(packed)),
        *(
            Corpus(
                shards=str(
                    write_folder(
                        tmp_path / name,
                        [
                            (record(number, 0.5), sound(0.5, 100 * place + number), "flac")
                            for number in range(11)
                        ],
                        name=name,
                    )
                )
            )
            for place, name in enumerate(("one", "two"))
        ),
    ]
    recipe.model.encoder.max_seconds, recipe.log.validate_utterances = 2.0, 19
    recipe.data.max_seconds = 1.0
    ensure_features(recipe)
    batches = validation_samples(
        recipe.data, "alignment", tokenizer, recipe.model, 0, 1, recipe.log.validate_utterances
    )
    longer = sum(0.3 + 0.1 * (number * 23 // 7) > 2.0 for number in range(7))
    assert longer and sum(len(samples) for _, samples in batches) == 21 - longer
    assert f"{longer} utterances of data.valid are left out" in caplog.text


def test_the_validation_picture_has_its_spectrogram_with_cached_features(recipe, tokenizer, packed):
    ensure_features(recipe)
    ranks, stage = Ranks(0, 1, 0, 1, "cpu"), STAGES["alignment"]
    batches = validation_set(recipe, stage, tokenizer, ranks)
    assert all(entry.batch.waveforms is None for entry in batches)
    mel = clip_mel(recipe, stage, tokenizer, ranks, batches, None)
    index = ShardIndex.load(packed)
    clips = [soundfile.read(io.BytesIO(audio))[0] for audio, _ in map(index.read, range(len(index))) if audio]
    expected = [log_mel(torch.tensor(clip)[None], torch.tensor([len(clip)]), 80)[0][0] for clip in clips]
    assert mel.std() > 0 and any(e.shape == mel.shape and torch.allclose(e, mel, atol=1e-4) for e in expected)


def test_written_once_resumed_and_found_after_packing_anew(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PACK_SECONDS", 8.0)
    encoded = []
    original = cache_module._encode

    def counting(encoder, clips, padded):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(clips))
        return original(encoder, clips, padded)

    monkeypatch.setattr(cache_module, "_encode", counting)
    with pytest.raises(KeyboardInterrupt):
        ensure_features(recipe)
    store = FeatureStore.open(recipe.data.cache_features, recipe.model)
    before = len(store)
    assert 0 < before < 23
    monkeypatch.setattr(cache_module, "_encode", original)
    for rank in range(2):
        ensure_features(recipe, None, rank, 2)
    store = FeatureStore.open(recipe.data.cache_features, recipe.model)
    assert len(store) == 23 and len(np.unique(store._entries["key"])) == 23
    samples = [(record(n, 0.3 + 0.1 * n), sound(0.3 + 0.1 * n, n), "flac") for n in reversed(range(23))]
    recipe.data.train = recipe.data.valid = [
        Corpus(shards=str(write_folder(tmp_path / "again", samples, per_shard=4)))
    ]
    monkeypatch.setattr(cache_module, "_encode", lambda *a: pytest.fail("encoded again"))
    assert len(ensure_features(recipe)) == 23


def test_a_pack_that_has_gone_or_was_cut_is_made_again_and_costs_samples_not_the_run(
    recipe, tokenizer, monkeypatch, caplog
):
    monkeypatch.setattr(cache_module, "PACK_SECONDS", 8.0)
    store = ensure_features(recipe)
    packs = sorted(path for path in store.folder.glob("*.npy") if ".index" not in path.name)
    index = cache_module.load_index(recipe.data.train[0].shards)
    assert len(packs) > 3
    packs[0].unlink()
    os.truncate(packs[1], 1000)
    os.truncate(packs[2].with_name(packs[2].name.replace(".npy", ".index.npy")), 0)

    def problems(store) -> int:
        failed = 0
        for row in range(len(index)):
            try:
                store.read(index.samples[row])
            except BrokenSample as error:
                failed += "cannot be read" in str(error)
        return failed

    assert problems(store) > 1, "in the middle of a run"
    left = FeatureStore.open(recipe.data.cache_features, recipe.model)
    assert (
        "3 packs of features are missing or cut short" in caplog.text
        and len(left) < 23
        and problems(left) == 0
    )
    assert len(ensure_features(recipe)) == 23


def test_stops_between_packs_on_request(recipe, tokenizer, monkeypatch):
    monkeypatch.setattr(cache_module, "PACK_SECONDS", 8.0)
    asked = []

    def stop_reason(seconds):
        asked.append(seconds)
        return "SIGTERM" if len(asked) == 3 else None

    with pytest.raises(Interrupted, match="SIGTERM on rank 0"):
        ensure_features(recipe, stop_reason=stop_reason)
    store = FeatureStore.open(recipe.data.cache_features, recipe.model)
    assert len(store._packs) == 2 and asked[0] == 0 < asked[1]
    assert len(ensure_features(recipe)) == 23
    assert len(ensure_features(recipe, stop_reason=lambda seconds: "SIGTERM")) == 23, (
        "nothing is left to stop"
    )


def test_another_encoder_or_setting_has_its_own_features(recipe, tokenizer):
    ensure_features(recipe)
    recipe.model.encoder.pad_to_seconds = 30.0
    with pytest.raises(RecipeError, match="holds nothing for this encoder and its settings"):
        Stream(recipe.data, "alignment", tokenizer, recipe.model, 0, 1, 0, 1)


def test_augmentation_and_cache_exclude_each_other(recipe, tokenizer):
    recipe.data.speed_perturb = [0.9, 1.1]
    with pytest.raises(RecipeError, match="must be off with it"):
        ensure_features(recipe)


def test_the_command(recipe, tmp_path, packed, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"encoder": {"name": recipe.model.encoder.name}},
                "data": {"train": [{"shards": str(packed)}], "cache_features": str(tmp_path / "c2")},
            }
        )
    )
    assert cache_module.main([str(path)]) == 0
    assert "23 utterances" in capsys.readouterr().out
    shutil.rmtree(packed)
    assert cache_module.main([str(path)]) == 2
    assert "no index.json" in capsys.readouterr().err
