"""From an entry's audio to the bytes that go into a shard: cut, mix to mono, resample, encode, or pass through.

Its one reason to change is a codec. Decoding and encoding are libsndfile's (soundfile; whole 16-bit WAVs are read without
it), resampling is torchaudio's; a clip that they or the checks here refuse raises ClipError, which costs that one clip.
Every step is a pure function of the clip: the same input is the same output byte for byte (with the same library versions
on the same kind of CPU).
"""

from __future__ import annotations

import io
import math
import os
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soundfile

from data_tools.sources import ClipError, kind_of, open_sound, read_bytes, sound_of

SAMPLE_RATE = 16000
CODECS = ("flac", "opus", "wav16", "copy")
_EXTENSIONS = {
    ("FLAC", None): "flac",
    ("WAV", None): "wav",
    ("WAVEX", None): "wav",
    ("MP3", None): "mp3",
    ("OGG", "OPUS"): "opus",
    ("OGG", "VORBIS"): "ogg",
}
# A segment may end this much after its recording (annotators round), a clip this much before what its header promises.
TOLERANCE_SECONDS = 0.25
MAX_SECONDS = 4 * 3600.0  # of a clip where no filter says less: what is decoded stands in memory whole
_MAX_FILTER = 1 << 24  # numbers in the resampler's filter, 64 MB


@dataclass
class Clip:
    """Encoded audio as it goes into the shard."""

    data: bytes
    codec: str  # also the member's extension
    sample_rate: int
    duration: float  # seconds
    samples: np.ndarray | None = None  # [samples] int16 where it was decoded to mono at sample_rate


def decode(
    audio: str, offset: float | None = None, duration: float | None = None, max_seconds: float = MAX_SECONDS
) -> tuple[np.ndarray, int, bytes | None]:
    """Samples [n, channels] (int16 where the source has 16 bits or fewer, else float32), sample rate, and the source's bytes.

    With an offset the stretch [offset, offset + duration) seconds is decoded and nothing else (bytes: None); without one
    the whole clip. What is longer than max_seconds is not decoded. Errors: ClipError, reasons missing_file | unreadable |
    command_failed | undecodable | zero_length | truncated | not_finite | too_large | too_long.
    """
    data = read_bytes(audio) if offset is None else None
    if data is not None and (plain := _plain_wav(data)):
        _check_length(len(plain[0]), plain[1], max_seconds)
        return *plain, data
    file = sound_of(data, audio) if data is not None else open_sound(audio)
    rate, start = file.samplerate, round((offset or 0.0) * file.samplerate)
    if start >= file.frames:
        raise ClipError("zero_length", f"{audio} has {file.frames / rate:.3f} s, nothing from {offset or 0.0:.3f} s on")
    wanted = file.frames - start if offset is None or duration is None else round(duration * rate)
    if wanted <= 0:
        raise ClipError("zero_length", f"{audio}: a stretch of {duration} s")
    there = min(wanted, file.frames - start)
    _check_length(there, rate, max_seconds)
    exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
    try:
        file.seek(start)
        samples = file.read(there, dtype="int16" if exact else "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ClipError("undecodable", f"{audio}: {error.error_string}") from None
    if len(samples) == 0:
        raise ClipError("zero_length", f"{audio} holds no samples")
    if len(samples) < wanted - TOLERANCE_SECONDS * rate or data is not None and _wav_cut_short(data):
        raise ClipError(
            "truncated", f"{audio} ends after {(start + len(samples)) / rate:.3f} s, before its header or segment says"
        )
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).any(1).argmax())
        raise ClipError("not_finite", f"{audio}: NaN or infinity at {(start + bad) / rate:.3f} s")
    return samples, rate, data


def _check_length(frames: int, rate: int, max_seconds: float) -> None:
    if (seconds := frames / rate) > max_seconds:
        raise ClipError("too_long", f"{seconds:.3f} s, more than {max_seconds:g}", seconds)


def _plain_wav(data: bytes) -> tuple[np.ndarray, int] | None:
    """A whole 16-bit WAV: samples [n, channels] int16 as they stand there, and the rate; None leaves it to libsndfile, which
    reads through callbacks into Python and takes about three times as long."""
    if data[:4] != b"RIFF" or _wav_cut_short(data):
        return None
    try:
        buffer = io.BytesIO(data)
        with wave.open(buffer) as file:  # stands at the first sample then
            if file.getsampwidth() != 2 or not file.getnframes() or not file.getframerate():
                return None
            count = file.getnframes() * file.getnchannels()
            return np.frombuffer(data, "<i2", count, buffer.tell()).reshape(-1, file.getnchannels()), file.getframerate()
    except (wave.Error, EOFError, ValueError):  # whatever is wrong with it, libsndfile has the words
        return None


def _wav_cut_short(data: bytes) -> bool:
    """Whether a RIFF file promises more bytes than there are (libsndfile reads what is left and says nothing). Sizes that
    writers to a pipe put in because they cannot know are no promise."""
    size = int.from_bytes(data[4:8], "little")
    return data[:4] == b"RIFF" and 0 < size < 0x7FFFF000 and size + 8 > len(data) + 1


@lru_cache(maxsize=16)
def _resampler(rate: int, target: int):
    import torchaudio

    return torchaudio.transforms.Resample(rate, target)


