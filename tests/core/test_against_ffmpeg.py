"""Lengths, rates, channels and samples of generated files agree with ffmpeg's own decode, over containers,
codecs and rates.

One ffmpeg command writes all files, one decodes them.
"""

import subprocess

import numpy as np
import pytest

from core.audio import AudioError, decode, read

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="requirements-dev.txt has it")
pytest.importorskip("av", reason="requirements-av.txt has it")

EXACT, LOSSY, COARSE = (
    0.0,
    1e-5,
    2e-2,
)  # COARSE: ffmpeg gives Opus at 48 kHz and resamples it, libsndfile decodes at the rate
# (name, codec and options, rate, channels, largest difference of a sample)
FILES = [
    ("a.wav", "pcm_s16le", 16000, 1, EXACT),
    ("b.wav", "pcm_s16le", 44100, 2, EXACT),
    ("c.wav", "pcm_s16le", 22254, 1, EXACT),
    ("d.wav", "pcm_s16le", 11127, 1, EXACT),
    ("e.wav", "pcm_u8", 8000, 1, EXACT),
    ("f.wav", "pcm_s24le", 48000, 2, EXACT),
    ("g.wav", "pcm_s32le", 16000, 6, EXACT),
    ("h.wav", "pcm_f32le", 16000, 1, EXACT),
    ("i.wav", "pcm_f64le", 32000, 1, EXACT),
    ("j.wav", "pcm_alaw", 8000, 1, EXACT),
    ("k.wav", "pcm_mulaw", 8000, 2, EXACT),
    ("l.wav", "adpcm_ima_wav", 22050, 1, EXACT),
    ("m.wav", "adpcm_ms", 22050, 2, EXACT),
    ("n.wav", "g726", 8000, 1, EXACT),
    ("o.wav", "libmp3lame", 44100, 1, LOSSY),
    ("p.wav", "pcm_s16le -rf64 always", 16000, 1, EXACT),
    ("a.w64", "pcm_s16le", 16000, 1, EXACT),
    ("b.w64", "pcm_s24le", 96000, 2, EXACT),
    ("a.aiff", "pcm_s16be", 22050, 1, EXACT),
    ("b.aiff", "pcm_s24be", 44100, 2, EXACT),
    ("c.aiff", "pcm_f32be", 16000, 1, EXACT),
    ("a.au", "pcm_s16be", 16000, 1, EXACT),
    ("b.au", "pcm_mulaw", 8000, 1, EXACT),
    ("a.caf", "pcm_s16be", 16000, 2, EXACT),
    ("b.caf", "alac", 44100, 1, EXACT),
    ("a.flac", "flac -sample_fmt s16", 16000, 1, EXACT),
    ("b.flac", "flac -sample_fmt s16", 44100, 2, EXACT),
    ("c.flac", "flac -sample_fmt s32", 96000, 1, EXACT),
    ("d.flac", "flac -sample_fmt s16", 48000, 8, EXACT),
    ("a.ogg", "flac", 16000, 1, EXACT),
    ("b.ogg", "libvorbis", 16000, 1, LOSSY),
    ("c.ogg", "libvorbis", 44100, 2, LOSSY),
    ("a.opus", "libopus", 16000, 1, COARSE),
    ("b.opus", "libopus", 24000, 1, COARSE),
    ("c.opus", "libopus", 48000, 2, 1e-3),
    ("a.mp3", "libmp3lame -b:a 128k", 44100, 2, LOSSY),
    ("b.mp3", "libmp3lame -q:a 4", 22050, 1, LOSSY),
    ("c.mp3", "libmp3lame -b:a 16k", 11025, 1, LOSSY),
    ("d.mp3", "libmp3lame -q:a 2", 16000, 1, LOSSY),
    ("e.mp3", "libmp3lame -write_xing 0 -b:a 64k", 16000, 1, LOSSY),
    ("f.mp3", "libmp3lame -write_xing 0 -q:a 3", 44100, 1, 5e-5),
    ("g.mp3", "libmp3lame -id3v2_version 4 -write_id3v1 1 -metadata title=x -b:a 64k", 16000, 1, LOSSY),
    ("a.mp2", "mp2", 48000, 2, 5e-5),
    ("a.m4a", "aac", 16000, 1, LOSSY),
    ("b.m4a", "aac", 44100, 2, LOSSY),
    ("c.m4a", "aac -movflags +faststart", 48000, 1, LOSSY),
    ("d.m4a", "alac", 44100, 2, EXACT),
    ("a.aac", "aac", 22050, 1, LOSSY),
    ("a.mp4", "aac", 32000, 2, LOSSY),
    ("b.mp4", "aac -movflags +frag_keyframe+empty_moov", 16000, 1, LOSSY),
    ("a.mov", "pcm_s16le", 48000, 1, EXACT),
    ("a.3gp", "libopencore_amrnb", 8000, 1, LOSSY),
    ("a.amr", "libopencore_amrnb", 8000, 1, LOSSY),
    ("a.webm", "libopus", 48000, 1, LOSSY),
    ("b.webm", "libvorbis", 44100, 2, LOSSY),
    ("c.webm", "libopus -live 1", 48000, 1, LOSSY),
    ("a.mka", "flac", 16000, 1, EXACT),
    ("a.wma", "wmav2", 44100, 2, LOSSY),
    ("b.wma", "wmav1", 16000, 1, LOSSY),
    ("a.wv", "wavpack", 44100, 2, EXACT),
    ("a.tta", "tta", 44100, 1, EXACT),
    ("a.avi", "libmp3lame", 44100, 2, LOSSY),
    ("a.flv", "aac", 44100, 1, LOSSY),
    ("a.ts", "aac", 48000, 1, LOSSY),
]
SECONDS = 1.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ffmpeg")
    left, right = "0.3*sin(2*PI*(300+200*t)*t)+0.05*sin(2*PI*1234*t)", "0.2*sin(2*PI*500*t)"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    make = [*ffmpeg, "-f", "lavfi", "-i", f"aevalsrc=exprs='{left}|{right}':d={SECONDS}:s=48000"]
    for name, codec, rate, channels, _ in FILES:
        make += [
            "-map",
            "0:a",
            "-c:a",
            *codec.split(),
            "-ar",
            str(rate),
            "-ac",
            str(channels),
            str(folder / name),
        ]
    subprocess.run(make, check=True)
    back = list(ffmpeg)
    for name, *_ in FILES:
        back += ["-i", str(folder / name)]
    for number, (name, _, rate, _, _) in enumerate(FILES):
        resampled = ["-ar", str(rate)] if name.endswith(".opus") else []
        back += ["-map", f"{number}:a", "-f", "f32le", *resampled, str(folder / f"{name}.raw")]
    subprocess.run(back, check=True)
    return folder


