"""Print the quick start's scores as a table, and write them as CSV.

    python -m examples.quickstart.results [--out benchmarks/results/quickstart.csv]

results.json holds the rows (each score with its 95 % bootstrap interval and number of utterances, before and
after training), the recipes as they were run, the seconds of each step, the machine, the versions and the
commit.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from core.command_line import CommandParser, accept_old_name
from core.console import printable_line
from core.decode_names import decode_name
from core.files import write_atomically
from evaluation.predictions import read_rows, row_key

if TYPE_CHECKING:
    from examples.quickstart.demo import Plan

# Of each metric family of evaluation.score: what the table shows, and how it is called.
SHOWN = {
    "wer": [("wer", "WER")],
    "bleu": [("bleu", "BLEU"), ("chrf", "chrF")],
    "answer": [("exact", "exact answers")],
    "chain": [("wer", "WER of the transcription"), ("exact", "exact answers")],
    "accuracy": [("accuracy", "accuracy")],
}
POINTS = ("BLEU", "chrF")  # measures of 0 to 100; the others are fractions
DECODES = {"ctc": "CTC head, greedy", "greedy": "LLM, greedy", "joint": "LLM and CTC head, beam search"}


def collect(plan: Plan) -> list[dict]:
    """A row for each stage, scored data and measure; `before` (where scored) and `after`: value, ci95,
    utterances."""
    rows = []
    for stage, recipe in plan.recipes:
        scores_at = {
            when: {name: scores_of(plan.scores(recipe, when), name) for name in stage[when].shards}
            for when in ("before", "after", "joint")
            if when in stage
        }
        for how in ("after", "joint"):
            for name, tasks in scores_at.get(how, {}).items():
                for task, scores in tasks.items():
                    for key, label in SHOWN[scores["metric"]]:
                        row = {
                            "stage": stage.title,
                            "data": name,
                            "task": task,
                            "decode": stage[how].decode,
                            "measure": label,
                            "kept_share": scores["length"].get("kept_share"),
                            "after": value_of(scores, key),
                        }
                        if how == "after" and task in scores_at.get("before", {}).get(name, {}):
                            row["before"] = value_of(scores_at["before"][name][task], key)
                        rows.append(row)
    return rows


def value_of(scores: dict, key: str) -> dict:
    return {"value": scores[key], "ci95": scores.get(f"{key}_ci95"), "utterances": scores["utterances"]}


def scores_of(folder: Path, shards: str) -> dict[str, dict]:
    """task -> scores that evaluation.run left in FOLDER for a packed folder of that name. Errors:
    ValueError."""
    files = list(folder.glob(f"{shards}-*.scores.json"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} has {len(files)} score files of {shards}, not one: remove it and run the demo again"
        )
    return json.loads(files[0].read_text())["tasks"]


def processor() -> str:
    names = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def summary(plan: Plan, rows: list[dict], seconds: dict[str, float | None]) -> dict:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed_files": bool(git("status", "--porcelain")),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "gpu": device,
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
        "ranks": plan.ranks,
        "seconds": seconds,
        "recipes": {recipe.stage: asdict(recipe) for _, recipe in plan.recipes},
        "rows": rows,
    }


def shown(score: dict | None, percent: bool) -> str:
    """Return a score with its interval as the table prints it; percent: it is a fraction."""
    if score is None:
        return ""
    scale = 100 if percent else 1
    bounds = " [{:.1f}, {:.1f}]".format(*(scale * bound for bound in score["ci95"])) if score["ci95"] else ""
    return f"{scale * score['value']:.1f}{bounds}"


def table(result: dict) -> str:
    """Return the scores as text; error rates and accuracies in percent."""
    lines = [
        [
            row["stage"],
            f"{row['data']}, {row['task']}",
            row["measure"] if row["measure"] in POINTS else f"{row['measure']}, %",
            DECODES[decode_name(row["decode"])],
            shown(row.get("before"), row["measure"] not in POINTS),
            shown(row["after"], row["measure"] not in POINTS),
            row["after"]["utterances"],
        ]
        for row in result["rows"]
    ]
    return tabulate(
        lines,
        headers=["", "held-out data", "measure", "decoded by", "before", "after", "utterances"],
        tablefmt="github",
        disable_numparse=True,
    )


def transcripts(files: dict[str, Path], count: int = 5) -> str:
    """Return `count` utterances that all prediction files hold, evenly spaced: the reference, and a line for
    each file by its name; "" if one is missing."""
    if not files or not all(path.exists() for path in files.values()):
        return ""
    predictions = {name: {row_key(row): row for row in read_rows(path)} for name, path in files.items()}
    first = next(iter(predictions.values()))
    common = [key for key in first if all(key in rows for rows in predictions.values())]
    width = max(len("reference"), *map(len, files))
    blocks = []
    for place in range(min(count, len(common))):
        key = common[place * len(common) // min(count, len(common))]
        lines = [("reference", first[key]["reference"])]
        lines += [(name, rows[key]["prediction"]) for name, rows in predictions.items()]
        blocks.append("\n".join(f"{name:<{width}}  {printable_line(text)}" for name, text in lines))
    return "\n\n".join(blocks)


def machine_line(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    minutes = sum(value or 0 for value in result["seconds"].values()) / 60
    where = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB{where}; "
        f"{result['ranks']} ranks; "
        f"{minutes:.0f} minutes in all; torch {versions['torch']}, deepspeed {versions['deepspeed']}; "
        f"commit {result['commit']}{' with local changes' if result['changed_files'] else ''}, "
        f"{result['date']}"
    )


def write_csv(path: Path, result: dict) -> None:
    """Write one row for each score; the first line is a comment with seed, steps and machine."""
    steps = ", ".join(f"{name} {recipe['optim']['steps']}" for name, recipe in result["recipes"].items())
    seed = next(iter(result["recipes"].values()))["seed"]
    text = io.StringIO()
    text.write(f"# One run, seed {seed}; optimizer steps: {steps}. Machine: {machine_line(result)}.\n")
    names = ("stage", "data", "task", "decode", "measure")
    columns = [f"{when}{end}" for when in ("before", "after") for end in ("", "_low", "_high")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *columns, "utterances"])
    for row in result["rows"]:
        numbers = []
        for score in (row.get("before"), row["after"]):
            low, high = (score or {}).get("ci95") or (None, None)
            numbers += [
                "" if value is None else f"{value:.4f}" for value in ((score or {}).get("value"), low, high)
            ]
        writer.writerow([*(row[name] for name in names), *numbers, row["after"]["utterances"]])
    write_atomically(path, text.getvalue())


def main() -> int:
    parser = CommandParser(
        "python -m examples.quickstart.results", __doc__.split("\n")[0], example="--out scores.csv"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("runs/quickstart/results.json"), help="written by the demo"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores there too")
    accept_old_name(parser, "--csv", "--out")
    options = parser.parse_args()
    if not options.results.exists():
        print(
            f"error: {options.results} does not exist: run `make demo` first, or name another with --results",
            file=sys.stderr,
        )
        return 2
    result = json.loads(options.results.read_text())
    print(table(result))
    if options.out:
        try:
            write_csv(options.out, result)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
