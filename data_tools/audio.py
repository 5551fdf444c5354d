"""From an entry's audio to the bytes that go into a shard: decode (core/audio.py), cut, encode, or pass
through.

Its one reason to change is a codec. A clip that is refused raises ClipError, which costs that one clip. Every
step is a pure function of the clip: the same input is the same output byte for byte (with the same library
versions on the same kind of CPU).
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soundfile

from core.audio import MAX_SECONDS, SAMPLE_RATE, Audio, Finding, Recording, to_mono, typed_errors
from data_tools.sources import ClipError, kind_of, open_recording, read_bytes

CODECS = ("flac", "opus", "wav16", "copy")
#: Rates that --rate may ask for.
RATES = (4_000, 384_000)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_EXTENSIONS = {
    ("FLAC", None): "flac",
    ("WAV", None): "wav",
    ("WAVEX", None): "wav",
    ("MP3", None): "mp3",
    ("OGG", "OPUS"): "opus",
    ("OGG", "VORBIS"): "ogg",
}


@dataclass
class Clip:
    """Encoded audio as it goes into the shard."""

    data: bytes
    codec: str  # also the member's extension
    sample_rate: int
    duration: float  # seconds
    samples: np.ndarray | None = None  # [samples] int16 where it was decoded to mono at sample_rate
    findings: tuple[Finding, ...] = ()


def read_clip(
    audio: str, offset: float | None = None, duration: float | None = None, max_seconds: float = MAX_SECONDS
) -> tuple[Audio, bytes | None]:
    """Decode one entry's audio to [frames, channels] as the source has them; the source's bytes beside it.

    With an offset the segment [offset, offset + duration) seconds is decoded and nothing else (bytes: None);
    without one the whole clip. Errors: ClipError.
    """
    if offset is not None:
        recording = open_recording(audio)
        with typed_errors(audio):
            return recording.read(offset, duration, max_seconds=max_seconds), None
    data = read_bytes(audio)
    with typed_errors(audio):
        return Recording(data).read(max_seconds=max_seconds), data


def check_output(codec: str, rate: int | None) -> str | None:
    """Why clips cannot be written so, one line; None where they can. rate: None keeps each source's."""
    if rate is None or codec == "copy":
        return None
    if not RATES[0] <= rate <= RATES[1]:
        return f"{rate} samples a second are not between {RATES[0]:,} and {RATES[1]:,} (16 kHz is 16000)"
    if codec == "opus" and rate not in _OPUS_RATES:
        return f"Opus has no {rate:,} Hz: {', '.join(map(str, _OPUS_RATES))}"
    return None


def output_rate(codec: str, rate: int) -> int:
    """The rate at which a clip of `rate` is written where each keeps its own: Opus has five, and takes the
    next one up."""
    if codec != "opus":
        return rate
    return next((opus_rate for opus_rate in _OPUS_RATES if opus_rate >= rate), _OPUS_RATES[-1])


def encode(samples: np.ndarray, rate: int, codec: str) -> tuple[bytes, str]:
    """[samples] int16 -> (file bytes, extension). codec: flac | opus | wav16. Errors: ClipError odd_rate."""
    kinds = {
        "flac": ("FLAC", "PCM_16", "flac"),
        "wav16": ("WAV", "PCM_16", "wav"),
        "opus": ("OGG", "OPUS", "opus"),
    }
    container, subtype, extension = kinds[codec]
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    except soundfile.LibsndfileError as error:
        raise ClipError(
            "odd_rate", f"cannot be written as {codec} at {rate:,} Hz ({error.error_string}): give --rate"
        ) from None
    data = buffer.getvalue()
    return (with_serial(data, 1) if codec == "opus" else data), extension


_MIRRORED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 (RFC 3533: polynomial 0x04c11db7, start 0, not mirrored), by zlib's mirrored one on
    mirrored bits."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def with_serial(ogg: bytes, serial: int) -> bytes:
    """The same Ogg stream under another serial number: encoders draw it at random, and equal input must be
    equal bytes."""
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
    """The whole way for one entry. rate: samples a second, None keeps the source's. cut: chooses a part of
    the samples.

    copy passes whole clips through, decoded to check them; segments, which have no bytes of their own, become
    flac. A source that already is what is asked for (16-bit mono FLAC at the rate) keeps its bytes too:
    encoding it again would give the same samples. Errors: ClipError.
    """
    source, data = read_clip(audio, offset, duration, max_seconds)
    if codec == "copy" and data is not None:
        return _copied(audio, source, data)
    codec = "flac" if codec == "copy" else codec
    with typed_errors(audio):
        mono = to_mono(source, rate or output_rate(codec, source.rate), "int16")
        wave, target = mono.samples, mono.rate
        if cut is not None:
            whole, wave = len(wave), cut(wave, target)
            data = data if len(wave) == whole else None
        if (
            codec == "flac"
            and data is not None
            and data[:4] == b"fLaC"
            and source.samples.dtype == np.int16
            and source.samples.shape[1] == 1
            and source.rate == target
            and not any(finding.kind == "joined" for finding in mono.findings)
        ):
            encoded, extension = data, "flac"
        else:
            encoded, extension = encode(wave, target, codec)
    return Clip(encoded, extension, target, len(wave) / target, wave, mono.findings)


def _copied(audio: str, source: Audio, data: bytes) -> Clip:
    kinds = (source.container, None), (source.container, source.subtype)
    extension = next((_EXTENSIONS[kind] for kind in kinds if kind in _EXTENSIONS), None)
    if extension is None:
        raise ClipError(
            "undecodable",
            f"{audio}: {source.container}/{source.subtype} has no place in a shard: pack it as flac, not "
            f"copy",
        )
    findings = to_mono(source, None, "int16").findings
    return Clip(data, extension, source.rate, source.seconds, findings=findings)


# Bytes of one second in files of each kind: how long a clip about is, and how large it about becomes, without
# opening it.
BYTES_PER_SECOND = {
    "wav": 32000,
    "flac": 18000,
    "mp3": 8000,
    "opus": 4000,
    "ogg": 8000,
    "webm": 8000,
    "amr": 1600,
}
_UNKNOWN_BYTES_PER_SECOND, _UNKNOWN_SECONDS = 16000, 5.0


def estimate_seconds(audio: str, size: float | None = None) -> float:
    """A guess at a clip's duration from its size alone; 0 for a file that is not there (found out when
    packed)."""
    kind, rest = kind_of(audio)
    suffix = rest.rpartition(".")[2].lower()
    if size is not None:
        pass
    elif kind == "file":
        try:
            size = os.stat(rest).st_size
        except OSError:
            return 0.0
    elif kind in ("tar", "tarz"):
        size = int(rest.rpartition("+")[2].partition(".")[0])
    else:
        return _UNKNOWN_SECONDS
    return size / BYTES_PER_SECOND.get(suffix, _UNKNOWN_BYTES_PER_SECOND)


def estimate_bytes(audio: str, seconds: float, codec: str) -> float:
    suffix = audio.rpartition(".")[2].lower()
    kind = {"wav16": "wav", "copy": suffix}.get(codec, codec)
    return seconds * BYTES_PER_SECOND.get(kind, _UNKNOWN_BYTES_PER_SECOND)
