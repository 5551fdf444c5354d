"""Kills, full disks, dead workers: nothing is lost, nothing is doubled, nothing unfinished has a final
name."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from data_tools import pack
from data_tools.packing import Packing
from data_tools.shards import ShardIndex
from tests.data_tools.conftest import REASONS, tone
from tests.data_tools.test_pack import ROOT, folder_bytes

OPTIONS = ["--workers", "2", "--shard-mb", "0.2", "--max-broken-share", "1"]


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory):
    """160 clips, some broken or missing."""
    folder = tmp_path_factory.mktemp("large")
    rows = []
    for number in range(160):
        path = folder / f"{number}.wav"
        if number % 20 == 3:
            path.write_bytes(b"RIFF broken")
        elif number % 20 != 7:
            soundfile.write(path, tone(4.0, 16000, 200 + number, noise=0.1, seed=number), 16000)
        rows.append({"id": f"{number}", "audio": path.name, "text": f"number {number}"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return manifest


def start(manifest, out, *more):
    command = [
        sys.executable,
        "-m",
        "data_tools.pack",
        "--manifest",
        str(manifest),
        "--out",
        str(out),
        *OPTIONS,
        *more,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def complete_tars(folder: Path) -> None:
    """Every file with a final name must be a whole tar."""
    for path in folder.glob("*.tar"):
        subprocess.run(["tar", "tf", path], check=True, capture_output=True)
        assert path.read_bytes().endswith(bytes(1024))


def kill_and_finish(manifest, out, rng, undisturbed, kills):
    """Kill -9 the whole process group, or the parent alone, at random moments, then let it end; returns how
    many were hit."""
    killed, longest = 0, 3.0
    for _ in range(kills):
        started = time.monotonic()
        process = start(manifest, out)
        try:
            process.wait(timeout=rng.uniform(0.2, longest))
            longest = time.monotonic() - started  # it ended by itself: kill earlier
        except subprocess.TimeoutExpired:
            killed += 1
            longest = max(longest, 1.2 * (time.monotonic() - started))
            if rng.random() < 0.5:
                process.kill()  # its workers are left behind, and end by themselves
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        complete_tars(out)
        if (out / "index.json").exists():
            assert folder_bytes(out) == undisturbed
            shutil.rmtree(out)
    process = start(manifest, out)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert folder_bytes(out) == undisturbed and not (out / ".pack").exists()
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments_leave_the_same_bytes(large_corpus, tmp_path, kills):
    reference = tmp_path / "a" / "packed"
    assert pack.main(["--manifest", str(large_corpus), "--out", str(reference), *OPTIONS]) == 0
    assert len(list(reference.glob("*.tar"))) >= 20
    rng, killed, out = random.Random(0), 0, tmp_path / "b" / "packed"
    while killed < kills:
        killed += kill_and_finish(large_corpus, out, rng, folder_bytes(reference), kills=6)
        shutil.rmtree(out)


def test_a_kill_between_any_two_steps_of_a_shard_leaves_the_same_bytes(corpus, tmp_path, monkeypatch):
    """The same as the random kills, at every step on purpose: the process stops after its n-th change of the
    disk."""
    reference, out = tmp_path / "a" / "packed", tmp_path / "b" / "packed"
    options = ["--manifest", str(corpus), "--shard-mb", "0.15", "--workers", "1"]
    monkeypatch.setattr(
        Packing, "run", lambda self, shards, hours, workers: [self.write_shard(shard) for shard in shards]
    )
    assert pack.main([*options, "--out", str(reference)]) == 0

    class Killed(BaseException):
        pass

    replace, steps = os.replace, [0]

    def replace_until(source, target):
        if steps[0] == 0:
            raise Killed
        steps[0] -= 1
        replace(source, target)
        if steps[0] == 0:
            raise Killed

    # One more change of the disk each time: progress is kept, so a few dozen runs end it.
    for attempt in range(60):
        steps[0] = 1 + attempt % 3
        monkeypatch.setattr(os, "replace", replace_until)
        try:
            pack.main([*options, "--out", str(out)])
            break
        except Killed:
            if out.exists():
                complete_tars(out)
    monkeypatch.setattr(os, "replace", replace)
    assert pack.main([*options, "--out", str(out)]) == 0
    assert folder_bytes(out) == folder_bytes(reference)


def test_finished_shards_are_not_made_again(large_corpus, tmp_path):
    out = tmp_path / "packed"
    process = start(large_corpus, out)
    while len(list((out / ".pack" / "done").glob("[0-9]*")) if (out / ".pack" / "done").exists() else []) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    finished = {f"packed-{path.name}.tar" for path in (out / ".pack" / "done").glob("[0-9]*")}
    assert pack.main(["--manifest", str(large_corpus), "--out", str(out), *OPTIONS]) == 0
    for name in finished & set(done):
        assert (out / name).stat().st_ino == done[name][0] and (out / name).stat().st_mtime_ns == done[name][
            1
        ]
    assert len(finished & set(done)) >= 2


def test_parts_give_the_bytes_of_one_run(corpus, tmp_path, capsys):
    whole, parts = tmp_path / "a" / "packed", tmp_path / "b" / "packed"
    options = ["--manifest", str(corpus), "--shard-mb", "0.1", "--workers", "1"]
    assert pack.main([*options, "--out", str(whole)]) == 0
    assert pack.main([*options, "--out", str(parts), "--part", "2/3"]) == 0
    assert (
        pack.main([*options, "--out", str(parts), "--merge"]) == 2
        and "not packed yet" in capsys.readouterr().err
    )
    assert pack.main([*options, "--out", str(parts), "--part", "0/3"]) == 0
    assert (
        pack.main([*options, "--out", str(parts), "--part", "1/3"]) == 0
        and not (parts / "index.json").exists()
    )
    assert pack.main(["--merge", "--out", str(parts)]) == 0
    assert folder_bytes(whole) == folder_bytes(parts)


def test_the_same_command_on_a_finished_folder_does_nothing(corpus, tmp_path, capsys):
    options = ["--manifest", str(corpus), "--out", str(tmp_path / "packed"), "--workers", "1"]
    assert pack.main(options) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert pack.main(options) == 0 and "packed already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()} == before
    assert pack.main([*options, "--seed", "1"]) == 2 and "other options" in capsys.readouterr().err


def test_other_options_do_not_resume_unfinished_work(corpus, tmp_path, capsys):
    options = [
        "--manifest",
        str(corpus),
        "--out",
        str(tmp_path / "packed"),
        "--workers",
        "1",
        "--shard-mb",
        "0.1",
    ]
    assert pack.main([*options, "--part", "0/2"]) == 0
    assert pack.main([*options, "--seed", "1", "--part", "1/2"]) == 2
    assert "begun with other options (seed)" in capsys.readouterr().err
    assert pack.main([*options, "--workers", "2", "--part", "1/2"]) == 0, (
        "the number of workers is no such option"
    )


def test_a_corpus_that_has_changed_is_not_packed_by_the_old_plan(corpus, tmp_path, capsys):
    out = tmp_path / "packed"
    options = ["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.1"]
    text = corpus.read_bytes()
    assert pack.main([*options, "--part", "0/2"]) == 0
    corpus.write_bytes(text + b"\n")
    for asked in (["--part", "1/2"], ["--dry-run"]):
        assert (
            pack.main([*options, *asked]) == 2
            and f"{corpus} has changed since {out}" in capsys.readouterr().err
        )
    corpus.write_bytes(text)
    assert pack.main(options) == 0
    corpus.write_bytes(text.replace(b"e", b"i", 1))
    assert pack.main(options) == 2 and f"{corpus} has changed since {out}" in capsys.readouterr().err
    corpus.unlink()
    assert pack.main(options) == 0 and "packed already" in capsys.readouterr().out, (
        "a finished folder needs no corpus"
    )


def test_both_ends_of_a_large_file_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_END_BYTES", 4)
    found = set()
    for text in ("", "ab", "abcdef", "abcdeg", "bbcdef", "abcdefgh.ijkl", "abcdefgh!ijkl", "abcdefgh.ijkm"):
        (tmp_path / "m.jsonl").write_text(text)
        found.add(
            *pack.corpus_files([f"manifest:{tmp_path / 'm.jsonl'},lang=en", f"kaldi:{tmp_path}"]).values()
        )
    assert len(found) == 7, "only what lies between the ends is not seen"


def test_a_dry_run_writes_no_shard_and_reports_the_plan(corpus, tmp_path, capsys):
    out = tmp_path / "packed"
    assert pack.main(["--manifest", str(corpus), "--out", str(out), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert (
        "19 samples" in output
        and "bad_json" in output
        and "duplicate_id" in output
        and not list(out.glob("*.tar"))
    )
    assert (
        pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1"]) == 0
        and len(ShardIndex.load(out)) == 13
    )


def test_after_a_dry_run_any_options_may_follow(corpus, tmp_path, capsys):
    out = tmp_path / "packed"
    options = ["--manifest", str(corpus), "--out", str(out), "--workers", "1"]
    assert pack.main([*options, "--dry-run"]) == 0
    assert (
        pack.main([*options, "--dry-run", "--languages", "en"]) == 0 and "language" in capsys.readouterr().out
    )
    assert (
        pack.main([*options, "--dry-run", "--languages", "de"]) == 2
        and "nothing to pack" in capsys.readouterr().err
    )
    assert not [path for path in out.rglob("*") if path.is_file()], "a dry run leaves no file"
    with open(corpus, "a") as file:
        file.write(json.dumps({"id": "later", "audio": "clip 0.wav", "text": "added since"}) + "\n")
    assert pack.main([*options, "--seed", "1"]) == 0 and len(ShardIndex.load(out)) == 14


def test_a_dry_run_leaves_what_was_begun_alone(corpus, tmp_path, capsys):
    out = tmp_path / "packed"
    options = ["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.1"]
    assert pack.main([*options, "--part", "0/2"]) == 0
    before = folder_bytes(out / ".pack" / "plan") | folder_bytes(out / ".pack" / "done")
    assert pack.main([*options, "--dry-run"]) == 0
    assert (
        pack.main([*options, "--dry-run", "--languages", "en"]) == 2
        and "begun with other options" in capsys.readouterr().err
    )
    assert folder_bytes(out / ".pack" / "plan") | folder_bytes(out / ".pack" / "done") == before
    assert pack.main([*options, "--part", "1/2"]) == 0 and pack.main(["--merge", "--out", str(out)]) == 0


def test_a_plan_that_another_process_of_this_machine_is_making_is_left_alone(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = os.uname().nodename
    for process in (os.getpid(), dead.pid):
        for name in (
            f"plan.{here}.{process}.140123456789",
            f"trial.{here}.{process}",
            f"p-000000.tar.{here}.{process}",
        ):
            (tmp_path / ".pack" / name).mkdir(parents=True)
    Packing(tmp_path, "p").clear_unfinished()
    assert len(left := list((tmp_path / ".pack").iterdir())) == 3 and all(
        f".{os.getpid()}" in path.name for path in left
    )


def limited(bytes_at_most):
    """For a child: writing past this many bytes of a file fails, as on a full disk (EFBIG in place of
    ENOSPC)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_at_most, bytes_at_most))


