"""Measure the latency of single clips: compressed frames, first token, end of the answer.

    python -m evaluation.speed --model DIR --shards DIR

Per clip, in seconds: from the waveform to the CTC peaks (encoder, adapter, CTC), from the waveform to the
first token, and to the end of the answer; then medians, and the real-time factor (seconds of work per second
of audio). Reading and decoding the file is not counted.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from core.command_line import CommandParser, accept_old_name
from data_tools.shards import ShardError
from evaluation.run import InputError, shard_folder
from model import artifact
from model.batch import Batch
from model.pretrained import SourceError
from model.soundwave import Soundwave
from recipe.config import DataConfig, RecipeError
from stream import EvalStream


class Clock(BaseStreamer):
    """Notes when each token arrives. `generate` hands over the prompt first: the second call brings the first
    new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def wait(device: torch.device) -> float:
    """The clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def measure(model: Soundwave, batch: Batch, max_new_tokens: int) -> dict[str, float]:
    """One conversation: {audio_path, first_token, total} in seconds, {frames, kept, tokens} as counts.
    first_token is there when the model answers at all (a stage 1 folder has no LLM: the CTC transcript is its
    answer)."""
    device = next(model.parameters()).device
    began = wait(device)
    model.encode_audio(batch)
    listened = wait(device)
    frames, kept = (int(lengths.sum()) for lengths in model.lengths_of_last_batch)
    result = {"audio_path": listened - began, "frames": frames, "kept": kept}
    began, clock = wait(device), Clock()
    if model.llm is None:
        model.ctc_greedy(batch)
    else:
        result["tokens"] = len(model.generate(batch, max_new_tokens=max_new_tokens, streamer=clock)[0])
        result["first_token"] = clock.times[1] - began
    result["total"] = wait(device) - began
    return result


def summarise(clips: list[dict]) -> dict:
    """Medians over clips, and sums' ratios: real-time factor, CTC peaks and frames per second of audio."""
    seconds = sum(clip["seconds"] for clip in clips)
    result = {
        "clips": len(clips),
        "audio_seconds": seconds,
        "real_time_factor": sum(clip["total"] for clip in clips) / seconds,
        "frames_per_second": sum(clip["frames"] for clip in clips) / seconds,
        "kept_per_second": sum(clip["kept"] for clip in clips) / seconds,
    }
    for key in ("audio_path", "first_token", "total"):
        values = [clip[key] for clip in clips if key in clip]
        if values:
            result[f"{key}_ms_median"] = float(np.median(values) * 1000)
            result[f"{key}_ms_p90"] = float(np.quantile(values, 0.9) * 1000)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.speed",
        __doc__.splitlines()[0],
        example="--model runs/me/sft/model --shards shards/test",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--shards", required=True, help="folder written by data_tools/pack.py")
    parser.add_argument("--split", help="sub-folder of --shards")
    parser.add_argument("--task", nargs="+", default=["asr"], help="tasks to time")
    parser.add_argument(
        "--limit", type=int, default=20, help="how many, evenly spaced over the folder (default: 20)"
    )
    accept_old_name(parser, "--clips", "--limit")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, help="write clips and summary here as JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        shards = shard_folder(options.shards, options.split)
        model = artifact.load(options.model, device=device)
        stream = EvalStream(
            str(shards),
            model.tokenizer,
            model.config,
            model.stage,
            tasks=options.task,
            limit=options.limit,
            batch_seconds=0.01,
            data=DataConfig(workers=0),
        )  # a budget that one clip exceeds: one clip a batch
    except (InputError, RecipeError, ShardError, SourceError, artifact.FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clips: list[dict] = []
    for batch, samples in tqdm(stream, desc="speed", unit="clip", total=len(stream)):
        if not samples:  # the clip could not be read
            continue
        batch = batch.to(device)
        if not clips:
            measure(
                model, batch, options.max_new_tokens
            )  # the first run pays for allocations and compiled kernels
        clips.append(
            measure(model, batch, options.max_new_tokens)
            | {"id": samples[0]["id"], "seconds": samples[0]["duration"]}
        )
    if not clips:
        print(f"error: {shards} holds no readable clip of task {', '.join(options.task)}", file=sys.stderr)
        return 2
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    result = {
        "device": f"{name}, {torch.get_num_threads()} CPU threads",
        **summarise(clips),
        "skipped": len(stream.rejected),
        "per_clip": clips,
    }
    for key, value in result.items():
        if key != "per_clip":
            print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
