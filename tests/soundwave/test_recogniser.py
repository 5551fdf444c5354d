"""Transcription in Python: what batching, containers and lengths must not change; silence; channels; answers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

import soundwave
from model.generation.joint import JointSearch
from model.generation.timestamps import frame_seconds
from soundwave.decoding import Decoding
from soundwave.recogniser import Options, _Job, batches
from soundwave.windows import Window
from tests.soundwave.conftest import wave

SHORT = {"max_new_tokens": 6}


def as_file(samples: np.ndarray, rate: int = 16000, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype="FLOAT" if format == "WAV" else None)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def long() -> np.ndarray:
    return np.concatenate([wave(1.7, 1), np.zeros(4000, np.float32), wave(2.9, 2), wave(0.3, 3)])


@pytest.mark.parametrize("decode", ["ctc", "greedy", "drafted", "joint"])
def test_a_batch_gives_what_single_clips_give(speaker, decode):
    clips = [wave(seconds, seed) for seed, seconds in enumerate((0.4, 1.3, 0.7, 2.1))]
    options = Options(decode=decode, timestamps="word", **SHORT)
    together = list(speaker.transcribe_all(clips, options=options))
    for clip, found in zip(clips, together, strict=True):
        alone = speaker.transcribe(clip, decode=decode, timestamps="word", **SHORT)
        assert alone.text == found.text and alone.duration == found.duration == len(clip) / 16000
        assert [s.confidence for s in alone.segments] == pytest.approx(
            [s.confidence for s in found.segments], rel=1e-3
        )
        assert [w.text for w in alone.words] == [w.text for w in found.words]
        assert [w.start for w in alone.words] == pytest.approx([w.start for w in found.words])
    assert any(found.text for found in together)


def test_a_clip_is_transcribed_as_the_network_answers_it(speaker):
    """The features of the gate's pass are used again: the text is that of a whole pass."""
    clip = wave(1.3, 1)
    chat = [{"role": "user", "content": "<audio_patch>\nPlease transcribe the following audio."}]
    for decode, options in (
        ("greedy", {}),
        ("drafted", {}),
        ("joint", {"joint": JointSearch(ctc_text="lower")}),
    ):
        wanted = speaker.network.answer([chat], [clip], max_new_tokens=6, **options)[0]
        assert speaker.transcribe(clip, decode=decode, **SHORT).text == " ".join(wanted.split())


@pytest.mark.parametrize("decode", ["ctc", "greedy"])
def test_windows_of_a_long_recording_are_its_transcript(speaker, long, decode):
    """Whatever the batch's size; the text is that of the windows, each transcribed as a clip of its own."""
    options = {"decode": decode, "window_seconds": 1.0, **SHORT}
    whole = speaker.transcribe(long, batch_seconds=60, **options)
    small = speaker.transcribe(long, batch_seconds=1, **options)
    assert whole.text == small.text and len(whole.segments) > 4
    assert whole.duration == len(long) / 16000
    starts = [segment.start for segment in whole.segments]
    assert starts == sorted(starts)
    for before, after in zip(whole.segments, whole.segments[1:], strict=False):
        assert before.end <= after.start + 1e-6


@pytest.fixture
def encoded_seconds(speaker, monkeypatch) -> list[float]:
    """Seconds of audio of each call of the encoder."""
    seconds: list[float] = []
    forward = speaker.network.encoder.forward

    def counted(waveforms, lengths, *more):
        seconds.append(int(lengths.sum()) / 16000)
        return forward(waveforms, lengths, *more)

    monkeypatch.setattr(speaker.network.encoder, "forward", counted)
    return seconds


@pytest.mark.parametrize("decode", ["ctc", "greedy", "drafted", "joint"])
def test_a_long_recording_is_encoded_once(speaker, encoded_seconds, monkeypatch, decode):
    monkeypatch.setattr("soundwave.windows.CONTEXT_SECONDS", 0.1)
    monkeypatch.setattr("soundwave.recogniser.CONTEXT_SECONDS", 0.1)
    clip = np.concatenate([wave(2.6, seed) for seed in range(3)])
    result = speaker.transcribe(clip, decode=decode, timestamps="word", window_seconds=1.0, **SHORT)
    assert len(result.segments) > 6
    assert len(clip) / 16000 <= sum(encoded_seconds) < 1.4 * len(clip) / 16000  # with context