def test_a_full_disk_stops_the_run_with_one_line_and_nothing_half_done(large_corpus, tmp_path):
    out = tmp_path / "packed"
    command = [
        sys.executable,
        "-m",
        "data_tools.pack",
        "--manifest",
        str(large_corpus),
        "--out",
        str(out),
        *OPTIONS,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: limited(100_000), check=False
    )
    assert (
        done.returncode == 1
        and "cannot write" in done.stderr
        and "free space" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(out.glob("*.tar")) and not (out / "index.json").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0, (
        "with space again it resumes"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_is_an_output_error(tmp_path):
    from data_tools.shards import OutputError, ShardWriter

    (tmp_path / "full").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "full")
    with pytest.raises(OutputError, match="No space left"):
        writer.add(
            "a",
            bytes(3 << 20),
            "flac",
            {"id": "a", "corpus": "c", "task": "asr", "text": "", "lang": None, "duration": 1.0},
        )
        writer.close("a.tar")


def test_an_output_that_cannot_be_written_stops_before_work(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert pack.main(["--manifest", str(corpus), "--out", str(tmp_path / "file" / "packed")]) == 1
    output = capsys.readouterr().err
    assert output.startswith("error: cannot write") and output.count("\n") == 1


def test_a_worker_that_dies_is_an_error(corpus, tmp_path, monkeypatch, capsys):
    def die(self, shard, progress=None):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(Packing, "write_shard", die)
        assert (
            pack.main(["--manifest", str(corpus), "--out", str(tmp_path / "packed"), "--workers", "1"]) == 1
        )
    assert "a worker process died" in capsys.readouterr().err
    assert pack.main(["--manifest", str(corpus), "--out", str(tmp_path / "packed"), "--workers", "1"]) == 0


def test_a_worker_that_dies_leaves_its_shards_name(corpus, tmp_path, monkeypatch, capsys):
    def die(self, *arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Packing, "_add", die)
    options = [
        "--manifest",
        str(corpus),
        "--out",
        str(tmp_path / "packed"),
        "--workers",
        "1",
        "--shard-mb",
        "0.1",
    ]
    assert pack.main(options) == 1
    assert (
        "a worker process died while it wrote packed-000000.tar (out of memory?)" in capsys.readouterr().err
    )


def test_workers_do_not_outlive_a_killed_parent(large_corpus, tmp_path):
    process = start(large_corpus, tmp_path / "packed")
    children = []
    while not children:
        assert process.poll() is None, process.stderr.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "workers are still there"
        time.sleep(0.1)


def test_a_corpus_that_is_mostly_missing_stops_the_run(tmp_path, capsys):
    rows = [{"id": f"{i}", "audio": f"gone{i}.wav", "text": "x"} for i in range(150)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
        == 2
    )
    output = capsys.readouterr().err
    assert "150 of 150 clips are missing or broken" in output and "missing_file" in output


def test_nothing_left_to_pack_is_said(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "audio": "gone.wav", "text": "x"}\n')
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
        == 2
    )
    assert "no sample was left to pack (missing_file 1)" in capsys.readouterr().err
    soundfile.write(tmp_path / "gone.wav", [0.0] * 8000, 16000)  # fixed: the same command packs it
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
        == 0
    )
    capsys.readouterr()
    (tmp_path / "n.jsonl").write_text("broken\n")
    assert (
        pack.main(
            ["--manifest", str(tmp_path / "n.jsonl"), "--out", str(tmp_path / "out2"), "--workers", "1"]
        )
        == 2
    )
    assert (
        "every sample was refused" in capsys.readouterr().err
        and "bad_json" in (tmp_path / "out2/rejected.jsonl").read_text()
    )
    (tmp_path / "n.jsonl").write_text('{"id": "a", "audio": "gone.wav", "text": "x"}\n')
    assert (
        pack.main(
            ["--manifest", str(tmp_path / "n.jsonl"), "--out", str(tmp_path / "out2"), "--workers", "1"]
        )
        == 0
    )


def test_reject_file_is_the_same_after_an_interruption(corpus, tmp_path):
    out = tmp_path / "packed"
    for part in ("1/2", "0/2"):
        pack.main(
            [
                "--manifest",
                str(corpus),
                "--out",
                str(out),
                "--workers",
                "1",
                "--shard-mb",
                "0.1",
                "--part",
                part,
            ]
        )
    pack.main(["--merge", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == REASONS and len(lines) == len(REASONS)
