"""`evaluation.align`: word times for a corpus, clips of recordings that pack takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from data_tools import pack
from data_tools.shards import ShardIndex
from evaluation import align
from tests.evaluation.conftest import sound

TEXT = "The wall — isn't “here”, is it?"


@pytest.fixture
def corpus(tmp_path):
    """A manifest of two clips, a segment, and four samples that cannot be aligned."""
    (tmp_path / "one.flac").write_bytes(sound(3.0, 1))
    (tmp_path / "two.flac").write_bytes(sound(4.0, 2))
    rows = [
        {"id": "one", "audio": "one.flac", "text": TEXT, "lang": "en", "speaker": "s1"},
        {"id": "two", "audio": "two.flac", "text": "你好，世界", "lang": "zh"},
        {"id": "part", "audio": "two.flac", "text": "part", "lang": "en", "offset": 1.5, "duration": 1.0},
        {"id": "silent", "audio": "one.flac", "text": ""},
        {"id": "gone", "audio": "gone.flac", "text": "gone"},
        {"id": "long", "audio": "one.flac", "text": "too many words " * 40},
        {"id": "texts", "text": "no audio"},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_words_are_added_and_what_fails_is_named(folders, corpus, tmp_path, capsys):
    out = tmp_path / "new" / "timed.jsonl"
    model = str(folders / "alignment")
    assert align.main([model, "--corpus", f"manifest:{corpus}", "--out", str(out), "--device", "cpu"]) == 0
    rows = {row["id"]: row for row in lines(out)}
    assert list(rows) == ["one", "two", "part"]
    assert rows["one"]["speaker"] == "s1" and rows["one"]["text"] == TEXT
    assert [word["text"] for word in rows["one"]["words"]] == [
        "The",
        "wall —",
        "isn't",
        "“here”,",
        "is",
        "it?",
    ]
    assert [word["text"] for word in rows["two"]["words"]] == ["你", "好，", "世", "界"]
    for row, seconds in (("one", 3.0), ("two", 4.0), ("part", 1.0)):
        times = [time for word in rows[row]["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= seconds
        assert all(0 <= word["confidence"] <= 1 for word in rows[row]["words"])
    rejected = {row["id"]: row["reason"] for row in lines(tmp_path / "new" / "timed.jsonl.rejected.jsonl")}
    assert rejected == {
        "silent": "no_text",
        "gone": "missing_file",
        "long": "not_aligned",
        "texts": "no_audio",
    }
    assert "3 samples; 4 rejected" in capsys.readouterr().out


def test_recordings_become_clips_that_pack_takes(folders, tmp_path, monkeypatch):
    """Known word times in place of the model's: offsets, texts and packed audio are those of the clips."""
    samples = (np.arange(12 * 16000) % 30000 - 15000).astype(np.int16)
    soundfile.write(tmp_path / "rec.wav", samples, 16000)
    text = "One, two! (three)   “four” - five —"
    times = [(1.0, 1.5), (1.6, 2.4), (5.0, 6.0), (6.1, 7.0), (10.0, 11.0)]
    words = [
        align.Word(word, start, end, 0.5)
        for word, (start, end) in zip(["One,", "two!", "(three)", "“four” -", "five —"], times)
    ]
    row = {"id": "rec", "audio": "rec.wav", "text": text, "lang": "en"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(align, "align", lambda *_: [align.Aligned(words, -1.0)])
    out = tmp_path / "clips.jsonl"
    arguments = [
        str(folders / "alignment"),
        "--corpus",
        f"manifest:{tmp_path / 'm.jsonl'}",
        "--out",
        str(out),
    ]
    options = ["--segment", "--max-seconds", "4", "--min-seconds", "0.5", "--subtitles", "srt"]
    assert align.main([*arguments, *options, "--device", "cpu"]) == 0
    rows = lines(out)
    assert [(r["id"], r["text"], r["offset"], r["duration"]) for r in rows] == [
        ("rec-00000", "One, two!", 0.75, 1.9),
        ("rec-00001", "(three) “four” -", 4.75, 2.5),
        ("rec-00002", "five —", 9.75, 1.5),
    ]
    assert rows[1]["words"][0] == {"text": "(three)", "start": 0.25, "end": 1.25, "confidence": 0.5}
    assert not (tmp_path / "clips.jsonl.rejected.jsonl").exists()
    assert "One, two!" in (tmp_path / "clips.subtitles" / "rec.srt").read_text(encoding="utf-8")

    packed = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(out), "--out", str(packed), "--workers", "1", "--codec", "wav16"]) == 0
    )
    index = ShardIndex.load(packed)
    found = {}
    for number in range(len(index)):
        audio, sample = index.read(number)
        (tmp_path / "clip.wav").write_bytes(audio)
        found[sample["text"]] = soundfile.read(tmp_path / "clip.wav", dtype="int16")[0]
    assert set(found) == {r["text"] for r in rows}
    assert np.array_equal(found["five —"], samples[int(9.75 * 16000) : int(11.25 * 16000)])


def test_clips_of_low_confidence_are_rejected(folders, corpus, tmp_path):
    out = tmp_path / "clips.jsonl"
    arguments = [str(folders / "alignment"), "--corpus", f"manifest:{corpus}", "--out", str(out)]
    assert align.main([*arguments, "--segment", "--min-confidence", "0.99", "--device", "cpu"]) == 0
    assert lines(out) == []
    reasons = {row["id"]: row["reason"] for row in lines(tmp_path / "clips.jsonl.rejected.jsonl")}
    assert reasons["one-00000"] == "confidence" and reasons["long"] == "not_aligned"


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["{model}", "--corpus", "manifest:{tmp}/none.jsonl", "--out", "{tmp}/o.jsonl"], 2, "none.jsonl"),
        (["{tmp}/nowhere", "--corpus", "manifest:{corpus}", "--out", "{tmp}/o.jsonl"], 2, "nowhere"),
        (["{model}", "--corpus", "manifest:{corpus}", "--out", "{corpus}/x/o.jsonl"], 1, "cannot write"),
    ],
)
def test_bad_input_is_one_line(folders, corpus, tmp_path, capsys, arguments, code, message):
    places = {"model": folders / "alignment", "tmp": tmp_path, "corpus": corpus}
    assert align.main([a.format(**places) for a in [*arguments, "--device", "cpu"]]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("options", [["--pause", "-1"], ["--min-seconds", "40"], ["--subtitles", "doc"]])
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        align.parse(["model", "--corpus", "manifest:m.jsonl", "--out", "o.jsonl", *options])
    assert stop.value.code == 2
