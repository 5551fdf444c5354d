"""Packing: what plain tar and webdataset read, one named reject per fault, and the same bytes whatever the
workers."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import webdataset

from core import decoders
from data_tools import pack
from data_tools.corpora import Entry
from data_tools.packing import Packing
from data_tools.shards import SAMPLE_DTYPE, ShardIndex, id_hash
from tests.data_tools.conftest import REASONS, tone

ROOT = Path(__file__).resolve().parents[2]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_tar_and_webdataset_read_the_shards(corpus, tmp_path):
    out = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.1"]) == 0
    )
    shards = sorted(out.glob("packed-*.tar"))
    assert len(shards) > 1
    listed = subprocess.run(
        ["tar", "tf", shards[0]], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed and all(name.endswith((".flac", ".json")) for name in listed)
    samples = list(
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=False, empty_check=False)
    )
    records = {json.loads(sample["json"])["id"]: (sample, json.loads(sample["json"])) for sample in samples}
    assert set(records) == {f"spk.{number}/é" for number in range(11)} | {"stereo", "text"}
    for sample, record in records.values():
        if record["id"] == "text":
            assert "flac" not in sample and record["task"] == "text" and record["response"] == "Hello."
            continue
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
        assert (
            rate == record["sample_rate"] == 16000
            and wave.ndim == 1
            and abs(len(wave) / rate - record["duration"]) < 1e-6
        )
        assert record["task"] == "asr" and record["corpus"] == "manifest"
    assert records["stereo"][1]["duration"] == 0.5
    exact, _ = soundfile.read(corpus.parent / "clip 0.wav", dtype="int16")
    kept, _ = soundfile.read(io.BytesIO(records["spk.0/é"][0]["flac"]), dtype="int16")
    assert np.array_equal(exact, kept), "16 kHz 16-bit mono must be kept bit by bit"


def test_resampled_tone_keeps_its_pitch_and_level(corpus, tmp_path):
    out = tmp_path / "packed"
    pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1"])
    index = ShardIndex.load(out)
    for row in range(len(index)):
        audio, record = index.read(row)
        if not record["id"].startswith("spk."):
            continue
        number = int(record["id"].split(".")[1].split("/")[0])
        wave, rate = soundfile.read(io.BytesIO(audio))
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
        assert abs(spectrum.argmax() * rate / len(wave) - (200 + 50 * number)) < 2 * rate / len(wave)
        assert abs(np.sqrt(2 * np.mean(wave**2)) - 0.3) < 0.02


def test_every_fault_is_one_named_line(corpus, tmp_path, capsys):
    out = tmp_path / "packed"
    pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "2"])
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == REASONS and len(lines) == len(REASONS)
    assert "13 samples" in capsys.readouterr().out
    assert json.loads((out / "index.json").read_text())["rejected"]["zero_length"] == 3


def test_index_points_at_the_members(corpus, tmp_path):
    out = tmp_path / "packed"
    pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.1"])
    index = ShardIndex.load(out)
    assert (
        index.samples.dtype == SAMPLE_DTYPE
        and len(index) == 13
        and index.tasks == ["asr", "text"]
        and index.codecs == ["", "flac"]
    )
    members = {}
    for number, shard in enumerate(index.shards):
        with tarfile.open(out / shard["url"]) as tar:
            members.update({(number, member.offset_data): tar.extractfile(member).read() for member in tar})
    for row, sample in enumerate(index.samples):
        audio, record = index.read(row)
        assert (
            members[sample["shard"], sample["json_offset"]] == json.dumps(record, ensure_ascii=False).encode()
        )
        assert (
            audio is None
            if sample["audio_size"] == 0
            else members[sample["shard"], sample["audio_offset"]] == audio
        )
        assert sample["id_hash"] == id_hash(record["corpus"], record["id"])
        assert (
            sample["characters"] == len(record["text"] or "")
            and abs(sample["duration"] - record["duration"]) < 1e-6
        )
    again = pickle.loads(pickle.dumps(index))
    assert again.read(3) == index.read(3)
    assert abs(index.hours - index.samples["duration"].sum() / 3600) < 1e-5


def test_same_bytes_whatever_the_workers_and_from_script_or_module(corpus, tmp_path):
    one, two = tmp_path / "one" / "packed", tmp_path / "two" / "packed"
    common = ["--manifest", str(corpus), "--shard-mb", "0.1"]
    for command in (
        [str(ROOT / "data_tools" / "pack.py"), *common, "--out", str(one), "--workers", "1"],
        ["-m", "data_tools.pack", *common, "--out", str(two), "--workers", "3"],
    ):
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
    assert folder_bytes(one) == folder_bytes(two)


def test_seed_changes_the_order_and_none_keeps_it(corpus, tmp_path):
    orders = {}
    for name, extra in {"seed0": [], "seed1": ["--seed", "1"], "none": ["--shuffle", "none"]}.items():
        pack.main(["--manifest", str(corpus), "--out", str(tmp_path / name), "--workers", "1", *extra])
        index = ShardIndex.load(tmp_path / name)
        orders[name] = [index.read(row)[1]["id"] for row in range(len(index))]
    assert orders["seed0"] != orders["seed1"] and sorted(orders["seed0"]) == sorted(orders["seed1"])
    assert orders["none"] == [f"spk.{number}/é" for number in range(11)] + ["stereo", "text"]


def test_nan_inside_a_turn_costs_that_line(corpus, tmp_path):
    turns = [
        {"role": "user", "content": "<audio_patch>"},
        {"role": "assistant", "content": "A bird.", "score": float("nan")},
    ]
    with open(corpus, "a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "turns", "audio": "clip 0.wav", "messages": turns}) + "\n")
    out = tmp_path / "packed"
    assert pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1"]) == 0
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == REASONS | {"turns": "bad_row"}


def test_a_row_that_a_shard_cannot_hold_does_not_end_its_worker(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    entries = [
        Entry(id=name, audio=str(tmp_path / "a.wav"), text="x", corpus="c", task="asr")
        for name in ("bad", "good")
    ]
    entries[0].messages = [{"role": "assistant", "content": "x", "score": float("inf")}]
    monkeypatch.setattr("data_tools.packing.shard_entries", lambda folder, shard: (0, entries))
    packing = Packing(tmp_path, "p")
    packing.summary_path(0).parent.mkdir(parents=True)
    assert packing.write_shard(0) == (2, 1)
    summary, ((line, _),) = packing.load(0)
    assert len(summary.rows) == 1 and (json.loads(line)["id"], json.loads(line)["reason"]) == (
        "bad",
        "bad_row",
    )


def test_too_long_is_found_before_decoding(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.flac", tone(3.0), 16000)
    soundfile.write(tmp_path / "long.wav", tone(3.0), 16000)
    soundfile.write(tmp_path / "good.flac", tone(0.5), 16000)
    rows = [{"id": name, "audio": name, "text": "x"} for name in ("long.flac", "long.wav", "good.flac")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decode, decoded = decoders._by_miniaudio, []

    def decoding(codec, source, stream, exact):
        decoded.append(len(source.data))
        return decode(codec, source, stream, exact)

    monkeypatch.setattr(decoders, "_by_miniaudio", decoding)
    monkeypatch.setattr(
        Packing, "run", lambda self, shards, hours, workers: [self.write_shard(shard) for shard in shards]
    )
    options = ["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out")]
    assert pack.main([*options, "--max-seconds", "2"]) == 0
    assert decoded == [(tmp_path / "good.flac").stat().st_size], "the long one is not decoded"
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["rejected"] == {"too_long": 2} and abs(index["rejected_hours"]["too_long"] - 6 / 3600) < 1e-5


def test_what_is_trained_on_without_an_instruction_is_said(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    turns = [{"role": "user", "content": "<audio_patch>"}, {"role": "assistant", "content": "x"}]
    rows = [{"task": task, "label": "x"} for task in ("emotion", "age", "sound", "chat", "accent")]
    rows += [
        {"text": "x"},
        {"task": "age", "label": "y", "prompt": "How old?"},
        {"task": "topic", "messages": turns},
    ]
    rows += [
        {"task": "keyword", "id": "0", "label": "x"},
        {"task": "text", "audio": None, "prompt": "a", "response": "b"},
    ]
    rows = [{"id": str(number), "audio": "a.wav"} | row for number, row in enumerate(rows)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    for last in (["--dry-run"], []):
        assert pack.main([*options, *last]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no instruction")]
        assert (
            "task accent, age have no prompt" in line
            and "prompt=..." in line
            and "data_tools.instruct" in line
        )
    assert (
        pack.main(["--corpus", f"shards:{tmp_path / 'out'},prompt=What?", "--out", str(tmp_path / "asked")])
        == 0
    )
    assert "no instruction" not in capsys.readouterr().out


def test_a_translation_keeps_its_language(tmp_path):
    from model.prompt import messages_of

    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    row = {
        "id": "a",
        "audio": "a.wav",
        "task": "translation",
        "text": "hi",
        "response": "hallo",
        "target_lang": "German",
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
    record = ShardIndex.load(tmp_path / "out").read(0)[1]
    assert record["target_lang"] == "German" and "into German" in messages_of(record)[0]["content"]


def test_languages_that_are_not_known_are_counted(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    languages = ["xx", "xx", "cn", "en_us", None]
    rows = [{"id": str(n), "audio": "a.wav", "text": "x", "lang": lang} for n, lang in enumerate(languages)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert "not known, samples of language 'xx' (2): scores" in capsys.readouterr().out
