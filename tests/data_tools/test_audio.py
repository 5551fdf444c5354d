"""Codecs, rates and cuts against soundfile and scipy-free references; equal input must be equal bytes."""

import io
import subprocess

import numpy as np
import pytest
import soundfile

from core import audio
from data_tools import quality
from data_tools.audio import encode, make_clip, ogg_checksum, read_clip, with_serial
from data_tools.sources import ClipError
from tests.core.sound import vbr_mp3
from tests.data_tools.conftest import tone


def write(path, samples, rate=16000, **kind):
    soundfile.write(path, samples, rate, **kind)
    return str(path)


@pytest.mark.parametrize("codec, extension", [("flac", "flac"), ("wav16", "wav"), ("opus", "opus")])
def test_codecs_keep_length_and_repeat_their_bytes(codec, extension):
    samples = audio.to_int16(tone(1.3))
    data, found = encode(samples, 16000, codec)
    assert found == extension and data == encode(samples, 16000, codec)[0]
    wave, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == 16000 and len(wave) == len(samples)
    if codec == "opus":
        assert len(data) < 0.4 * samples.nbytes and np.corrcoef(wave, samples)[0, 1] > 0.98
    else:
        assert np.array_equal(wave, samples)


def test_ogg_serial_is_replaced_and_pages_stay_valid():
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(3.0), 16000, format="OGG", subtype="OPUS")
    original = buffer.getvalue()
    assert original[22:26] == ogg_checksum(
        original[:22] + bytes(4) + original[26 : 27 + original[26] + sum(original[27 : 27 + original[26]])]
    ).to_bytes(4, "little"), "the checksum that the encoder wrote"
    renamed = with_serial(original, 7)
    assert renamed[14:18] == (7).to_bytes(4, "little") and len(renamed) == len(original)
    assert np.array_equal(soundfile.read(io.BytesIO(renamed))[0], soundfile.read(io.BytesIO(original))[0])


def test_copy_keeps_every_byte_and_names_the_container(tmp_path):
    for extension, kind in {
        "mp3": {},
        "flac": {},
        "wav": {},
        "ogg": {},
        "opus": {"format": "OGG", "subtype": "OPUS"},
    }.items():
        path = write(
            tmp_path / f"misnamed.{extension}.bin",
            tone(0.7, 24000),
            24000,
            **({"format": extension.upper()} | kind),
        )
        clip = make_clip(path, codec="copy")
        assert clip.data == open(path, "rb").read() and clip.codec == extension and clip.sample_rate == 24000
        assert abs(clip.duration - 0.7) < 0.06  # MP3 and Opus pad
    segment = make_clip(path, 0.1, 0.2, codec="copy")
    assert segment.codec == "flac" and abs(segment.duration - 0.2) < 1e-4


def test_flac_that_is_right_already_is_kept_and_others_are_made(tmp_path):
    right = write(tmp_path / "right.flac", tone(0.5))
    wrong_rate = write(tmp_path / "rate.flac", tone(0.5, 8000), 8000)
    stereo = write(tmp_path / "stereo.flac", np.stack([tone(0.5)] * 2, 1))
    assert make_clip(right).data == open(right, "rb").read()
    for path in (wrong_rate, stereo):
        clip = make_clip(path)
        assert (
            clip.data != open(path, "rb").read()
            and soundfile.info(io.BytesIO(clip.data)).channels == 1
            and clip.sample_rate == 16000
        )
    assert make_clip(wrong_rate, rate=None).sample_rate == 8000


def test_segments_equal_slices_of_the_whole(tmp_path):
    samples = tone(3.0, noise=0.1)
    for name in ("a.wav", "a.flac"):
        path = write(tmp_path / name, samples)
        whole = soundfile.read(path, dtype="int16")[0]
        for offset, duration in ((0.0, 0.5), (1.23, 0.77), (2.5, 0.6), (2.9, None)):
            part = soundfile.read(io.BytesIO(make_clip(path, offset, duration).data), dtype="int16")[0]
            start = round(offset * 16000)
            assert np.array_equal(
                part, whole[start : None if duration is None else start + round(duration * 16000)]
            )


def test_loud_float_audio_is_clipped_not_wrapped(tmp_path):
    path = write(tmp_path / "loud.wav", np.array([1.5, -1.5, 0.5] * 1000, dtype=np.float32), subtype="FLOAT")
    wave = soundfile.read(io.BytesIO(make_clip(path).data), dtype="int16")[0]
    assert set(wave.tolist()) == {32767, -32768, 16384}


