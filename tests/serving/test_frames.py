"""`include`: frames, the server's extension: what the model made of the audio, for pictures."""

from __future__ import annotations

import io
import json

import httpx2
import numpy as np
import pytest
import soundfile
import torch

from core.samples import asked
from model.generation.timestamps import align
from tests.serving.conftest import QUESTION, part, samples_of, wav


def close(found: list[float], right: torch.Tensor) -> bool:
    return np.allclose(found, right.tolist(), atol=2e-3)


def check(model, entry: dict, clip: bytes) -> None:
    """An entry of `frames` has what `Soundwave.inspect` finds in the clip."""
    batch = model.prompts([[asked(QUESTION)]], [samples_of(clip)])
    right = model.inspect(batch)
    assert entry["tokens"] == right["tokens"][0].tolist() and entry["kept"] == right["kept"][0].tolist()
    assert entry["rate"] == right["frame_rate"] and entry["blank"] == right["blank"]
    assert close(entry["blank_probability"], right["blank_probability"][0])
    assert close(entry["log_probability"], right["peak"][0])
    assert entry["transcript"] == model.ctc_greedy(batch)[0]
    spoken = {token for token in entry["tokens"] if token != entry["blank"]}
    assert entry["texts"] == {str(token): model.tokenizer.decode([token]) for token in spoken}
    words = align(model, [samples_of(clip)], [entry["transcript"]])[0].words
    assert [(w["word"], w["start"]) for w in entry["words"]] == [
        (word.text, pytest.approx(word.start, abs=1e-3)) for word in words
    ]


def transcribe(url: str, clip: bytes, **fields):
    form = {"model": "tiny", "response_format": "verbose_json", **fields}
    return httpx2.post(
        f"{url}/v1/audio/transcriptions", data=form, files={"file": ("c.wav", clip)}, timeout=60
    )


def chat(url: str, clips: list[bytes], **fields):
    content = [*map(part, clips), {"type": "text", "text": "What?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_a_transcription_has_the_frames_of_its_audio(server, model):
    url, clip = server[1], wav(1.1, 2)
    (entry,) = transcribe(url, clip, **{"include[]": "frames"}).json()["frames"]
    assert entry["start"] == 0.0 and entry["kept"]
    check(model, entry, clip)
    assert "frames" not in transcribe(url, clip).json()


def test_a_recording_has_an_entry_for_each_window(server):
    noise = [samples_of(wav(1.0, seed)).numpy() for seed in range(3)]
    pause = np.zeros(3 * 16_000, np.float32)
    out = io.BytesIO()
    soundfile.write(out, np.concatenate([noise[0], pause, noise[1], pause, noise[2]]), 16_000, format="WAV")
    found = transcribe(server[1], out.getvalue(), **{"include[]": "frames"}).json()
    starts = [entry["start"] for entry in found["frames"]]
    assert starts == sorted(starts) and starts[0] == 0.0 and len(set(starts)) == len(starts)
    frames = sum(len(entry["tokens"]) / entry["rate"] for entry in found["frames"])
    assert frames == pytest.approx(found["duration"], abs=0.1 * len(starts))


def test_a_chat_has_the_frames_of_each_audio_and_the_words_of_its_answer(server, model):
    url, clips = server[1], [wav(0.8, 1), wav(1.2, 2)]
    found = chat(url, clips, include=["frames"]).json()
    assert len(found["frames"]) == 2 and "words" not in found
    check(model, found["frames"][0], clips[0])
    check(model, found["frames"][1], clips[1])
    found = chat(url, clips[:1], include=["words"]).json()
    words = align(model, [samples_of(clips[0])], [found["choices"][0]["message"]["content"]])[0].words
    assert [word["word"] for word in found["words"]] == [
        word.text for word in words
    ] and "frames" not in found


def test_a_stream_has_them_in_its_last_chunk(server, model):
    clip = wav(0.9, 3)
    text = chat(server[1], [clip], include=["frames", "words"], stream=True).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    *first, last = events
    assert last["choices"][0]["finish_reason"] and {"frames", "words"} <= last.keys()
    assert not any("frames" in event for event in first)
    check(model, last["frames"][0], clip)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"include[]": "logprobs"}, "include is frames, not 'logprobs'"),
        ({"include[]": "frames", "response_format": "json"}, "include needs response_format=verbose_json"),
    ],
)
def test_other_values_are_refused(server, fields, message):
    found = transcribe(server[1], wav(0.5), **fields)
    assert found.status_code == 400 and found.json()["error"]["message"] == message


def test_words_of_several_audios_are_refused(server):
    found = chat(server[1], [wav(0.5), wav(0.5)], include=["words"])
    assert found.status_code == 400 and "needs one audio, not 2" in found.json()["error"]["message"]
    assert chat(server[1], [wav(0.5)], include=["pictures"]).status_code == 400


def test_the_model_s_description_names_its_parts(server, model):
    known = httpx2.get(f"{server[1]}/v1/models/tiny").json()
    assert known["stage"] == model.stage and known["llm"] == "llm" and known["encoder"] == "whisper"
    assert known["max_seconds"] == model.config.encoder.max_seconds
