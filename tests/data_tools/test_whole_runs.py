"""A command as its user sees it: sums that add up, faults that stop it early, splits, ids, dry runs, the
folder it writes to."""

import io
import json
import os
import random
import re
import shutil
import tarfile
import time
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from data_tools import pack, progress, show
from data_tools import packing as packing_module
from data_tools.corpora import Entry
from data_tools.filters import SampleFilter
from data_tools.output import locked
from data_tools.packing import Packing
from data_tools.plan import Layout, make_plan
from data_tools.shards import OutputError, ShardIndex
from tests.data_tools.conftest import tone


def wav(path, seconds=0.2, hertz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, hertz=hertz, noise=0), 16000)
    return path


def manifest(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def run(*options, capsys=None, workers="1"):
    """(exit code, standard output, standard error)"""
    code = pack.main([*map(str, options), "--workers", workers])
    told = capsys.readouterr()
    return code, told.out, told.err


def records(folder):
    index = ShardIndex.load(folder)
    return [index.read(row)[1] for row in range(len(index))]


def tar_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# --- sums ---------------------------------------------------------------------------------------------------


def test_the_report_adds_up(tmp_path, capsys):
    audio = wav(tmp_path / "a.wav").read_bytes()
    members = [
        (f"u{n}.{kind}", data) for n in range(8) for kind, data in (("wav", audio), ("txt", b"hi there"))
    ]
    tar_of(
        tmp_path / "t.tar",
        [*members, ("lone.json", b"{}"), ("bad.wav", b"x"), ("bad.txt", b"hi"), ("q.npy", b""), ("._q", b"")],
    )
    for last in (["--dry-run"], []):
        code, out, _ = run(
            "--corpus",
            f"shards:{tmp_path / 't.tar'}",
            "--languages",
            "en",
            "--out",
            tmp_path / "out",
            *last,
            capsys=capsys,
        )
        assert code == 2, "no language is known"
        options = [
            "--corpus",
            f"shards:{tmp_path / 't.tar'},lang=en",
            "--out",
            tmp_path / "out",
            "--max-seconds",
            "5",
            *last,
        ]
        code, out, _ = run(*options, capsys=capsys)
        assert code == 0
        read, samples, refused = map(
            int, re.search(r"read (\d+) = (\d+) samples \+ (\d+) refused", out).groups()
        )
        counted = sum(int(count) for count in re.findall(r"refused +(\d+) ", out))
        assert read == samples + refused == 10 and counted == refused == (1 if last else 2)
        assert sum(int(count) for count in re.findall(r"ignored +(\d+) ", out)) == 2
    assert len(records(tmp_path / "out")) == samples
    assert sum(json.loads((tmp_path / "out" / "index.json").read_text())["ignored"].values()) == 2
    assert show.main([str(tmp_path / "out")]) == 0 and ".npy members" in capsys.readouterr().out


# --- the share of what is broken ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, code",
    [
        (["{broken\n"] * 6, 2),
        (["{broken\n"] * 5, 0),
        ([{"audio": "a.wav", "text": None}] * 6, 2),
        ([{"audio": "gone.wav", "text": "x"}] * 6, 2),
        (["{broken\n"] * 3 + [{"audio": "gone.wav", "text": "x"}] * 4, 2),
        (["{broken\n"] * 2 + [{"audio": "gone.wav", "text": "x"}] * 3, 0),
        ([{"audio": "a.wav", "text": "x" * 500}] * 20, 0),
    ],
)
def test_faults_of_lines_and_clips_count_together_from_the_first_one(rows, code, tmp_path, capsys):
    """Beside five good clips; a filter's refusals are no faults."""
    wav(tmp_path / "a.wav")
    good = [{"id": f"g{n}", "audio": "a.wav", "text": "hi", "duration": 0.2} for n in range(5)]
    rows = [
        row if isinstance(row, str) else {"id": f"b{n}", "duration": 0.2, **row} for n, row in enumerate(rows)
    ]
    path = manifest(tmp_path / "m.jsonl", [*good, *rows])
    for last in (["--dry-run"], []):
        found, out, err = run(
            "--manifest", path, "--out", tmp_path / "out", "--max-rate", "100", *last, capsys=capsys
        )
        assert found == code and "Traceback" not in err and "{'" not in out + err, (out, err)
        if code:
            assert (
                "broken" in err
                and err.count("\n") <= 2
                and ("m.jsonl:6" in err or "b0" in err or "gone.wav" in err)
            )
    if code:
        again, *_ = run(
            "--manifest",
            path,
            "--out",
            tmp_path / "out",
            "--max-rate",
            "100",
            "--max-broken-share",
            "1",
            capsys=capsys,
        )
        assert again == 0 and len(records(tmp_path / "out")) == 5


