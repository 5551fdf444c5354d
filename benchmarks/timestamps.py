"""Measure the errors of word times on clips with known boundaries, beside Whisper's.

Two materials with known times (--shards, --tts, or both):

    joined   clips of --shards, trimmed of silence, joined to about 20 s with silence of 0.2 to 1.5 s between:
             the start of each clip's first word and the end of its last word are known
    tts      clips of benchmarks/tts_words.py: the start of every word is known

Two systems on the same audio in the same run: the model's CTC alignment of the given text and of its own
transcript, and Whisper's own word times by transformers. A word counts for a system where its transcript has
it; "both" rows count the words that Whisper and the model's transcript have both. The last column shows what
an ideal offset would leave. --calibrate measures the offsets of model/generation/timestamps.py instead (use
validation data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import keep, machine, settings
from core.audio import SAMPLE_RATE, decode
from core.command_line import CommandParser, accept_old_name
from core.ctc_text import normalise
from data_tools.shards import ShardIndex
from model import artifact
from model.generation import timestamps

LONGEST = 20.0  # seconds of a joined recording, about
LOUD = -35.0  # dB below the loudest 10 ms: what is quieter at a clip's ends is silence
HOP = SAMPLE_RATE // 100
BATCH = 4


@dataclass
class Item:
    samples: np.ndarray
    text: str
    starts: dict[int, float]  # word -> seconds
    ends: dict[int, float]


def trimmed(samples: np.ndarray) -> np.ndarray:
    frames = samples[: len(samples) // HOP * HOP].reshape(-1, HOP)
    level = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
    loud = np.nonzero(level > level.max() + LOUD)[0]
    return samples[loud[0] * HOP : (loud[-1] + 1) * HOP]


def joined(shards: str, count: int, seed: int = 0) -> list[Item]:
    """Recordings of several clips each, `count` clips in all."""
    index, random = ShardIndex.load(shards), np.random.default_rng(seed)
    items: list[Item] = []
    used = 0
    parts: list[np.ndarray] = []
    words: list[str] = []
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}

    def size() -> int:
        return sum(map(len, parts))

    for row in random.permutation(len(index.samples)):
        audio, sample = index.read(int(row))
        text = (sample["text"] or "").split()
        if audio is None or not text:
            continue
        samples = trimmed(decode(audio).samples)
        if len(samples) < SAMPLE_RATE // 2 or len(samples) > LONGEST * SAMPLE_RATE:
            continue
        silence = int(random.uniform(0.2, 1.5) * SAMPLE_RATE)
        parts.append(1e-4 * random.standard_normal(silence).astype(np.float32))
        starts[len(words)] = size() / SAMPLE_RATE
        parts.append(samples)
        words += text
        ends[len(words) - 1] = size() / SAMPLE_RATE
        used += 1
        if size() > LONGEST * SAMPLE_RATE or used == count:
            items.append(Item(np.concatenate(parts), " ".join(words), dict(starts), dict(ends)))
            for own in (parts, words, starts, ends):
                own.clear()
        if used == count:
            break
    return items


def spoken(directory: Path) -> list[Item]:
    rows = [json.loads(line) for line in (directory / "words.jsonl").read_text().splitlines()]
    return [
        Item(decode(directory / row["audio"]).samples, row["text"], dict(enumerate(row["starts"])), {})
        for row in rows
    ]


Times = list[tuple[str, float, float]]


def ours(model, items: list[Item], texts: list[str]) -> list[Times]:
    waveforms = [torch.from_numpy(item.samples) for item in items]
    words_of_items = timestamps.word_times(model, waveforms, texts, ["en"] * len(items))
    return [[(word.text, word.start, word.end) for word in words] for words in words_of_items]


def transcripts(model, items: list[Item]) -> list[str]:
    chat = [{"role": "user", "content": model.config.audio_token}]
    texts = []
    for first in tqdm(range(0, len(items), BATCH), desc="transcripts", leave=False):
        group = [torch.from_numpy(item.samples) for item in items[first : first + BATCH]]
        texts += model.ctc_greedy(model.prompts([chat] * len(group), group))
    return texts


def whisper(path: Path, items: list[Item], device: str) -> list[Times]:
    from transformers import (
        AutoTokenizer,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        pipeline,
    )

    transcribe = pipeline(
        "automatic-speech-recognition",
        model=WhisperForConditionalGeneration.from_pretrained(path, attn_implementation="eager"),
        tokenizer=AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(path),
        device=device,
    )
    times = []
    for item in tqdm(items, desc="whisper", leave=False):
        answer = transcribe(
            {"raw": item.samples, "sampling_rate": SAMPLE_RATE},
            return_timestamps="word",
            generate_kwargs={"language": "en", "task": "transcribe", "num_beams": 1},
        )
        end = len(item.samples) / SAMPLE_RATE
        times.append(
            [
                (chunk["text"], begin, end if stop is None else stop)
                for chunk in answer["chunks"]
                for begin, stop in [chunk["timestamp"]]
            ]
        )
    return times


def bare(word: str) -> str:
    return normalise(word, "lower_no_punctuation").replace(" ", "") or "-"


def matches(text: str, times: Times) -> dict[int, int]:
    """Words of the text -> words of the transcript that equal them in the alignment of both."""
    if not times:
        return {}
    reference, hypothesis = (
        [bare(word) for word in words] for words in (text.split(), [t[0] for t in times])
    )
    chunks = jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]
    return {
        chunk.ref_start_idx + i: chunk.hyp_start_idx + i
        for chunk in chunks
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    }


def errors(items: list[Item], system: list[Times], chosen: list[set[int]] | None, end: bool) -> np.ndarray:
    """Signed errors in seconds of the known words that a system has, and that are chosen."""
    values = []
    for number, (item, times) in enumerate(zip(items, system, strict=True)):
        pairs = matches(item.text, times)
        for word, truth in (item.ends if end else item.starts).items():
            if word in pairs and (chosen is None or word in chosen[number]):
                values.append(times[pairs[word]][1 + end] - truth)
    return np.array(values)


def row(name: str, values: np.ndarray, known: int) -> dict:
    size = np.abs(values)
    return {
        "what": name,
        "words": len(values),
        "known": known,
        "median_ms": 1000 * float(np.median(size)),
        "mean_ms": 1000 * float(size.mean()),
        "p90_ms": 1000 * float(np.percentile(size, 90)),
        "within_80_ms": float((size <= 0.08).mean()),
        "within_200_ms": float((size <= 0.2).mean()),
        "median_signed_ms": 1000 * float(np.median(values)),
        "centred_median_ms": 1000 * float(np.median(np.abs(values - np.median(values)))),
    }


def compare(model, items: list[Item], path: Path, device: str, material: str) -> list[dict]:
    systems = {
        "CTC, given text": ours(model, items, [item.text for item in items]),
        "CTC, own transcript": ours(model, items, transcripts(model, items)),
        "Whisper": whisper(path, items, device),
    }
    common = [
        set(matches(item.text, own)) & set(matches(item.text, other))
        for item, own, other in zip(items, systems["CTC, own transcript"], systems["Whisper"], strict=False)
    ]
    theirs = [set(matches(item.text, other)) for item, other in zip(items, systems["Whisper"], strict=False)]
    rows = []
    for end in (False, True) if any(item.ends for item in items) else (False,):
        known = sum(len(item.ends if end else item.starts) for item in items)
        what = "ends" if end else "starts"
        for label, chosen in (("", None), (", words of Whisper", theirs), (", words of both", common)):
            for name, system in systems.items():
                if label == ", words of Whisper" and name == "CTC, own transcript":
                    continue
                values = errors(items, system, chosen, end)
                rows.append(row(f"{material} {what}: {name}{label}", values, known))
    return rows


def calibrate(model, items: list[Item]) -> None:
    timestamps.START_DELAY = timestamps.END_ADVANCE = 0.0
    times = ours(model, items, [item.text for item in items])
    delay, advance = errors(items, times, None, False), -errors(items, times, None, True)
    for name, values in (("START_DELAY", delay), ("END_ADVANCE", advance)):
        low, median, high = np.percentile(values, [25, 50, 75])
        print(f"{name} {median:.3f} s (quartiles {low:.3f} to {high:.3f}, {len(values)} words)")


def main() -> None:
    parser = CommandParser(
        "python -m benchmarks.timestamps", __doc__, example="--model runs/quickstart/sft/model"
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder to measure")
    parser.add_argument("--whisper", type=Path, help="folder of Whisper, for the comparison")
    parser.add_argument("--shards", help="packed clips for joined recordings")
    parser.add_argument("--tts", type=Path, help="folder written by benchmarks/tts_words.py")
    parser.add_argument("--clips", type=int, default=100, help="clips that are joined to recordings")
    parser.add_argument("--tts-clips", type=int, default=40, help="clips of --tts")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the offset of the CTC peaks, and nothing else"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_grad_enabled(False)
    if not options.calibrate and not options.whisper:
        parser.error("--whisper is needed to compare with")
    if not options.shards and (options.calibrate or not options.tts):
        parser.error("--shards or --tts is needed (--calibrate: --shards)")
    facts = machine(options.device)
    model = artifact.load(options.model, device=options.device, with_llm=False)
    if options.calibrate:
        calibrate(model, joined(options.shards, options.clips))
        return
    rows, lines = [], []
    for material, items in (
        ("joined", joined(options.shards, options.clips) if options.shards else []),
        ("tts", spoken(options.tts)[: options.tts_clips] if options.tts else []),
    ):
        if items:
            seconds = sum(len(item.samples) for item in items) / SAMPLE_RATE
            lines.append(f"{material}: {len(items)} recordings, {seconds:.0f} s")
            rows += compare(model, items, options.whisper, options.device, material)
    table = tabulate(
        [
            [
                r["what"],
                f"{r['words']} / {r['known']}",
                *(f"{r[key]:.0f}" for key in ("median_ms", "mean_ms", "p90_ms")),
                f"{100 * r['within_80_ms']:.0f} %",
                f"{100 * r['within_200_ms']:.0f} %",
                f"{r['median_signed_ms']:+.0f}",
                f"{r['centred_median_ms']:.0f}",
            ]
            for r in rows
        ],
        tablefmt="github",
        headers=[
            "word times",
            "words",
            "median |error|, ms",
            "mean",
            "p90",
            "<= 80 ms",
            "<= 200 ms",
            "median error",
            "median |error - median error|",
        ],
    )
    text = "\n".join([*lines, table])
    print(text)
    if options.out:
        keep(options.out, {"machine": facts, "options": settings(options), "results": rows}, text)


if __name__ == "__main__":
    main()