def test_windows_have_the_frames_of_the_scan(speaker, long, monkeypatch):
    """One chunk holds the recording here: the windows' frames, one after another, are the recording's."""
    monkeypatch.setattr(speaker, "_chunk", lambda longest: 30 * 16000)
    setup = speaker._setup(Options(window_seconds=1.0))
    windows = [piece.window for piece in speaker._pieces(long, 16000, setup, _Job(0))]
    _, whole = speaker._encoded([long], "x")
    _, audio = speaker._encoded(windows, "x")
    assert len(windows) > 4 and sum(audio.lengths.tolist()) == int(whole.lengths[0])
    for name in ("hidden", "argmax", "peak", "blank_logprob"):
        rows, wanted = getattr(audio, name), getattr(whole, name)[0]
        joined = torch.cat([row[:length] for row, length in zip(rows, audio.lengths, strict=True)])
        torch.testing.assert_close(joined, wanted, atol=1e-4, rtol=1e-4)
    frame = round(frame_seconds(speaker.network) * 16000)
    for window, length in zip(windows, audio.lengths.tolist(), strict=True):
        assert window.frames_origin % frame == 0 and window.start <= window.frames_origin
        assert window.frames_origin + (length - 1) * frame < window.start + len(window.samples)


def test_scanned_and_short_recordings_share_a_batch(speaker, long):
    options = Options(window_seconds=2.0, timestamps="word", **SHORT)
    clips = [long, wave(0.8, 4), long[:40000]]
    together = list(speaker.transcribe_all(clips, options=options))
    for clip, found in zip(clips, together, strict=True):
        alone = next(iter(speaker.transcribe_all([clip], options=options)))
        assert alone.text == found.text
        assert [w.start for w in alone.words] == pytest.approx([w.start for w in found.words])


def test_frames_of_a_filled_up_clip_are_not_reused(speaker, long, monkeypatch):
    monkeypatch.setattr(speaker.network.config.alignment, "ctc_length", "full")
    setup = speaker._setup(Options(window_seconds=1.0))
    pieces = list(speaker._pieces(long, 16000, setup, _Job(0)))
    assert len(pieces) > 4 and not any(piece.window.outputs for piece in pieces)


def test_windows_may_be_as_long_as_the_model_takes(speaker, long, encoded_seconds, monkeypatch):
    for owner in (speaker.network.encoder, speaker.network.config.encoder):
        monkeypatch.setattr(owner, "max_seconds", 2.0)
    assert speaker.transcribe(long, window_seconds=2.0, pause_seconds=0, **SHORT).segments[-1].end > 4
    assert len(encoded_seconds) > 1


def test_a_padded_encoder_scans_whole_paddings(speaker, long, encoded_seconds, monkeypatch):
    monkeypatch.setattr(speaker.network.encoder, "pad_to_samples", 10 * 16000)
    result = speaker.transcribe(long, decode="ctc", window_seconds=1.0)
    assert len(result.segments) > 4 and encoded_seconds == [len(long) / 16000]


def test_answers_are_drafted_by_default_where_they_are_those_of_greedy(speaker, monkeypatch, caplog):
    def chosen(**options) -> str:
        return speaker._setup(Options(**options)).decoding.decode

    assert chosen() == "drafted" and chosen(decode="greedy") == "greedy"
    assert chosen(hotwords=["a"]) == "joint" and chosen(hotwords=["a"], hotwords_in_prompt=True) == "drafted"
    with monkeypatch.context() as patch:
        patch.setattr("soundwave.recogniser.refusal", lambda *_: "its cache cannot be cut")
        assert chosen() == "greedy"
    with monkeypatch.context() as patch:
        patch.setattr(next(speaker.network.llm.parameters()), "data", torch.zeros(1, dtype=torch.bfloat16))
        assert chosen() == "greedy"
    clip = wave(1.3, 1)
    assert speaker.transcribe(clip, **SHORT) == speaker.transcribe(clip, decode="greedy", **SHORT)
    assert not caplog.records