# --- splits -------------------------------------------------------------------------------------------------


def speakers_of(folder):
    return {record["speaker"] for record in records(folder)}


def test_all_splits_in_one_pass_are_those_of_single_commands(tmp_path, capsys, monkeypatch):
    wav(tmp_path / "a.wav")
    rows = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "speaker": f"s{n % 20}"} for n in range(60)]
    path = manifest(tmp_path / "m.jsonl", [*rows, "{broken\n"])
    splits = ["--splits", "train=0.7,valid=0.3", "--shard-mb", "0.05"]
    passes = []
    monkeypatch.setattr(pack, "_watch", lambda corpus: passes.append(corpus) or iter(corpus))
    code, out, _ = run("--manifest", path, "--out", tmp_path / "all", *splits, capsys=capsys)
    assert code == 0 and len(passes) == 1
    assert re.search(r"speakers by split: train \d+ \(\d+ samples\), valid \d+", out)
    for name in ("train", "valid"):
        assert (
            run(
                "--manifest", path, "--out", tmp_path / "one" / name, *splits, "--split", name, capsys=capsys
            )[0]
            == 0
        )
        ours, theirs = (
            {file.name: file.read_bytes() for file in (tmp_path / kind / name).iterdir() if file.is_file()}
            for kind in ("all", "one")
        )
        assert ours == theirs
    assert not speakers_of(tmp_path / "all" / "train") & speakers_of(tmp_path / "all" / "valid")
    assert sum(len(records(tmp_path / "all" / name)) for name in ("train", "valid")) == 60
    assert (
        run("--manifest", path, "--out", tmp_path / "all", *splits, capsys=capsys)[1].count(
            "is packed already"
        )
        == 2
    )


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_holds_for_all_splits_is_said_once(tmp_path, capsys, more):
    wav(tmp_path / "a.wav")
    rows = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "speaker": f"s{n % 20}"} for n in range(60)]
    path = manifest(tmp_path / "m.jsonl", rows)
    splits = ["--splits", "train=0.7,valid=0.3"]
    code, out, _ = run("--manifest", path, "--out", tmp_path / "all", *splits, *more, capsys=capsys)
    assert code == 0 and out.count("speakers by split") == 1


def test_all_splits_by_parts_and_merge(tmp_path, capsys):
    wav(tmp_path / "a.wav")
    rows = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "speaker": f"s{n % 20}"} for n in range(60)]
    path = manifest(tmp_path / "m.jsonl", rows)
    options = [
        "--manifest",
        path,
        "--out",
        tmp_path / "out",
        "--splits",
        "train=0.7,valid=0.3",
        "--shard-mb",
        "0.05",
    ]
    for part in ("1/2", "0/2"):
        assert run(*options, "--part", part, capsys=capsys)[0] == 0
    assert run("--merge", "--out", tmp_path / "out", capsys=capsys)[0] == 0
    assert sum(len(records(tmp_path / "out" / name)) for name in ("train", "valid")) == 60
    assert run("--merge", "--out", tmp_path / "out", capsys=capsys)[0] == 2


