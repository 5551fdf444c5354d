"""Predictions: what batching, interruption and several ranks must not change."""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import socket

import numpy as np
import pytest
import soundfile
import torch

from core.distributed import disconnect, hard_exit
from data_tools.shards import ShardIndex
from evaluation import run
from evaluation.predictions import PredictionError, PredictionFile, read_rows
from model import artifact
from model.batch import Batch
from model.generation.joint import JointSearch
from model.prompt import chat_ids, messages_of, prompt_of
from stream.reader import decode
from tests.evaluation.conftest import record, write_folder


def alone(model, waveform, messages) -> Batch:
    """A batch of one clip, built without the stream."""
    ids = chat_ids(model.tokenizer, messages, "chat")[0] if messages else []
    empty = torch.zeros(1, 0, dtype=torch.long)
    ids = torch.tensor([ids], dtype=torch.long)
    return Batch(
        waveforms=waveform[None],
        features=None,
        audio_lengths=torch.tensor([len(waveform)]),
        audio_is_dummy=False,
        ctc_targets=empty,
        ctc_target_lengths=torch.tensor([0]),
        has_transcript=torch.tensor([False]),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.full_like(ids, -100),
        ids=["x"],
    )


def expected(path, shards, task, generate, joint=None) -> dict[str, str]:
    """The answers to each readable clip of a task, one at a time."""
    model, index, answers = artifact.load(path), ShardIndex.load(shards), {}
    for row in range(len(index)):
        audio, sample = index.read(row)
        if sample["task"] != task or sample["id"] == "asr-7":
            continue
        batch = alone(model, decode(audio), prompt_of(messages_of(sample)) if generate else None)
        if generate:
            tokens = model.generate(batch, max_new_tokens=6, joint=joint)[0]
            answers[sample["id"]] = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        else:
            answers[sample["id"]] = model.ctc_greedy(batch)[0]
    return answers


def command(path, shards, out, *more) -> list[str]:
    return [
        "--model",
        str(path),
        "--shards",
        str(shards),
        "--out",
        str(out),
        "--workers",
        "0",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        *more,
    ]


def predictions(out) -> dict[str, str]:
    return {row["id"]: row["prediction"] for row in read_rows(out)}


