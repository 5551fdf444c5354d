"""One decode function: true lengths, exact values, named errors and findings. Expected: the samples that were
written."""

import io
import os
import struct
import subprocess
import sys
import threading

import miniaudio
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import audio, decoders
from core.audio import AudioError, Recording, decode, read
from data_tools.audio import with_serial
from tests.core.sound import RATE, chirp, chunk, encoded, first_frame_size, fmt, id3, riff, vbr_mp3

SOUND = chirp(2.0)
RAW = SOUND.astype("<i2").tobytes()
LIST = chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.3.100\0\0")


def refused(source, **options) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def kinds(result: audio.Audio) -> list[str]:
    return [finding.kind for finding in result.findings]


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container, subtype",
    [
        ("WAV", "PCM_16"),
        ("WAVEX", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("RF64", "PCM_16"),
        ("CAF", "PCM_16"),
        ("W64", "PCM_16"),
        ("AU", "PCM_16"),
    ],
)
def test_16_bit_mono_keeps_its_values(container, subtype):
    data = encoded(SOUND, container, subtype)
    assert np.array_equal(decode(data, dtype="int16").samples, SOUND)
    as_float = decode(data)
    assert as_float.samples.dtype == np.float32 and np.array_equal(
        as_float.samples, SOUND.astype(np.float32) / 32768
    )
    assert (as_float.rate, as_float.seconds, as_float.findings) == (RATE, 2.0, ())


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(
    "container, subtype",
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("FLAC", "PCM_S8"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("OGG", "VORBIS"),
    ],
)
def test_channels_are_averaged(container, subtype, channels):
    samples = np.random.default_rng(0).normal(0, 0.1, (5_000, channels))
    data = encoded(samples, container, subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]
    assert np.array_equal(read(data, dtype="float32").samples, expected)
    assert np.array_equal(decode(data).samples, expected.mean(axis=1))


def test_a_big_endian_wav_is_read():
    data = encoded(SOUND, "WAV", "PCM_16", endian="BIG")
    assert data[:4] == b"RIFX" and np.array_equal(decode(data, dtype="int16").samples, SOUND)


@pytest.mark.parametrize(
    "container, subtype",
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "GSM610"),
        ("WAV", "IMA_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", "PCM_16"),
        ("CAF", "ALAC_16"),
    ],
)
@pytest.mark.parametrize("from_path", [False, True])
def test_segments_are_slices_of_the_whole(container, subtype, from_path, tmp_path):
    data = encoded(SOUND, container, subtype)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    whole = read(data).samples
    recording = Recording(str(path) if from_path else data)
    for start, duration in ((0.5, 0.25), (0.0, 0.5), (1.75, None), (0.25, 0.75)):
        end = None if duration is None else round((start + duration) * RATE)
        part = recording.read(start, duration).samples
        expected = whole[round(start * RATE) : end]
        assert part.shape == expected.shape and np.allclose(part, expected, rtol=0, atol=1e-6)


# --- headers that are wrong ---------------------------------------------------------------------------------

WHOLE = 36 + len(RAW)  # RIFF's size of a plain WAV
WAVS = {
    "plain": riff(fmt(), chunk(b"data", RAW)),
    "RIFF size 8 too large (the file's)": riff(fmt(), chunk(b"data", RAW), size=WHOLE + 8),
    "RIFF size far too large": riff(fmt(), chunk(b"data", RAW), size=2 * WHOLE),
    "RIFF size 0": riff(fmt(), chunk(b"data", RAW), size=0),
    "RIFF size of an empty file": riff(fmt(), LIST, chunk(b"data", RAW), size=36),
    "both sizes 0": riff(fmt(), chunk(b"data", RAW, size=0), size=0),
    "data size 0": riff(fmt(), chunk(b"data", RAW, size=0)),
    "sizes from a pipe, FFFFFFFF": riff(fmt(), LIST, chunk(b"data", RAW, size=0xFFFFFFFF), size=0xFFFFFFFF),
    "sizes from a pipe, 7FFFFFFF": riff(fmt(), chunk(b"data", RAW, size=0x7FFFFFFF - 36), size=0x7FFFFFFF),
    "sizes from a pipe, 80000000": riff(fmt(), chunk(b"data", RAW, size=0x80000000), size=0x80000024),
    "data size counts the header": riff(fmt(), chunk(b"data", RAW, size=len(RAW) + 44)),
    "an odd chunk, padded": riff(fmt(), chunk(b"LIST", b"INFOabc"), chunk(b"data", RAW)),
    "an odd chunk, not padded": riff(fmt(), chunk(b"LIST", b"INFOabc", padded=False), chunk(b"data", RAW)),
    "data before fmt": riff(chunk(b"data", RAW), fmt()),
    "fmt of 18 bytes": riff(fmt(more=b"\0\0"), chunk(b"data", RAW)),
    "wrong block alignment": riff(fmt(align=4), chunk(b"data", RAW)),
    "chunks after the data": riff(fmt(), chunk(b"data", RAW), LIST, chunk(b"id3 ", b"x" * 9001)),
    "an ID3v1 tag at the end": riff(fmt(), chunk(b"data", RAW)) + b"TAG" + bytes(125),
    "an ID3v2 tag in front": id3(1000) + riff(fmt(), chunk(b"data", RAW)),
    "two ID3v2 tags in front": id3(20) + id3(100_000) + riff(fmt(), chunk(b"data", RAW)),
}