@pytest.mark.parametrize("speaker", [True, False])
def test_a_split_is_the_same_whatever_the_reader(speaker, tmp_path, capsys):
    rng = random.Random(0)
    names = [f"u{n:02d}" for n in range(40)]
    who = {name: f"s{rng.randrange(15)}" for name in names}
    for name in names:
        wav(tmp_path / "wavs" / f"{name}.wav", 0.1)
    more = {name: {"speaker": who[name]} if speaker else {} for name in names}
    manifest(
        tmp_path / "m.jsonl", [{"id": n, "audio": f"wavs/{n}.wav", "text": "x", **more[n]} for n in names]
    )
    manifest(
        tmp_path / "nemo.json",
        [{"audio_filepath": f"wavs/{n}.wav", "duration": 0.1, "text": "x", **more[n]} for n in names],
    )
    table = "file,words,who\n" + "".join(f"wavs/{n}.wav,x,{who[n]}\n" for n in reversed(names))
    (tmp_path / "t.csv").write_text(table)
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text("".join(f"{n} {tmp_path}/wavs/{n}.wav\n" for n in names))
    (kaldi / "text").write_text("".join(f"{n} x\n" for n in names))
    if speaker:
        (kaldi / "utt2spk").write_text("".join(f"{n} {who[n]}\n" for n in names))
    (tmp_path / "wavs" / "metadata.csv").write_text(
        "file_name,text"
        + ",speaker" * speaker
        + "\n"
        + "".join(f"{n}.wav,x{f',{who[n]}' * speaker}\n" for n in names)
    )
    audio = [(tmp_path / "wavs" / f"{n}.wav").read_bytes() for n in names]
    columns = {"audio": audio, "text": ["x"] * 40, "who": [who[n] for n in names], "name": names}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    meta = [json.dumps({"text": "x", **more[n]}).encode() for n in names]
    members = [
        m
        for n, data, told in zip(names, audio, meta, strict=True)
        for m in ((f"d/{n}.wav", data), (f"d/{n}.json", told))
    ]
    tar_of(tmp_path / "foreign.tar", members)
    assert run("--manifest", tmp_path / "m.jsonl", "--out", tmp_path / "packed", capsys=capsys)[0] == 0
    by_column = ",speaker=who" * speaker
    corpora = [
        f"manifest:{tmp_path}/m.jsonl",
        f"nemo:{tmp_path}/nemo.json",
        f"table:{tmp_path}/t.csv,audio=file,text=words{by_column}",
        f"kaldi:{kaldi}",
        f"folder:{tmp_path}/wavs",
        f"huggingface:{tmp_path}/p.parquet,id=name{by_column}",
        f"shards:{tmp_path}/foreign.tar",
        f"shards:{tmp_path}/packed",
    ]
    found = set()
    for corpus in corpora:
        sieve = SampleFilter(splits={"train": 0.6, "valid": 0.4}, take="valid")
        plan = tmp_path / "plan"
        make_plan(plan, pack.open_corpora([corpus]), sieve, Layout(), {})
        with open(plan / "entries.jsonl") as lines:
            entries = [Entry.from_json(line) for line in lines]
        stems = {
            entry.id.rpartition("/")[2] if not corpus.startswith("table") else entry.audio[-7:-4]
            for entry in entries
        }
        assert 5 < len(stems) < 30, corpus
        found.add(frozenset(stems))
    assert len(found) == 1, "one split"


def test_the_smallest_manifest_can_be_split_and_says_by_what(tmp_path, capsys):
    for n in range(30):
        wav(tmp_path / f"{n}.wav", 0.1)
    path = manifest(
        tmp_path / "m.jsonl", [{"id": f"u{n}", "audio": f"{n}.wav", "text": "x"} for n in range(30)]
    )
    code, out, _ = run(
        "--manifest", path, "--out", tmp_path / "out", "--splits", "train=0.7,valid=0.3", capsys=capsys
    )
    assert code == 0 and "no speaker is known of 30 samples: split by recording" in out
    assert sum(len(records(tmp_path / "out" / name)) for name in ("train", "valid")) == 30


