"""Measure answers per second: batches, single clips, and padding to 30 s.

    python -m benchmarks.generate --model RUN [--shards DIR] [--clips 32] [--batch 8] [--tokens 24]

The same weights, clips, prompt and number of new tokens (greedy), each way measured in the same process:

    release     one at a time, padded to 30 s, a frame kept of every run, blank runs too (the released
                inference code's way)
    one         one at a time, at true length
    batch       batches of --batch, at true length, sorted by length

Per way: audio seconds per second and new tokens per second over all clips; time to first token (ms, median
over clips or batches: everything up to the first token); LLM positions that an audio takes. Without --model:
a fresh network of --encoder and --llm (its frames kept are those of an untrained CTC head). Without --shards:
noise of 1 to 12 s.

--drafted 1 8 compares drafted decoding (model/generation/drafted.py) with greedy decoding instead, in batches
of 1 and of 8: forward passes of the LLM per token (of each answer, its end of turn included: 1 for greedy
decoding), time, and answers that differ (by rounding where the two best logits lie within 1e-4).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import keep, machine, settings
from core.audio import decode
from core.command_line import CommandParser, accept_old_name
from core.samples import INSTRUCTIONS, asked
from core.text import count_errors
from data_tools.shards import ShardIndex
from model import artifact
from model.batch import Batch
from model.config import EncoderConfig, LLMConfig, SoundwaveConfig
from model.generation.drafted import Drafting
from model.language_model import embed
from model.soundwave import Audio, Soundwave

CHAT = [asked(INSTRUCTIONS["asr"], SoundwaveConfig.audio_token)]


class Clip(NamedTuple):
    samples: torch.Tensor  # [S] at 16 kHz
    text: str | None


def clips(shards: str | None, count: int) -> list[Clip]:
    """Clips of 0.5 to 30 s, spread evenly over the corpus; noise of 1 to 12 s without a corpus."""
    if shards is None:
        generator = torch.Generator().manual_seed(0)
        lengths = [int(16000 * (1 + 11 * i / max(1, count - 1))) for i in range(count)]
        return [Clip(0.1 * torch.randn(length, generator=generator), None) for length in lengths]
    index = ShardIndex.load(shards)
    rows = [i for i, row in enumerate(index.samples) if row["audio_size"] and 0.5 <= row["duration"] <= 30]
    count = min(count, len(rows))
    clips_of_index = []
    for row in (rows[i * len(rows) // count] for i in range(count)):
        audio, sample = index.read(row)
        clips_of_index.append(Clip(torch.from_numpy(decode(audio).samples), sample.get("text")))
    return clips_of_index


def as_the_release_does(model: Soundwave) -> None:
    """Set the model to the authors' options; its look-back and attention cost no more than ours and
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


def drafted_decoding(model: Soundwave, selected: list[Clip], sizes: list[int], tokens: int) -> list[dict]:
    """Greedy and drafted decoding of the same batches, in turns; the audio is encoded once for both."""
    results = []
    encode = model.encode_audio
    for size in sizes:
        ordered = sorted(selected, key=lambda clip: len(clip.samples))
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        sums: Counter[str] = Counter()
        ratios, gaps, model._spelling = [], [], None
        progress = tqdm(groups, desc=f"batches of {size}")
        for number, group in enumerate(progress):
            prompts = model.prompts([CHAT] * len(group), [clip.samples for clip in group])
            start = time.perf_counter()
            audio = encode(prompts)
            wait(model)
            sums["audio"] += time.perf_counter() - start
            model.encode_audio = lambda batch, with_ctc=False, audio=audio: audio
            spent, answers, passes = {}, {}, None
            for way in ("greedy", "drafted") if number % 2 else ("drafted", "greedy"):
                options = {"drafted": Drafting()} if way == "drafted" else {}
                start, worked = time.perf_counter(), time.process_time()
                answers[way] = model.generate(prompts, max_new_tokens=tokens, **options)
                wait(model)
                sums[f"{way}_cpu"] += time.process_time() - worked
                spent[way] = time.perf_counter() - start
                passes = model.drafted_passes if way == "drafted" else passes
                sums[way] += spent[way]
            del model.encode_audio
            if passes is None:
                raise SystemExit("error: this LLM's answers cannot be drafted")
            ratios.append(spent["greedy"] / spent["drafted"])
            sums["row_passes"] += sum(passes.row_passes)
            sums["tokens"] += sum(passes.tokens)
            sums["passes"] += passes.passes
            sums["greedy_passes"] += max(passes.tokens)
            sums["drafted_tokens"] += passes.drafted
            sums["accepted"] += passes.accepted
            for row, (one, other) in enumerate(zip(answers["greedy"], answers["drafted"], strict=True)):
                if one != other:
                    gaps.append(logit_gap(model, prompts, audio, row, one, other))
            progress.set_postfix(
                passes_per_token=f"{sums['row_passes'] / sums['tokens']:.3f}",
                speedup=f"{sums['greedy'] / sums['drafted']:.2f}",
                answers=f"{min(len(selected), size * (number + 1))}",
                different=len(gaps),
                rounding=sum(gap <= 1e-4 for gap in gaps),
            )
            model_texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers["greedy"]]
            ctc_texts = [
                model.tokenizer.decode(ids, skip_special_tokens=True) for ids in model._ctc_tokens(audio)
            ]
            for clip, text, ctc in zip(group, model_texts, ctc_texts, strict=True):
                if clip.text:
                    counts = count_errors([clip.text] * 2, [text, ctc], ["en"] * 2)
                    sums["words"] += int(counts.units[0])
                    sums["errors"] += int(counts.errors[0])
                    sums["ctc_errors"] += int(counts.errors[1])
        results.append(
            {
                "batch": size,
                "answers": len(selected),
                "tokens": sums["tokens"],
                "passes_per_token": sums["row_passes"] / sums["tokens"],
                "batch_passes": sums["passes"] / sums["greedy_passes"],
                "accepted_share": sums["accepted"] / max(1, sums["drafted_tokens"]),
                "speedup": sums["greedy"] / sums["drafted"],
                "speedup_cpu_time": sums["greedy_cpu"] / sums["drafted_cpu"],
                "speedup_median": statistics.median(ratios),
                "speedup_with_audio": (sums["greedy"] + sums["audio"]) / (sums["drafted"] + sums["audio"]),
                "different": len(gaps),
                "different_by_rounding": sum(gap <= 1e-4 for gap in gaps),
                "wer": sums["errors"] / max(1, sums["words"]),
                "ctc_wer": sums["ctc_errors"] / max(1, sums["words"]),
                "load": os.getloadavg()[0],
            }
        )
    return results


