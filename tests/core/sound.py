"""Sounds and files for tests of core/audio.py."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile

RATE = 16_000


def chirp(seconds: float = 1.0, rate: int = RATE, gain: float = 0.3) -> np.ndarray:
    """[frames] int16, a tone that rises: no two stretches of it are alike."""
    time = np.arange(round(seconds * rate)) / rate
    return np.round(gain * 32767 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.int16)


def encoded(
    samples: np.ndarray, container: str = "FLAC", subtype: str | None = None, rate: int = RATE, **options
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, size: int | None = None, padded: bool = True) -> bytes:
    """A RIFF chunk; size: what it says instead of its true size."""
    told = len(body) if size is None else size
    return name + struct.pack("<I", told & 0xFFFFFFFF) + body + bytes(len(body) % 2 if padded else 0)


def fmt(
    channels: int = 1,
    rate: int = RATE,
    bits: int = 16,
    tag: int = 1,
    align: int | None = None,
    more: bytes = b"",
) -> bytes:
    step = channels * bits // 8
    return chunk(
        b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * step, align or step, bits) + more
    )


def riff(*chunks: bytes, size: int | None = None, magic: bytes = b"RIFF") -> bytes:
    """A WAV of chunks; size: what RIFF says instead of the truth."""
    body = b"WAVE" + b"".join(chunks)
    return magic + struct.pack("<I", (len(body) if size is None else size) & 0xFFFFFFFF) + body


def id3(size: int) -> bytes:
    """An ID3v2 tag with `size` bytes of content."""
    shifts = (21, 14, 7, 0)
    return b"ID3\x04\0\0" + bytes(size >> shift & 127 for shift in shifts) + b"APIC" + bytes(size - 4)


def vbr_mp3(quiet_first: bool, seconds: float = 10.0, rate: int = RATE) -> tuple[bytes, bytes]:
    """(an MP3 of variable bit rate, the same without its Xing header): loud and quiet halves have frames of
    other sizes."""
    samples = np.random.default_rng(0).standard_normal(round(seconds * rate)) * 0.1
    half = len(samples) // 2
    samples[slice(None, half) if quiet_first else slice(half, None)] *= 0.001
    whole = encoded(samples, "MP3", "MPEG_LAYER_III", rate, bitrate_mode="VARIABLE", compression_level=0.3)
    return whole, whole[first_frame_size(whole) :]


def first_frame_size(mp3: bytes) -> int:
    """Bytes of an MPEG-2 layer III frame at the file's start, by the standard's formula."""
    assert mp3[0] == 0xFF and mp3[1] & 0xFE == 0xF2, "an MPEG-2 layer III frame"
    kbps = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[mp3[2] >> 4]
    rate = (22050, 24000, 16000)[mp3[2] >> 2 & 3]
    return 72 * kbps * 1000 // rate + (mp3[2] >> 1 & 1)
