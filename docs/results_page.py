"""The generated parts of README.md and docs/results.md: tables and figures from benchmarks/results/."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from core.repository import ROOT

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
WHOLE = "dialogues-test (all)"
PART = "dialogues-test"
#: Rows of the table: system in less_is_more.csv, name on the page.
TABLE = {
    "whisper": "Whisper base, its own decoder (680,000 h)",
    "stage 1 (full)": "stage 1, CTC decoding",
    "ours": "stage 2, LLM decoding",
    "ours, joint": "stage 2, joint decoding",
    "ours-sft, joint": "stage 3, joint decoding",
    "synthetic, joint": "stage 2 with 5.9 h of TTS audio in stage 1, joint decoding",
    "no-token-embeddings": "stage 2 without token embeddings (the paper's input), LLM decoding",
    "data-10": "stage 2 with 10 % of the data, LLM decoding",
    "no-stage-1": "stage 2 without stage 1, LLM decoding",
    "projector": "baseline: linear projector and LoRA, LLM decoding",
}
#: More rows of the forest plot.
FOREST = {
    "ours-sft": "stage 3, LLM decoding",
    "longer": "stage 2, four times the steps",
    "synthetic": "TTS audio in stage 1, LLM decoding",
    "synthetic-2": "TTS audio in stages 1 and 2",
    "projector-synthetic": "linear projector with TTS audio",
    "alpha-16": "LoRA alpha 16 (paper)",
    "no-lookback": "without look-back",
    "no-ctc": "without CTC loss in stage 2",
    "blank-kept": "one frame for each blank run",
    "frame": "attention within a frame",
    "data-25": "25 % of the data",
    "data-50": "50 % of the data",
}


def rows() -> dict[tuple[str, str], list[dict]]:
    """Return (system, test set) -> rows of its seeds."""
    by_system = defaultdict(list)
    for row in csv.DictReader((RESULTS / "less_is_more.csv").open()):
        by_system[row["system"], row["test_set"]].append(row)
    return by_system


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def mean_and_range(seed_rows: list[dict]) -> str:
    values = [float(row["wer"]) for row in seed_rows]
    if not values:
        return ""
    spread = f" ({percent(min(values))} to {percent(max(values))})" if len(values) > 1 else ""
    return percent(mean(values)) + spread


def main_table() -> str:
    results = rows()
    lines = []
    for system, name in TABLE.items():
        part, whole = results[system, PART], results[system, WHOLE]
        rates = [float(row["frames_per_second"]) for row in part if row["frames_per_second"]]
        seeds = max(len(part), len(whole)) if system != "whisper" else ""
        shown = f"{mean(rates):.1f}" if rates and not system.startswith("stage 1") else ""
        lines.append(f"| {name} | {seeds} | {mean_and_range(part)} | {mean_and_range(whole)} | {shown} |")
    head = "| system | seeds | WER %, 80 utterances | WER %, 539 utterances | LLM frames/s |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def forest() -> Figure:
    """Mean WER of each system with the range over seeds, sorted."""
    results, names = rows(), {**TABLE, **FOREST}
    points = []
    for system, name in names.items():
        values = [float(row["wer"]) for row in results[system, PART]]
        if values:
            points.append((mean(values), min(values), max(values), name.replace(" (680,000 h)", "")))
    points.sort(reverse=True)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots()
    for place, (middle, low, high, name) in enumerate(points):
        color = (
            "#c4570a" if "baseline" in name or "projector" in name or "without stage 1" in name else "#2f6fd0"
        )
        axes.plot([100 * low, 100 * high], [place, place], color=color, linewidth=2)
        axes.plot(100 * middle, place, "o", color=color, markersize=5)
    axes.set_yticks(range(len(points)), [name for *_, name in points], fontsize=9)
    axes.set_xlabel("WER, %, 80 held-out utterances: mean and range over seeds")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    return figure


def data_curve() -> Figure:
    """WER against hours of training audio: stage 1's CTC and stage 2's LLM."""
    results = rows()
    hours = {"data-10": 0.25, "data-25": 0.64, "data-50": 1.24, "ours": 2.59}
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    curves = {
        "stage 1, CTC decoding": {kind: f"stage 1 ({'full' if kind == 'ours' else kind})" for kind in hours},
        "stage 2, LLM decoding": {kind: kind for kind in hours},
    }
    for (label, systems), color in zip(curves.items(), ("#2f6fd0", "#c4570a"), strict=True):
        means = [(hours[kind], mean(seeds(results, system))) for kind, system in systems.items()]
        axes.plot([x for x, _ in means], [100 * y for _, y in means], "-", color=color, label=label)
        for kind, system in systems.items():
            values = [100 * value for value in seeds(results, system)]
            axes.plot([hours[kind]] * len(values), values, "o", color=color, markersize=4)
    axes.set_xlabel("hours of training audio, equal steps")
    axes.set_ylabel("WER, %, 80 held-out utterances")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def seeds(results: dict, system: str) -> list[float]:
    """Return the WER of seeds 0 and 1, which every point of the curve has."""
    return [float(row["wer"]) for row in results[system, PART] if row["seed"] in ("0", "1")]


# ------------------------------------------------------------------------------------------------------------


def quickstart() -> tuple[str, list[dict]]:
    """Return the comment (seed, steps, machine, commit) and the rows of the quick start."""
    text = (RESULTS / "quickstart.csv").read_text()
    comment, _, table = text.partition("\n")
    return comment.removeprefix("# "), list(csv.DictReader(io.StringIO(table)))


def with_interval(row: dict, when: str) -> str:
    if not row[when]:
        return ""
    value, low, high = (float(row[when + end]) for end in ("", "_low", "_high"))
    if row["measure"] in ("BLEU", "chrF"):
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


DECODES = {"ctc": "CTC head", "greedy": "LLM", "joint": "LLM and CTC head"}


def quickstart_table() -> str:
    comment, results = quickstart()
    lines = [
        "| stage | test set, task | measure | decoded by | before | after | utterances |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        measure = row["measure"] if row["measure"] in ("BLEU", "chrF") else f"{row['measure']}, %"
        cells = [row["stage"], f"{row['data']}, {row['task']}", measure, DECODES[row["decode"]]]
        cells += [with_interval(row, "before"), with_interval(row, "after"), row["utterances"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets: 95 % bootstrap intervals over utterances. {comment}"])


def readme_rows() -> str:
    comment, results = quickstart()
    chosen = [
        row
        for row in results
        if (row["data"], row["task"], row["measure"]) == ("dialogues-test", "asr", "WER")
    ]
    lines = ["| quick start, held-out dialogues | WER, % | utterances |", "|---|---|---|"]
    for row in (chosen[0], chosen[1], chosen[-1]):
        name = f"{row['stage']}, decoded by {DECODES[row['decode']]}"
        lines.append(f"| {name} | {with_interval(row, 'after')} | {row['utterances']} |")
    return "\n".join([*lines, "", comment])


def machine() -> str:
    result = json.loads((RESULTS / "less_is_more.json").read_text())["machine"]
    commits = {
        commit
        for row in csv.DictReader((RESULTS / "less_is_more.csv").open())
        for commit in row["commits"].split()
    }
    versions = result["versions"]
    return (
        f"Machine of the latest runs: {result['cpu']}, {result['cores']} cores, {result['capability']}; "
        f"torch {versions['torch']}, deepspeed {versions['deepspeed']}; two ranks, ZeRO-1. "
        f"Trained at commits {', '.join(sorted(commits))}."
    )


PARTS = {
    ROOT / "README.md": {"quick start": readme_rows},
    DOCS / "results.md": {"main table": main_table, "quick start": quickstart_table, "machine": machine},
}


def filled(path: Path) -> str:
    """Return a document with its generated parts replaced. Errors: ValueError for a missing mark."""
    text = path.read_text()
    for name, make in PARTS[path].items():
        pattern = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(
                f"{path.name} needs the lines <!-- {name}: generated --> and <!-- end of {name} -->, once"
            )
        text = pattern.sub(lambda match: f"{match[1]}\n{make()}\n\n{match[2]}", text)  # noqa: B023
    return text


def write_figures() -> None:
    forest().savefig(DOCS / "images" / "forest.png", dpi=110)
    data_curve().savefig(DOCS / "images" / "data_curve.png", dpi=110)
