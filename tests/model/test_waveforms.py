"""Waveforms of all kinds that callers have, and what is no waveform."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from model.compressors import AllFrames
from model.waveforms import ClipProblem, SoundWarning, mono, usable_clips
from tests.model.conftest import build

CHAT = [{"role": "user", "content": "<audio_patch>\nWhat is said?"}]


def tone(rate: int, seconds: float = 1.0, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x).float(),
        lambda x: x,
        lambda x: x.astype(np.float32),
        lambda x: x.tolist(),
        lambda x: x[None],
        lambda x: x[:, None],
        lambda x: np.stack([x, x]),
        lambda x: torch.from_numpy(np.stack([x, x], 1)),
        lambda x: np.stack([1.5 * x, 0.5 * x]),
        lambda x: torch.from_numpy(x)[None].requires_grad_(),
    ],
)
def test_floats_of_every_shape_are_the_same_clip(kind):
    clip, findings = mono(kind(tone(16000)))
    assert clip.shape == (16000,) and clip.dtype == torch.float32 and not findings
    np.testing.assert_allclose(clip.numpy(), tone(16000), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "full", "offset", "error"),
    [
        (np.int16, 32768, 0, 1e-4),
        (np.int32, 2**31, 0, 1e-6),
        (np.int8, 128, 0, 1e-2),
        (np.uint8, 128, 128, 1e-2),
    ],
)
def test_integers_are_scaled_by_their_full_scale(dtype, full, offset, error):
    """Taken as they are they were 32,768 times too loud."""
    whole = np.clip(np.rint(tone(16000) * full) + offset, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(
        dtype
    )
    for samples in (whole, torch.from_numpy(whole)):
        np.testing.assert_allclose(mono(samples)[0].numpy(), tone(16000), atol=error)


def test_half_precision_is_read():
    for dtype in (torch.float16, torch.bfloat16):
        np.testing.assert_allclose(
            mono(torch.from_numpy(tone(16000)).to(dtype))[0].numpy(), tone(16000), atol=4e-3
        )


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(rate):
    clip, _ = mono(tone(rate), rate)
    assert abs(len(clip) - 16000) <= 1
    middle = slice(2000, 14000)
    np.testing.assert_allclose(clip.numpy()[middle], tone(16000)[middle], atol=2e-3)


def test_channels_that_cancel_out_are_said():
    clip, findings = mono(np.stack([tone(16000), -tone(16000)]))
    assert np.abs(clip.numpy()).max() > 0.4 and len(findings) == 1 and "cancel out" in findings[0]


@pytest.mark.parametrize(
    ("waveform", "problem"),
    [
        (np.zeros(0), "holds no samples"),
        (np.zeros((0, 2)), "holds no samples"),
        (np.array([0.0, np.nan, 0.1]), "NaN or infinity, first at sample 1 of 3"),
        (np.stack([np.zeros(9), np.full(9, np.inf)]), "NaN or infinity, first at sample 0 of 9"),
    ],
)
def test_clips_that_cannot_be_used(waveform, problem):
    with pytest.raises(ClipProblem, match=problem):
        mono(waveform)


@pytest.mark.parametrize(
    ("waveform", "rate", "problem"),
    [
        (np.zeros((2, 3, 4)), 16000, r"shape \[2, 3, 4\]"),
        (np.zeros((100, 100)), 16000, r"shape \[100, 100\]"),
        (np.float32(1), 16000, r"shape \[\]"),
        (tone(16000).astype(np.float32) * 32768, 16000, "divided by 32768"),
        (np.array(["a"]), 16000, "give floats"),
        (np.array([True, False]), 16000, "give floats"),
        (np.zeros(9, np.int64), 16000, "give floats"),
        (tone(16000), 0, "sampling_rate is 0"),
        (tone(16000), 16000.5, "sampling_rate is 16000.5"),
        (tone(16000), "16k", "sampling_rate is '16k'"),
    ],
)
def test_what_is_no_waveform_is_said(waveform, rate, problem):
    with pytest.raises(ValueError, match=problem):
        mono(waveform, rate)


def test_one_bad_clip_leaves_the_others():
    good, bad = tone(16000), np.full(9, np.nan)
    with pytest.warns(SoundWarning, match="waveform 1 holds NaN.*not answered"):
        clips, unusable = usable_clips([good, bad])
    assert unusable == [1] and torch.equal(clips[0], mono(good)[0]) and clips[1].abs().max() == 0
    with pytest.raises(ValueError, match="waveform 0 holds NaN"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usable_clips([bad])
    with pytest.raises(ValueError, match="waveform 1: a waveform of shape"):
        usable_clips([good, np.zeros((50, 50))])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@torch.no_grad()
def test_a_clip_with_nan_costs_its_own_answer_alone(folders, dtype):
    model = build(folders)
    model.config.dtype = dtype
    model = model.to({"float32": torch.float32, "float16": torch.float16}[dtype])
    good, bad = torch.from_numpy(tone(16000)).float(), torch.from_numpy(tone(8000)).float()
    alone = model.answer([CHAT], [good], max_new_tokens=6)
    bad[7] = float("nan")
    with pytest.warns(SoundWarning, match="waveform 1 holds NaN or infinity, first at sample 7 of 8000"):
        assert model.answer([CHAT, CHAT], [good, bad], max_new_tokens=6) == [*alone, ""]
    with pytest.raises(ValueError, match="waveform 0 holds NaN"), pytest.warns(SoundWarning):
        model.answer([CHAT], [bad], max_new_tokens=6)
    text = [{"role": "user", "content": "Why?"}]
    with pytest.warns(SoundWarning):
        assert model.answer([text, CHAT, CHAT], [bad, good], max_new_tokens=6)[2] == alone[0]


@torch.no_grad()
def test_a_sum_that_overflows_in_half_precision_reaches_no_answer(folders):
    """The silent dummy's zero was added to every batch as 0 times a sum over all frames: 0 x infinity."""
    model = build(folders)
    model.shrinking = AllFrames(model.config, model.shrinking.norm.weight.numel(), 4, 1.0)
    model.shrinking.norm.bias.fill_(30.0)
    model = model.half()
    clips = [torch.from_numpy(tone(16000, 2.0, pitch)).float() for pitch in (200, 300, 400, 500)]
    batch = model.prompts([CHAT] * 4, clips)
    audio = model.encode_audio(batch)
    shrunk = model.shrinking.compress(audio.hidden, audio.lengths, audio.kept, audio.kept_lengths)
    assert torch.isfinite(shrunk).all() and not torch.isfinite(shrunk.half().sum()), (
        "the case is what it says"
    )
    embeddings, _, _ = model.embeddings(batch, audio)
    assert torch.isfinite(embeddings).all()


