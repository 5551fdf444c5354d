"""`python -m soundwave.transcribe`: what goes where, formats, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from core.console import printable
from soundwave import transcribe
from tests.soundwave.conftest import wave


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.wav", tmp_path / "two.flac"]
    soundfile.write(paths[0], wave(1.9, 1), 16000)
    soundfile.write(paths[1], np.stack([wave(0.8, 2)] * 2, axis=1), 16000)
    return paths


def run(folders, *more) -> int:
    return transcribe.main(
        [str(folders / "shrinking"), "--device", "cpu", "--max-new-tokens", "6", *map(str, more)]
    )


def test_text_goes_to_standard_output(folders, files, speaker, capsys):
    wanted = [printable(speaker.transcribe(file, max_new_tokens=6).text) for file in files]
    assert run(folders, files[0]) == 0
    assert capsys.readouterr().out == wanted[0] + "\n"
    assert run(folders, *files, "--quiet") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{f}\t{text}" for f, text in zip(files, wanted, strict=False)
    ]


def test_each_format_is_a_file_of_its_own(folders, files, speaker, tmp_path, capsys):
    out = tmp_path / "out"
    for format, name in (
        ("json", "json"),
        ("srt", "srt"),
        ("vtt", "vtt"),
        ("ctm", "ctm"),
        ("textgrid", "TextGrid"),
    ):
        assert run(folders, *files, "--out", out, "--format", format, "--decode", "ctc") == 0
        for file in files:
            assert (out / f"{file.stem}.{name}").stat().st_size > 0
    found = json.loads((out / "one.json").read_text())
    wanted = speaker.transcribe(files[0], decode="ctc")
    assert found["text"] == wanted.text and found["duration"] == 1.9 and found["language"] is None
    assert [row["text"] for row in found["segments"]] == [s.text for s in wanted.segments]
    assert not capsys.readouterr().out
    assert (out / "one.ctm").read_text().split()[:2] == ["one", "1"]


def test_a_bad_file_is_named_and_the_others_are_transcribed(folders, files, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    assert run(folders, bad, files[0], "--quiet") == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{files[0]}\t") and f"error: {bad}: " in err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--format", "srt"], "give --out DIR"),
        (["--hotwords", "none.txt"], "there is no such file"),
        (["--hotwords", " , "], "holds no words"),
        (["--hotwords", "/"], "is a folder"),
        (["--hotwords", "lists/words"], "there is no such file"),
        (["--out", __file__], "is a file; give a folder"),
        (["--device", "gpu0"], "device gpu0 cannot be used"),
        (["--device", "cuda:77"], "device cuda:77 cannot be used"),
        (["--hotwords", "a,b", "--decode", "ctc"], "give decode='joint'"),
        (["--window-seconds", "1000"], "more than this model takes"),
        (["--gate", "nan"], "gate is nan"),
    ],
)
def test_what_cannot_be_done_is_one_line(folders, files, capsys, more, words):
    assert run(folders, *files, *more) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert not out and len(errors) == 1 and words in errors[0]


def test_hotwords_without_an_llm_are_refused(folders, files, capsys):
    for more in ([], ["--hotwords-in-prompt"]):
        command = [str(folders / "alignment"), str(files[0]), "--hotwords", "a,b", *more, "--device", "cpu"]
        assert transcribe.main(command) == 2
        out, err = capsys.readouterr()
        assert not out and "error: hotwords need the LLM" in err


def test_a_recording_without_speech_is_noted(folders, tmp_path, capsys):
    soundfile.write(tmp_path / "short.wav", np.zeros(800), 16000)
    assert run(folders, tmp_path / "short.wav", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == "\n" and f"warning: {tmp_path / 'short.wav'}: no speech was found" in err


def test_two_files_of_one_name_are_refused(folders, files, tmp_path, capsys):
    twin = tmp_path / "other" / "one.wav"
    twin.parent.mkdir()
    soundfile.write(twin, wave(0.5), 16000)
    assert run(folders, files[0], twin, "--out", tmp_path / "out") == 2
    assert "would both be written to" in capsys.readouterr().err


def test_hotwords_are_a_list_or_the_lines_of_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Ann Lee\n\n Bob \n", encoding="utf-8")
    assert transcribe.hotwords_of(str(path)) == ["Ann Lee", "Bob"]
    assert transcribe.hotwords_of("Ann Lee, Bob") == ["Ann Lee", "Bob"]