@pytest.mark.parametrize("name", WAVS)
def test_a_wav_is_as_long_as_its_data_chunk(name, tmp_path):
    result = decode(WAVS[name], dtype="int16")
    assert np.array_equal(result.samples, SOUND) and result.findings == ()
    path = tmp_path / "a.wav"
    path.write_bytes(WAVS[name])
    assert np.array_equal(decode(path, start=0.5, duration=1.5, dtype="int16").samples, SOUND[8000:])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610"])
def test_other_codecs_in_a_wav_with_wrong_sizes_are_whole(subtype):
    data = encoded(SOUND, "WAV", subtype)
    wrong = bytearray(id3(50) + data)
    wrong[64:68] = b"\xff\xff\xff\xff"
    place = wrong.index(b"data") + 4
    wrong[place : place + 4] = bytes(4)
    assert np.array_equal(decode(bytes(wrong)).samples, decode(data).samples)


@pytest.mark.parametrize("container", ["FLAC", "AIFF", "MP3", "OGG", "AU"])
@pytest.mark.parametrize("size", [20, 100_000])
def test_an_id3_tag_in_front_changes_nothing(container, size, tmp_path):
    data = encoded(SOUND, container)
    path = tmp_path / "tagged"
    path.write_bytes(id3(size) + data)
    expected = decode(data).samples
    assert np.array_equal(decode(id3(size) + data).samples, expected)
    segment = decode(path, start=0.5, duration=1.0).samples
    assert np.allclose(segment, expected[8000:24000], rtol=0, atol=1e-5)


