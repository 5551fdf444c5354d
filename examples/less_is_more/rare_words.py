"""Print which words are wrong, by how often the training transcripts hold their tokens.

    python -m examples.less_is_more.rare_words [--out FILE]

Words of the study's first test set are sorted by how often their rarest token occurs in the CTC targets of
the quick start's recordings (`dialogues-train`); the table holds the share of words that each decoding
deletes or replaces, insertions aside.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from core.command_line import CommandParser, accept_old_name
from core.files import write_atomically
from evaluation.metrics.error_rates import aligned
from evaluation.predictions import read_rows
from examples.less_is_more.synthetic import CTC_TEXT

if TYPE_CHECKING:
    from examples.less_is_more.study import Study

BINS = {
    "never": 0,
    "1 to 4 times": 1,
    "5 to 19 times": 5,
    "20 to 99 times": 20,
    "100 times and more": 100,
}  # from how many on
READ_OUTS = {
    "stage 1, CTC": ("full", "ctc"),
    "ours, LLM": ("ours", "greedy"),
    "ours, both": ("ours", "joint"),
    "synthetic, stage 1, CTC": ("synthetic", "ctc"),
    "synthetic, both": ("synthetic", "joint"),
}
WHISPER = "Whisper's own decoder"  # has no seed


def bin_of(count: int) -> str:
    return [name for name, least in BINS.items() if count >= least][-1]


def wrong_words(rows: list[dict]) -> list[tuple[str, bool]]:
    """Each reference word after Whisper's normaliser, and whether it was deleted or replaced."""
    output = aligned(rows)
    return [
        (word, chunk.type != "equal")
        for words, chunks in zip(output.references, output.alignments, strict=True)
        for chunk in chunks
        for word in words[chunk.ref_start_idx : chunk.ref_end_idx]
    ]


def shares(rows: list[dict], count_of: Callable[[str], int | None]) -> dict[str, tuple[int, float]]:
    """Bin -> (words, share of wrong ones). count_of: how often training showed a word's rarest token;
    None for what has no token, which is left out (the normaliser takes the dots of "end..." for one)."""
    words, wrong = Counter(), Counter()
    for word, missed in wrong_words(rows):
        if (count := count_of(word)) is not None:
            words[name := bin_of(count)] += 1
            wrong[name] += missed
    return {name: (words[name], wrong[name] / words[name]) for name in BINS if words[name]}


def files(study: Study, seed: int) -> dict[str, Path]:
    """Decoding -> its predictions, of those that were scored."""
    data = study.plan.score.shards[0]
    paths = {}
    for title, (name, decode) in READ_OUTS.items():
        folder = study.first(name, seed) if decode == "ctc" else study.folder(name, seed)
        paths[title] = study.predictions(folder, decode, data)
    paths[WHISPER] = study.output / "whisper" / f"{data}.jsonl"
    return {title: path for title, path in paths.items() if path.exists()}


def build(study: Study, seed: int) -> list[list[str]]:
    """Return the table, its header first. Errors: ValueError where nothing of that seed was scored."""
    from transformers import AutoTokenizer

    from core.ctc_text import ctc_target_ids

    predictions, cache = files(study, seed), study.data.cache
    if predictions.keys() <= {WHISPER}:
        raise ValueError(
            f"{study.output} holds no predictions of seed {seed}: run python -m examples.less_is_more.study "
            f"first"
        )
    tokenizer = AutoTokenizer.from_pretrained(cache / "models" / "smollm2-135m", trust_remote_code=False)
    lines = (cache / "manifests" / "dialogues-train.jsonl").read_text(encoding="utf-8").splitlines()
    shown = Counter(
        token for line in lines for token in ctc_target_ids(tokenizer, json.loads(line)["text"], CTC_TEXT)
    )

    def count_of(word: str) -> int | None:
        return min((shown[token] for token in ctc_target_ids(tokenizer, word, CTC_TEXT)), default=None)

    shares_of = {title: shares(read_rows(path), count_of) for title, path in predictions.items()}
    words = next(iter(shares_of.values()))
    header = ["rarest token seen", "words", *shares_of]
    return [
        header,
        *([name, words[name][0], *(f"{of[name][1]:.2f}" for of in shares_of.values())] for name in words),
    ]


def main() -> int:
    from examples.less_is_more.study import HERE, Study

    parser = CommandParser(
        "python -m examples.less_is_more.rare_words", __doc__.split("\n")[0], example="--out rare_words.csv"
    )
    parser.add_argument("--seed", type=int, default=0, help="whose runs (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    accept_old_name(parser, "--csv", "--out")
    options = parser.parse_args()
    try:
        rows = build(Study(HERE / "plan.yaml"), options.seed)
        print(tabulate(rows, headers="firstrow", tablefmt="github", disable_numparse=True))
        if options.out:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            write_atomically(options.out, text.getvalue())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
