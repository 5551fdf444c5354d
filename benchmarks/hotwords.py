"""Measure the recall of rare words with hotwords, and the cost elsewhere.

    python -m benchmarks.hotwords --model RUN --test FILE --train FILE

FILE: manifests with `audio` and `text` (the quick start's:
.cache/quickstart/manifests/dialogues-test.jsonl and dialogues-train.jsonl). A word of the test set is
rare where training showed its rarest token fewer than 5 times (examples/less_is_more/rare_words.py). The
clips: half hold a rare word, half do not, both evenly spaced.

The hotwords of every clip are the same list: all rare words of the chosen clips, and so many distractors:
rare words of training that no chosen clip holds. Per number of distractors: recall of the rare words; WER
of the rest (errors on other words, and insertions, for each other word); distractors that were written;
share of a clip's rare words that the CTC head spots; wall time against joint search without hotwords, in
the same process.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import soundwave
from benchmarks.machine import keep, machine, settings
from core.audio import decode
from core.command_line import CommandParser, accept_old_name
from core.ctc_text import ctc_target_ids
from core.text import count_errors, words
from examples.less_is_more.rare_words import bin_of
from model.generation.hotwords import BONUS, Hotwords
from soundwave import Options

RARE = ("never", "1 to 4 times")


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def spaced(items: list, count: int) -> list:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Rare:
    """Which words training hardly showed."""

    def __init__(self, tokenizer, normalisation: str, train: list[dict]):
        self.tokenizer, self.normalisation = tokenizer, normalisation
        self.shown = Counter(
            token for row in train for token in ctc_target_ids(tokenizer, row["text"], normalisation)
        )
        self.is_rare: dict[str, bool] = {}

    def __call__(self, word: str) -> bool:
        if word not in self.is_rare:
            ids = ctc_target_ids(self.tokenizer, word, self.normalisation)
            count = min((self.shown[token] for token in ids), default=None)
            self.is_rare[word] = (
                len(word) > 3 and word.isalpha() and count is not None and bin_of(count) in RARE
            )
        return self.is_rare[word]


def score(references: list[str], texts: list[str], rare: set[str], distractors: set[str]) -> dict:
    """Recall of the wanted words, errors on the others."""
    output = count_errors(references, texts, ["en"] * len(texts)).output
    recalled = missed = errors = others = 0
    for reference, chunks in zip(output.references, output.alignments, strict=True):
        for chunk in chunks:
            if chunk.type == "insert":
                errors += chunk.hyp_end_idx - chunk.hyp_start_idx
                continue
            for word in reference[chunk.ref_start_idx : chunk.ref_end_idx]:
                right = chunk.type == "equal"
                if word in rare:
                    recalled, missed = recalled + right, missed + (not right)
                else:
                    errors, others = errors + (not right), others + 1
    written = sum(word in distractors for text in texts for word in words(text, "en"))
    return {
        "rare": recalled + missed,
        "recall": recalled / max(recalled + missed, 1),
        "other_words": others,
        "wer_of_the_rest": errors / max(others, 1),
        "distractors_written": written,
    }


def main() -> None:
    parser = CommandParser(
        "python -m benchmarks.hotwords",
        __doc__,
        example="--model runs/quickstart/sft/model --test test.jsonl --train train.jsonl",
    )
    parser.add_argument("--model", required=True, help="model folder of stage 2 or 3")
    parser.add_argument("--test", type=Path, required=True, help="manifest of the clips to transcribe")
    parser.add_argument(
        "--train", type=Path, required=True, help="manifest of the training clips, by which a word is rare"
    )
    parser.add_argument(
        "--clips", type=int, default=80, help="clips of --test; half of these have a rare word"
    )
    parser.add_argument(
        "--distractors",
        type=int,
        nargs="+",
        default=[0, 50, 500],
        help="numbers of words in the list that are not said",
    )
    parser.add_argument(
        "--bonus", type=float, default=BONUS, help="score for a token of a listed word, as of transcribe"
    )
    parser.add_argument("--in-prompt", action="store_true", help="also: the rare words in the prompt, greedy")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    facts = machine(options.device)
    model = soundwave.load(options.model, device=options.device)
    network, train = model.network, rows_of(options.train)
    rare = Rare(network.tokenizer, network.ctc_text, train)

    def rare_words(row: dict) -> list[str]:
        return [word for word in words(row["text"], "en") if rare(word)]

    test = rows_of(options.test)
    rows = spaced([row for row in test if rare_words(row)], options.clips // 2)
    rows += spaced([row for row in test if not rare_words(row)], options.clips - len(rows))
    targets = sorted({word for row in rows for word in rare_words(row)})
    held = {word for row in rows for word in words(row["text"], "en")}
    others = sorted({word for row in train for word in words(row["text"], "en") if rare(word)} - held)
    random.Random(0).shuffle(others)
    clips = [decode(row["audio"]).samples for row in rows]
    references = [row["text"] for row in rows]

    def spotted_share(hotwords: list[str]) -> float:
        made = Hotwords(network.tokenizer, hotwords, network.ctc_text)
        hits = total = 0
        for row, clip in zip(rows, clips, strict=True):
            if own := set(rare_words(row)):
                with torch.inference_mode():
                    batch, audio = model._encoded([clip], "")
                    scores = network.ctc_scores(batch, audio)[0]
                spotted = {made.phrases[i] for i in made.spot(scores.log_probs, scores.blank)}
                hits, total = hits + len(own & spotted), total + len(own)
        return hits / max(total, 1)

    ways: list[tuple[str, Options, int | None]] = [("joint, no hotwords", Options(decode="joint"), None)]
    for count in options.distractors:
        listed = targets + others[:count]
        ways.append(
            (
                f"{count} distractors",
                Options(decode="joint", hotwords=listed, hotword_bonus=options.bonus),
                min(count, len(others)),
            )
        )
    if options.in_prompt:
        ways.append(("greedy, no hotwords", Options(decode="greedy"), None))
        ways.append(
            (
                "greedy, rare words in the prompt",
                Options(decode="greedy", hotwords=targets, hotwords_in_prompt=True),
                0,
            )
        )
    results = []
    next(iter(model.transcribe_all(clips[:1], options=ways[0][1])))  # warm
    for name, how, count in tqdm(ways):
        start = time.perf_counter()
        transcriptions = list(model.transcribe_all(clips, options=how))
        spent = time.perf_counter() - start
        scored = score(
            references, [one.text for one in transcriptions], set(targets), set(others[: count or 0])
        )
        spotted = None
        if how.hotwords and not how.hotwords_in_prompt:
            spotted = spotted_share(list(how.hotwords))
        results.append({"way": name, **scored, "spotted": spotted, "seconds": spent})
    base = results[0]["seconds"]
    seconds = sum(map(len, clips)) / 16000
    rare_count = results[0]["rare"]
    table = (
        f"{len(clips)} clips, {seconds:.0f} s of audio, {rare_count} rare words "
        f"({len(targets)} different, on the list of every clip), {results[0]['other_words']} other words; "
        f"bonus {options.bonus:g} a token, {options.device}\n\n"
        + tabulate(
            [
                [
                    one["way"],
                    f"{100 * one['recall']:.1f}",
                    f"{100 * one['wer_of_the_rest']:.1f}",
                    one["distractors_written"],
                    "" if one["spotted"] is None else f"{100 * one['spotted']:.0f}",
                    f"{one['seconds'] / base:.2f}",
                ]
                for one in results
            ],
            tablefmt="github",
            headers=[
                "hotwords",
                "recall of rare words, %",
                "WER of the rest, %",
                "distractors written",
                "rare words spotted, %",
                "time",
            ],
            disable_numparse=True,
        )
    )
    print(table)
    if options.out:
        keep(options.out, {"machine": facts, "options": settings(options), "results": results}, table)


if __name__ == "__main__":
    main()