def reason(path, *arguments, **options):
    with pytest.raises(ClipError) as caught:
        make_clip(str(path), *arguments, **options)
    return caught.value.reason


def test_reasons_for_refusal(tmp_path):
    good = write(tmp_path / "good.wav", tone(1.0))
    data = open(good, "rb").read()
    (tmp_path / "cut.wav").write_bytes(data[:20000])
    flac = open(write(tmp_path / "good.flac", tone(1.0, noise=0.3)), "rb").read()
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (tmp_path / "header.flac").write_bytes(flac[:60])
    (tmp_path / "text.mp3").write_text("this is no audio " * 50)
    (tmp_path / "none.wav").write_bytes(b"")
    write(tmp_path / "zero.wav", np.zeros(0, dtype=np.int16))
    write(tmp_path / "inf.wav", np.array([0, np.inf, 0], dtype=np.float32), subtype="FLOAT")
    raw = write(tmp_path / "x.au", tone(0.3), format="AU")
    assert reason(tmp_path / "gone.wav") == reason(tmp_path / "gone.wav", 0.0, 1.0) == "missing_file"
    assert reason(tmp_path / "cut.wav") == reason(tmp_path / "cut.wav", codec="copy") == "truncated"
    assert reason(tmp_path / "cut.flac") in ("truncated", "undecodable") and reason(
        tmp_path / "header.flac"
    ) in (
        "truncated",
        "undecodable",
        "zero_length",
    )
    assert reason(tmp_path / "text.mp3") == reason(raw, codec="copy") == "undecodable"
    assert (
        reason(tmp_path / "none.wav")
        == reason(tmp_path / "zero.wav")
        == reason(good, 0.0, 0.0)
        == reason(good, 1.5, 1.0)
        == "zero_length"
    )
    assert reason(good, 0.5, 1.0) == "truncated" and abs(make_clip(good, 0.5, 0.6).duration - 0.5) < 1e-3
    assert reason(tmp_path / "inf.wav") == "not_finite"
    assert reason(tmp_path) == "unreadable"


def test_what_would_take_all_memory_is_refused(tmp_path, monkeypatch):
    long, whole = write(tmp_path / "long.flac", tone(2.0)), write(tmp_path / "long.wav", tone(2.0))
    for path in (long, whole):
        assert reason(path, max_seconds=1.0) == reason(path, 0.25, 1.5, max_seconds=1.0) == "too_long"
    assert make_clip(long, 0.25, 1.0, max_seconds=1.0).duration == 1.0
    monkeypatch.setattr(audio.read_file, "__kwdefaults__", {"max_bytes": 20_000})
    assert reason(whole) == "too_large" and make_clip(whole, 0.0, 0.5).duration == 0.5


def test_a_wav_without_a_rate_is_refused(tmp_path):
    data = bytearray(open(write(tmp_path / "a.wav", tone(0.5)), "rb").read())
    data[24:28] = bytes(4)
    (tmp_path / "b.wav").write_bytes(bytes(data))
    assert reason(tmp_path / "b.wav") == "undecodable"


@pytest.mark.parametrize("rate", [8000, 11127, 22254, 44100, 44101, 96000])
def test_any_rate_is_packed_at_the_one_asked_for(rate, tmp_path):
    path = write(tmp_path / "a.wav", tone(0.5, rate), rate)
    clip = make_clip(path)
    assert clip.sample_rate == 16000 and abs(clip.duration - 0.5) < 1e-4
    assert make_clip(path, rate=None).sample_rate == rate


def test_opus_at_a_rate_that_it_has_not_takes_the_next_one_up(tmp_path):
    for rate, written in ((8000, 8000), (11025, 12000), (22050, 24000), (44100, 48000), (96000, 48000)):
        clip = make_clip(write(tmp_path / "a.wav", tone(0.5, rate), rate), codec="opus", rate=None)
        assert (clip.sample_rate, clip.codec) == (written, "opus") and abs(clip.duration - 0.5) < 1e-3


def test_a_rate_that_flac_has_not_is_named(tmp_path):
    path = write(tmp_path / "a.wav", tone(0.1, 96001), 96001)
    assert reason(path, rate=None) == "odd_rate" and make_clip(path).sample_rate == 16000