def test_an_empty_split_is_an_error_with_advice_before_anything_is_packed(tmp_path, capsys):
    wav(tmp_path / "a.wav")
    rows = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "speaker": "only one"} for n in range(9)]
    path = manifest(tmp_path / "m.jsonl", rows)
    options = ["--manifest", path, "--out", tmp_path / "out", "--splits", "train=0.5,valid=0.5"]
    for last in (["--dry-run"], []):
        code, _, err = run(*options, *last, capsys=capsys)
        assert (
            code == 2
            and re.search(r"none of the 1 speakers is in split (train|valid), whose share is 0.5 ", err)
            and "--seed" in err
            and "--split-by" in err
        )
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert run(*options, "--split-by", "id", capsys=capsys)[0] == 0, "another choice needs no cleaning up"


# --- ids ----------------------------------------------------------------------------------------------------


def test_manifests_of_one_name_keep_all_their_samples(tmp_path, capsys):
    for lang, pitch in (("de", 300), ("fr", 500)):
        for n in range(3):
            wav(tmp_path / lang / f"{n}.wav", hertz=pitch)
        manifest(
            tmp_path / lang / "train.jsonl", [{"audio": f"{n}.wav", "text": f"{lang} {n}"} for n in range(3)]
        )
    options = [part for lang in ("de", "fr") for part in ("--manifest", tmp_path / lang / "train.jsonl")]
    code, out, _ = run(*options, "--out", tmp_path / "out", capsys=capsys)
    found = {record["id"]: record["text"] for record in records(tmp_path / "out")}
    assert code == 0 and "de/ID" in out and found["fr/train-000000001"] == "fr 0" and len(found) == 6
    code, out, _ = run(*options[:2], *options[:2], "--out", tmp_path / "twice", capsys=capsys)
    assert len(records(tmp_path / "twice")) == 3 and "duplicate_id" in out, (
        "the same file twice is no other corpus"
    )


def test_keys_that_restart_in_each_tar_are_distinguished_and_others_stay(tmp_path, capsys):
    for shard in range(2):
        audio = wav(tmp_path / "a.wav", hertz=300 + 200 * shard).read_bytes()
        members = [m for n in range(3) for m in ((f"{n}.wav", audio), (f"{n}.txt", f"tar {shard}".encode()))]
        tar_of(tmp_path / "tars" / f"part-{shard}.tar", members)
    code, out, _ = run("--corpus", f"shards:{tmp_path / 'tars'}", "--out", tmp_path / "out", capsys=capsys)
    found = {record["id"]: record["text"] for record in records(tmp_path / "out")}
    assert code == 0 and "PART/ID" in out
    assert found == {f"part-{shard}/{n}": f"tar {shard}" for shard in range(2) for n in range(3)}
    manifest_path = tmp_path / "ann.jsonl"
    from data_tools import annotate

    assert (
        annotate.main(
            ["--corpus", f"shards:{tmp_path / 'tars'}", "--out", str(manifest_path), "--workers", "1"]
        )
        == 0
    )
    assert run("--manifest", manifest_path, "--out", tmp_path / "annotated", capsys=capsys)[0] == 0
    assert {record["id"]: record["text"] for record in records(tmp_path / "annotated")} == found


def test_one_id_twice_in_a_manifest_is_a_fault(tmp_path, capsys):
    for name in "ab":
        wav(tmp_path / f"{name}.wav")
    path = manifest(
        tmp_path / "m.jsonl", [{"id": "u", "audio": f"{name}.wav", "text": name} for name in "ab"]
    )
    code, out, _ = run("--manifest", path, "--out", tmp_path / "out", capsys=capsys)
    assert (
        code == 0
        and "duplicate_id" in out
        and [record["text"] for record in records(tmp_path / "out")] == ["a"]
    )


