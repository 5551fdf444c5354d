"""Compare two prediction files with paired tests on their common utterances.

python -m evaluation.compare A.jsonl B.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from tabulate import tabulate

from core.command_line import CommandParser, accept_old_name
from core.plugins import PluginError, add_plugins_option, load_plugins
from evaluation.metrics import METRICS, metric_of
from evaluation.metrics.accuracy import with_labels
from evaluation.metrics.translation import bleu_tokenizer, with_tokenizers
from evaluation.predictions import PredictionError, prediction_key, read_predictions
from evaluation.score import direction


def paired(first: list[dict], second: list[dict]) -> dict[str, dict]:
    """Per score: both values, the difference (second - first), its 95 % interval where known, and a two-sided
    p-value.

    Rows are of one task, translations of one BLEU tokenizer, and in the same order. Error rates and accuracy:
    approximate randomisation over utterances (evaluation.resampling); BLEU and chrF: sacrebleu's.
    """
    return METRICS[metric_of(first)].paired(first, second)


def compare(first: Path, second: Path) -> dict:
    """{task: {utterances, metrics}} and how many utterances only one file has; translations whose directions
    need several BLEU tokenizers stand by direction, as "translation en-zh". PredictionError where they cannot
    be compared."""
    files, notes = [], []
    for path in (first, second):
        rows, noted = read_predictions(path)
        files.append(rows)
        notes += [f"{path}: {note}" for note in noted]
    every = [*files[0], *files[1]]
    tables = [
        {prediction_key(row): row for row in with_tokenizers(with_labels(rows, every), every)}
        for rows in files
    ]
    shared = [key for key in tables[0] if key in tables[1]]
    differing = [key for key in shared if tables[0][key]["reference"] != tables[1][key]["reference"]]
    if differing:
        raise PredictionError(
            f"{first} and {second} hold other references for {len(differing)} utterances ({differing[0]}): "
            "compare two runs over the same shards"
        )
    if not shared:
        raise PredictionError(
            f"{first} and {second} share no utterance: compare two runs over the same shards"
        )
    by_task = defaultdict(list)
    for key in shared:
        by_task[tables[0][key].get("task") or "asr"].append(key)
    for task, keys in list(by_task.items()):
        rows = [tables[0][key] for key in keys]
        if metric_of(rows) == "bleu" and len({bleu_tokenizer(row) for row in rows}) > 1:
            del by_task[task]
            for key, row in zip(keys, rows, strict=True):
                by_task[f"{task} {direction(row)}"].append(key)
    counts = {"only_first": len(tables[0]) - len(shared), "only_second": len(tables[1]) - len(shared)}
    return {
        "first": str(first),
        "second": str(second),
        **counts,
        "notes": notes,
        "tasks": {
            task: {
                "metric": metric_of([tables[0][key] for key in keys]),
                "utterances": len(keys),
                "metrics": paired(*([part[key] for key in keys] for part in tables)),
            }
            for task, keys in sorted(by_task.items())
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.compare", __doc__.splitlines()[0], example="ours.jsonl baseline.jsonl"
    )
    parser.add_argument("first", type=Path, help="predictions file")
    parser.add_argument("second", type=Path, help="predictions file of the other system")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    accept_old_name(parser, "--json", "--out")
    add_plugins_option(parser)
    options = parser.parse_args(arguments)
    try:
        load_plugins(options.plugins)
        result = compare(options.first, options.second)
    except (PredictionError, PluginError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = []
    for task, part in result["tasks"].items():
        for name, values in part["metrics"].items():
            percent = name in METRICS[part["metric"]].rates
            scale, digits, unit = (100, 1, ", %") if percent else (1, 3, "")
            first, second, difference, *bounds = (
                scale * value
                for value in (
                    values["first"],
                    values["second"],
                    values["difference"],
                    *values.get("difference_ci95", ()),
                )
            )
            lines.append(
                [
                    task,
                    f"{name}{unit}",
                    part["utterances"],
                    f"{first:.{digits}f}",
                    f"{second:.{digits}f}",
                    f"{difference:+.{digits}f}",
                    "[{}]".format(", ".join(f"{bound:+.{digits}f}" for bound in bounds)) if bounds else "",
                    f"{values['p_value']:.4g}",
                ]
            )
    headers = ["task", "metric", "utterances", "first", "second", "second - first", "95 %", "p"]
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"only in the first: {result['only_first']}, only in the second: {result['only_second']}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