def test_samples_after_the_data_chunk_are_reported():
    result = decode(riff(fmt(), chunk(b"data", RAW, size=len(RAW) // 2)), dtype="int16")
    assert np.array_equal(result.samples, SOUND[: len(SOUND) // 2]) and kinds(result) == ["trailing"]


def test_an_empty_data_chunk_before_others_is_empty():
    assert refused(riff(fmt(), chunk(b"data", b""), LIST)).reason == "zero_length"
    assert refused(riff(fmt(), chunk(b"data", b""))).reason == "zero_length"


@pytest.mark.parametrize("quiet_first", [True, False])
def test_a_vbr_mp3_without_a_header_is_decoded_to_its_end(quiet_first, tmp_path):
    tagged, bare = vbr_mp3(quiet_first)
    assert len(decode(tagged).samples) == 10 * RATE
    result = decode(bare)
    assert abs(soundfile.info(io.BytesIO(bare)).frames - 10 * RATE) > RATE, "libsndfile guesses wrong"
    assert (
        result.findings == () and 10 * RATE <= len(result.samples) <= 10 * RATE + 4 * 576
    )  # the encoder's delay stays
    reference = np.frombuffer(miniaudio.mp3_read_f32(bare).samples, np.float32)
    assert np.array_equal(result.samples, reference)
    path = tmp_path / "bare.mp3"
    path.write_bytes(bare)
    for start, duration in ((1.0, 1.0), (8.5, 1.0)):
        part = decode(path, start=start, duration=duration).samples
        first = round(start * RATE)
        assert len(part) == RATE and np.allclose(
            part, reference[first : first + RATE], rtol=0, atol=1e-4
        )  # dr_mp3 rounds
    assert refused(path, start=9.5, duration=2.0).reason == "truncated"


def test_a_tag_in_an_mp3_that_counts_wrong_is_not_believed():
    tagged, bare = vbr_mp3(True)
    place = tagged.index(b"Xing") + 8
    count = int.from_bytes(tagged[place : place + 4], "big")
    for wrong in (count // 3, 0):
        data = tagged[:place] + wrong.to_bytes(4, "big") + tagged[place + 4 :]
        assert abs(decode(data).seconds - 10.0) < 0.15
    assert (
        refused(tagged[:place] + (3 * count).to_bytes(4, "big") + tagged[place + 4 :]).reason == "truncated"
    )


def test_tags_and_junk_between_mp3_frames_are_passed_over():
    data = encoded(SOUND, "MP3")
    size = first_frame_size(data)
    for junk in (id3(300), b"TAG" + bytes(125), bytes(5000)):
        result = decode(data + junk + data)
        assert len(result.samples) == 4 * RATE and kinds(result) == ["joined"]
    assert np.array_equal(decode(bytes(3000) + data).samples, decode(data).samples)
    damaged = decode(data[: 20 * size] + b"\x55" * 1000 + data[20 * size :])
    assert "damaged" in kinds(damaged) and abs(damaged.seconds - 2.0) < 0.3


# --- joined and cut -----------------------------------------------------------------------------------------

JOINABLE = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("NIST", "PCM_16"),
]


@pytest.mark.parametrize("container, subtype", JOINABLE)
def test_joined_files_are_all_decoded(container, subtype, tmp_path):
    first, second = encoded(SOUND[:RATE], container, subtype), encoded(SOUND, container, subtype)
    parts = [decode(data).samples for data in (first, second)]
    result = decode(first + second)
    assert np.array_equal(result.samples, np.concatenate(parts)) and kinds(result) == ["joined"]
    path = tmp_path / "joined"
    path.write_bytes(first + second)
    assert np.allclose(decode(path, start=1.5, duration=1.0).samples, parts[1][8000:24000], rtol=0, atol=1e-5)


def test_joined_ogg_files_of_one_serial_number_are_all_decoded(tmp_path):
    sounds = chirp(1.0), chirp(2.0)
    for subtype in ("OPUS", "VORBIS"):
        files = [with_serial(encoded(sound, "OGG", subtype), 1) for sound in sounds]
        for first, second in (files, files[::-1]):
            whole = decode(first + second)
            assert whole.seconds == 3.0 and kinds(whole) == ["joined"]
            path = tmp_path / "a.ogg"
            path.write_bytes(first + second)
            for start in (0.2, 1.2, 1.9, 2.4):
                part = decode(path, start=start, duration=0.5).samples
                assert np.allclose(part, whole.samples[round(start * RATE) :][: RATE // 2], rtol=0, atol=1e-5)


def test_joined_files_of_other_rates_and_channels_are_brought_together():
    for container in ("FLAC", "MP3", "WAV"):
        first = encoded(SOUND, container)
        second = encoded(np.stack([chirp(1.0, 48000)] * 2, 1), container, rate=48000)
        result = decode(first + second, dtype="float32")
        assert result.rate == RATE and abs(len(result.samples) - 3 * RATE) < 100
        if container != "MP3":
            expected = chirp(1.0).astype(np.float32) / 32768  # the same sound at the first file's rate
            assert np.allclose(result.samples[2 * RATE + 100 : -100], expected[100:-100], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "container, subtype",
    [
        *JOINABLE,
        ("WAVEX", "PCM_16"),
        ("WAV", "GSM610"),
        ("SVX", "PCM_16"),
        ("AIFF", "FLOAT"),
        ("FLAC", "PCM_24"),
    ],
)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.97])
def test_cut_files_are_named(container, subtype, share):
    data = encoded(SOUND, container, subtype)
    data = data[: int(len(data) * share)]
    assert refused(data).reason == "truncated"
    try:
        there = decode(data, whole=False)
    except AudioError as error:  # nothing of it can be decoded
        assert error.reason in ("undecodable", "zero_length") and container in ("OGG", "CAF")
    else:
        assert "cut" in kinds(there) and there.seconds < 2.0


def test_an_ogg_without_its_end_mark_is_reported():
    data = encoded(np.concatenate([SOUND] * 3), "OGG", "VORBIS")
    last = data.rindex(b"OggS")
    result = decode(data[:last])
    assert kinds(result) == ["no_end"] and result.seconds > 3.0


def test_a_cut_mp3_of_constant_bit_rate_is_named_with_and_without_a_tag():
    data = encoded(SOUND, "MP3", bitrate_mode="CONSTANT")
    bare = data[first_frame_size(data) :]
    assert decode(bare).findings == ()
    for whole in (data, bare):
        assert refused(whole[: len(whole) * 6 // 10]).reason == "truncated"


def test_a_flac_from_a_pipe_has_no_length_and_is_decoded_to_its_end():
    data = bytearray(encoded(SOUND))
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    assert np.array_equal(decode(bytes(data), dtype="int16").samples, SOUND)
    assert np.array_equal(
        decode(bytes(data), start=0.5, duration=0.5, dtype="int16").samples, SOUND[8000:16000]
    )
    data[21], data[22:26] = data[21] | 0x0F, b"\xff" * 4  # 2^36 - 1 samples
    assert refused(bytes(data)).reason == "truncated"


# --- limits -------------------------------------------------------------------------------------------------


def test_seconds_are_limited_before_decoding(monkeypatch):
    clips = [encoded(SOUND, container) for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF")]
    with monkeypatch.context() as patched:
        for name in ("read",):
            patched.setattr(
                soundfile.SoundFile, name, lambda *arguments, **options: pytest.fail("was decoded")
            )
        patched.setattr(decoders, "_by_miniaudio", lambda *arguments: pytest.fail("was decoded"))
        for clip in clips:
            assert refused(clip, max_seconds=1.0).reason == "too_long"
            assert refused(clip, start=0.25, duration=1.5, max_seconds=1.0).reason == "too_long"
    for clip in clips:
        assert decode(clip, start=0.25, duration=1.0, max_seconds=1.0).seconds == 1.0


def test_bytes_are_limited_by_frames_channels_and_width():
    stereo = np.stack([SOUND] * 8, 1)
    for container, subtype, width in (
        ("WAV", "PCM_16", 2),
        ("FLAC", "PCM_16", 2),
        ("FLAC", "PCM_24", 4),
        ("AIFF", "PCM_16", 2),
    ):
        clip, size = encoded(stereo, container, subtype), stereo.size * width
        assert read(clip, max_bytes=size).samples.nbytes == size
        error = refused(clip, max_bytes=size - 1, dtype="int16")
        assert error.reason == "too_large" and "8 channels at 16,000 Hz" in str(error)


def test_a_clip_without_a_length_is_limited_while_it_is_decoded():
    data = bytearray(encoded(np.zeros(40 * RATE, np.int16)))
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    assert refused(bytes(data), max_seconds=30.0).reason == "too_long"
    bare = vbr_mp3(True)[1]
    assert refused(bare, max_seconds=5.0).reason == "too_long"


def test_resampling_does_not_pass_the_limit():
    data = riff(fmt(rate=1), chunk(b"data", bytes(2 * 14_000)))  # 14,000 s at 1 Hz
    assert refused(data, rate=48_000).reason == "too_large"


def test_special_files_are_refused_at_once(tmp_path):
    fifo = tmp_path / "fifo.wav"
    os.mkfifo(fifo)
    for path, word in ((fifo, "FIFO"), ("/dev/zero", "device"), (tmp_path, "folder")):
        for options in ({}, {"start": 0.0, "duration": 1.0}):
            error = refused(path, **options)
            assert error.reason == "unreadable" and word in str(error)
    assert (
        refused(tmp_path / "none.wav").reason
        == refused(tmp_path / "none.wav", start=0.0).reason
        == "missing_file"
    )


# --- errors -------------------------------------------------------------------------------------------------


class Odd(Exception):
    """No exception that anybody expects."""


@pytest.mark.parametrize(
    "error, reason",
    [
        (MemoryError(), "too_large"),
        (RuntimeError("x\ny"), "undecodable"),
        (OverflowError("x"), "undecodable"),
        (RecursionError("x"), "undecodable"),
        (EOFError(), "undecodable"),
        (struct.error("x"), "undecodable"),
        (OSError(5, "Input/output error"), "unreadable"),
        (Odd("x"), "undecodable"),
        (UnicodeDecodeError("a", b"", 0, 1, "x"), "undecodable"),
    ],
)
@pytest.mark.parametrize("place", ["locate", "decode_stream", "resample"])
def test_whatever_is_raised_becomes_a_named_error(monkeypatch, place, error, reason):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(audio, place, fail)
    assert refused(encoded(chirp(1.0, 8000), rate=8000)).reason == reason


def test_values_that_are_no_numbers_are_refused():
    samples = SOUND.astype(np.float32) / 32768
    for value in (np.nan, np.inf, -np.inf):
        samples[16_000] = value
        for container, subtype in (("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("AIFF", "FLOAT")):
            error = refused(encoded(samples, container, subtype))
            assert error.reason == "not_finite" and "1.000 s" in str(error)


@pytest.mark.parametrize(
    "start, duration, reason",
    [
        (5.0, 1.0, "zero_length"),
        (1e306, None, "zero_length"),
        (0.5, 1e306, "truncated"),
        (0.0, 0.0, "zero_length"),
        (1.5, 1.0, "truncated"),
    ],
)
def test_segments_outside_of_a_recording(start, duration, reason):
    for container in ("WAV", "FLAC", "OGG"):
        assert refused(encoded(SOUND, container), start=start, duration=duration).reason == reason
    assert decode(encoded(SOUND), start=1.5, duration=0.6).seconds == 0.5, "annotators round"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_audio_or_a_named_error(data):
    container = data.draw(
        st.sampled_from(["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64", "NIST"])
    )
    clip = bytearray(encoded(SOUND[:4000], container))
    for _ in range(data.draw(st.integers(0, 8))):
        clip[data.draw(st.integers(0, min(len(clip), 200) - 1))] = data.draw(st.integers(0, 255))
    clip = bytes(clip[: data.draw(st.integers(0, len(clip)))]) + data.draw(st.binary(max_size=40))
    try:
        result = decode(clip, max_seconds=100.0, max_bytes=1 << 24)
    except AudioError as error:
        assert error.reason and "\n" not in str(error)
    else:
        assert result.samples.ndim == 1 and np.isfinite(result.samples).all()


# --- findings -----------------------------------------------------------------------------------------------


def test_channels_that_cancel_out_are_not_averaged():
    for rate in (RATE, 44100):
        sound = chirp(2.0, rate)
        opposite = encoded(np.stack([sound, -sound], 1), rate=rate)
        result = decode(opposite)
        assert kinds(result) == ["antiphase"] and np.array_equal(
            result.samples, decode(encoded(sound, rate=rate)).samples
        )
    nearly = np.stack([SOUND, np.round(-0.95 * SOUND)], 1).astype(np.int16)
    assert kinds(decode(encoded(nearly))) == ["antiphase"]
    noise = np.random.default_rng(0).normal(0, 3000, (2 * RATE, 6)).astype(np.int16)
    for fine in (
        np.stack([SOUND, 0 * SOUND], 1),
        np.stack([SOUND, SOUND], 1),
        noise,
        np.stack([SOUND, -SOUND // 2], 1),
    ):
        assert kinds(decode(encoded(fine))) == []


def test_silence_and_clipping_are_found():
    assert kinds(decode(encoded(0 * SOUND))) == ["silent"]
    assert kinds(decode(encoded(SOUND // 1000))) == ["silent"]  # a peak of 9 of 32768, -71 dB
    assert kinds(decode(encoded(SOUND // 200))) == []  # 49, -57 dB
    assert kinds(decode(encoded(np.clip(SOUND.astype(int) * 5, -32768, 32767).astype(np.int16)))) == [
        "clipped"
    ]
    loudest = np.round(SOUND / np.abs(SOUND).max() * 32767).astype(np.int16)
    assert kinds(decode(encoded(loudest))) == [], "a few samples at full scale are no clipping"
    too_loud = decode(
        encoded(SOUND.astype(np.float32), "WAV", "FLOAT"), dtype="int16"
    )  # int16 values as floats
    assert kinds(too_loud) == ["clipped"] and "9830" in too_loud.findings[0].detail
    assert set(np.unique(too_loud.samples)) <= {-32768, 0, 32767}
    assert kinds(decode(encoded(0 * SOUND), levels=False)) == []
    assert kinds(decode(encoded(np.array([32767], np.int16)))) == []
    huge = np.stack([SOUND.astype(np.float32) * 1e30] * 2, 1)
    assert kinds(decode(encoded(huge, "WAV", "FLOAT"), dtype="int16")) == ["clipped"]
    both = decode(encoded(np.zeros((RATE, 2), np.int16)))
    assert kinds(both) == ["silent"], "silence does not cancel out"


# --- resampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [
        4000,
        7999,
        8000,
        11025,
        11127,
        12000,
        22050,
        22254,
        22255,
        24000,
        32000,
        44056,
        44100,
        44101,
        47999,
        48000,
        88200,
        96000,
        192000,
        384000,
    ],
)
def test_any_rate_is_resampled(rate):
    hertz, seconds = 1000.0, 1.0
    time = np.arange(round(seconds * rate)) / rate
    tone = (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
    result = decode(encoded(tone, "WAV", "FLOAT", rate))
    expected = 0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)
    assert abs(len(result.samples) - RATE) <= 1
    middle = slice(800, RATE - 800)  # the filter sees the ends of the clip
    error = result.samples[middle] - expected[middle]
    assert 10 * np.log10(0.125 / np.mean(error**2)) > 80


def test_a_rate_that_is_no_whole_number_is_accepted():
    """The Macintosh's 22,254.5454 Hz, as AIFF stores it: an 80-bit float."""
    data = bytearray(encoded(chirp(2.0, 22_254), "AIFF", "PCM_16", 22_254))
    place, rate = data.index(b"COMM") + 16, 22_254 + 6 / 11
    data[place : place + 10] = struct.pack(">HQ", 16383 + 14, int(rate / 2**14 * 2**63))
    result = decode(bytes(data))
    assert abs(result.seconds - 2.0) < 1e-3 and result.findings == ()


def test_short_clips_are_resampled():
    for frames in (1, 2, 7, 100):
        for rate in (8000, 44100, 22254):
            length = (
                len(decode(encoded(SOUND[:frames], "WAV", rate=rate)).samples)
                if frames * RATE >= rate
                else None
            )
            assert length is None or abs(length - frames * RATE / rate) < 1


def test_what_lies_above_the_new_band_is_removed():
    time = np.arange(48_000) / 48_000
    above = (0.5 * np.sin(2 * np.pi * 11_000 * time)).astype(np.float32)
    left = decode(encoded(above, "WAV", "FLOAT", 48_000), levels=False).samples[800:-800]
    assert np.abs(left).max() < 1e-4


# --- FFmpeg is optional -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, name",
    [
        (b"\0\0\0\x20ftypM4A ", "MP4"),
        (b"\x1a\x45\xdf\xa3", "WebM"),
        (b"#!AMR\n", "AMR"),
        (b"\x30\x26\xb2\x75", "WMA"),
        (b"\xff\xf1\x50\x80", "AAC"),
    ],
)
def test_without_pyav_the_refusal_names_the_command(monkeypatch, head, name):
    monkeypatch.setitem(sys.modules, "av", None)
    error = refused(head + bytes(100))
    assert error.reason == "no_decoder" and name in str(error) and "make setup EXTRAS=av" in str(error)
    assert refused(b"this is no audio " * 20).reason == "undecodable"


def test_playlists_are_not_followed(tmp_path):
    clip = tmp_path / "clip.ts"
    clip.write_bytes(encoded(SOUND))
    for text in (f"#EXTM3U\n#EXTINF:2,\nfile://{clip}\n", f"ffconcat version 1.0\nfile '{clip}'\n"):
        assert refused(text.encode()).reason == "undecodable"


def test_threads_decode_at_once():
    clips = [encoded(chirp(0.5 + 0.1 * number), "MP3" if number % 2 else "FLAC") for number in range(8)]
    expected = [decode(clip).samples for clip in clips]
    found: list = [None] * len(clips)

    def work(number: int) -> None:
        found[number] = decode(clips[number]).samples

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(clips))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_decoding_needs_no_torch():
    code = "import sys, core.audio; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