def check_rate(rate: int, target: int = SAMPLE_RATE) -> None:
    """Errors: ClipError odd_rate where the resampler, which keeps (rate / gcd) x (target / gcd) numbers, would take too much
    memory: 2.8 GB from 44101 to 16000 Hz, where 44100 takes 0.3 MB."""
    common = math.gcd(rate, target)
    if (rate // common) * (target // common) > _MAX_FILTER:
        raise ClipError("odd_rate", f"{rate} Hz is not resampled to {target} Hz here: bring it to a usual rate first")


def to_mono_16bit(samples: np.ndarray, rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """[samples, channels] at `rate` -> [samples'] int16 at `target_rate`: channels averaged, then band-limited resampling.

    Errors: ClipError odd_rate.
    """
    check_rate(rate, target_rate)
    if samples.dtype == np.int16 and samples.shape[1] == 1 and rate == target_rate:
        return samples[:, 0]
    wave = samples.astype(np.float32) / 32768.0 if samples.dtype == np.int16 else samples
    wave = np.ascontiguousarray(wave.mean(axis=1))
    if rate != target_rate:
        import torch

        with torch.inference_mode():
            wave = _resampler(rate, target_rate)(torch.from_numpy(wave)).numpy()
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def encode(samples: np.ndarray, rate: int, codec: str) -> tuple[bytes, str]:
    """[samples] int16 -> (file bytes, extension). codec: flac | opus | wav16."""
    buffer = io.BytesIO()
    if codec == "flac":
        soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
        return buffer.getvalue(), "flac"
    if codec == "wav16":
        soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
        return buffer.getvalue(), "wav"
    if codec == "opus":
        soundfile.write(buffer, samples, rate, format="OGG", subtype="OPUS")
        return with_serial(buffer.getvalue(), 1), "opus"
    raise ValueError(f"codec '{codec}' is none of {', '.join(CODECS)}")


_MIRRORED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 (RFC 3533: polynomial 0x04c11db7, start 0, not mirrored), by zlib's mirrored one on mirrored bits."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def with_serial(ogg: bytes, serial: int) -> bytes:
    """The same Ogg stream under another serial number: encoders draw it at random, and equal input must be equal bytes."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + 26]
        body = start + 27 + segments
        end = body + sum(ogg[start + 27 : body])
        page = bytearray(ogg[start:end])
        page[14:18], page[22:26] = serial.to_bytes(4, "little"), bytes(4)
        page[22:26] = ogg_checksum(bytes(page)).to_bytes(4, "little")
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def make_clip(
    audio: str,
    offset: float | None = None,
    duration: float | None = None,
    *,
    codec: str = "flac",
    rate: int | None = SAMPLE_RATE,
    cut: Callable[[np.ndarray, int], np.ndarray] | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Clip:
    """The whole way for one entry. rate: samples a second, None keeps the source's. cut: chooses a part of the samples.

    copy passes whole clips through after a look at their header; segments, which have no bytes of their own, become flac.
    A source that already is what is asked for (16-bit mono FLAC at the rate) is decoded to check it, and its bytes are
    kept: encoding it again would give the same samples. Errors: ClipError.
    """
    if codec == "copy" and offset is None:
        return _copied(audio)
    codec = "flac" if codec == "copy" else codec
    samples, source_rate, data = decode(audio, offset, duration, max_seconds)
    target = rate or source_rate
    wave = to_mono_16bit(samples, source_rate, target)
    if cut is not None:
        whole, wave = len(wave), cut(wave, target)
        data = data if len(wave) == whole else None
    if len(wave) == 0:
        raise ClipError("zero_length", f"{audio}: nothing left after resampling")
    if (
        codec == "flac"
        and data is not None
        and data[:4] == b"fLaC"
        and samples.dtype == np.int16
        and samples.shape[1] == 1
        and source_rate == target
    ):
        return Clip(data, "flac", target, len(wave) / target, wave)
    encoded, extension = encode(wave, target, codec)
    return Clip(encoded, extension, target, len(wave) / target, wave)


def _copied(audio: str) -> Clip:
    data = read_bytes(audio)
    file = sound_of(data, audio)
    extension = _EXTENSIONS.get((file.format, None)) or _EXTENSIONS.get((file.format, file.subtype))
    if extension is None:
        raise ClipError(
            "undecodable", f"{audio}: {file.format}/{file.subtype} has no place in a shard: pack it as flac, not copy"
        )
    if file.frames == 0:
        raise ClipError("zero_length", f"{audio} holds no samples")
    if _wav_cut_short(data):
        raise ClipError("truncated", f"{audio} is shorter than its header says")
    return Clip(data, extension, file.samplerate, file.frames / file.samplerate)


# Bytes of one second in files of each kind: how long a clip about is, and how large it about becomes, without opening it.
BYTES_PER_SECOND = {"wav": 32000, "flac": 18000, "mp3": 8000, "opus": 4000, "ogg": 8000}
_UNKNOWN_BYTES_PER_SECOND, _UNKNOWN_SECONDS = 16000, 5.0


def estimate_seconds(audio: str, size: int | None = None) -> float:
    """A guess at a clip's duration from its size alone; 0 for a file that is not there (found out when packed)."""
    kind, rest = kind_of(audio)
    suffix = rest.rpartition(".")[2].lower()
    if size is not None:
        pass
    elif kind == "file":
        try:
            size = os.stat(rest).st_size
        except OSError:
            return 0.0
    elif kind == "tar":
        size = int(rest.rpartition("+")[2].partition(".")[0])
    else:
        return _UNKNOWN_SECONDS
    return size / BYTES_PER_SECOND.get(suffix, _UNKNOWN_BYTES_PER_SECOND)


def estimate_bytes(audio: str, seconds: float, codec: str) -> float:
    suffix = audio.rpartition(".")[2].lower()
    kind = {"wav16": "wav", "copy": suffix}.get(codec, codec)
    return seconds * BYTES_PER_SECOND.get(kind, _UNKNOWN_BYTES_PER_SECOND)
