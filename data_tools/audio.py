"""From where an entry's audio stands to the bytes that go into a shard: open, cut, resample, encode.

Its one reason to change is an audio source or a codec. Decoding and encoding are libsndfile's (soundfile), resampling is
torchaudio's; a clip that they or the checks here refuse raises ClipError, which costs that one clip.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000


class ClipError(ValueError):
    """One clip that cannot be used: `reason` is a fixed word, the text says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass
class Clip:
    """Encoded audio as it goes into the shard."""

    data: bytes
    codec: str  # also the member's extension
    sample_rate: int
    duration: float  # seconds


def decode(path: str, offset: float | None = None, duration: float | None = None) -> tuple[np.ndarray, int]:
    """The stretch [offset, offset + duration) seconds of a file: ([samples, channels] int16 or float32, sample rate).

    16-bit files stay int16, so that what needs no resampling is kept bit by bit. Only the stretch is decoded.
    Errors: ClipError missing_file | unreadable | undecodable | zero_length | not_finite.
    """
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise ClipError("missing_file", f"{path} does not exist") from None
    except OSError as error:
        raise ClipError("unreadable", f"{path}: {error.strerror}") from None
    if size == 0:
        raise ClipError("zero_length", f"{path} has no bytes")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            start = round((offset or 0.0) * rate)
            if start >= file.frames:
                raise ClipError("zero_length", f"{path} has {file.frames / rate:.3f} s, nothing from {offset or 0.0:.3f} s on")
            wanted = file.frames - start if duration is None else min(round(duration * rate), file.frames - start)
            if start:
                file.seek(start)
            exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
            samples = file.read(wanted, dtype="int16" if exact else "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ClipError("undecodable", f"{path}: {error.error_string}") from None
    if len(samples) == 0:
        raise ClipError("zero_length", f"{path} holds no samples")
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).any(1).argmax())
        raise ClipError("not_finite", f"{path}: NaN or infinity at {bad / rate:.3f} s")
    return samples, rate


@lru_cache(maxsize=16)
def _resampler(rate: int, target: int):
    import torchaudio
    return torchaudio.transforms.Resample(rate, target)


def to_mono_16bit(samples: np.ndarray, rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """[samples, channels] at `rate` -> [samples'] int16 at `target_rate`: channels averaged, then band-limited resampling."""
    if samples.dtype == np.int16 and samples.shape[1] == 1 and rate == target_rate:
        return samples[:, 0]
    wave = samples.astype(np.float32) / 32768.0 if samples.dtype == np.int16 else samples
    wave = np.ascontiguousarray(wave.mean(axis=1))
    if rate != target_rate:
        import torch
        with torch.inference_mode():
            wave = _resampler(rate, target_rate)(torch.from_numpy(wave)).numpy()
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(samples: np.ndarray, rate: int) -> bytes:
    """[samples] int16 -> FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def make_clip(path: str, offset: float | None = None, duration: float | None = None) -> Clip:
    """The whole way for one entry. Errors: ClipError."""
    samples, rate = decode(path, offset, duration)
    wave = to_mono_16bit(samples, rate)
    if len(wave) == 0:
        raise ClipError("zero_length", f"{path}: nothing left after resampling")
    return Clip(encode_flac(wave, SAMPLE_RATE), "flac", SAMPLE_RATE, len(wave) / SAMPLE_RATE)


# Bytes of one second in files of each kind, for planning shards of clips whose duration is not told.
BYTES_PER_SECOND = {".wav": 32000, ".flac": 18000, ".mp3": 8000, ".opus": 4000, ".ogg": 8000}


def estimate_seconds(path: str) -> float:
    """A guess at a clip's duration from its file size alone; 0 for a file that is not there (found out when packed)."""
    try:
        size = os.stat(path).st_size
    except OSError:
        return 0.0
    return math.ceil(size) / BYTES_PER_SECOND.get(Path(path).suffix.lower(), 16000)
