"""Log-mel and Whisper encoder at true length, against transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    ParakeetEncoder,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    WhisperFeatureExtractor,
    WhisperModel,
)

from model import artifact, trained_encoder
from model.config import EncoderConfig
from model.encoder import build_encoder
from model.features import log_mel
from model.pretrained import SourceError, locate
from model.soundwave import Soundwave
from recipe.config import DataConfig
from stream.augment import mel_channels
from tests.model import tiny


def sound(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator) * 0.1
    return noise * torch.linspace(0.01, 1, samples)  # loudest at the end: where the edge matters


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 400, 16000, 31999, 479_601, 479_800, 479_999, 480_000])
def test_first_frames_are_whispers(samples, n_mels):
    wave = sound(samples)
    expected = WhisperFeatureExtractor(n_mels)(
        wave.numpy(), sampling_rate=16000, return_tensors="pt"
    ).input_features[0]
    garbage = torch.full((1, min(480_000, samples + 777)), 9.0)
    garbage[0, :samples] = wave
    mel, frames = log_mel(garbage, torch.tensor([samples]), n_mels)
    assert int(frames) == -(-samples // 160)
    assert (mel[0, :, : int(frames)] - expected[:, : int(frames)]).abs().max() < 2e-4
    assert (mel[0, :, int(frames) :] == 0).all()
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
        assert (features[row, int(count) :] == 0).all()


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
    mask = torch.rand(3, 16, 325) < 0.3  # a clip is masked as it is alone, whoever its companions are
    masked, _ = encoder(waves, lengths, mel_mask=mask)
    short = encoder(waves[1:2, :9_000], torch.tensor([9_000]), mel_mask=mask[1:2, :, :57])[0][0]
    torch.testing.assert_close(masked[1, :29], short, rtol=0, atol=2e-5)
    second = encoder(waves[2:, 16_000:32_000], torch.tensor([16_000]), mel_mask=mask[2:, :, 100:200])[0][0]
    torch.testing.assert_close(masked[2, 50:100], second, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"audio of 4.1 s is longer than model.encoder.max_seconds = 4"):
        encoder(torch.zeros(1, 65_600), torch.tensor([65_600]))


@torch.no_grad()
def test_padded_lengths_know_no_companions_either(folders):
    config = EncoderConfig(name=folders("whisper", positions=50), pad_to_seconds=1.0, max_seconds=4.0)
    encoder = build_encoder(config, locate(config.name), torch.float32, "sdpa")
    waves, lengths = torch.randn(4, 52_000), torch.tensor([52_000, 9_000, 32_000, 0])
    features, frames = encoder(waves, lengths, padded=True)
    assert frames.tolist() == [200, 50, 100, 50]
    for row, length in enumerate(lengths.tolist()):
        alone, count = encoder(waves[row : row + 1, : max(1, length)], lengths[row : row + 1], padded=True)
        assert int(count) == int(frames[row])
        torch.testing.assert_close(features[row, : int(count)], alone[0], rtol=0, atol=2e-5)


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


WAVEFORM_FAMILIES = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model, Wav2Vec2ForCTC, dict(feat_extract_norm="group")),
    "hubert": (
        HubertConfig,
        HubertModel,
        HubertForCTC,
        dict(feat_extract_norm="layer", do_stable_layer_norm=True),
    ),
    "wavlm": (WavLMConfig, WavLMModel, WavLMForCTC, dict(feat_extract_norm="group")),
}


@pytest.fixture(params=list(WAVEFORM_FAMILIES))
def waveform_encoder(request, tmp_path):
    """(our encoder, transformers' model) of a family, with and without a head around it in its folder."""
    config_class, plain, with_head, options = WAVEFORM_FAMILIES[request.param]
    config = config_class(
        **tiny.SPEECH_SIZES,
        vocab_size=9,
        num_codevectors_per_group=4,
        **options,
    )
    model = with_head(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    made = build_encoder(EncoderConfig(name=str(tmp_path)), locate(str(tmp_path)), torch.float32, None)
    return made, plain.from_pretrained(tmp_path).eval()


@torch.no_grad()
def test_waveform_encoders_equal_transformers_clip_by_clip(waveform_encoder):
    """Also the norm over time of the first convolution, which in transformers sees a batch's padding."""
    ours, theirs = waveform_encoder
    assert (ours.width, ours.frame_rate, ours.window_seconds) == (16, 50.0, None)
    lengths = torch.tensor([9000, 4321, 900, 3])
    waves = torch.full((4, 9100), 5.0)
    for row, length in enumerate(lengths.tolist()):
        waves[row, :length] = torch.randn(length)
    features, frames = ours(waves, lengths)
    for row, length in enumerate(lengths.tolist()):
        clip = waves[row : row + 1, :length]
        clip = (clip - clip.mean()) / (clip.var(unbiased=False) + 1e-7).sqrt()
        expected = theirs(F.pad(clip, (0, max(0, ours.shortest - length)))).last_hidden_state[0]
        assert int(frames[row]) == len(expected)
        torch.testing.assert_close(features[row, : len(expected)], expected, rtol=0, atol=3e-5)
        assert (features[row, len(expected) :] == 0).all()


def test_another_encoder_changes_nothing_elsewhere(waveform_encoder, folders, tmp_path):
    """The network is built, trained a step, saved and loaded with an encoder of another width and rate."""
    config = tiny.config(str(tmp_path), folders("llama_tied"))
    model = Soundwave.build(config)
    batch = tiny.batch(model, [tiny.chat("What?", "the wall")], [0.9], ["the wall"])
    output = model(batch, losses=("ce", "ctc"))
    (output.ce_sum + output.ctc_sum).backward()
    assert all(p.grad is not None for group in model.parameter_groups().values() for _, p in group)
    artifact.save(model, tmp_path / "saved")
    again = artifact.load(tmp_path / "saved")
    torch.testing.assert_close(
        model.eval()(batch, losses=("ce",)).ce_sum, again(batch, losses=("ce",)).ce_sum
    )
    assert Soundwave.build(config, meta=True).encoder.width == 16


CONFORMERS = {
    "w2v-BERT 2.0": (
        dict(position_embeddings_type="relative_key", left_max_position_embeddings=6),
        Wav2Vec2BertForCTC,
        Wav2Vec2BertModel,
        SeamlessM4TFeatureExtractor,
        50.0,
    ),
    "w2v-BERT rotary": (
        dict(position_embeddings_type="rotary"),
        Wav2Vec2BertForCTC,
        Wav2Vec2BertModel,
        SeamlessM4TFeatureExtractor,
        50.0,
    ),
    "Parakeet": (dict(num_mel_bins=16), ParakeetForCTC, None, ParakeetFeatureExtractor, 12.5),
    "Parakeet encoder": (dict(num_mel_bins=24), ParakeetEncoder, None, ParakeetFeatureExtractor, 12.5),
}


@pytest.fixture(params=list(CONFORMERS))
def conformer(request, tmp_path):
    """(our encoder, transformers' encoder, its feature extractor, frames a second), from a whole model's
    folder."""
    options, whole, plain, extractor, rate = CONFORMERS[request.param]
    model = tiny.conformer(tmp_path, whole, **options).eval()
    theirs = plain.from_pretrained(tmp_path).eval() if plain else getattr(model, "encoder", model)
    given = {"feature_size": options["num_mel_bins"]} if plain is None else {}
    ours = build_encoder(EncoderConfig(name=str(tmp_path)), locate(str(tmp_path)), torch.float32, None)
    return ours, theirs, extractor(**given), rate


@torch.no_grad()
def test_conformers_equal_transformers_clip_by_clip(conformer):
    """The extractor's features of a clip alone, and the network without a batch; 0.13 s and less are padded
    to the shortest clip."""
    ours, theirs, extractor, rate = conformer
    assert (ours.width, ours.frame_rate, ours.window_seconds) == (16, rate, None)
    lengths = torch.tensor([9000, 4321, 900, 7])
    waves = torch.full((4, 9100), 5.0)
    for row, length in enumerate(lengths.tolist()):
        waves[row, :length] = 0.1 * torch.randn(length)
    features, frames = ours(waves, lengths)
    for row, length in enumerate(lengths.tolist()):
        clip = F.pad(waves[row, :length], (0, max(0, ours.shortest - length)))
        inputs = extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt")
        valid = int(inputs["attention_mask"].sum())
        expected = theirs(inputs["input_features"][:, :valid].float()).last_hidden_state[0]
        assert int(frames[row]) == len(expected) == int(ours.frames(torch.tensor(length)))
        # A constant silent channel is divided by almost nothing: rounding counts there.
        torch.testing.assert_close(features[row, : len(expected)], expected, rtol=0, atol=2e-3)
        assert (features[row, len(expected) :] == 0).all()
        alone, _ = ours(waves[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(features[row, : len(expected)], alone[0], rtol=0, atol=3e-5)


def test_conformers_give_gradients_to_lora_and_to_layers(conformer):
    ours = conformer[0]
    layers = trained_encoder.transformer_layers(ours)
    assert len(layers) == 2
    family = ours.layers.config.model_type
    trained_encoder.add_lora(ours, EncoderConfig(name="x", lora_r=2), family)
    lora = trained_encoder.lora_parameters(ours)
    assert len(lora) == 2 * 2 * 4  # two layers, four linear layers each
    for parameter in lora:
        parameter.requires_grad_(True)
    ours.learns = True
    ours(0.1 * torch.randn(1, 5000), torch.tensor([5000]))[0].square().sum().backward()
    assert sum(p.grad is not None for p in lora) == len(lora)


def test_spec_augment_masks_parakeets_mel(tmp_path):
    tiny.conformer(tmp_path, ParakeetForCTC, num_mel_bins=16)
    config = EncoderConfig(name=str(tmp_path))
    encoder = build_encoder(config, locate(str(tmp_path)), torch.float32, None)
    everything = torch.ones(1, 16, 50, dtype=torch.bool)
    one, two = (0.1 * torch.randn(1, 8000) for _ in range(2))
    masked = [encoder(wave, torch.tensor([8000]), mel_mask=everything)[0] for wave in (one, two)]
    assert torch.equal(*masked)
    assert not torch.allclose(masked[0], encoder(one, torch.tensor([8000]))[0])
    data = DataConfig(spec_augment=True)
    assert mel_channels(data, tiny.config(str(tmp_path), "x")) == 16


def test_encoders_whose_frames_would_be_counted_wrongly_are_refused(tmp_path):
    tiny.conformer(tmp_path / "adapter", Wav2Vec2BertModel, add_adapter=True, output_hidden_size=16)
    tiny.conformer(tmp_path / "other", ParakeetForCTC)
    ParakeetFeatureExtractor(n_fft=400).save_pretrained(tmp_path / "other")
    for name, words in (
        ("adapter", r"has an adapter that drops frames \(add_adapter\)"),
        ("other", r"n_fft is 400, and this encoder's features are computed with 512"),
    ):
        config = EncoderConfig(name=str(tmp_path / name))
        with pytest.raises(SourceError, match=words):
            build_encoder(config, locate(config.name), torch.float32, None)