def test_stage_one_reads_ctc(folders, packed, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    assert run.main(command(folders / "alignment", packed, out, "--batch-seconds", "3")) == 0
    wanted = expected(folders / "alignment", packed, "asr", generate=False)
    assert len(wanted) == 7 and any(wanted.values())
    assert predictions(out) == wanted
    assert "WER" in capsys.readouterr().out
    row = read_rows(out)[1]
    assert (
        row["reference"] == "words of clip 1" and 0 < row["kept"] <= row["frames"] == 33
    )  # 1.3 s: 65 encoder frames, by twos
    scores = json.loads(out.with_suffix(".scores.json").read_text())
    assert scores["rejected"] == 1 and scores["tasks"]["asr"]["utterances"] == 7
    assert [r["id"] for r in read_rows(out.with_suffix(".rejected.jsonl"))] == ["asr-7"]


def test_several_folders_are_scored_each_by_itself(folders, packed, tmp_path, capsys):
    copies = [tmp_path / "shards" / name for name in ("first", "second")]
    for copy in copies:
        shutil.copytree(packed, copy)
    more = ["--shards", *map(str, copies), "--task", "asr", "translation", "--decode", "greedy"]
    assert run.main(command(folders / "shrinking", packed, tmp_path / "out", *more)) == 0
    one = tmp_path / "one.jsonl"
    assert run.main(command(folders / "shrinking", packed, one, "--task", "asr", "translation")) == 0
    for name in ("first", "second"):
        assert predictions(tmp_path / "out" / f"{name}-asr-translation-greedy.jsonl") == predictions(one)
    capsys.readouterr()
    assert run.main(command(folders / "shrinking", packed, one, *more)) == 2
    assert "name a folder" in capsys.readouterr().err
    assert (
        run.main(
            command(folders / "shrinking", packed, tmp_path / "out", *more[:3], "--task", "asr", "emotion")
        )
        == 2
    )
    assert "no task 'emotion': give --task asr or text" in capsys.readouterr().err


def test_predictions_of_the_former_decode_name_are_resumed(folders, packed, tmp_path, capsys):
    """`generate` was the name of `greedy`: as an option, in NAME.run.json and in file names."""
    out = tmp_path / "out"
    more = ["--shards", str(packed), str(shutil.copytree(packed, tmp_path / "second"))]
    assert run.main(command(folders / "shrinking", packed, out, *more, "--decode", "generate")) == 0
    name = f"{packed.name}-asr-greedy"
    first, settings = out / f"{name}.jsonl", json.loads((out / f"{name}.run.json").read_text())
    assert settings["decode"] == "greedy"
    rows = read_rows(first)
    # A folder of an earlier version, interrupted after three rows.
    for file in out.glob("*-greedy.*"):
        file.rename(file.with_name(file.name.replace("-greedy.", "-generate.")))
    former = out / f"{packed.name}-asr-generate.jsonl"
    former.with_suffix(".run.json").write_text(json.dumps(settings | {"decode": "generate"}))
    marked = [row | {"raw": "of the first run"} for row in rows[:3]]
    former.write_text("".join(json.dumps(row) + "\n" for row in marked))
    assert run.main(command(folders / "shrinking", packed, out, *more, "--decode", "greedy")) == 0
    resumed = read_rows(former)
    assert [row["prediction"] for row in resumed] == [row["prediction"] for row in rows]
    assert sum(row["raw"] == "of the first run" for row in resumed) == 3 and not first.exists()
    assert json.loads(former.with_suffix(".scores.json").read_text())["utterances"] == len(rows)
    capsys.readouterr()
    assert run.main(command(folders / "shrinking", packed, former, "--decode", "ctc")) == 2
    assert "decode was 'greedy', is 'ctc'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--help"])
    assert "generate" not in capsys.readouterr().out


def test_stage_two_generates(folders, packed, tmp_path):
    out = tmp_path / "p.jsonl"
    assert run.main(command(folders / "shrinking", packed, out, "--task", "all", "--batch-seconds", "3")) == 0
    got = predictions(out)
    wanted = expected(folders / "shrinking", packed, "asr", generate=True)
    wanted |= expected(folders / "shrinking", packed, "translation", generate=True)
    assert {key: got[key] for key in wanted} == wanted and len(set(wanted.values())) > 1
    scores = json.loads(out.with_suffix(".scores.json").read_text())["tasks"]
    assert {row["id"]: row.get("transcript") for row in read_rows(out) if row["task"] == "translation"} == {
        f"translation-{i}": f"words of clip {i}" for i in (8, 9)
    }
    assert set(scores) == {"asr", "text", "translation"} and scores["text"]["metric"] == "accuracy"
    assert all(row["tokens"] <= 6 for row in read_rows(out))


def test_stage_two_writes_transcripts_together_with_ctc(folders, packed, tmp_path, capsys):
    """Each as alone; stored under what the search depends on."""
    out = tmp_path / "p.jsonl"
    joint = command(
        folders / "shrinking", packed, out, "--decode", "joint", "--batch-seconds", "3", "--ctc-weight"
    )
    assert run.main([*joint, "2.0", "--beams", "2"]) == 0
    got = predictions(out)
    assert (
        got == expected(folders / "shrinking", packed, "asr", generate=True, joint=JointSearch(2.0, 2))
        and len(got) == 7
    )
    assert got != expected(folders / "shrinking", packed, "asr", generate=True)
    capsys.readouterr()
    assert run.main([*joint, "1.0", "--beams", "2"]) == 2
    assert "--restart" in capsys.readouterr().err
    for more, message in (
        (["--sample"], "without --sample"),
        (["--task", "asr", "translation"], "with --task asr alone"),
    ):
        with pytest.raises(SystemExit):
            run.main([*joint, "2.0", *more])
        assert message in capsys.readouterr().err


