"""Packing odd audio: true lengths, named refusals, what was noticed about clips, and the options that refuse
them."""

import json
import os
import subprocess

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from data_tools import annotate, pack, show, verify
from data_tools.shards import ShardIndex
from tests.core.sound import RATE, chirp, chunk, encoded, fmt, riff, vbr_mp3

SOUND = chirp(1.5)


def packed(folder, files: dict[str, bytes], *options: str, code: int = 0, rows: dict | None = None):
    """Pack files as a manifest; {id: record} of what was packed, {id: reason} of what was refused."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    lines = rows or {name: {"id": name, "audio": name, "text": "hello there"} for name in files}
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    out = folder / "out"
    assert (
        pack.main(["--manifest", str(folder / "m.jsonl"), "--out", str(out), "--workers", "1", *options])
        == code
    )
    refused = {
        line["id"]: line["reason"]
        for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    }
    if code:
        return {}, refused
    index = ShardIndex.load(out)
    return {index.read(row)[1]["id"]: index.read(row)[1] for row in range(len(index))}, refused


KINDS = {
    "fine.wav": encoded(SOUND, "WAV"),
    "silent.wav": encoded(0 * SOUND, "WAV"),
    "clipped.flac": encoded(np.clip(SOUND.astype(int) * 5, -32768, 32767).astype(np.int16)),
    "antiphase.wav": encoded(np.stack([SOUND, -SOUND], 1), "WAV"),
    "joined.ogg": encoded(SOUND, "OGG") + encoded(SOUND, "OGG"),
    "trailing.wav": riff(fmt(), chunk(b"data", SOUND.tobytes(), size=SOUND.nbytes // 2)),
}


@pytest.mark.parametrize("codec", ["flac", "copy"])
def test_what_is_noticed_is_counted_with_ids(tmp_path, capsys, codec):
    findings, refused = packed(tmp_path, KINDS, "--codec", codec)
    assert set(findings) == set(KINDS) and not refused
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    assert {(line["id"].partition(".")[0], line["finding"], line["corpus"]) for line in lines} == {
        (kind, kind, "m") for kind in ("silent", "clipped", "antiphase", "joined", "trailing")
    }
    index = json.loads((out / "index.json").read_bytes())
    assert index["findings"] == dict.fromkeys(["antiphase", "clipped", "joined", "silent", "trailing"], 1)
    output = capsys.readouterr().out
    assert "silent: silent.wav" in output and "findings.jsonl (--refuse KIND leaves them out)" in output
    assert findings["joined.ogg"]["duration"] == 3.0 and findings["trailing.wav"]["duration"] == 0.75
    assert verify.main([str(out), "--decode", "all", "--workers", "1"]) == 0
    assert show.main([str(out)]) == 0 and "silent" in capsys.readouterr().out


def test_what_is_noticed_can_be_refused(tmp_path):
    findings, refused = packed(tmp_path, KINDS, "--refuse", "silent,clipped,antiphase")
    assert refused == {"silent.wav": "silent", "clipped.flac": "clipped", "antiphase.wav": "antiphase"}
    assert set(findings) == {"fine.wav", "joined.ogg", "trailing.wav"}
    index = json.loads((tmp_path / "out" / "index.json").read_bytes())
    assert index["rejected"] == {"antiphase": 1, "clipped": 1, "silent": 1}
    assert index["findings"] == {"joined": 1, "trailing": 1}


def test_a_corpus_without_findings_has_no_list(tmp_path):
    packed(tmp_path, {"fine.wav": KINDS["fine.wav"]})
    assert not (tmp_path / "out" / "findings.jsonl").exists()
    assert json.loads((tmp_path / "out" / "index.json").read_bytes())["findings"] == {}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rate", "16"], "16 kHz is 16000"),
        (["--rate", "0"], "between 4,000 and 384,000"),
        (["--rate", "16000000"], "between"),
        (["--codec", "opus", "--rate", "22050"], "Opus has no 22,050 Hz"),
        (["--refuse", "loud"], "silent, clipped can be refused"),
        (["--refuse", "cut"], "can be refused"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), *options])
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_no_clip_ends_the_run_and_each_has_its_reason(tmp_path):
    wav = encoded(SOUND, "WAV")
    list_chunk = chunk(b"LIST", b"INFOISFT\0\0\0\0", size=0x1000_0000)
    bomb = bytearray(encoded(np.zeros((4096, 8), np.int16), rate=192_000))
    bomb[21], bomb[22:26] = bomb[21] & 0xF0, (1 << 30).to_bytes(4, "big")  # says 93 min of 8 channels
    files = {
        "whole.wav": wav,
        "unpadded.wav": riff(
            fmt(), chunk(b"LIST", b"INFOabc", padded=False), chunk(b"data", SOUND.tobytes())
        ),
        "size36.wav": riff(fmt(), chunk(b"data", SOUND.tobytes()), size=36),
        "list.wav": riff(fmt(), list_chunk, chunk(b"data", SOUND.tobytes())),
        "cut.wav": wav[:20_000],
        "cut.ogg": encoded(SOUND, "OGG")[:4000],
        "bomb.flac": bytes(bomb),
        "vbr.mp3": vbr_mp3(False)[1],
        "gsm.wav": encoded(SOUND[:16_000], "WAV", "GSM610"),
        "macintosh.wav": encoded(chirp(1.0, 22_254), "WAV", rate=22_254),
    }
    findings, refused = packed(tmp_path, files, "--max-broken-share", "1")
    assert refused == {
        "list.wav": "undecodable",
        "cut.wav": "truncated",
        "cut.ogg": "truncated",
        "bomb.flac": "truncated",
    }
    assert {name: round(record["duration"], 1) for name, record in findings.items()} == {
        "whole.wav": 1.5,
        "unpadded.wav": 1.5,
        "size36.wav": 1.5,
        "vbr.mp3": 10.1,
        "gsm.wav": 1.0,
        "macintosh.wav": 1.0,
    }
    assert (
        annotate.main(
            [
                "--corpus",
                f"manifest:{tmp_path / 'm.jsonl'}",
                "--out",
                str(tmp_path / "a.jsonl"),
                "--hash",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {line["id"]: round(line["duration"], 1) for line in lines} == {
        name: round(record["duration"], 1) for name, record in findings.items()
    }


def test_memory_that_is_not_there_costs_one_named_clip(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("core.decoders.Sound.read_to_end", fail)  # workers are forked: it holds in them too
    findings, refused = packed(tmp_path, {"a.wav": KINDS["fine.wav"], "b.ogg": encoded(SOUND, "OGG")})
    assert set(findings) == {"a.wav"} and refused == {"b.ogg": "too_large"}


def test_devices_and_fifos_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.wav")
    places = {"zero": "/dev/zero", "fifo": str(tmp_path / "fifo.wav"), "folder": str(tmp_path)}
    rows = {name: {"id": name, "audio": place, "text": "x"} for name, place in places.items()}
    rows |= {
        f"{name} part": {"id": f"{name} part", "audio": place, "text": "x", "offset": 0.0, "duration": 1.0}
        for name, place in places.items()
    }
    rows["fine"] = {"id": "fine", "audio": "fine.wav", "text": "x"}
    findings, refused = packed(
        tmp_path, {"fine.wav": KINDS["fine.wav"]}, "--max-broken-share", "1", rows=rows
    )
    assert set(findings) == {"fine"} and set(refused.values()) == {"unreadable"} and len(refused) == 6


def test_segments_of_an_mp3_begin_with_sound(tmp_path):
    """libmpg123 gives wrong samples for some frames after a seek: enough must be decoded before the
    segment."""
    sound = chirp(6.0)
    data = encoded(sound, "MP3")
    whole = soundfile.read(_file(tmp_path / "a.mp3", data), dtype="float32")[0]
    rows = {
        f"s{start}": {"id": f"s{start}", "audio": "a.mp3", "text": "x", "offset": start, "duration": 0.5}
        for start in (0.25, 1.0, 3.5, 5.0)
    }
    packed(tmp_path, {}, "--shuffle", "none", rows=rows)
    index = ShardIndex.load(tmp_path / "out")
    for row in range(len(index)):
        audio, record = index.read(row)
        part = soundfile.read(_file(tmp_path / "part.flac", audio), dtype="float32")[0]
        first = round(float(record["id"][1:]) * RATE)
        assert np.abs(part - whole[first : first + RATE // 2]).max() < 1e-4


def _file(path, data: bytes):
    path.write_bytes(data)
    return path


# --- Hugging Face's columns ---------------------------------------------------------------------------------


def table_of(folder, **columns) -> str:
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"], **columns}), folder / "train.parquet")
    return f"huggingface:{folder / 'train.parquet'},lang=en"


def only_clip(corpus: str, out) -> tuple[np.ndarray, dict]:
    assert pack.main(["--corpus", corpus, "--out", str(out), "--workers", "1"]) == 0
    audio, record = ShardIndex.load(out).read(0)
    return soundfile.read(_file(out / "clip.flac", audio), dtype="int16")[0], record


@pytest.mark.parametrize("kind", [pyarrow.float32(), pyarrow.float64(), pyarrow.int16()])
@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_a_decoded_column_is_packed_and_not_the_file_that_it_names(tmp_path, kind, rate):
    soundfile.write(tmp_path / "other.wav", np.zeros(80_000), 16_000)
    sound = chirp(1.0, rate)
    values = sound if kind == pyarrow.int16() else (sound / 32768).tolist()
    struct = pyarrow.struct(
        {"array": pyarrow.list_(kind), "sampling_rate": pyarrow.int64(), "path": pyarrow.string()}
    )
    cell = pyarrow.array(
        [{"array": values, "sampling_rate": rate, "path": str(tmp_path / "other.wav")}], struct
    )
    wave, record = only_clip(table_of(tmp_path / "t", speech=cell), tmp_path / "out")
    assert record["duration"] == 1.0 and record["sample_rate"] == 16_000
    if rate == 16_000:
        assert np.array_equal(wave, sound)


def test_a_decoded_column_of_channels_is_averaged(tmp_path):
    channels = [(SOUND / 32768).tolist(), [0.0] * len(SOUND)]
    struct = pyarrow.struct(
        {"array": pyarrow.list_(pyarrow.list_(pyarrow.float32())), "sampling_rate": pyarrow.int64()}
    )
    cell = pyarrow.array([{"array": channels, "sampling_rate": RATE}], struct)
    wave, _ = only_clip(table_of(tmp_path / "t", audio=cell), tmp_path / "out")
    assert np.abs(wave.astype(int) * 2 - SOUND).max() <= 1


def test_paths_in_a_table_start_at_its_folder(tmp_path):
    (tmp_path / "t").mkdir()
    soundfile.write(tmp_path / "t" / "a.wav", SOUND, RATE)
    for column in ([{"bytes": None, "path": "a.wav"}], ["a.wav"]):
        wave, _ = only_clip(
            table_of(tmp_path / "t", audio=column), tmp_path / f"out-{type(column[0]).__name__}"
        )
        assert np.array_equal(wave, SOUND)


def test_columns_that_hold_no_audio_are_refused_before_packing(tmp_path, capsys):
    for column in ([[0.1, 0.2]], [3], [{"array_of": [0.1]}]):
        corpus = table_of(tmp_path / "t", audio=column)
        assert pack.main(["--corpus", corpus, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
        assert "column 'audio' holds" in capsys.readouterr().err


def test_a_decoded_column_without_a_rate_is_refused(tmp_path):
    corpus = table_of(tmp_path / "t", audio=[{"array": [0.1] * 100, "sampling_rate": None, "path": "x.wav"}])
    assert pack.main(["--corpus", corpus, "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "sampling_rate" in (tmp_path / "out" / "rejected.jsonl").read_text()


# --- commands -----------------------------------------------------------------------------------------------


def test_a_command_that_never_ends_writing_is_stopped(tmp_path, monkeypatch):
    from data_tools import sources

    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(sources.ClipError) as caught:
        sources.read_bytes("pipe:cat /dev/zero")
    assert caught.value.reason == "too_large"
    with pytest.raises(sources.ClipError) as caught:
        sources.read_bytes("pipe:echo no >&2; false")
    assert caught.value.reason == "command_failed" and "no" in str(caught.value)


def test_memory_is_bounded_for_a_flac_that_would_take_gigabytes(tmp_path):
    """24 min of silence in 8 channels at 655 kHz are 15 GB: refused by its header, under an address space of
    4 GB."""
    clip = encoded(np.zeros((65_536, 8), np.int16), rate=96_000)
    header = bytearray(clip)
    packed_bits = int.from_bytes(header[18:26], "big") & ~(((1 << 20) - 1) << 44) & ~((1 << 36) - 1)
    header[18:26] = (packed_bits | 655_350 << 44 | 24 * 60 * 655_350).to_bytes(8, "big")
    (tmp_path / "bomb.flac").write_bytes(bytes(header) + bytes(400_000))  # as long as the true one
    (tmp_path / "fine.flac").write_bytes(encoded(SOUND))
    lines = [{"id": name, "audio": f"{name}.flac", "text": "x"} for name in ("bomb", "fine")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    python = f"{os.sys.executable} data_tools/pack.py --manifest {tmp_path}/m.jsonl --out {tmp_path}/out --workers 1"
    run = subprocess.run(
        ["bash", "-c", f"ulimit -v 4000000; exec {python}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    (refused,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (refused["id"], refused["reason"]) == (
        "bomb",
        "too_large",
    ) and "8 channels at 655,350 Hz" in refused["detail"]