def test_waveforms_and_places_in_the_chats_must_be_as_many(folders):
    model = build(folders)
    for chats, count in (([CHAT], 0), ([CHAT], 2), ([[{"role": "user", "content": "x"}]], 1)):
        with pytest.raises(ValueError, match=f"{count} waveforms for"):
            model.prompts(chats, [tone(16000)] * count)
    model.config.encoder.max_seconds = 0.5
    with pytest.raises(ValueError, match="waveform 0 lasts 1.0 s, this model takes 0.5 s at most"):
        model.prompts([CHAT], [tone(16000)])


def test_a_clip_longer_than_any_in_training_is_said(folders):
    model = build(folders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prompts([CHAT], [tone(16000)])
        model.trained_seconds = 1.0
        model.prompts([CHAT], [tone(16000)])
    model.trained_seconds = 0.5
    with pytest.warns(
        SoundWarning, match="waveform 0 lasts 1.0 s, the model was trained on clips of at most 0.5 s"
    ):
        model.prompts([CHAT], [tone(16000)])


@torch.no_grad()
def test_sampling_rate_reaches_the_answer(folders):
    model = build(folders)
    wanted = model.ctc_greedy(model.prompts([CHAT], [tone(16000)]))
    assert (
        model.ctc_greedy(model.prompts([CHAT], [(tone(48000) * 32767).astype(np.int16)], sampling_rate=48000))
        == wanted
    )
    assert model.answer([CHAT], [tone(48000)], sampling_rate=48000, max_new_tokens=4)
