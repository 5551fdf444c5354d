"""Decoding in the workers, against libsndfile."""

import io

import numpy as np
import pytest
import soundfile

from stream.reader import decode
from stream.rejected import BrokenSample


def encoded(samples: np.ndarray, subtype: str, kind: str = "FLAC", rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(0, 0.1, (9_000, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "kind, subtype",
    [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_S8"), ("WAV", "PCM_16"), ("OGG", "VORBIS")],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_those_of_libsndfile(noise, kind, subtype, channels):
    audio = encoded(noise[:, :channels], subtype, kind)
    expected = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)[0].mean(axis=1)
    np.testing.assert_array_equal(decode(audio).numpy(), expected)


def test_any_rate_is_resampled(noise):
    for rate in (44_100, 44_101, 22_254, 8_000):
        assert abs(len(decode(encoded(noise, "PCM_16", rate=rate))) - 9_000 * 16_000 / rate) < 1


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 100, 0.5, -3])
def test_a_flac_that_ends_early_is_broken(noise, keep):
    audio = encoded(noise, "PCM_16")
    with pytest.raises(BrokenSample):
        decode(audio[: round(keep * len(audio)) if isinstance(keep, float) else keep])


def test_damaged_flac_is_broken_or_whole(noise):
    audio, random = encoded(noise[:, :1], "PCM_16"), np.random.default_rng(0)
    expected, broken = decode(audio), 0
    for _ in range(100):
        damaged = bytearray(audio)
        damaged[random.integers(42, len(audio))] ^= 1 << random.integers(8)
        try:
            assert decode(bytes(damaged)).equal(expected)  # what was hit does not matter to the sound
        except BrokenSample:
            broken += 1
    assert broken > 50


def test_a_flac_that_does_not_know_its_length_is_decoded_to_its_end(noise):
    audio = bytearray(encoded(noise[:, :1], "PCM_16"))
    expected = decode(bytes(audio))
    audio[21] &= 0xF0
    audio[22:26] = bytes(4)  # STREAMINFO's number of samples, as an encoder leaves it that writes to a pipe
    assert decode(bytes(audio)).equal(expected)


def test_a_clip_that_is_longer_than_allowed_is_broken_before_it_is_decoded(noise):
    audio = encoded(noise, "PCM_16")
    with pytest.raises(BrokenSample, match="too_long"):
        decode(audio, max_seconds=0.5)
    assert len(decode(audio, max_seconds=0.6)) == 9_000
