"""Sound files in, one line each out."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from core.console import printable
from data_tools.shards import ShardIndex
from evaluation import answer
from model import artifact
from model.generation.joint import JointSearch
from model.prompt import INSTRUCTIONS
from stream.reader import decode
from tests.evaluation.test_run import expected


@pytest.fixture
def files(packed, tmp_path):
    """Two packed clips as files: FLAC as packed, and WAV in stereo."""
    index = ShardIndex.load(packed)
    first, second = tmp_path / "0.flac", tmp_path / "1.wav"
    first.write_bytes(index.read(0)[0])
    soundfile.write(second, np.stack([decode(index.read(1)[0]).numpy()] * 2, axis=1), 16000)
    return [first, second]


def answers(capsys) -> dict[str, str]:
    return dict(line.split("\t") for line in capsys.readouterr().out.splitlines())


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    "stage, how",
    [
        ("alignment", None),
        ("shrinking", None),
        ("shrinking", "joint"),
        ("shrinking", "drafted"),
        ("shrinking", "ctc"),
    ],
)
def test_files_are_answered_as_shards_are(folders, packed, files, capsys, stage, how):
    more = ["--decode", how] if how else []
    assert (
        answer.main(
            [str(folders / stage), *map(str, files), "--max-new-tokens", "6", "--device", "cpu", *more]
        )
        == 0
    )
    joint = JointSearch() if how == "joint" else None
    wanted = expected(
        folders / stage, packed, "asr", generate=stage == "shrinking" and how != "ctc", joint=joint
    )
    assert answers(capsys) == {
        str(file): printable(one_line(wanted[f"asr-{i}"])) for i, file in enumerate(files)
    }


def test_a_prompt_follows_the_audio(folders, files, capsys):
    model = artifact.load(folders / "shrinking")
    waveform = decode(files[0].read_bytes())
    said = [
        model.answer(
            [[{"role": "user", "content": f"<audio_patch>\n{prompt}"}]], [waveform], max_new_tokens=6
        )[0]
        for prompt in ("How many?", INSTRUCTIONS["asr"])
    ]
    assert said[0] != said[1]
    command = [
        str(folders / "shrinking"),
        str(files[0]),
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        "--prompt",
        "How many?",
    ]
    assert answer.main(command) == 0
    assert answers(capsys) == {str(files[0]): printable(one_line(said[0]))}


def test_a_file_that_is_no_use_costs_its_own_line(folders, files, tmp_path, capsys):
    text, empty, long, windows = (tmp_path / name for name in ("a.txt", "b.wav", "c.flac", "d.flac"))
    text.write_text("no sound")
    soundfile.write(empty, [], 16000)
    soundfile.write(long, np.zeros(301 * 8000), 8000)
    soundfile.write(windows, np.zeros(31 * 16000), 16000)  # beyond Whisper's 30 s: encoded in two windows
    bad = [tmp_path / "none.wav", text, empty, long]
    assert (
        answer.main([str(folders / "alignment"), *map(str, [*bad, windows, files[0]]), "--device", "cpu"])
        == 2
    )
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(windows), str(files[0])]
    wanted = [
        "does not exist",
        "Format not recognised",
        "holds no samples",
        "lasts 301 s, this model takes 300 s at most",
    ]
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 4
    for line, file, words in zip(lines, bad, wanted, strict=True):
        assert line.startswith(f"error: {file}: ") and words in line


def test_what_is_noticed_about_a_file_is_a_warning(folders, files, tmp_path, capsys):
    cut, opposite = tmp_path / "cut.wav", tmp_path / "opposite.wav"
    wave, rate = soundfile.read(files[0])
    soundfile.write(opposite, np.stack([wave, -wave], 1), rate)
    soundfile.write(cut, wave, rate)
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) * 3 // 4])
    assert answer.main([str(folders / "alignment"), str(cut), str(opposite), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(cut), str(opposite)]
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert (
        len(warnings) == 2
        and "declares" in warnings[0]
        and "(cut)" in warnings[0]
        and "(antiphase)" in warnings[1]
    )


def test_a_file_longer_than_any_in_training_or_than_the_context_is_said(folders, files, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(folders / "shrinking", path)
    description = json.loads((path / "soundwave.json").read_text())
    (path / "soundwave.json").write_text(json.dumps(description | {"recipe": {"data": {"max_seconds": 1.0}}}))
    command = [str(path), *map(str, files), "--max-new-tokens", "4", "--device", "cpu"]
    assert answer.main(command) == 0
    out, err = capsys.readouterr()
    assert (
        f"warning: {files[1]}: lasts 1.3 s, the model was trained on clips of at most 1 s" in err
        and str(files[0]) not in err
    )
    base = tmp_path / "llm"
    shutil.copytree(description["config"]["llm"]["name"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    description["config"]["llm"]["name"] = str(base)
    del description["settings"]  # which name the LLM's context
    (path / "soundwave.json").write_text(json.dumps(description))
    assert answer.main(command) == 2
    out, err = capsys.readouterr()
    assert not out and f"error: {files[0]}: conversation 0 takes" in err and "the LLM's context has 40" in err


@pytest.mark.parametrize(
    "stage, more, words",
    [
        ("alignment", ["--decode", "greedy"], "of stage 1, which has no LLM: use --decode ctc"),
        ("alignment", ["--decode", "generate"], "of stage 1, which has no LLM"),  # its former name
        ("alignment", ["--prompt", "Why?"], "which has no LLM to ask"),
        ("shrinking", ["--prompt", "<audio_patch> twice?"], "--prompt holds <audio_patch>"),
        ("nowhere", [], "is not a model folder"),
    ],
)
def test_what_cannot_be_asked(folders, files, capsys, stage, more, words):
    assert answer.main([str(folders / stage), str(files[0]), "--device", "cpu", *more]) == 2
    out, err = capsys.readouterr()
    assert not out and words in err


def test_a_transcript_takes_no_prompt(folders, files, capsys):
    with pytest.raises(SystemExit):
        answer.main([str(folders / "shrinking"), str(files[0]), "--decode", "joint", "--prompt", "Why?"])
    assert "--decode joint writes transcripts: without --prompt" in capsys.readouterr().err
