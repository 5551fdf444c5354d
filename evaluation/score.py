"""Score prediction files; needs no model, audio or network.

    python -m evaluation.score FILE.jsonl

A prediction row holds `id`, `reference`, `prediction`, `raw`, and `corpus`, `task`, `lang`, `duration`
(seconds), and where known `label`, `choices`, `frames` (adapter frames of the audio), `kept` (frames the LLM
saw), `tokens` (generated).
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from core.command_line import CommandParser
from core.languages import is_known
from core.plugins import PluginError, add_plugins_option, load_plugins
from core.samples import target_language
from core.text import MARKS, Marks
from evaluation.metrics import METRICS, metric_of
from evaluation.metrics.accuracy import with_labels
from evaluation.metrics.base import BOOTSTRAP
from evaluation.metrics.translation import with_tokenizers
from evaluation.predictions import PredictionError, read_predictions, read_rows


def lengths(rows: list[dict]) -> dict:
    """Length statistics over the rows that carry them; rates are per second of audio."""
    measured = [
        row for row in rows if row.get("frames") and row.get("duration") and row.get("kept") is not None
    ]
    seconds = sum(row["duration"] for row in measured)
    if not measured or not seconds:
        return {}
    stats = {
        "audio_seconds": seconds,
        "kept_share": sum(row["kept"] for row in measured) / sum(row["frames"] for row in measured),
        "kept_per_second": sum(row["kept"] for row in measured) / seconds,
    }
    if all(row.get("tokens") is not None for row in measured):
        stats["generated_tokens_per_second_of_audio"] = sum(row["tokens"] for row in measured) / seconds
    return stats


def direction(row: dict) -> str:
    return f"{row.get('lang') or '?'}-{target_language(row) or '?'}"


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by corpus, by language and, for translations, by direction: every grouping that has more than
    one group."""
    keys = {"corpus": lambda row: row.get("corpus") or "", "lang": lambda row: row.get("lang") or ""}
    if rows[0].get("task") == "translation":
        keys["direction"] = direction
        del keys["lang"]
    by_group: dict[str, Any] = {}
    for kind, key in keys.items():
        parts = defaultdict(list)
        for row in rows:
            parts[key(row)].append(row)
        if len(parts) > 1:
            by_group |= {f"{kind} {name}": part for name, part in sorted(parts.items())}
    return by_group


def score_rows(rows: list[dict], marks: Marks = "script") -> dict:
    """{task: {metric, utterances, the scores, length, groups: {group: the same}}}, from prediction rows.
    marks: what happens to combining marks (core/text.py)."""
    by_task = defaultdict(list)
    for row in with_tokenizers(with_labels(rows, rows), rows):
        by_task[row.get("task") or "asr"].append(row)
    result = {}
    for task, members in sorted(by_task.items()):
        metric = metric_of(members)

        def one(part: list[dict], metric: str = metric) -> dict:
            return {
                "utterances": len(part),
                "empty_predictions": sum(not row["prediction"].strip() for row in part),
                **METRICS[metric].score(part, marks),
                "length": lengths(part),
            }

        result[task] = {
            "metric": metric,
            "columns": list(METRICS[metric].columns),
            **one(members),
            "groups": {name: one(part) for name, part in groups(members).items()},
        }
    return result


def table(scores: dict) -> str:
    """The scores as text, one line a task and group, intervals in brackets."""
    lines = []
    for task, whole in scores.items():
        metric = METRICS[whole["metric"]]
        for group, part in [("all", whole), *whole["groups"].items()]:
            shown = []
            for name in metric.columns:
                bounds = part.get(f"{name}_ci95")
                value, scale, digits = part[name], 1, 3
                if name in metric.rates and value is not None:
                    value, scale, digits = f"{100 * value:.1f} %", 100, 1
                low, high = (f"{scale * bound:.{digits}f}" for bound in bounds or (0, 0))
                shown.append(metric.show(name, value) + (f" [{low}, {high}]" if bounds else ""))
            shown[-1] = ", ".join([shown[-1], *metric.notes(part)])
            kept = part["length"].get("kept_per_second")
            lines.append([task, group, part["utterances"], *shown, "" if kept is None else f"{kept:.1f}"])
    return tabulate(
        lines,
        headers=["task", "group", "utterances", "score", "second score", "kept/s"],
        tablefmt="github",
        disable_numparse=True,
    )


def language_notes(rows: list[dict]) -> list[str]:
    """What is to be said about languages that the table (core/languages.py) does not hold."""
    notes = []
    for key, consequence in (
        ("lang", "their text is split into words by its script"),
        ("target_lang", "BLEU's tokenizer is chosen by the script of the references"),
    ):
        unknown = Counter(row[key] for row in rows if row.get(key) and not is_known(row[key]))
        if unknown:
            named = ", ".join(f"'{lang}'" for lang in sorted(unknown))
            notes.append(f"{unknown.total()} rows have a {key} that is not known ({named}): {consequence}")
    return notes


def score_file(path: Path, marks: Marks = "script") -> dict:
    """Score a predictions file and write FILE.scores.json beside it; returns what was written."""
    rows, notes = read_predictions(path)
    if not rows:
        raise PredictionError(f"{path} holds no predictions: run evaluation.run first")
    rejected = path.with_suffix(".rejected.jsonl")
    result = {
        "file": path.name,
        "utterances": len(rows),
        "bootstrap": BOOTSTRAP,
        "marks": marks,
        "rejected": len(read_rows(rejected)) if rejected.exists() else 0,
        "notes": [*notes, *language_notes(rows)],
        "tasks": score_rows(rows, marks),
    }
    target = path.with_suffix(".scores.json")
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def print_notes(result: dict) -> None:
    for note in result["notes"]:
        print(f"note: {note}")


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m evaluation.score", __doc__.splitlines()[0], example="predictions.jsonl")
    parser.add_argument("files", nargs="+", type=Path, help="predictions written by evaluation.run")
    parser.add_argument(
        "--marks",
        choices=MARKS,
        default="script",
        help="combining marks: kept where a script needs them (default), all kept, or deleted as Whisper's "
        "normaliser does, for comparison with published numbers",
    )
    add_plugins_option(parser)
    options = parser.parse_args(arguments)
    try:
        load_plugins(options.plugins)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in options.files:
        try:
            result = score_file(path, options.marks)
        except PredictionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path} ({result['utterances']} predictions, {result['rejected']} samples rejected)")
        print(table(result["tasks"]))
        print_notes(result)
        print(f"scores: {path.with_suffix('.scores.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