def test_files_bytes_and_arrays_are_the_same_recording(speaker, long, tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(as_file(long))
    options = {"decode": "ctc", "window_seconds": 1.5}
    wanted = speaker.transcribe(long, **options).text
    assert wanted
    for source in (str(path), path, as_file(long), torch.from_numpy(long), long.tolist()):
        assert speaker.transcribe(source, **options).text == wanted
    flac = tmp_path / "long.flac"
    flac.write_bytes(as_file(np.round(long * 32768) / 32768, format="FLAC"))
    assert speaker.transcribe(flac, **options).duration == len(long) / 16000


def test_other_rates_are_resampled_over_the_borders_of_blocks(speaker, long, monkeypatch):
    monkeypatch.setattr("soundwave.recogniser.BLOCK_SECONDS", 0.37)
    import soxr

    at_44 = soxr.resample(long, 16000, 44100)
    seen: list[np.ndarray] = []
    original = speaker._blocks

    def kept(*arguments):
        for block in original(*arguments):
            seen.append(block[:, 0])
            yield block

    monkeypatch.setattr(speaker, "_blocks", kept)
    result = speaker.transcribe(as_file(at_44, 44100), decode="ctc")
    wanted = soxr.resample(at_44, 44100, 16000)
    assert len(seen) > 10 and abs(len(np.concatenate(seen)) - len(wanted)) <= 1
    shorter = min(len(np.concatenate(seen)), len(wanted))
    assert np.abs(np.concatenate(seen)[:shorter] - wanted[:shorter]).max() < 1e-4
    assert result.duration == pytest.approx(len(long) / 16000, abs=1e-3)


def test_silence_has_no_text_and_is_counted(deaf, long):
    for source in (long, np.zeros(16000, np.float32)):
        result = deaf.transcribe(source, window_seconds=1.0, **SHORT)
        assert result.text == "" and result.segments == () and result.confidence == 0
        assert result.skipped_seconds == pytest.approx(result.duration)
        assert deaf.transcribe(source, window_seconds=1.0, gate=0.0, **SHORT).skipped_seconds == 0
    assert deaf.transcribe(long, gate=0.0, **SHORT).text


def test_what_is_below_60_db_is_silence_for_any_model(speaker):
    noise = 0.0009 * np.sin(np.arange(16000, dtype=np.float32))
    assert speaker.transcribe(noise, **SHORT).text == "" and speaker.transcribe(noise, gate=0, **SHORT).text
    assert speaker.transcribe(2 * noise, **SHORT).text


def test_the_gate_is_the_highest_probability_of_a_token(deaf):
    """One frame has a token with 0.4; beyond 3 s it takes more, without a step, up to twice as much."""
    for seconds, gate in ((0.5, 0.4), (3.04, 0.4 / 1.01), (4.5, 0.4 / 1.5), (6.5, 0.2), (9.5, 0.2)):
        _, audio = deaf._encoded([wave(seconds)], "x")
        blank = torch.zeros_like(audio.blank_logprob)
        blank[0, 3] = np.log(0.6)
        audio = audio._replace(blank_logprob=blank)
        assert deaf._has_speech(audio, 0, gate - 0.01) and not deaf._has_speech(audio, 0, gate + 0.01)
    said = audio._replace(argmax=audio.argmax.clone())
    said.argmax[0, 2] = 7
    assert deaf._has_speech(said, 0, 1.0)


def test_channels_are_mixed_or_speakers(speaker):
    left, right = wave(1.9, 1), wave(1.9, 2)
    stereo = as_file(np.stack([left, right], axis=1))
    options = {"decode": "ctc", "window_seconds": 1.0}
    mixed = speaker.transcribe(stereo, **options)
    assert mixed.text == speaker.transcribe((left + right) / 2, **options).text
    assert {segment.speaker for segment in mixed.segments} == {None}
    for source in (stereo, np.stack([left, right])):
        split = speaker.transcribe(source, channels="split", **options)
        for name, samples in (("channel 1", left), ("channel 2", right)):
            own = [segment for segment in split.segments if segment.speaker == name]
            assert [s.text for s in own] == [s.text for s in speaker.transcribe(samples, **options).segments]
        assert split.duration == len(left) / 16000
        assert split.by_speaker().startswith("channel 1: ")


def test_overlap_keeps_each_word_once(speaker, long):
    """Words of neighbours' overlaps are dropped by their time; their order is that of time."""
    result = speaker.transcribe(long, decode="ctc", window_seconds=1.0, overlap_seconds=0.3)
    times = [(word.start + word.end) / 2 for word in result.words]
    assert times == sorted(times) and result.text.split() == [word.text for word in result.words]


def test_word_times_lie_in_the_recording(speaker, long):
    result = speaker.transcribe(long, decode="ctc", timestamps="word", window_seconds=1.0)
    assert result.words and result.text.split() == [word.text for word in result.words]
    assert all(0 <= word.start <= word.end <= result.duration for word in result.words)
    assert result.words[-1].start > 3.0  # times are those of the recording, not of a window


def test_hotwords_choose_joint_search_and_can_be_in_the_prompt(speaker):
    clip = wave(0.7, 2)
    assert speaker.transcribe(clip, hotwords=["the"], hotword_bonus=0.0, **SHORT).text == (
        speaker.transcribe(clip, decode="joint", **SHORT).text
    )
    result = speaker.transcribe(clip, hotwords=["zebra"], hotwords_in_prompt=True, **SHORT)
    assert result.text != speaker.transcribe(clip, **SHORT).text


def test_answers(speaker):
    clip = wave(1.1, 4)
    wanted = speaker.network.answer(
        [[{"role": "user", "content": "<audio_patch>\nWho?"}]], [clip], max_new_tokens=6
    )[0]
    result = speaker.answer(as_file(clip), "Who?", max_new_tokens=6)
    assert str(result) == " ".join(wanted.split()) and result.duration == 1.1
    assert speaker.answer(clip, "Who?", max_new_tokens=6, decode="drafted").text == str(result)
    with pytest.raises(ValueError, match="holds <audio_patch>"):
        speaker.answer(clip, "<audio_patch>?")
    with pytest.raises(soundwave.AudioError, match="takes 300 s at most"):
        speaker.answer(np.zeros(301 * 16000, np.float32), "Who?")


def test_a_source_that_is_no_use_costs_itself_only(speaker, tmp_path):
    sources = [wave(0.5), b"no audio", tmp_path / "none.wav", np.zeros(0, np.float32), wave(0.5)]
    found = list(speaker.transcribe_all(sources, options=Options(**SHORT)))
    assert [isinstance(one, Exception) for one in found] == [False, True, True, True, False]
    assert found[0].text == found[4].text
    for method in (speaker.transcribe, speaker.transcribe_clip, lambda file: speaker.answer(file, "Who?")):
        with pytest.raises(soundwave.AudioError, match=f"^{tmp_path / 'none.wav'}: does not exist$"):
            method(tmp_path / "none.wav")


def test_progress_reaches_the_length(speaker, long):
    steps: list[float] = []
    speaker.transcribe(long, decode="ctc", window_seconds=1.0, batch_seconds=2.0, progress=steps.append)
    assert steps == sorted(steps) and steps[-1] == pytest.approx(len(long) / 16000)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"decode": "best"}, "decode is 'best'"),
        ({"timestamps": "letter"}, "timestamps is 'letter'"),
        ({"window_seconds": 500.0}, "more than this model takes"),
        ({"batch_seconds": float("nan")}, "batch_seconds"),
        ({"hotwords": "wall"}, "give a list"),
        ({"hotwords": ["wall"], "decode": "greedy"}, "give decode='joint'"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(speaker, options, words):
    with pytest.raises(ValueError, match=words):
        speaker.transcribe(wave(0.5), **options)


def test_a_model_of_stage_one_has_its_ctc_head_alone(folders):
    model = soundwave.load(folders / "alignment", device="cpu")
    assert model.transcribe(wave(1.0)).text == model.transcribe(wave(1.0), decode="ctc").text
    with pytest.raises(ValueError, match="has no LLM"):
        model.transcribe(wave(1.0), decode="greedy")
    with pytest.raises(ValueError, match="has no LLM to ask"):
        model.answer(wave(1.0), "Who?")


def test_a_transcript_that_does_not_end_is_cut_by_what_the_ctc_head_found(deaf):
    """A random LLM never ends; the CTC head of this model finds nothing, so one frame is kept."""
    clips = [wave(0.5), wave(1.5, 2)]
    found = deaf.transcribe_all(clips, options=Options(gate=0.0, max_new_tokens=200))
    for clip, one in zip(clips, found, strict=True):
        batch, audio = deaf._encoded([clip], "Please transcribe the following audio.")
        ids = deaf.network.generate(batch, max_new_tokens=19)[0]
        wanted = deaf.network.tokenizer.decode(ids, skip_special_tokens=True)
        assert one.text == " ".join(wanted.split()) and len(ids) == 19


def test_batches_hold_as_many_padded_seconds_as_they_may():
    class Piece:
        def __init__(self, seconds: float):
            self.window = Window(0, np.zeros(round(seconds * 16000), np.float32), 0, 1)

    pieces = [Piece(seconds) for seconds in (3, 1, 10, 2, 9, 30)]
    found = [[piece.window.seconds for piece in batch] for batch in batches(pieces, 20.0)]
    assert found == [[30], [10, 9], [3, 2, 1]]


def test_decoding_is_checked():
    with pytest.raises(ValueError, match="decode is 'generate'"):
        Decoding("generate")
