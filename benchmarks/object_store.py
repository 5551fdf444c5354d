"""Measure training data from a web server with latency against the same folder on the disk, in one run.

    python -m benchmarks.object_store --out benchmarks/results/object_store.json

Each side: one pass of the stream over the same clips, read, decoded, tokenised and collated by the same
worker processes, in turns. "cold" begins with an empty cache, "cached" follows it. The server is a process on
the same machine (tests/stream/range_server.py) that waits before each answer. Ids of all sides are compared.
Mark: cold at least 0.9 of local.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from benchmarks.machine import keep, machine
from core.command_line import CommandParser

SIDES = ("local", "cold", "cached")


def one_pass(shards: str, workers: int) -> tuple[float, list[str]]:
    """Clips a second after the first fifth of the steps, in which processes start, and all ids in order."""
    from model.config import SoundwaveConfig
    from recipe.config import Corpus, DataConfig
    from stream import Plan, Stream
    from tests.stream.conftest import byte_tokenizer

    data = DataConfig(
        train=[Corpus(shards=shards)], batch_seconds=240.0, micro_batch_seconds=60.0, workers=workers
    )
    plan, steps = Plan.open(data, "alignment", 10**6), 1
    while next(iter(plan.passes(steps).values())) < 1:
        steps += 1
    stream = Stream(data, "alignment", byte_tokenizer(), SoundwaveConfig(), 0, 1, 0, steps, plan=plan)
    ids: list[str] = []
    began, before = time.perf_counter(), 0
    for step in stream:
        for batch in step.micro_batches:
            ids += batch.ids
        if step.step == steps // 5:
            began, before = time.perf_counter(), len(ids)
    return (len(ids) - before) / (time.perf_counter() - began), ids


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make(folder: Path, clips: int) -> Path:
    from tests.stream.conftest import record, sound, write_folder

    samples = []
    for number in range(clips):
        seconds = 2.0 + number % 12
        samples.append((record(number, seconds), sound(seconds, number), "flac"))
    return write_folder(folder / "toy", samples, per_shard=100)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser("python -m benchmarks.object_store", __doc__, example="--clips 400 --repeats 2")
    parser.add_argument("--clips", type=int, default=1200, help="clips in the shards")
    parser.add_argument("--workers", type=int, default=4, help="worker processes of the data loader")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each way, taken in turn; the median counts"
    )
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    options = parser.parse_args(argv)
    facts = machine()
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch), options.clips)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.stream.range_server", scratch, f"{options.delay}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/toy"
        expected, used = None, 0.0
        try:
            for turn in range(options.repeats):
                os.environ["SOUNDWAVE_SHARD_CACHE"] = f"{scratch}/cache-{turn}"
                for side in SIDES:
                    speed, ids = one_pass(str(folder) if side == "local" else url, options.workers)
                    speeds[side].append(speed)
                    expected = expected or ids
                    if ids != expected:
                        print(f"{side}: other utterances than the local folder's", file=sys.stderr)
                        return 1
            used = processor_seconds(server.pid)
        finally:
            server.kill()
            server.wait()
    local = statistics.median(speeds["local"])
    rows = [
        (side, statistics.median(values), min(values), max(values), statistics.median(values) / local)
        for side, values in speeds.items()
    ]
    table = tabulate(rows, headers=("side", "clips/s", "least", "most", "of local"), floatfmt=".2f")
    settings = {"clips": options.clips, "workers": options.workers, "delay": options.delay}
    head = (
        f"{options.clips} clips, {options.workers} workers, {options.delay * 1e3:.0f} ms before each answer"
    )
    text = f"{head}; the server used {used:.1f} processor seconds of these cores\n\n{table}"
    print(text)
    if options.out:
        keep(
            options.out,
            {"machine": facts, "settings": settings, "clips_per_second": speeds, "server_seconds": used},
            text,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