def test_drafted_answers_are_those_of_greedy_decoding(folders, packed, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    drafted = command(folders / "shrinking", packed, out, "--decode", "drafted", "--batch-seconds", "3")
    assert run.main(drafted) == 0
    assert predictions(out) == expected(folders / "shrinking", packed, "asr", generate=True)
    assert all(1 <= row["passes"] <= row["tokens"] + 1 for row in read_rows(out))
    assert run.main([*drafted, "--draft-ratio", "0.5"]) == 2, "answers of another ratio are others"
    capsys.readouterr()
    for more, message in (
        (["--sample"], "without --sample"),
        (["--draft-ratio", "0"], "must be in (0, 1]"),
        (["--draft-tokens", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            run.main([*drafted, *more])
        assert message in capsys.readouterr().err


def test_ctc_of_a_later_stage_scores_transcripts(folders, packed, tmp_path):
    out = tmp_path / "p.jsonl"
    assert (
        run.main(command(folders / "shrinking", packed, out, "--task", "translation", "--decode", "ctc")) == 0
    )
    assert {(row["task"], row["reference"]) for row in read_rows(out)} == {
        ("asr", "words of clip 8"),
        ("asr", "words of clip 9"),
    }
    loaded, decode = run.load(
        argparse.Namespace(untrained=None, model=folders / "shrinking", decode="ctc"), "cpu"
    )
    assert loaded.llm is None and decode == "ctc", "the LLM is not read for it"
    whole = expected(folders / "shrinking", packed, "translation", generate=False)
    assert predictions(out) == whole and any(whole.values())


def test_interrupted_run_resumes(folders, packed, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    more = ("--batch-seconds", "2.5")
    assert run.main(command(folders / "alignment", packed, whole, *more)) == 0
    append, calls = PredictionFile.append, []

    def killed(self, rows, rejected=()):
        if len(calls) == 2:
            with self.part.open("a") as part:
                part.write('{"id": "asr-')  # a write that was cut
            raise KeyboardInterrupt
        calls.append(rows)
        append(self, rows, rejected)

    monkeypatch.setattr(PredictionFile, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        run.main(command(folders / "alignment", packed, out, *more))
    done = sum(map(len, calls))
    assert 0 < done < 7
    again = []

    def counted(self, rows, rejected=()):
        again.extend(rows)
        append(self, rows, rejected)

    monkeypatch.setattr(PredictionFile, "append", counted)
    assert run.main(command(folders / "alignment", packed, out, *more)) == 0
    assert len(again) == 7 - done and predictions(out) == predictions(whole)
    assert not list(tmp_path.glob("*.rank-*"))


def test_what_the_encoder_cannot_take_is_rejected_and_the_rest_answered(folders, packed, tmp_path, capsys):
    model, out = shutil.copytree(folders / "alignment", tmp_path / "model"), tmp_path / "p.jsonl"
    written = json.loads((model / "soundwave.json").read_text())
    for seconds, answered, code in ((1.25, 5, 0), (0.01, 0, 2)):
        written["config"]["encoder"]["max_seconds"] = seconds
        (model / "soundwave.json").write_text(json.dumps(written))
        assert run.main(command(model, packed, out, "--restart")) == code
        rejected = {row["id"]: row["why"] for row in read_rows(out.with_suffix(".rejected.jsonl"))}
        assert len(read_rows(out)) == answered and len(rejected) == 8 - answered
        assert f"longer than model.encoder.max_seconds = {seconds:g}" in rejected.values()
    assert "holds no predictions" in capsys.readouterr().err


def test_a_predictions_file_survives_a_cut_character_and_tells_corpora_apart(tmp_path):
    file = PredictionFile(tmp_path / "p.jsonl", {})
    file.prepare()
    file.append([{"id": "0", "corpus": "en"}], [{"id": "1", "corpus": "de", "why": "unreadable"}])
    with file.part.open("ab") as part:
        part.write('{"id": "2", "prediction": "你'.encode()[:-1])
    assert file.done() == {"en/0"}
    file.append([{"id": "0", "corpus": "de"}])
    assert file.done() == {"en/0", "de/0"} and len(file.merge()) == 2
    assert [row["id"] for row in read_rows(tmp_path / "p.rejected.jsonl")] == ["1"]
    file.append([{"id": "1", "corpus": "de"}])  # readable by now
    assert len(file.merge()) == 3 and not (tmp_path / "p.rejected.jsonl").exists()
    file.part.write_text('{"id": "5"}')  # all of it but the line's end: it counts, now and later
    file.append([{"id": "6"}])
    assert {"/5", "/6"} <= file.done() and len(file.merge()) == 5


def test_refuses_predictions_without_settings(tmp_path):
    file = PredictionFile(tmp_path / "p.jsonl", {"model": "b"})
    file.path.write_text('{"id": "0"}\n')
    with pytest.raises(PredictionError, match="p.jsonl is there, but not p.run.json"):
        file.prepare()
    PredictionFile(file.path, {"model": "b"}, restart=True).prepare()
    assert not file.done()


def test_a_job_that_is_requeued_begins_anew_once(tmp_path, monkeypatch):
    asked = PredictionFile(tmp_path / "p.jsonl", {"model": "a"}, restart=True)
    for job, left in (("7", 0), ("7", 1), ("8", 0), (None, 0)):  # requeued once; then another job, then none
        monkeypatch.setenv("SOUNDWAVE_JOB", job) if job else monkeypatch.delenv("SOUNDWAVE_JOB")
        asked.prepare()
        assert len(asked.done()) == left
        asked.append([{"id": "0"}])
    PredictionFile(asked.path, {"model": "a"}).prepare()
    assert len(asked.done()) == 1, "the job's number is no setting"


def test_other_settings_are_refused(folders, packed, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    assert run.main(command(folders / "alignment", packed, out, "--limit", "3")) == 0
    assert len(read_rows(out)) == 3
    assert run.main(command(folders / "alignment", packed, out, "--limit", "4")) == 2
    assert "limit was 3, is 4" in capsys.readouterr().err
    assert run.main(command(folders / "alignment", packed, out, "--limit", "4", "--restart")) == 0
    assert len(read_rows(out)) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "emotion"), "give --task asr or text or translation"),
        (("--decode", "greedy"), "stage 1, which has no LLM"),
        (("--decode", "joint"), "stage 1, which has no LLM"),
        (("--split", "nowhere"), "holds no index.json"),
    ],
)
def test_wrong_commands_are_one_line(folders, packed, tmp_path, capsys, more, message):
    assert run.main(command(folders / "alignment", packed, tmp_path / "p.jsonl", *more)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_untrained_is_the_score_before(parts, folders, packed, tmp_path, capsys):
    """Stage 1: fresh adapters under the seed. Stage 2: what stage 1 has learnt, and an LLM whose LoRA does
    nothing yet."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"stage: alignment\nseed: 2\nmodel:\n  attention_implementation: sdpa\n"
        f"  encoder: {{name: {parts / 'whisper'}}}\n  llm: {{name: {parts / 'llm'}, lora_r: 4}}\n"
    )
    arguments = command("", packed, tmp_path / "1.jsonl")[2:]
    assert run.main(["--untrained", str(recipe), *arguments]) == 0
    first = expected(folders / "alignment", packed, "asr", generate=False)  # built under seed 2 as well
    assert predictions(tmp_path / "1.jsonl") == first
    later = ["--untrained", str(recipe), "stage=shrinking", "seed=9", f"init_from={folders / 'alignment'}"]
    assert run.main([*later, *command("", packed, tmp_path / "2.jsonl")[2:], "--decode", "ctc"]) == 0
    assert predictions(tmp_path / "2.jsonl") == first
    assert run.main([*later, *command("", packed, tmp_path / "3.jsonl")[2:]]) == 0
    assert len(read_rows(tmp_path / "3.jsonl")) == 7 and read_rows(tmp_path / "3.jsonl")[0]["tokens"] > 0
    without = [
        "--untrained",
        str(recipe),
        "stage=shrinking",
        "init_from=fresh",
        "seed=2",
    ]  # no stage 1: its adapters are new
    assert run.main([*without, *command("", packed, tmp_path / "4.jsonl")[2:], "--decode", "ctc"]) == 0
    assert predictions(tmp_path / "4.jsonl") == first
    assert run.main(["--untrained", str(recipe), "stage=shrinking", f"output={tmp_path}", *arguments]) == 2
    assert "finish stage 1 first" in capsys.readouterr().err


def one_rank(rank: int, port: int, arguments: list[str]) -> None:
    """What torchrun gives a process, without a second import of everything."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = run.main(arguments)
    disconnect()
    hard_exit(code)


def test_two_ranks_share_and_merge(folders, packed, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run.main(command(folders / "alignment", packed, one)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = command(folders / "alignment", packed, two, "--batch-seconds", "2")
    ranks = [
        multiprocessing.get_context("fork").Process(target=one_rank, args=(rank, port, arguments))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert predictions(two) == predictions(one) and len(read_rows(two)) == 7
    assert json.loads(two.with_suffix(".scores.json").read_text())["rejected"] == 1


def test_what_is_noticed_about_packed_clips_is_reported(folders, tmp_path, capsys):
    """Inverted stereo, silence, clips longer than those of training."""
    wave = 0.3 * np.sin(np.arange(16000) / 10)
    clips = []
    for number, samples in enumerate((np.stack([wave, -wave], 1), np.zeros(16000), wave)):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 16000, format="FLAC")
        clips.append((record(number, 1.0), buffer.getvalue()))
    shards = write_folder(tmp_path / "odd", clips)
    out = tmp_path / "p.jsonl"
    assert run.main(command(folders / "shrinking", shards, out)) == 0
    rows = {row["id"]: row.get("findings") for row in read_rows(out)}
    assert "cancel out" in rows["asr-0"][0] and "-60 dB" in rows["asr-1"][0] and rows["asr-2"] is None
    assert "note: 2 clips may not be what they should be (asr-0: " in capsys.readouterr().out
    notes = run.clip_notes(
        [{"id": "1", "duration": 31.0}, {"id": "2", "duration": 30.2}, {"id": "3", "duration": None}], 30.0
    )
    assert len(notes) == 1 and notes[0].startswith("1 clips are longer than 30 s")
    assert run.clip_notes([{"id": "1", "duration": 99.0}], None) == []


def test_a_conversation_beyond_the_context_is_rejected_by_name(folders, packed, tmp_path, capsys):
    path, base = tmp_path / "model", tmp_path / "llm"
    shutil.copytree(folders / "shrinking", path)
    description = json.loads((path / "soundwave.json").read_text())
    shutil.copytree(description["config"]["llm"]["name"], base)
    lengths = {}
    model = artifact.load(path)
    index = ShardIndex.load(packed)
    for row in (0, 3):
        audio, sample = index.read(row)
        batch = alone(model, decode(audio), prompt_of(messages_of(sample)))
        lengths[sample["id"]] = int(model.embeddings(batch, model.encode_audio(batch))[1].sum())
    assert lengths["asr-3"] > lengths["asr-0"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": lengths["asr-3"]}))
    description["config"]["llm"]["name"] = str(base)
    del description["settings"]  # which name the LLM's context
    (path / "soundwave.json").write_text(json.dumps(description))
    out = tmp_path / "p.jsonl"
    assert run.main(command(path, packed, out)) == 0
    rejected = {row["id"]: row["why"] for row in read_rows(out.with_suffix(".rejected.jsonl"))}
    assert (
        "the LLM's context has" in rejected["asr-3"]
        and "asr-0" in predictions(out)
        and "asr-3" not in predictions(out)
    )