def test_copied_clips_have_their_true_length(tmp_path):
    first, second = (open(write(tmp_path / f"{n}.ogg", tone(0.5 + n)), "rb").read() for n in (0, 1))
    (tmp_path / "joined.ogg").write_bytes(first + second)
    clip = make_clip(str(tmp_path / "joined.ogg"), codec="copy")
    assert abs(clip.duration - 2.0) < 1e-3 and [finding.kind for finding in clip.findings] == ["joined"]
    bare = tmp_path / "bare.mp3"
    bare.write_bytes(vbr_mp3(True)[1])
    assert abs(make_clip(str(bare), codec="copy").duration - 10.0) < 0.15
    for name in ("joined.ogg", "bare.mp3"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) * 6 // 10])
        assert reason(tmp_path / "cut", codec="copy") == "truncated"


def test_joined_flac_is_encoded_again(tmp_path):
    data = open(write(tmp_path / "a.flac", tone(0.5)), "rb").read()
    (tmp_path / "b.flac").write_bytes(data + data)
    clip = make_clip(str(tmp_path / "b.flac"))
    assert clip.duration == 1.0 and soundfile.info(io.BytesIO(clip.data)).frames == 16000


def test_plain_tar_takes_out_what_was_put_in(corpus, tmp_path):
    from data_tools import pack

    out = tmp_path / "packed"
    pack.main(
        ["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--codec", "opus", "--measure"]
    )
    subprocess.run(["tar", "xf", next(out.glob("*.tar")), "-C", tmp_path], check=True)
    clips = list(tmp_path.glob("*.opus"))
    assert clips and all(soundfile.info(clip).subtype == "OPUS" for clip in clips)
    import json

    told = json.loads(clips[0].with_suffix(".json").read_text())["quality"]
    assert set(told) == {"rms_db", "peak_db", "clipping", "snr_db"}


def test_measures_of_known_signals():
    rate, rng = 16000, np.random.default_rng(0)
    sine = (np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 16384).astype(np.int16)
    assert quality.measure(sine, rate)["rms_db"] == pytest.approx(-9.03, abs=0.02)
    assert quality.measure(sine, rate)["peak_db"] == pytest.approx(-6.02, abs=0.02)
    clipped = np.clip(sine.astype(np.int32) * 4, -32768, 32767).astype(np.int16)
    assert quality.measure(clipped, rate)["clipping"] > 0.3 and quality.measure(sine, rate)["clipping"] == 0
    bursts = np.tile(np.repeat([1.0, 0.0], rate // 4), 4)
    for snr in (10, 20, 30):
        noise = rng.standard_normal(len(bursts)) * 300
        signal = (
            np.sqrt(2)
            * 300
            * 10 ** (snr / 20)
            * np.sin(2 * np.pi * 300 * np.arange(len(bursts)) / rate)
            * bursts
        )
        assert quality.measure((signal + noise).astype(np.int16), rate)["snr_db"] == pytest.approx(
            snr, abs=1.5
        )


def test_clearest_stretch_holds_the_event():
    rate = 16000
    samples = (np.random.default_rng(0).standard_normal(10 * rate) * 50).astype(np.int16)
    bark = (tone(0.8, hertz=800) * 20000).astype(np.int16)
    for at in (0.0, 2.0, 5.5, 9.2):
        clip = samples.copy()
        clip[round(at * rate) : round(at * rate) + len(bark)] += bark
        cut = quality.clearest(clip, rate, 3.0)
        assert len(cut) == 3 * rate and (np.abs(cut) > 3000).sum() > 0.99 * (np.abs(bark) > 3000).sum()
    assert len(quality.clearest(bark, rate, 3.0)) == len(bark)


@pytest.mark.parametrize(
    "kind, subtype", [("WAV", "PCM_16"), ("WAVEX", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24")]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_decodes_as_libsndfile_decodes_it(tmp_path, kind, subtype, channels):
    path = tmp_path / "a.wav"
    soundfile.write(
        path, np.random.default_rng(0).normal(0, 0.1, (1001, channels)), 22050, format=kind, subtype=subtype
    )
    data = path.read_bytes()
    before = data.index(b"data")
    extra = b"LIST" + (7).to_bytes(4, "little") + b"INFOabc" + b"\0"  # of odd size, so it is padded
    path.write_bytes(
        b"RIFF" + (len(data) - 8 + len(extra)).to_bytes(4, "little") + data[8:before] + extra + data[before:]
    )
    read, _ = read_clip(str(path))
    samples, rate = read.samples, read.rate
    assert rate == 22050 and np.array_equal(
        samples, soundfile.read(path, dtype=samples.dtype, always_2d=True)[0]
    )
    assert samples.dtype == (np.float32 if subtype == "PCM_24" else np.int16)