@pytest.mark.parametrize("name, codec, rate, channels, tolerance", FILES)
def test_decodes_as_ffmpeg_does(folder, name, codec, rate, channels, tolerance):
    expected = np.fromfile(folder / f"{name}.raw", "<f4").reshape(-1, channels)
    found = read((folder / name).read_bytes())
    samples = found.samples / 32768 if found.samples.dtype == np.int16 else found.samples
    assert (found.rate, samples.shape, found.findings) == (rate, expected.shape, ())
    assert np.abs(samples - expected).max() <= tolerance
    assert abs(found.seconds - SECONDS) < 0.13, "encoders pad"
    first = round(0.4 * rate)
    segment = read(folder / name, start=0.4, duration=0.5)
    part = segment.samples / 32768 if segment.samples.dtype == np.int16 else segment.samples
    assert np.abs(part - expected[first : first + len(part)]).max() <= max(
        tolerance, LOSSY if tolerance else EXACT
    )


CUTTABLE = "b.m4a c.m4a a.aac a.mp4 b.mp4 a.webm b.webm a.wma a.amr a.3gp a.avi a.flv a.wv a.mka".split()


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_files_are_named(folder, name):
    data = (folder / name).read_bytes()
    for share in (0.5, 0.8):
        with pytest.raises(AudioError) as caught:
            decode(data[: int(len(data) * share)])
        assert caught.value.reason == "truncated", str(caught.value)


def test_what_is_left_of_a_cut_file_is_decoded_on_request(folder):
    for name in ("c.m4a", "a.aac", "a.webm", "a.amr"):
        data = (folder / name).read_bytes()
        part = decode(data[: int(len(data) * 0.6)], whole=False)
        assert [finding.kind for finding in part.findings] == ["cut"] and 0.5 < part.seconds < 1.4


def test_limits_hold_for_ffmpeg_too(folder):
    data = (folder / "b.m4a").read_bytes()
    for options, reason in (({"max_seconds": 1.0}, "too_long"), ({"max_bytes": 100_000}, "too_large")):
        with pytest.raises(AudioError) as caught:
            read(data, **options)
        assert caught.value.reason == reason


def test_video_without_audio_is_named(tmp_path):
    path = tmp_path / "silent.mp4"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    source = ["-f", "lavfi", "-i", "color=size=32x32:duration=0.2", "-c:v", "mpeg4", str(path)]
    subprocess.run([ffmpeg, "-v", "error", *source], check=True)
    with pytest.raises(AudioError, match="without audio"):
        decode(path)