def logit_gap(
    model: Soundwave, prompts: Batch, audio: Audio, row: int, one: list[int], other: list[int]
) -> float:
    """The difference of the two best logits where two answers of a row begin to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    embeddings, mask, _ = model.embeddings(prompts, audio, left_padded=True)
    prompt = embeddings[row : row + 1, -int(mask[row].sum()) :]
    written = embed(
        model.llm, torch.tensor([one[:same]], dtype=torch.long, device=prompt.device), model.audio_id
    )
    logits = model.llm(inputs_embeds=torch.cat([prompt, written], dim=1)).logits[0, -1].float()
    best = logits.topk(2).values
    return float(best[0] - best[1])


def drafted_table(results: list[dict]) -> str:
    columns = {
        "batch": lambda r: r["batch"],
        "answers": lambda r: r["answers"],
        "tokens": lambda r: r["tokens"],
        "CTC WER, %": lambda r: f"{100 * r['ctc_wer']:.1f}",
        "LLM WER, %": lambda r: f"{100 * r['wer']:.1f}",
        "passes / token": lambda r: f"{r['passes_per_token']:.2f}",
        "batch passes / greedy": lambda r: f"{r['batch_passes']:.2f}",
        "draft accepted, %": lambda r: f"{100 * r['accepted_share']:.0f}",
        "greedy / drafted, LLM time": lambda r: f"{r['speedup']:.2f}",
        "CPU time": lambda r: f"{r['speedup_cpu_time']:.2f}",
        "median": lambda r: f"{r['speedup_median']:.2f}",
        "with audio": lambda r: f"{r['speedup_with_audio']:.2f}",
        "different (rounding)": lambda r: f"{r['different']} ({r['different_by_rounding']})",
        "load": lambda r: f"{r['load']:.1f}",
    }
    rows = [[value(result) for value in columns.values()] for result in results]
    return tabulate(rows, tablefmt="github", headers=list(columns), disable_numparse=True)


def main() -> None:
    parser = CommandParser(
        "python -m benchmarks.generate",
        __doc__,
        example="--model runs/quickstart/sft/model --shards shards/test",
    )
    parser.add_argument("--model", help="model folder of stage 2 or 3")
    parser.add_argument("--encoder", default="openai/whisper-base", help="encoder where no --model is given")
    parser.add_argument(
        "--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="LLM where no --model is given"
    )
    parser.add_argument("--shards", help="folder written by data_tools/pack.py (default: noise)")
    parser.add_argument("--clips", type=int, default=32, help="how many clips")
    accept_old_name(parser, "--utterances", "--clips")
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each answer")
    parser.add_argument(
        "--drafted",
        type=int,
        nargs="+",
        metavar="BATCH",
        help="compare drafted and greedy decoding instead, in batches of these sizes",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    facts = machine(options.device)
    if options.model:
        model = artifact.load(options.model, device=options.device)
    else:
        config = SoundwaveConfig(encoder=EncoderConfig(options.encoder), llm=LLMConfig(options.llm))
        model = Soundwave.build(config, device=options.device).eval()
    selected = clips(options.shards, options.clips)
    sounds = [clip.samples for clip in selected]
    seconds = sum(map(len, sounds)) / 16000
    if options.drafted:
        with torch.inference_mode():
            results = drafted_decoding(model, selected, options.drafted, options.tokens)
        sizes = f"{len(sounds)} clips, {seconds:.0f} s of audio, at most {options.tokens} new tokens"
        title = f"{sizes}, {options.device}"
        report(options, facts, seconds, results, f"{title}\n{drafted_table(results)}")
        return
    results = [
        measure(model, sounds, options.batch, options.tokens, f"batch of {options.batch}"),
        measure(model, sounds, 1, options.tokens, "one"),
    ]
    as_the_release_does(model)
    results.append(measure(model, sounds, 1, options.tokens, "release"))
    text = (
        f"{len(sounds)} clips, {seconds:.0f} s of audio, {options.tokens} new tokens each, {options.device}\n"
        + tabulate(
            [[r["way"], *(f"{v:.1f}" for v in list(r.values())[1:])] for r in results],
            tablefmt="github",
            headers=["way", "audio s / s", "tokens / s", "first token, ms", "LLM positions / audio"],
        )
    )
    report(options, facts, seconds, results, text)


def report(options: argparse.Namespace, facts: dict, seconds: float, results: list[dict], table: str) -> None:
    print(table)
    if options.out:
        keep(
            options.out,
            {"machine": facts, "options": settings(options), "audio_seconds": seconds, "results": results},
            table,
        )


if __name__ == "__main__":
    main()
