"""Recordings read block by block: the same samples as at once, whatever the format and the block's size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from core.audio import AudioError, Recording, Resampler, mixed_block, read, resample
from core.decoders import to_float

RATE = 16_000
SAMPLES = np.random.default_rng(0).uniform(-0.5, 0.5, (70_001, 2)).astype(np.float32)


def encoded(format: str, subtype: str | None = None, samples: np.ndarray = SAMPLES) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=format, subtype=subtype)
    return buffer.getvalue()


def joined(source, seconds: float) -> np.ndarray:
    return np.concatenate([block.samples for block in Recording(source).blocks(seconds)])


@pytest.mark.parametrize(
    "format, subtype, error",
    [
        ("WAV", "PCM_16", 0),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 0),
        ("OGG", "VORBIS", 1e-4),
        ("MP3", None, 1e-3),
    ],
)
@pytest.mark.parametrize("of_path", [False, True])
def test_blocks_are_the_recording(tmp_path, format, subtype, error, of_path):
    data = encoded(format, subtype)
    source = data
    if of_path:
        source = tmp_path / "clip"
        source.write_bytes(data)
    whole = read(data, dtype="float32").samples
    for seconds in (0.5, 1.0, 100.0):
        found = joined(source, seconds)
        assert found.shape == whole.shape and found.dtype == np.float32
        assert np.abs(found - whole).max() <= error


@pytest.mark.parametrize("form, codec", [("mp4", "aac"), ("matroska", "libopus"), ("matroska", "pcm_s16le")])
def test_blocks_of_ffmpegs_formats_are_the_recording(form, codec):
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(SAMPLES.T), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        resampler = av.AudioResampler(stream.codec_context.format.name, "stereo", 48_000)
        fifo = av.AudioFifo()
        for converted in resampler.resample(frame):
            fifo.write(converted)
        while (part := fifo.read(1024, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    whole = to_float(read(data, whole=False).samples)
    assert len(whole) > 69_000
    for seconds in (0.2, 0.5, 100.0):
        assert np.array_equal(joined(data, seconds), whole)


def test_joined_files_are_read_to_their_end(tmp_path):
    """The first header declares the first file's length only."""
    path = tmp_path / "joined.ogg"
    path.write_bytes(encoded("OGG", "VORBIS") + encoded("OGG", "VORBIS", SAMPLES[:20_000]))
    blocks = list(Recording(path).blocks(1.0))
    assert sum(len(block.samples) for block in blocks) == len(SAMPLES) + 20_000


def test_a_recording_that_is_cut_is_read_as_far_as_it_goes():
    data = encoded("WAV", "PCM_16")
    blocks = list(Recording(data[: len(data) // 2]).blocks(0.5))
    found = np.concatenate([block.samples for block in blocks])
    assert 30_000 < len(found) < 36_000 and np.array_equal(
        found, read(data, dtype="float32").samples[: len(found)]
    )
    assert any(finding.kind == "cut" for block in blocks for finding in block.findings)


def test_what_cannot_be_used_is_an_error():
    with pytest.raises(AudioError, match="no samples"):
        list(Recording(encoded("WAV", "PCM_16", SAMPLES[:0])).blocks(1.0))
    wrong = SAMPLES.copy()
    wrong[40_000] = np.nan
    with pytest.raises(AudioError, match="2.500 s"):
        list(Recording(encoded("WAV", "FLOAT", wrong)).blocks(1.0))


def test_the_length_is_that_of_the_header():
    assert Recording(encoded("FLAC")).seconds() == len(SAMPLES) / RATE


@pytest.mark.parametrize("rate", [8_000, 44_100, 16_000])
def test_blocks_are_resampled_as_a_whole_is(rate):
    stream = Resampler(rate, 16_000, 2)
    parts = [stream.push(SAMPLES[place : place + 997]) for place in range(0, len(SAMPLES), 997)]
    parts.append(stream.push(SAMPLES[:0], last=True))
    found, wanted = np.concatenate(parts), resample(SAMPLES, rate, 16_000)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-4


def test_a_block_is_mixed_as_a_recording_is():
    mixed, findings = mixed_block(SAMPLES)
    assert mixed.shape == (len(SAMPLES), 1) and not findings
    assert np.allclose(mixed[:, 0], SAMPLES.mean(axis=1), atol=1e-6)
    opposite, findings = mixed_block(np.stack([SAMPLES[:, 0], -SAMPLES[:, 0]], axis=1))
    assert findings[0].kind == "antiphase" and np.array_equal(opposite[:, 0], SAMPLES[:, 0])
