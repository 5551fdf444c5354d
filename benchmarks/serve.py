"""Measure the requests per second of the HTTP server.

    python -m benchmarks.serve MODEL --audio DIR [--requests 48]

The server's own command is started on the loopback once for each way of running the LLM: by torch with
batching, by torch without, and by vLLM with `--backend torch vllm` (needs make setup-vllm). Each is asked for
the same transcriptions by 1, 8 and 32 clients that send their next request when the last one is answered
(a closed loop). Per cell: requests and audio seconds per second, latency of the median and the 95th
percentile, requests that failed. The servers' texts must be equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
from tabulate import tabulate

from benchmarks.machine import keep, machine
from core.audio import EXTENSIONS, Recording
from core.command_line import CommandParser, accept_old_name

START_SECONDS = 900.0  # vLLM takes minutes on a busy machine
#: Backend -> its rows of the table: name, options of the server.
WAYS = {
    "torch": [("torch, batches", []), ("torch, one by one", ["--no-batching"])],
    "vllm": [("vLLM", ["--backend", "vllm"])],
}


@contextmanager
def server(model: str, *more: str) -> Iterator[tuple[str, str]]:
    """Yields the server's address and its model's name."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "serving", model, "--port", "0", "--waiting-jobs", "1000", *more]
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            yield ready(process, log)
        finally:
            process.terminate()
            process.wait(60)


def ready(process: subprocess.Popen, log) -> tuple[str, str]:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        for line in log:
            if line.startswith("{") and (event := json.loads(line))["event"] == "ready":
                return event["url"], event["model"]
        time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"error: the server did not start: {log.read()[-500:]}")


def load(url: str, name: str, clips: list[tuple[bytes, float]], clients: int) -> tuple[dict, list[str]]:
    """Ask for each clip once, by so many clients."""
    texts, latencies, failed = [""] * len(clips), [0.0] * len(clips), 0
    numbers, lock = iter(range(len(clips))), threading.Lock()

    def work() -> None:
        nonlocal failed
        with httpx2.Client(timeout=600) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                began = time.perf_counter()
                try:
                    answer = client.post(
                        f"{url}/audio/transcriptions",
                        data={"model": name},
                        files={"file": ("clip", clips[number][0])},
                    )
                    answer.raise_for_status()
                    texts[number] = answer.json()["text"]
                except httpx2.HTTPError:
                    failed += 1
                latencies[number] = time.perf_counter() - began

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    row = {
        "clients": clients,
        "requests_per_second": len(clips) / spent,
        "audio_seconds_per_second": sum(seconds for _, seconds in clips) / spent,
        "p50_seconds": float(np.percentile(latencies, 50)),
        "p95_seconds": float(np.percentile(latencies, 95)),
        "errors": failed,
    }
    return row, texts


def main() -> int:
    parser = CommandParser(
        "python -m benchmarks.serve", __doc__, example="runs/quickstart/sft/model --audio clips"
    )
    parser.add_argument("model", help="model folder of stage 2 or 3")
    parser.add_argument("--audio", type=Path, required=True, help="folder of audio files")
    accept_old_name(parser, "--clips", "--audio")
    parser.add_argument("--requests", type=int, default=48, help="requests in each cell of the table")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients that ask at a time"
    )
    parser.add_argument("--encoder", help="as of python -m serving")
    parser.add_argument("--llm", help="as of python -m serving")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=list(WAYS),
        default=["torch"],
        help="what runs the LLM; several are compared",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/serve.json"),
        help="where to write the numbers, the table beside them (.txt; default: %(default)s)",
    )
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    files = sorted(p for p in options.audio.iterdir() if p.suffix[1:].lower() in EXTENSIONS)
    if not files:
        parser.error(f"--audio {options.audio} holds no audio")
    chosen = [files[i * len(files) // options.requests] for i in range(options.requests)]
    clips = [(path.read_bytes(), Recording(path).seconds() or 0.0) for path in chosen]
    parts = [
        part
        for name in ("encoder", "llm")
        if (value := getattr(options, name))
        for part in (f"--{name}", value)
    ]
    rows, texts = [], {}
    for way, more in [one for backend in options.backend for one in WAYS[backend]]:
        with server(options.model, *parts, *more) as (url, name):
            load(url, name, clips[:4], 2)  # warm
            for clients in options.clients:
                row, texts[way, clients] = load(url, name, clips, clients)
                rows.append({"backend": way, **row})
                print(rows[-1], flush=True)
    first, *others = texts.values()
    differ = max((sum(a != b for a, b in zip(first, other, strict=True)) for other in others), default=0)
    table = tabulate(
        [
            [
                row["clients"],
                row["backend"],
                f"{row['requests_per_second']:.2f}",
                f"{row['audio_seconds_per_second']:.1f}",
                f"{row['p50_seconds']:.2f}",
                f"{row['p95_seconds']:.2f}",
                row["errors"],
            ]
            for row in sorted(rows, key=lambda row: row["clients"])
        ],
        tablefmt="github",
        headers=["clients", "LLM", "requests / s", "audio s / s", "p50, s", "p95, s", "errors"],
    )
    seconds = sum(seconds for _, seconds in clips)
    text = (
        f"{len(clips)} requests a cell, {seconds:.0f} s of audio; texts that differ between cells: {differ}; "
        f"load average at the end {os.getloadavg()[0]:.1f}\n{table}"
    )
    print(text)
    facts = {"machine": machine("cpu"), "requests": len(clips), "audio_seconds": seconds}
    keep(options.out, facts | {"texts_that_differ": differ, "results": rows}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
