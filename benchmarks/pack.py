"""Measure packing against other tools in one run.

    python -m benchmarks.pack [--manifest M.jsonl] [--hours 8] [--workers 2] [--out FILE]

The same clips (16 kHz mono WAV), the same codec (FLAC, libsndfile's default level) and worker count, one run,
each way in a process of its own, start-up included, files in the page cache:

    codec bound   the clips read and encoded by soundfile in as many processes, nothing written: what no
                  packer can beat
    this project  data_tools/pack.py (plan, checksums, index)
    lhotse        CutSet.to_shar from a ready cut manifest
    webdataset    webdataset.ShardWriter with soundfile, each process its slice of the list
    pool          a task of a process pool for each tar, written with tarfile (the way of shard-list makers)
    copy          data_tools/pack.py --codec copy against `tar cf` of the same files

Marks: FLAC at least 0.9 of the codec bound and 1.5 times lhotse; copy at least 0.7 of tar.

`--lines 300000` measures planning instead, on one core, without audio: a manifest of so many lines is read,
filtered, shuffled and cut into shards, with no filter and with those that need no audio (seconds, rate,
language), beside json.loads and json.dumps of each line.
Mark: at most 40 microseconds of processor time a line, and no more memory for ten times the lines.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.machine import keep, machine
from core.command_line import CommandParser, accept_old_name

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000
CLIPS_A_SHARD = 500
PLANNING_MARK = 40  # microseconds of processor time a line


def synthetic_clip(number: int) -> np.ndarray:
    """3 to 16 s of noise through formant-like resonances with pauses: compresses about as speech does.
    [samples] int16."""
    rng = np.random.default_rng(number)
    samples = round(rng.uniform(3, 16) * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.fft.rfftfreq(samples, 1 / RATE)
    shape = sum(
        np.exp(-(((hertz - centre) / 250) ** 2)) * gain
        for centre, gain in ((300, 1.0), (1200, 0.4), (2600, 0.15))
    )
    wave = np.fft.irfft(spectrum * (shape + 0.002), samples)
    syllables = np.clip(
        np.sin(2 * np.pi * 2.2 * np.arange(samples) / RATE + rng.uniform(0, 6)) + 0.4, 0.02, 1
    )
    wave *= syllables
    return (wave / np.abs(wave).max() * 12000).astype(np.int16)


def prepare(folder: Path, manifest: Path | None, hours: float) -> tuple[Path, Path, float]:
    """16 kHz WAV files of about `hours` (a real manifest is repeated under new names as often as it takes),
    their manifest and lhotse cut manifest; made once. Returns (manifest, cuts, hours).

    Errors: SystemExit for a folder that was made from another manifest or number of hours: the report would
    name the wrong one.
    """
    clips, rows_path, cuts, source = (
        folder / name for name in ("clips", "manifest.jsonl", "cuts.jsonl", "source.json")
    )
    made_from = {
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None,
        "hours": hours,
    }
    if rows_path.exists() and (not source.exists() or json.loads(source.read_text()) != made_from):
        raise SystemExit(
            f"{folder} was made with another --manifest or --hours: remove it, or give another --cache"
        )
    if not rows_path.exists():
        shutil.rmtree(clips, ignore_errors=True)  # of a run that did not end, with other options perhaps
        clips.mkdir(parents=True)
        rows, seconds = [], 0.0
        sources = [json.loads(line) for line in open(manifest)] if manifest else None
        while seconds < hours * 3600:
            name, path = f"clip{len(rows):07d}", clips / f"clip{len(rows):07d}.wav"
            if sources is None:
                samples, text = synthetic_clip(len(rows)), "words that are said here"
            else:
                from core.audio import decode

                row = sources[len(rows) % len(sources)]
                samples, text = decode(manifest.parent / row["audio"], dtype="int16").samples, row["text"]
            soundfile.write(path, samples, RATE, subtype="PCM_16")
            rows.append(
                {"id": name, "audio": str(path), "text": text, "lang": "en", "duration": len(samples) / RATE}
            )
            seconds += len(samples) / RATE
        cuts.write_text("".join(json.dumps(cut_of(row)) + "\n" for row in rows))
        source.write_text(json.dumps(made_from) + "\n")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    return rows_path, cuts, sum(row["duration"] for row in rows) / 3600


def cut_of(row: dict) -> dict:
    recording = {
        "id": row["id"],
        "sources": [{"type": "file", "channels": [0], "source": row["audio"]}],
        "sampling_rate": RATE,
    }
    recording |= {
        "num_samples": round(row["duration"] * RATE),
        "duration": row["duration"],
        "channel_ids": [0],
    }
    supervision = {
        "id": row["id"],
        "recording_id": row["id"],
        "start": 0.0,
        "duration": row["duration"],
        "channel": 0,
        "text": row["text"],
    }
    cut = {
        "id": row["id"],
        "start": 0.0,
        "duration": row["duration"],
        "channel": 0,
        "supervisions": [supervision],
    }
    return {**cut, "recording": recording, "type": "MonoCut"}


def flac(path: str) -> bytes:
    samples, rate = soundfile.read(path, dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _encode_all(rows: list[dict]) -> int:
    return sum(len(flac(row["audio"])) for row in rows)


def codec_bound(manifest: Path, cuts: Path, out: Path, workers: int) -> None:
    with Pool(workers) as pool:
        pool.map(_encode_all, slices(manifest, CLIPS_A_SHARD), chunksize=1)


def slices(manifest: Path, size: int) -> list[list[dict]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def lhotse(manifest: Path, cuts: Path, out: Path, workers: int) -> None:
    from lhotse import CutSet

    CutSet.from_jsonl_lazy(cuts).to_shar(
        out, fields={"recording": "flac"}, shard_size=CLIPS_A_SHARD, num_jobs=workers
    )


def _write_webdataset(task: tuple[int, list[dict], Path]) -> None:
    import webdataset

    number, rows, out = task
    with webdataset.ShardWriter(f"{out}/part{number}-%06d.tar", maxcount=CLIPS_A_SHARD, verbose=0) as writer:
        for row in rows:
            writer.write({"__key__": row["id"], "flac": flac(row["audio"]), "json": {"text": row["text"]}})


def webdataset_writer(manifest: Path, cuts: Path, out: Path, workers: int) -> None:
    rows = [row for part in slices(manifest, CLIPS_A_SHARD) for row in part]
    with Pool(workers) as pool:
        pool.map(
            _write_webdataset,
            [(number, rows[number::workers], out) for number in range(workers)],
            chunksize=1,
        )


def _write_tar(task: tuple[int, list[dict], Path]) -> None:
    number, rows, out = task
    with tarfile.open(out / f"shard_{number:09d}.tar", "w") as tar:
        for row in rows:
            for name, data in (
                (f"{row['id']}.txt", row["text"].encode()),
                (f"{row['id']}.flac", flac(row["audio"])),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def pool_per_file(manifest: Path, cuts: Path, out: Path, workers: int) -> None:
    with Pool(workers) as pool:
        for result in [
            pool.apply_async(_write_tar, ((n, rows, out),))
            for n, rows in enumerate(slices(manifest, CLIPS_A_SHARD))
        ]:
            result.get()


IN_PROCESS = {
    "codec bound": codec_bound,
    "lhotse": lhotse,
    "webdataset": webdataset_writer,
    "pool": pool_per_file,
}


def command(way: str, manifest: Path, cuts: Path, out: Path, workers: int) -> list[str]:
    if way in IN_PROCESS:
        return [
            sys.executable,
            "-m",
            "benchmarks.pack",
            "--way",
            way,
            str(manifest),
            str(cuts),
            str(out),
            str(workers),
        ]
    if way == "tar":
        return ["tar", "cf", str(out / "all.tar"), "-C", str(manifest.parent), "clips"]
    codec = {"this project": "flac", "copy": "copy"}[way]
    pack = [
        sys.executable,
        str(ROOT / "data_tools" / "pack.py"),
        "--manifest",
        str(manifest),
        "--out",
        str(out),
    ]
    return [*pack, "--workers", str(workers), "--codec", codec]


def measure(way: str, manifest: Path, cuts: Path, out: Path, workers: int) -> float:
    """Seconds of one run, from nothing to everything on the disk (`sync` included, for all alike)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()
    started = time.perf_counter()
    subprocess.run(
        command(way, manifest, cuts, out, workers),
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    os.sync()
    return time.perf_counter() - started


# --- planning -----------------------------------------------------------------------------------------------

PLANNING = ("json.loads and json.dumps", "plan", "plan with filters")


def lines_of(path: Path, count: int) -> Path:
    """A manifest of `count` lines, as corpora have them."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "id": f"utterance-{number:09d}",
                "audio": f"clips/{number % 1000:03d}/{number:09d}.flac",
                "lang": "en",
            }
            row |= {
                "text": f"these are the words of utterance {number}, which are as many as in a sentence that is read aloud"  # noqa: E501
            }
            file.write(
                json.dumps({**row, "speaker": f"s{number % 997}", "duration": 3.0 + number % 1300 / 100})
                + "\n"
            )
    return path


def plan_once_here(way: str, manifest: Path, out: Path) -> dict:
    """Processor seconds and peak memory in MB of one way to go through a manifest, in this process."""
    from data_tools.corpora import Corpus
    from data_tools.filters import Filters, SampleFilter
    from data_tools.plan import Layout, make_plan

    limits = {"min_seconds": 0.5, "max_seconds": 30, "min_rate": 1, "max_rate": 60, "langs": ["en", "de"]}
    filters = Filters(**limits) if "filters" in way else Filters()
    started = time.process_time()
    if way == PLANNING[0]:
        with open(manifest, encoding="utf-8") as lines, open(out, "w", encoding="utf-8") as copy:
            for line in lines:
                copy.write(json.dumps(json.loads(line), ensure_ascii=False) + "\n")
    else:
        make_plan(out, [Corpus(f"manifest:{manifest}")], SampleFilter(filters), Layout(), {})
    return {
        "seconds": time.process_time() - started,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_planning(options: argparse.Namespace) -> int:
    """Print microseconds a line and peak memory, for all lines and for a tenth; exit code 1 where a mark
    is missed."""
    folder = options.cache.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    counts = (options.lines // 10, options.lines)
    runs: dict[str, dict[int, list[dict]]] = {way: {count: [] for count in counts} for way in PLANNING}
    for count in counts:
        manifest = lines_of(folder / "lines.jsonl", count)
        for _ in range(options.repeats):
            for way in PLANNING:
                out = folder / "plan"
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
                command = [sys.executable, "-m", "benchmarks.pack", "--plan", way, str(manifest), str(out)]
                done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
                runs[way][count].append(json.loads(done.stdout))
    for path in (folder / "plan", folder / "lines.jsonl"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    lines = [f"{options.lines:,} lines, one core, the least of {options.repeats}", ""]
    lines.append(f"{'way':<28}{'us a line':>11}{'MB':>8}{'MB at a tenth':>15}")
    numbers, missed = {}, False
    for way in PLANNING:
        micro = min(run["seconds"] for run in runs[way][options.lines]) / options.lines * 1e6
        large, small = (min(run["megabytes"] for run in runs[way][count]) for count in reversed(counts))
        numbers[way] = {
            "microseconds": round(micro, 2),
            "megabytes": round(large, 1),
            "megabytes_tenth": round(small, 1),
        }
        lines.append(f"{way:<28}{micro:>11.1f}{large:>8.0f}{small:>15.0f}")
        missed |= way != PLANNING[0] and micro > PLANNING_MARK
    lines += ["", f"mark: {PLANNING_MARK} microseconds a line, {'missed' if missed else 'reached'}"]
    print("\n".join(lines))
    if options.out:
        keep(
            options.out,
            {"machine": machine(), "lines": options.lines, "planning": numbers},
            "\n".join(lines),
        )
    return int(missed)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--plan"]:
        print(json.dumps(plan_once_here(argv[1], Path(argv[2]), Path(argv[3]))))
        return 0
    if argv[:1] == ["--way"]:
        IN_PROCESS[argv[1]](Path(argv[2]), Path(argv[3]), Path(argv[4]), int(argv[5]))
        return 0
    parser = CommandParser("python -m benchmarks.pack", __doc__, example="--hours 1")
    parser.add_argument("--manifest", type=Path, help="real speech (id, audio, text); default: made up")
    parser.add_argument("--hours", type=float, default=8.0, help="hours of audio, about")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes of each way")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each way, taken in turn; the median counts"
    )
    accept_old_name(parser, "--repeat", "--repeats")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "benchmark-pack", help="for clips and output (large)"
    )
    accept_old_name(parser, "--folder", "--cache")
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    parser.add_argument(
        "--lines", type=int, help="measure planning on this many manifest lines instead (300000)"
    )
    options = parser.parse_args(argv)
    if options.lines:
        return measure_planning(options)
    manifest, cuts, hours = prepare(options.cache.absolute(), options.manifest, options.hours)
    facts = machine()
    ways = ["codec bound", "this project", "lhotse", "webdataset", "pool", "copy", "tar"]
    if facts["versions"]["lhotse"] is None:
        print("lhotse is not installed (make setup EXTRAS=bench): left out")
        ways.remove("lhotse")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            seconds[way].append(
                measure(way, manifest, cuts, options.cache.absolute() / "out", options.workers)
            )
    shutil.rmtree(options.cache / "out", ignore_errors=True)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    kind = "real speech" if options.manifest else "made-up sound"
    lines = [
        f"{hours:.2f} h of {kind}, {options.workers} workers, median of {options.repeats}",
        "",
        f"{'way':<14}{'seconds':>9}{'audio-hours/h':>16}{'of this project':>17}",
    ]
    for way in ways:
        ours = median["copy" if way in ("copy", "tar") else "this project"]
        lines.append(
            f"{way:<14}{median[way]:>9.2f}{hours * 3600 / median[way]:>16.0f}{ours / median[way]:>17.2f}"
        )
    marks = {
        "flac / codec bound": (median["codec bound"] / median["this project"], 0.9),
        "copy / tar": (median["tar"] / median["copy"], 0.7),
    }
    if "lhotse" in median:
        marks["flac / lhotse"] = (median["lhotse"] / median["this project"], 1.5)
    lines.append("")
    for name, (value, mark) in marks.items():
        lines.append(f"{name:<20}{value:>6.2f}   mark {mark}   {'reached' if value >= mark else 'missed'}")
    print("\n".join(lines))
    if options.out:
        record = {
            "machine": facts,
            "hours": hours,
            "corpus": kind,
            "workers": options.workers,
            "seconds": seconds,
        }
        record["marks"] = {
            name: {"value": round(value, 3), "mark": mark} for name, (value, mark) in marks.items()
        }
        keep(options.out, record, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
