"""Log-mel and Whisper encoder at true length, against transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor, WhisperModel

from model.config import EncoderConfig
from model.encoder import build_encoder
from model.features import log_mel
from model.pretrained import SourceError, locate


def sound(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator) * 0.1
    return noise * torch.linspace(0.01, 1, samples)  # loudest at the end: where the edge matters


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 400, 16000, 31999, 479_601, 479_800, 479_999, 480_000])
def test_first_frames_are_whispers(samples, n_mels):
    wave = sound(samples)
    expected = WhisperFeatureExtractor(n_mels)(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
    garbage = torch.full((1, min(480_000, samples + 777)), 9.0)
    garbage[0, :samples] = wave
    mel, frames = log_mel(garbage, torch.tensor([samples]), n_mels)
    assert int(frames) == -(-samples // 160)
    assert (mel[0, :, : int(frames)] - expected[:, : int(frames)]).abs().max() < 2e-4
    assert (mel[0, :, int(frames):] == 0).all()
    full, frames = log_mel(wave[None], torch.tensor([samples]), n_mels, 480_000)
    assert full.shape[-1] == 3000 and (full[0] - expected).abs().max() < 2e-4


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=4), st.integers(0, 3000), st.floats(-5, 5))
def test_mel_knows_neither_companions_nor_padding(lengths, extra, garbage):
    waves = [sound(n, seed=i) for i, n in enumerate(lengths)]
    padded = torch.full((len(waves), max(lengths) + extra), garbage)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
    mel, frames = log_mel(padded, torch.tensor(lengths), 16)
    for row, wave in enumerate(waves):
        alone, count = log_mel(wave[None], torch.tensor([len(wave)]), 16)
        assert torch.equal(count[0], frames[row])
        torch.testing.assert_close(mel[row, :, : int(count)], alone[0], rtol=0, atol=1e-5)


def make(folders, pad=None, attention="sdpa", **options):
    config = EncoderConfig(name=folders("whisper"), pad_to_seconds=pad, **options)
    return build_encoder(config, locate(config.name), torch.float32, attention)


@torch.no_grad()
def test_padded_to_thirty_seconds_equals_transformers(folders):
    encoder = make(folders, pad=30.0)
    theirs = WhisperModel.from_pretrained(folders("whisper")).encoder
    waves = torch.stack([F.pad(sound(n), (0, 40_000 - n)) for n in (40_000, 23_456)])
    mel, _ = log_mel(waves, torch.tensor([40_000, 23_456]), 16, 480_000)
    expected = theirs(mel).last_hidden_state
    features, lengths = encoder(waves, torch.tensor([40_000, 23_456]), padded=True)
    assert lengths.tolist() == [1500, 1500]
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    features, lengths = encoder(waves, torch.tensor([40_000, 23_456]))
    assert lengths.tolist() == [125, 74]
    torch.testing.assert_close(features[1, :74], expected[1, :74], rtol=0, atol=2e-5)
    assert (features[1, 74:] == 0).all()


@torch.no_grad()
def test_true_length_is_the_network_on_the_frames_there_are(folders):
    """One clip alone, through transformers' layers with no mask at all."""
    encoder = make(folders)
    net = WhisperModel.from_pretrained(folders("whisper")).encoder
    wave = sound(12_345)
    mel, frames = log_mel(wave[None], torch.tensor([12_345]), 16)
    hidden = F.gelu(net.conv2(F.gelu(net.conv1(mel)))).transpose(1, 2)
    hidden = hidden + net.embed_positions.weight[: hidden.shape[1]]
    for layer in net.layers:
        hidden = layer(hidden, None)
    expected = net.layer_norm(hidden)
    batch = torch.full((3, 30_000), 3.0)
    batch[0], batch[1, :12_345], batch[2, :700] = sound(30_000, 1), wave, sound(700, 2)
    features, lengths = encoder(batch, torch.tensor([30_000, 12_345, 700]))
    assert lengths.tolist() == [94, expected.shape[1], 3]
    torch.testing.assert_close(features[1, : expected.shape[1]], expected[0], rtol=0, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=4), st.integers(0, 3000), st.floats(-5, 5))
@torch.no_grad()
def test_encoder_knows_neither_companions_nor_padding(folders, lengths, extra, garbage):
    encoder = make(folders)
    waves = [sound(n, seed=i) for i, n in enumerate(lengths)]
    padded = torch.full((len(waves), max(lengths) + extra), garbage)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
    features, frames = encoder(padded, torch.tensor(lengths))
    for row, wave in enumerate(waves):
        alone, count = encoder(wave[None], torch.tensor([len(wave)]))
        assert int(count) == int(frames[row])
        torch.testing.assert_close(features[row, : int(count)], alone[0], rtol=0, atol=2e-5)
        assert (features[row, int(count):] == 0).all()


@torch.no_grad()
def test_eager_equals_sdpa(folders):
    waves, lengths = torch.randn(2, 9000), torch.tensor([9000, 4000])
    sdpa, eager = (make(folders, attention=a)(waves, lengths)[0] for a in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=2e-5)


@torch.no_grad()
def test_long_audio_is_encoded_in_windows(folders):
    config = EncoderConfig(name=folders("whisper", positions=50), max_seconds=4.0)  # a window of 1 s
    encoder = build_encoder(config, locate(config.name), torch.float32, "sdpa")
    waves, lengths = torch.randn(3, 52_000), torch.tensor([52_000, 9_000, 32_000])
    features, frames = encoder(waves, lengths)
    assert frames.tolist() == [163, 29, 100]  # 3 x 50 + 13 for the 4000 samples that are left
    for row in range(3):
        pieces = waves[row, : lengths[row]].split(16_000)
        expected = torch.cat([encoder(p[None], torch.tensor([len(p)]))[0][0] for p in pieces])
        torch.testing.assert_close(features[row, : frames[row]], expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"audio of 4.1 s is longer than model.encoder.max_seconds = 4"):
        encoder(torch.zeros(1, 65_600), torch.tensor([65_600]))


def test_what_is_no_encoder_is_refused(folders, tmp_path):
    with pytest.raises(SourceError, match="is a 'llama' model; encoders known: whisper"):
        build_encoder(EncoderConfig(), locate(folders("llama")), torch.float32, "sdpa")
    with pytest.raises(SourceError, match="does not exist"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(SourceError, match="no config.json"):
        locate(str(tmp_path))


def test_mel_mask_hides_content(folders):
    encoder = make(folders)
    one, two = torch.randn(1, 8000), torch.randn(1, 8000)
    everything = torch.ones(1, 16, 50, dtype=torch.bool)
    masked = [encoder(w, torch.tensor([8000]), mel_mask=everything)[0] for w in (one, two)]
    assert torch.equal(*masked)
    assert not torch.allclose(masked[0], encoder(one, torch.tensor([8000]))[0])
