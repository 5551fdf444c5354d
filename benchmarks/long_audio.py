"""Compare windows of long recordings with clip by clip, and measure memory.

    python -m benchmarks.long_audio --model RUN --manifest FILE

FILE: a manifest with `audio` and `text` (the quick start's
.cache/quickstart/manifests/dialogues-test.jsonl). Its clips, in order, are joined into one recording with
silences of 0.3 to 1.0 s between them.

    clips       each clip alone, one after another, at its known borders
    windows     the recording as one file: scanned, cut at pauses, batched (borders unknown)

Both in one process, for each --decode; the WER is that of the whole text. Then, in processes of their
own, the peak of resident memory while recordings of --memory-minutes are transcribed by the CTC head (the
clips repeated). Also: windows that the gate skipped, and whether it passes each clip by itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from tabulate import tabulate
from tqdm import tqdm

import soundwave
from benchmarks.machine import keep, machine, settings
from core.audio import decode
from core.command_line import CommandParser, accept_old_name
from core.decode_names import decode_name
from core.text import count_errors
from soundwave.decoding import DECODES
from soundwave.recogniser import GATE

RATE = 16_000


def clips_of(manifest: Path, minutes: float) -> tuple[list[np.ndarray], list[str]]:
    """Clips in their order, of about so many minutes with the silences, and their texts."""
    clips, texts, seconds = [], [], 0.0
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        clips.append(decode(row["audio"]).samples)
        texts.append(row["text"])
        seconds += len(clips[-1]) / RATE + 0.65
        if seconds >= 60 * minutes:
            break
    return clips, texts


def write_joined(path: Path, clips: list[np.ndarray], minutes: float | None = None) -> float:
    """Write clips with silences between them as one file; repeated until it has so many minutes. Returns its
    seconds."""
    random, frames = np.random.default_rng(0), 0
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        while True:
            for clip in clips:
                silence = np.zeros(round(RATE * random.uniform(0.3, 1.0)), np.float32)
                file.write(np.concatenate([clip, silence]))
                frames += len(clip) + len(silence)
                if minutes is not None and frames >= 60 * minutes * RATE:
                    return frames / RATE
            if minutes is None:
                return frames / RATE


def wer(references: list[str], texts: list[str]) -> float:
    counted = count_errors([" ".join(references)], [" ".join(texts)], ["en"])
    return float(100 * counted.errors.sum() / counted.units.sum())


def peak_mib(model: str, file: Path, device: str) -> tuple[float, float]:
    """Resident memory after loading the model, and at its peak while a file is transcribed, in a process
    of its own."""
    command = [sys.executable, "-m", "benchmarks.long_audio", "--model", model, "--peak", str(file)]
    out = subprocess.run([*command, "--device", device], check=True, capture_output=True, text=True).stdout
    before, after = out.split()[-2:]
    return float(before), float(after)


def print_peak(model: str, file: str, device: str) -> None:
    speech = soundwave.load(model, device=device, with_llm=False)
    speech.transcribe(np.random.default_rng(0).normal(0, 0.1, 60 * RATE).astype(np.float32), decode="ctc")
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
    speech.transcribe(file, decode="ctc")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(*peaks)


def main() -> None:
    parser = CommandParser(
        "python -m benchmarks.long_audio", __doc__, example="--model runs/quickstart/sft/model"
    )
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--manifest", type=Path, help="manifest")
    accept_old_name(parser, "--test", "--manifest")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the joined recording")
    parser.add_argument(
        "--decode",
        nargs="+",
        choices=DECODES,
        type=decode_name,
        default=["greedy", "drafted"],
        help="of both sides",
    )
    parser.add_argument("--batch-seconds", type=float, default=120.0, help="audio in a batch, padded")
    parser.add_argument(
        "--memory-minutes",
        type=float,
        nargs="*",
        default=[10.0, 60.0],
        help="lengths of the files by which memory is measured",
    )
    parser.add_argument("--memory-model", help="another model folder for the memory (default: --model)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    if options.peak:
        print_peak(options.model, options.peak, options.device)
        return
    facts = machine(options.device)
    clips, texts = clips_of(options.manifest, options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "joined.wav"
        seconds = write_joined(file, clips)
        model = soundwave.load(options.model, device=options.device)
        ways = {}
        for decode in options.decode:
            how = {"decode": decode, "batch_seconds": options.batch_seconds}
            model.transcribe(clips[0], **how)  # warm
            began, cpu = time.perf_counter(), time.process_time()
            whole = model.transcribe(file, **how)
            ways["windows, batched", decode] = [
                wer(texts, [whole.text]),
                time.perf_counter() - began,
                time.process_time() - cpu,
            ]
            began, cpu = time.perf_counter(), time.process_time()
            alone = [model.transcribe(clip, **how) for clip in tqdm(clips, desc=f"clips, {decode}")]
            ways["clips, one at a time", decode] = [
                wer(texts, [one.text for one in alone]),
                time.perf_counter() - began,
                time.process_time() - cpu,
            ]
        gated = sum(one.skipped_seconds > 0 for one in alone)
        base = ways["clips, one at a time", options.decode[0]][2]
        results = {
            "seconds": seconds,
            "clips": len(clips),
            "gate": GATE,
            "clips_gated": gated,
            "windows": len(whole.segments),
            "skipped_seconds": whole.skipped_seconds,
            "ways": [
                {"way": way, "decode": decode, "wer": errors, "wall_seconds": wall, "cpu_seconds": cpu}
                for (way, decode), (errors, wall, cpu) in ways.items()
            ],
        }
        table = (
            f"{len(clips)} clips joined into {seconds / 60:.1f} min, {len(whole.segments)} windows with "
            f"text, {gated} clips gated as silence, {options.device}\n\n"
            + tabulate(
                [
                    [way, decode, f"{errors:.1f}", f"{wall:.1f}", f"{cpu:.1f}", f"{base / cpu:.2f}"]
                    for (way, decode), (errors, wall, cpu) in ways.items()
                ],
                tablefmt="github",
                headers=["way", "decode", "WER, %", "wall, s", "CPU, s", "speed by CPU time"],
                disable_numparse=True,
            )
        )
        memory = []
        for minutes in options.memory_minutes:
            write_joined(file, clips, minutes)
            loaded, peak = peak_mib(options.memory_model or options.model, file, options.device)
            memory.append([minutes, loaded, peak])
        if memory:
            table += "\n\n" + tabulate(
                [[f"{m:g}", f"{before:.0f}", f"{after:.0f}"] for m, before, after in memory],
                tablefmt="github",
                headers=["minutes", "peak RSS after a minute of noise, MiB", "peak RSS at the end, MiB"],
                disable_numparse=True,
            )
            results["memory"] = memory
    print(table)
    if options.out:
        keep(options.out, {"machine": facts, "options": settings(options), "results": results}, table)


if __name__ == "__main__":
    main()