# --- one sample ---------------------------------------------------------------------------------------------

ODD = [
    RuntimeError("odd chunk"),
    OverflowError("too large"),
    RecursionError(),
    EOFError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    MemoryError(),
    KeyError("x"),
    TypeError("NoneType"),
    AttributeError("no get"),
    IndexError("list"),
    ZeroDivisionError("division"),
    ValueError("odd"),
    OSError(5, "Input/output error"),
    AssertionError(),
    soundfile.LibsndfileError(0),
    StopIteration(),
]
PLACES = [
    "data_tools.packing.make_clip",
    "data_tools.packing.record_of",
    "data_tools.filters.SampleFilter.judge_clip",
    "data_tools.filters.SampleFilter.judge_metadata",
    "data_tools.filters.SampleFilter.prepare",
    "data_tools.corpora.manifest.Manifest.sample",
    "data_tools.packing.quality.measure",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_whatever_one_sample_raises_wherever_it_is_that_samples_fault(
    place, error, tmp_path, capsys, monkeypatch
):
    wav(tmp_path / "a.wav")
    path = manifest(
        tmp_path / "m.jsonl",
        [{"id": f"u{n}", "audio": "a.wav", "text": "x", "duration": 0.2} for n in range(4)],
    )
    owner, _, name = place.rpartition(".")
    owner = re.sub(r"^data_tools\.packing\.quality", "data_tools.quality", owner)
    module, _, attribute = owner.rpartition(".") if owner.rpartition(".")[2][0].isupper() else (owner, "", "")
    target = __import__(module, fromlist=["x"])
    target = getattr(target, attribute) if attribute else target
    real, calls = getattr(target, name), Counter()

    def sometimes(*arguments, **options):
        calls["all"] += 1
        if calls["all"] == 2:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(target, name, sometimes)
    monkeypatch.setattr(
        Packing, "run", lambda self, shards, hours, workers: [self.write_shard(shard) for shard in shards]
    )
    code, _, err = run("--manifest", path, "--out", tmp_path / "out", "--measure", capsys=capsys)
    assert code == 0 and len(records(tmp_path / "out")) == 3, err
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    fault = json.loads(line)
    assert (
        fault["reason"] in {"failed", "bad_row", "too_large", "encoding"}
        and fault["detail"]
        and "\n" not in fault["detail"]
    )


def test_a_full_disk_is_no_samples_fault(tmp_path, capsys, monkeypatch):
    wav(tmp_path / "a.wav")
    path = manifest(tmp_path / "m.jsonl", [{"id": "u", "audio": "a.wav", "text": "x"}])

    def full(*arguments, **options):
        raise OutputError("cannot write x: No space left on device")

    monkeypatch.setattr(packing_module.ShardWriter, "add", full)
    monkeypatch.setattr(
        Packing, "run", lambda self, shards, hours, workers: [self.write_shard(shard) for shard in shards]
    )
    code, _, err = run("--manifest", path, "--out", tmp_path / "out", capsys=capsys)
    assert code == 1 and "free space there, then run the same command again" in err


# --- dry runs -----------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_truth(tmp_path, capsys):
    wav(tmp_path / "a.wav", 1.5)
    (tmp_path / "broken.flac").write_bytes(b"fLaC" + bytes(50))
    rows = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "mos": 3, "client_id": "c"} for n in range(6)]
    rows += [
        {"id": "gone", "audio": "gone.wav", "text": "x"},
        {"id": "odd", "audio": "broken.flac", "text": "x"},
        "{broken\n",
    ]
    path = manifest(tmp_path / "m.jsonl", rows)
    code, out, err = run("--manifest", path, "--out", tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 0 and not err.strip() and "{'" not in out and "0.00 h" not in out
    assert "m.jsonl:9: not valid JSON" in out, "an example of each reason"
    assert "reads id, audio, text; leaves out mos, client_id" in out and "speaker = client_id" in out
    assert "looked for 8 clips and decoded 8: " in out
    assert "1 missing_file (for example gone: " in out and "1 undecodable (for example odd: " in out
    assert not (tmp_path / "out").exists()
    code, out, err = run("--manifest", path, "--out", tmp_path / "a.wav" / "out", "--dry-run", capsys=capsys)
    assert code == 0 and out.splitlines()[-1].endswith(
        f"out cannot be written: {tmp_path / 'a.wav'} is a file"
    )


def test_a_dry_run_ends_like_packing_where_files_are_missing(tmp_path, capsys):
    path = manifest(
        tmp_path / "m.jsonl", [{"id": f"u{n}", "audio": f"gone{n}.wav", "text": "x"} for n in range(300)]
    )
    code, out, err = run("--manifest", path, "--out", tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 2 and "looked for 200 clips" in out and "200 of the 200 clips" in err


# --- the output folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strange", ["notes.txt", ".pack/precious/f", "samples.npy", "other-000000.tar", "rejected.jsonl"]
)
def test_a_folder_with_other_files_is_not_packed_into(strange, tmp_path, capsys):
    wav(tmp_path / "a.wav")
    path = manifest(tmp_path / "m.jsonl", [{"id": "u", "audio": "a.wav", "text": "x"}])
    out = tmp_path / "out"
    (out / strange).parent.mkdir(parents=True)
    (out / strange).write_text("keep")
    for last in (["--dry-run"], []):
        code, _, err = run("--manifest", path, "--out", out, *last, capsys=capsys)
        assert code == 2 and f"holds {strange.split('/')[0]}, which this command did not write" in err
    assert [file.read_text() for file in out.rglob("*") if file.is_file()] == ["keep"]


def test_a_name_for_shards_is_a_plain_file_name(tmp_path, capsys):
    path = manifest(tmp_path / "m.jsonl", [{"id": "u", "audio": "a.wav", "text": "x"}])
    for options in (
        ["--out", f"{tmp_path}/new\nline"],
        ["--out", tmp_path / "o", "--name", "../up"],
        ["--out", tmp_path / "o", "--name", ""],
    ):
        with pytest.raises(SystemExit) as caught:
            pack.main([*map(str, options), "--manifest", str(path)])
        assert (
            caught.value.code == 2
            and "must be a plain file name (" in capsys.readouterr().err.splitlines()[-1]
        )


def test_two_processes_on_one_output(tmp_path, capsys, monkeypatch):
    from data_tools import output
    from data_tools.output import InUse

    monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.0)
    wav(tmp_path / "a.wav")
    path = manifest(tmp_path / "m.jsonl", [{"id": f"u{n}", "audio": "a.wav", "text": "x"} for n in range(4)])
    out = tmp_path / "out"
    (out / ".pack" / "done").mkdir(parents=True)
    begun, end = os.pipe()
    child = os.fork()
    if child == 0:  # another process that packs; record locks do not keep a process from itself
        with locked(out, None):
            os.write(end, b"x")
            while os.getppid() != 1 and not (tmp_path / "stop").exists():
                pass
        os._exit(0)
    os.read(begun, 1)
    try:
        for part in ([], ["--part", "0/2"]):
            code, _, err = run("--manifest", path, "--out", out, *part, capsys=capsys)
            assert code == 1 and err.count("\n") == 1 and f"another process (process {child} on" in err
        with pytest.raises(InUse), locked(out, (1, 2)):
            pass
    finally:
        (tmp_path / "stop").touch()
        monkeypatch.setattr(output, "PATIENCE_SECONDS", 60.0)
        with locked(out, None):  # comes when the other one has let go
            pass
        os.waitpid(child, 0)
    with locked(out, (0, 2)), locked(out, (1, 2)):
        pass
    assert run("--manifest", path, "--out", out, capsys=capsys)[0] == 0


