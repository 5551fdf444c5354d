"""Measure answers per second: batches, single clips, and padding to 30 s.

    python -m benchmarks.generate --model RUN [--shards DIR] [--utterances 32] [--batch 8] [--tokens 24]

The same weights, clips, prompt and number of new tokens (greedy), each way measured in the same process:

    release     one at a time, padded to 30 s, a frame kept of every run, blank runs too (the released
                inference code's way)
    one         one at a time, at true length
    batch       batches of --batch, at true length, sorted by length

Per way: audio seconds per second and new tokens per second over all clips; time to first token (ms, median
over clips or batches: everything up to the first token); LLM positions that an audio takes. Without --model:
a fresh network of --encoder and --llm (its frames kept are those of an untrained CTC head). Without --shards:
noise of 1 to 12 s.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path

import soundfile
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import keep, machine
from data_tools.shards import ShardIndex
from model import folder as model_folder
from model.config import EncoderConfig, LLMConfig, SoundwaveConfig
from model.soundwave import Soundwave

CHAT = [{"role": "user", "content": "<audio_patch>\nPlease transcribe the following audio."}]


def clips(shards: str | None, count: int) -> list[torch.Tensor]:
    """[samples] at 16 kHz each, of at most 30 s, spread evenly over the corpus."""
    if shards is None:
        generator = torch.Generator().manual_seed(0)
        return [
            0.1 * torch.randn(int(16000 * (1 + 11 * i / max(1, count - 1))), generator=generator)
            for i in range(count)
        ]
    index = ShardIndex.load(shards)
    rows = [i for i, row in enumerate(index.samples) if row["audio_size"] and 0.5 <= row["duration"] <= 30]
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    sounds = [
        torch.from_numpy(soundfile.read(io.BytesIO(index.read(row)[0]), dtype="float32")[0]) for row in chosen
    ]
    return [sound.mean(1) if sound.dim() == 2 else sound for sound in sounds]


def as_the_release_does(model: Soundwave) -> None:
    """The released code's way with these weights; its look-back and attention cost no more than ours and
    stay."""
    model.encoder.pad_to_samples = 480_000
    model.config.encoder.pad_to_seconds = 30.0
    model.config.alignment.ctc_length = "full"
    model.config.shrinking.keep, model.config.shrinking.keep_blank_runs = "first", True


def wait(model: Soundwave) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def measure(model: Soundwave, sounds: list[torch.Tensor], batch: int, tokens: int, label: str) -> dict:
    ordered = sorted(sounds, key=len)
    groups = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    first, whole, made, kept = [], 0.0, 0, 0
    model.generate(
        model.prompts([CHAT] * len(groups[0]), groups[0]), max_new_tokens=2, min_new_tokens=2
    )  # warm
    for group in tqdm(groups, desc=label, leave=False):
        prompts = model.prompts([CHAT] * len(group), group)
        for count in (1, tokens):
            wait(model)
            start = time.perf_counter()
            answers = model.generate(prompts, max_new_tokens=count, min_new_tokens=count)
            wait(model)
            spent = time.perf_counter() - start
            if count == 1:
                first.append(spent)
            else:
                whole += spent
                made += sum(map(len, answers))
                kept += int(model.lengths_of_last_batch[1].sum())
    seconds = sum(map(len, sounds)) / 16000
    return {
        "way": label,
        "audio_seconds_per_second": seconds / whole,
        "tokens_per_second": made / whole,
        "first_token_ms": 1000 * statistics.median(first),
        "positions_per_audio": kept / len(sounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder of stage II or III")
    parser.add_argument("--encoder", default="openai/whisper-base")
    parser.add_argument("--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--shards")
    parser.add_argument("--utterances", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the numbers, the table beside them (.txt)")
    options = parser.parse_args()
    torch.manual_seed(0)
    facts = machine(options.device)
    if options.model:
        model = model_folder.load(options.model, device=options.device)
    else:
        config = SoundwaveConfig(encoder=EncoderConfig(options.encoder), llm=LLMConfig(options.llm))
        model = Soundwave.build(config, device=options.device).eval()
    sounds = clips(options.shards, options.utterances)
    results = [
        measure(model, sounds, options.batch, options.tokens, f"batch of {options.batch}"),
        measure(model, sounds, 1, options.tokens, "one"),
    ]
    as_the_release_does(model)
    results.append(measure(model, sounds, 1, options.tokens, "release"))
    seconds = sum(map(len, sounds)) / 16000
    told = (
        f"{len(sounds)} clips, {seconds:.0f} s of audio, {options.tokens} new tokens each, {options.device}\n"
        + tabulate(
            [[r["way"], *(f"{v:.1f}" for v in list(r.values())[1:])] for r in results],
            tablefmt="github",
            headers=["way", "audio s / s", "tokens / s", "first token, ms", "LLM positions / audio"],
        )
    )
    print(told)
    if options.json:
        keep(
            options.json,
            {
                "machine": facts,
                "options": {name: str(value) for name, value in vars(options).items()},
                "audio_seconds": seconds,
                "results": results,
            },
            told,
        )


if __name__ == "__main__":
    main()