@pytest.mark.parametrize("command", [[], ["--merge"]])
def test_a_process_that_waits_while_another_finishes_finds_the_packed_folder(tmp_path, capsys, command):
    """The other process writes the index, removes .pack/ and ends."""
    wav(tmp_path / "a.wav")
    path = manifest(tmp_path / "m.jsonl", [{"id": f"u{n}", "audio": "a.wav", "text": "x"} for n in range(4)])
    out, finished, ready = tmp_path / "out", tmp_path / "finished" / "out", tmp_path / "ready"
    assert run("--manifest", path, "--out", finished, capsys=capsys)[0] == 0
    assert run("--manifest", path, "--out", out, "--part", "0/1", capsys=capsys)[0] == 0
    child = os.fork()
    if child == 0:
        with locked(out, None):
            ready.touch()
            time.sleep(0.5)
            for name in ("index.json", "samples.npy", "rejected.jsonl"):
                shutil.copy(finished / name, out)
            shutil.rmtree(out / ".pack")
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    options = ["--merge", "--out", out] if command else ["--manifest", path, "--out", out]
    code, _, err = run(*options, capsys=capsys)
    assert os.waitpid(child, 0)[1] == 0
    assert "waiting for up to" in err and "No such file" not in err
    assert code == (2 if command else 0) and (not command or "it has its index" in err)


# --- what is shown ------------------------------------------------------------------------------------------


def test_a_log_has_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("packing 9 shards", 10.0, " h", decimals=2) as shown:
        for step in range(1, 13):
            now[0] += 20
            shown.to(step / 2, "5 shards left")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "packing 9 shards: 1.50 of 10.00 h, 90 h an hour, about 5.7 min left, 5 shards left"
    now[0] = 0.0

    def items():
        for number in range(1000):
            now[0] += 0.1
            yield number

    assert list(progress.watched(items(), "planning m")) == list(range(1000))
    assert capsys.readouterr().err.startswith("planning m: 640 samples, 10.0 samples/s")


def test_control_characters_do_not_reach_the_console(tmp_path, capsys):
    evil = "evil\x1b]0;owned\x07\x1b[31m"
    wav(tmp_path / "a.wav")
    rows = [{"id": f"{evil}{n}", "audio": f"gone{n}.wav" if n else "a.wav", "text": "x"} for n in range(4)]
    path = manifest(tmp_path / "m.jsonl", rows)
    for last in (["--dry-run"], []):
        _, out, err = run("--manifest", path, "--out", tmp_path / "out", *last, capsys=capsys)
        assert "\x1b" not in out + err and "evil\\x1b" in out + err


def test_a_folder_of_packed_folders_is_listed(tmp_path, capsys):
    wav(tmp_path / "a.wav", 1.0)
    path = manifest(tmp_path / "m.jsonl", [{"id": "u", "audio": "a.wav", "text": "x", "lang": "en"}])
    for name in ("one", "two/train"):
        assert run("--manifest", path, "--out", tmp_path / "packed" / name, capsys=capsys)[0] == 0
    (tmp_path / "packed" / "begun" / ".pack" / "done").mkdir(parents=True)
    assert show.main([str(tmp_path / "packed")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == [
        str(tmp_path / "packed" / "one"),
        str(tmp_path / "packed" / "two" / "train"),
    ]
    assert (
        "1.0 s" in lines[1] and "not finished" in lines[3] and str(tmp_path / "packed" / "begun") in lines[3]
    )
    assert show.main([str(tmp_path)]) == 0
    (tmp_path / "empty").mkdir()
    assert show.main([str(tmp_path / "empty")]) == 2 and "holds no index.json" in capsys.readouterr().err


def test_the_examples_of_the_documents_work(tmp_path, capsys, monkeypatch):
    """The four complete examples of docs/prepare-data.md, on small corpora of these layouts."""
    from pathlib import Path

    text = (
        (Path(pack.__file__).parents[1] / "docs" / "prepare-data.md")
        .read_text()
        .split("## Four complete examples")[1]
        .split("\n## ")[0]
    )
    for speaker in range(30):
        wav(tmp_path / "data" / "mine" / f"s{speaker}" / "a.wav").with_suffix(".txt").write_text("hello")
    voice = tmp_path / "data" / "cv-corpus-17.0-2024-03-15" / "fr"
    (voice / "clips").mkdir(parents=True)
    soundfile.write(voice / "clips" / "a.mp3", tone(0.5), 16000, format="MP3")
    for split in ("train", "dev", "test"):
        (voice / f"{split}.tsv").write_text("client_id\tpath\tsentence\tlocale\nx\ta.mp3\tBonjour.\tfr\n")
    for number in range(60):
        shutil.copy(voice / "clips" / "a.mp3", voice / "clips" / f"{number}.mp3")
    lines = "".join(f"speaker{number}\t{number}.mp3\tBonjour.\tfr\n" for number in range(60))
    (voice / "validated.tsv").write_text(f"client_id\tpath\tsentence\tlocale\n{lines}")
    chapter = tmp_path / "data" / "LibriSpeech" / "test-clean" / "19" / "198"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "19-198-0000.flac", tone(0.5), 16000)
    (chapter / "19-198.trans.txt").write_text("19-198-0000 HELLO THERE\n")
    (tmp_path / "data" / "hub").mkdir()
    columns = {
        "audio": [{"bytes": wav(tmp_path / "a.wav").read_bytes(), "path": "a.wav"}],
        "sentence": ["hi"],
        "client_id": ["c"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "hub" / "train-00000.parquet")
    from data_tools import verify

    tools = {"data_tools/pack.py": pack, "data_tools.show": show, "data_tools.verify": verify}
    monkeypatch.chdir(tmp_path)
    commands = [line.strip() for line in text.splitlines() if re.match(r" *python (-m )?data_tools", line)]
    assert len(commands) == 11
    for command in commands:
        for split in ("train", "dev", "test") if "$split" in command else ("",):
            words = (
                command.replace("$split", split)
                .replace("/data/", f"{tmp_path}/data/")
                .replace("/shards/", f"{tmp_path}/shards/")
                .split()
            )
            words = [
                word.replace(":/data", f":{tmp_path}/data") for word in words if word not in ("python", "-m")
            ]
            assert tools[words[0]].main(words[1:]) == 0, (command, capsys.readouterr())
    assert (
        len(speakers_of(tmp_path / "shards" / "mine" / "train"))
        + len(speakers_of(tmp_path / "shards" / "mine" / "valid"))
        == 30
    )
    assert records(tmp_path / "shards" / "test-clean")[0]["text"] == "Hello there"
    assert records(tmp_path / "shards" / "hub" / "train")[0]["speaker"] == "c"
    assert records(tmp_path / "shards" / "cv-fr" / "dev")[0]["lang"] == "fr"


def test_clips_of_equal_samples_stay_where_they_were(tmp_path, capsys):
    """An ordinary corpus gives the bytes that it always gave."""
    for n in range(4):
        soundfile.write(tmp_path / f"{n}.wav", (np.arange(3200 + n) % 100 * 100).astype(np.int16), 16000)
    path = manifest(
        tmp_path / "m.jsonl",
        [{"id": f"ü {n}", "audio": f"{n}.wav", "text": f"words {n}", "lang": "en"} for n in range(4)],
    )
    assert run("--manifest", path, "--out", tmp_path / "out", "--codec", "copy", capsys=capsys)[0] == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    # Of the first version that wrote this format.
    assert (
        index["shardlist"][0]["sha256"] == "65ded78a87b5459be5879c843b24a4454695a01cab7b156f6ae0e65bdda020d5"
    )
    assert index["fingerprint"] == "f13f490c33f2c2cc51e2a5ccf357e093bca5fc54f6a3cf3fa79cd34440f5096b"
