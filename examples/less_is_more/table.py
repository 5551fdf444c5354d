"""Print a study's scores as tables, draw them, and write them as CSV.

    python -m examples.less_is_more.table [--plan PLAN] [--out benchmarks/results]

results.json holds each variant and seed: WER with its 95 % bootstrap interval, the paired test against ours
on the same utterances, hours of data, CTC peaks, seconds; the machine, versions and commit. What has not
been run yet is not in the table.

With --out the rows are written as CSV and kept as JSON, by the plan's name
(benchmarks/results/less_is_more.json). Rows of former runs stay there until the same variant and seed is run
again, so the study can be run in parts. docs/results.md is generated from them.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.machine import line, machine
from core.command_line import CommandParser, accept_old_name
from core.files import read_lines, write_atomically
from evaluation.compare import compare
from evaluation.metrics.error_rates import word_counts
from evaluation.predictions import read_rows, row_key
from evaluation.resampling import paired_test
from stream import Plan

if TYPE_CHECKING:
    from examples.less_is_more.study import Study
    from recipe.config import Recipe

OURS, BASELINE = "ours", "projector"
STAGES = ("stage_1", "stage_2", "stage_3")
ERRORS = ("substitutions", "deletions", "insertions")
# How a variant is decoded: what that adds to its name and title.
DECODES = {"greedy": ("", ""), "joint": (", joint", ": LLM and CTC head together, beam search")}


def trained(folder: Path) -> dict:
    """Steps, median seconds of a step (one done again counts once), minutes in all and commit, from what the
    trainer left."""
    lines = read_lines(folder / "metrics.jsonl")
    seconds = {record["step"]: record["step_seconds"] for record in lines if record["kind"] == "train"}
    return {
        "steps": len(seconds),
        "step_seconds": float(np.median(list(seconds.values()))),
        "minutes": sum(seconds.values()) / 60,
        "commit": json.loads((folder / "run.json").read_text())["commit"],
    }


def hours(recipe: Recipe) -> float:
    """Of audio that a stage's corpora hold."""
    return (
        sum(order.total for order in Plan.open(recipe.data, recipe.stage, recipe.optim.total_steps).orders)
        / 3.6e6
    )


def wer_of(path: Path) -> dict:
    scores = json.loads(path.with_suffix(".scores.json").read_text())["tasks"]["asr"]
    return {
        "wer": scores["wer"],
        "ci95": scores["wer_ci95"],
        "utterances": scores["utterances"],
        "errors": {kind: scores[kind] for kind in ERRORS},
        "kept_per_second": scores["length"].get("kept_per_second"),
        "predictions": str(path),
    }


def against(ours: Path, other: Path) -> dict:
    wer = compare(ours, other)["tasks"]["asr"]["metrics"]["wer"]
    return {"difference": wer["difference"], "ci95": wer["difference_ci95"], "p_value": wer["p_value"]}


def over_seeds(pairs: list[tuple[Path, Path]]) -> dict:
    """The paired test over several runs on the same utterances: an utterance's errors are summed over its
    runs, so that the same words, said once, do not count as several draws. pairs: (first, second) predictions
    of each run."""
    sums = [np.zeros(1), np.zeros(1)]
    for pair in pairs:
        for side, path in enumerate(pair):
            rows = {row_key(row): row for row in read_rows(path)}
            counted, units, _ = word_counts([rows[key] for key in sorted(rows)])
            sums[side] = sums[side] + counted
    test = paired_test(*sums, units * len(pairs))
    return {
        "wer": test["second"],
        "difference": test["difference"],
        "ci95": test["difference_ci95"],
        "p_value": test["p_value"],
    }


class Results:
    """The prediction files of a study that have been scored."""

    def __init__(self, study: Study):
        self.study = study
        self.shards = list(study.plan.score.shards)
        # The plan's seeds, and those that --seeds has added.
        run = {int(path.name.rpartition("-seed-")[2]) for path in study.output.glob("*-seed-*")}
        self.seeds = sorted({*study.plan.seeds, *run})

    def files(self, folder: Path, decode: str) -> dict[str, Path]:
        """Return the predictions on each test set; {} where one has not been scored."""
        paths = {data: self.study.predictions(folder, decode, data) for data in self.shards}
        return paths if all(path.with_suffix(".scores.json").exists() for path in paths.values()) else {}

    def whole(self, folder: Path, decode: str) -> Path | None:
        """Return the predictions on every utterance of the first test set; None where it has not been scored
        so."""
        path = self.study.predictions(folder, decode, self.shards[0], whole=True)
        return path if path.with_suffix(".scores.json").exists() else None

    def variant_rows(self, name: str, seed: int) -> list[dict]:
        """Return one row for each way of decoding a variant."""
        study, variant = self.study, self.study.plan.variants[name]
        folder, first = study.folder(name, seed), study.first(variant.alignment, seed)
        if not self.files(folder, "greedy"):
            return []
        stages = [stage for stage in study.stages(name) if stage != "sft"]  # the same clips
        held = [hours(study.recipe(name, stage, seed)) for stage in stages]
        second = study.folder(variant.get("after", name), seed)
        common = {"seed": seed, "stage_2": trained(second), "hours": max(held)}
        if variant.alignment:
            common["stage_1"] = trained(first)
        if folder != second:
            common["stage_3"] = trained(folder)
        common["minutes"] = sum(common[stage]["minutes"] for stage in STAGES if stage in common)
        rows = []
        for decode, (suffix, addition) in DECODES.items():
            if not self.files(folder, decode):
                continue
            row = {"variant": name + suffix, "title": variant.title + addition, **common}
            row |= self.scores(name, decode, folder, first, seed)
            if decode == "greedy" and (folder / "speed.json").exists():
                speed = json.loads((folder / "speed.json").read_text())
                row["first_token_ms"] = speed["first_token_ms_median"]
            rows.append(row)
        return rows

    def scores(self, name: str, decode: str, folder: Path, first: Path, seed: int) -> dict:
        """Return a row's scores, and its comparisons with ours and with stage 1's CTC."""
        paths = self.files(folder, decode)
        row: dict = {"scores": {data: wer_of(path) for data, path in paths.items()}}
        # Against ours decoded in the same way; ours together with CTC against ours without it.
        same = decode if name != OURS else "greedy" if decode != "greedy" else None
        ours = self.study.folder(OURS, seed)
        for key, others in (
            ("against_ours", same and self.files(ours, same)),
            ("against_ctc", self.files(first, "ctc")),
        ):
            if others:
                row[key] = {data: against(others[data], path) for data, path in paths.items()}
        if of := self.whole(folder, decode):
            row["whole"] = wer_of(of)
            for key, other in (
                ("whole_against_ours", same and self.whole(ours, same)),
                ("whole_against_ctc", self.whole(first, "ctc")),
            ):
                if other:
                    row[key] = against(other, of)
        return row

    def first_stage_rows(self, seed: int) -> list[dict]:
        rows = []
        for kind in self.study.plan.alignments:
            if paths := self.files(self.study.first(kind, seed), "ctc"):
                scores = {data: wer_of(path) for data, path in paths.items()}
                row = {"alignment": kind, "seed": seed, "scores": scores}
                if of := self.whole(self.study.first(kind, seed), "ctc"):
                    row["whole"] = wer_of(of)
                rows.append(row)
        return rows

    def pairs(self, name: str, decode: str) -> dict[str, dict[int, tuple[Path, Path]]]:
        """Return what a variant is compared with, by seed."""
        study, variant = self.study, self.study.plan.variants[name]
        pairs: dict[str, dict[int, tuple[Path, Path]]] = {"its stage 1's CTC": {}, "ours": {}}
        for seed in self.seeds:
            of = self.whole(study.folder(name, seed), decode)
            if of and variant.alignment and (ctc := self.whole(study.first(variant.alignment, seed), "ctc")):
                pairs["its stage 1's CTC"][seed] = ctc, of
            if of and name != OURS and (ours := self.whole(study.folder(OURS, seed), decode)):
                pairs["ours"][seed] = ours, of
        return pairs


def collect(study: Study) -> dict:
    """Return what has been run so far, of any seed and variant of the plan."""
    results = Results(study)
    shards, variants = results.shards, study.plan.variants
    rows = [row for seed in results.seeds for name in variants for row in results.variant_rows(name, seed)]
    first_stages = [row for seed in results.seeds for row in results.first_stage_rows(seed)]
    pooled = [
        {
            "variant": name + suffix,
            "title": variant.title + addition,
            "against": title,
            "seeds": list(runs),
            **over_seeds(list(runs.values())),
        }
        for name, variant in variants.items()
        for decode, (suffix, addition) in DECODES.items()
        for title, runs in results.pairs(name, decode).items()
        if len(runs) > 1
    ]
    whisper = {data: study.output / "whisper" / f"{data}.jsonl" for data in shards}
    return {
        "machine": machine(),
        "ranks": study.ranks,
        "shards": shards,
        "rows": rows,
        "stage_1_ctc": first_stages,
        "over_seeds": pooled,
        "whisper": {
            data: wer_of(path) for data, path in whisper.items() if path.with_suffix(".scores.json").exists()
        },
    }


def with_former(result: dict, former: dict, study: Study) -> dict:
    """The result and, of what it lacks, the former one's; in the plan's order, seeds of a variant side by
    side. Where ours of a seed is not the former one any more, the former rows of that seed say so (`former`):
    they were compared with another ours."""
    variants = [name + DECODES[decode][0] for name in study.plan.variants for decode in DECODES]
    merged = {**result, "whisper": former["whisper"] | result["whisper"]}
    fresh = {row["seed"] for row in result["rows"] if row["variant"] == OURS}
    former = {
        **former,
        "rows": [{**row, "former": True} if row["seed"] in fresh else row for row in former["rows"]],
    }
    for kind, of, order in (
        ("rows", "variant", variants),
        ("stage_1_ctc", "alignment", list(study.plan.alignments)),
    ):
        by_run = {(row[of], row["seed"]): row for row in [*former[kind], *result[kind]] if row[of] in order}
        merged[kind] = [by_run[key] for key in sorted(by_run, key=lambda key: (order.index(key[0]), key[1]))]
    # Of a former run those alone of which no seed was run again.
    not_repeated = [row for row in former.get("over_seeds", []) if not fresh & set(row["seeds"])]
    pooled = {(row["variant"], row["against"]): row for row in [*not_repeated, *result["over_seeds"]]}
    in_plan = [key for key in pooled if key[0] in variants]
    merged["over_seeds"] = [
        pooled[key] for key in sorted(in_plan, key=lambda key: (variants.index(key[0]), key[1]))
    ]
    return merged


def score(scores: dict) -> str:
    digits = 2 if scores["wer"] > 1 else 3
    return f"{scores['wer']:.{digits}f} [{scores['ci95'][0]:.{digits}f}, {scores['ci95'][1]:.{digits}f}]"


def errors(scores: dict) -> str:
    """Return the counts S/D/I; "" in rows of runs that did not record them."""
    return "/".join(str(scores["errors"][kind]) for kind in ERRORS) if "errors" in scores else ""


def p_of(row: dict, compared: dict | None) -> str:
    return f"{compared['p_value']:.2g}" + " †" * row.get("former", False) if compared else ""


def whole_table(result: dict) -> str:
    """What was scored on every utterance of the first test set; "" where nothing was."""
    lines = [
        [
            f"stage 1, CTC decoding ({row['alignment']})",
            row["seed"],
            score(row["whole"]),
            errors(row["whole"]),
        ]
        for row in result["stage_1_ctc"]
        if "whole" in row
    ]
    for row in result["rows"]:
        if "whole" not in row:
            continue
        ours = row.get("whole_against_ours")
        lines.append(
            [
                row["title"],
                row["seed"],
                score(row["whole"]),
                errors(row["whole"]),
                f"{ours['difference']:+.3f} [{ours['ci95'][0]:+.3f}, {ours['ci95'][1]:+.3f}]" if ours else "",
                p_of(row, ours),
                p_of(row, row.get("whole_against_ctc")),
            ]
        )
    if not lines:
        return ""
    count = next(
        row["whole"]["utterances"] for row in [*result["stage_1_ctc"], *result["rows"]] if "whole" in row
    )
    return tabulate(
        lines,
        headers=[
            "",
            "seed",
            f"WER, all of {result['shards'][0]} ({count})",
            "S/D/I",
            "against ours",
            "p",
            "p, against its stage 1",
        ],
        tablefmt="github",
        disable_numparse=True,
    )


def pooled_table(result: dict) -> str:
    """The comparisons on every utterance, seeds together; "" where none has two."""
    lines = [
        [
            row["title"],
            row["against"],
            ", ".join(map(str, row["seeds"])),
            f"{row['wer']:.3f}",
            f"{row['difference']:+.3f} [{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}]",
            f"{row['p_value']:.2g}",
        ]
        for row in result["over_seeds"]
    ]
    headers = ["", "against", "seeds", f"mean WER, all of {result['shards'][0]}", "difference", "p"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True) if lines else ""


def table(result: dict) -> str:
    """One row a variant and seed, WER on each test set with its interval; a column that would be empty is
    left out."""
    first = result["shards"][0]

    def line(title: str, seed: object, scores: dict) -> dict:
        counts = {data: scores[data]["utterances"] for data in result["shards"]}
        return {
            "": title,
            "seed": seed,
            **{f"WER {data} ({counts[data]})": score(scores[data]) for data in result["shards"]},
            f"S/D/I, {first}": errors(scores[first]),
        }

    lines = [line("Whisper's own decoder, greedy", "", result["whisper"])] if result["whisper"] else []
    lines += [
        line(f"stage 1, CTC decoding ({row['alignment']})", row["seed"], row["scores"])
        for row in result["stage_1_ctc"]
    ]
    for row in result["rows"]:
        speed = row.get("first_token_ms")
        lines.append(
            {
                **line(row["title"], row["seed"], row["scores"]),
                "p, against ours": p_of(row, row.get("against_ours", {}).get(first)),
                "p, against its stage 1": p_of(row, row.get("against_ctc", {}).get(first)),
                "hours": f"{row['hours']:.2f}",
                "frames / s to the LLM": f"{row['scores'][first]['kept_per_second']:.1f}",
                "first token, ms": "" if speed is None else f"{speed:.0f}",
                "s / step, stage 2": f"{row['stage_2']['step_seconds']:.1f}",
                "training, min": f"{row['minutes']:.1f}",
            }
        )
    headers = [name for name in lines[-1] if name == "" or any(row.get(name, "") != "" for row in lines)]
    return tabulate(
        [[row.get(name, "") for name in headers] for row in lines],
        headers=headers,
        tablefmt="github",
        disable_numparse=True,
    )


def picture(result: dict) -> Figure:
    """WER of each variant on the first test set, every seed a point; beside it ours and the baseline
    against hours of data, where that was run."""
    data = result["shards"][0]
    curves = defaultdict(list)
    for row in result["rows"]:
        if row["variant"] == OURS or row["variant"].startswith("data-"):
            curves[row["seed"]].append((row["hours"], row["scores"][data]["wer"]))
    curves = {seed: sorted(points) for seed, points in sorted(curves.items()) if len(points) > 1}
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))[::-1]
    figure = Figure(figsize=(11 if curves else 6.6, max(4.2, 1 + 0.28 * len(names))), layout="constrained")
    left, *right = figure.subplots(1, 2, width_ratios=(3, 2)) if curves else [figure.subplots()]
    for row in result["rows"]:
        scores, place = row["scores"][data], names.index(row["variant"]) + 0.15 * row["seed"]
        left.errorbar(
            scores["wer"],
            place,
            xerr=[[scores["wer"] - scores["ci95"][0]], [scores["ci95"][1] - scores["wer"]]],
            fmt="o" if row["variant"] != OURS else "D",
            color=f"C{row['seed']}",
            markersize=4,
        )
    left.set_yticks(range(len(names)), names)
    if result["whisper"]:
        left.axvline(result["whisper"][data]["wer"], linestyle=":", color="gray")
        place = (result["whisper"][data]["wer"], 1.01)
        left.annotate(
            "Whisper's decoder",
            place,
            xycoords=("data", "axes fraction"),
            color="gray",
            fontsize=8,
            ha="center",
        )
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel(f"WER on {data}, 95 % interval")
    for axes in right:
        for seed, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{seed}", label=f"ours, seed {seed}")
        for row in result["rows"]:
            if row["variant"] == BASELINE and row["seed"] in curves:
                axes.plot(
                    row["hours"],
                    row["scores"][data]["wer"],
                    "s",
                    color=f"C{row['seed']}",
                    fillstyle="none",
                    label=f"{BASELINE}, seed {row['seed']}",
                )
        axes.set_xlabel("hours of training data, equal steps")
        axes.set_ylabel(f"WER on {data}")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.1 * max(np.max(drawn.get_ydata()) for drawn in axes.lines))
        axes.legend()
    return figure


def csv_rows(result: dict) -> list[dict]:
    """Return one flat row for each system, seed and test set."""

    def rows(system: str, title: str, row: dict) -> list[dict]:
        lines_of_row = []
        scores = {
            **row["scores"],
            **({f"{result['shards'][0]} (all)": row["whole"]} if "whole" in row else {}),
        }
        for data, score in scores.items():
            line = {"system": system, "title": title, "seed": row.get("seed", ""), "test_set": data}
            line |= {"utterances": score["utterances"], "wer": f"{score['wer']:.4f}"}
            line |= {"low": f"{score['ci95'][0]:.4f}", "high": f"{score['ci95'][1]:.4f}"}
            line |= {kind: score.get("errors", {}).get(kind, "") for kind in ERRORS}
            line["frames_per_second"] = shown(score.get("kept_per_second"), 2)
            line |= {"hours": shown(row.get("hours"), 2), "minutes": shown(row.get("minutes"), 1)}
            line["first_token_ms"] = shown(row.get("first_token_ms"), 0)
            line["commits"] = " ".join(
                sorted({row[stage]["commit"] or "unknown" for stage in STAGES if stage in row})
            )
            line["former_run"] = "yes" if row.get("former") else ""
            lines_of_row.append(line)
        return lines_of_row

    lines = (
        rows("whisper", "Whisper's own decoder", {"scores": result["whisper"]}) if result["whisper"] else []
    )
    for row in result["stage_1_ctc"]:
        lines += rows(f"stage 1 ({row['alignment']})", f"stage 1, CTC decoding ({row['alignment']})", row)
    for row in result["rows"]:
        lines += rows(row["variant"], row["title"], row)
    return lines


def shown(value: float | None, digits: int, sign: str = "-") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def comparisons(result: dict) -> list[dict]:
    """Return one flat row for each paired test."""

    def line(system: str, seed: object, data: str, against: str, comparison: dict) -> dict:
        row = {"system": system, "seeds": seed, "test_set": data, "against": against}
        # Rows of the first versions hold the p-value alone.
        numbers = (
            [comparison["difference"], *comparison["ci95"]] if "difference" in comparison else [None] * 3
        )
        row |= zip(("difference", "low", "high"), (shown(number, 4, "+") for number in numbers), strict=True)
        return row | {"p_value": f"{comparison['p_value']:.4g}"}

    lines = []
    for row in result["rows"]:
        for key, against in (("against_ours", "ours"), ("against_ctc", "its stage 1's CTC")):
            for data, comparison in row.get(key, {}).items():
                lines.append(line(row["variant"], row["seed"], data, against, comparison))
            if comparison := row.get(f"whole_{key}"):
                lines.append(
                    line(row["variant"], row["seed"], f"{result['shards'][0]} (all)", against, comparison)
                )
    for row in result["over_seeds"]:
        seeds = " ".join(map(str, row["seeds"]))
        lines.append(line(row["variant"], seeds, f"{result['shards'][0]} (all)", row["against"], row))
    return lines


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def finish(study: Study, folder: Path | None = None) -> str:
    """Collect the scores; write results.json, a table and picture.png into the study's folder, and NAME.json,
    NAME.csv and NAME-comparisons.csv into `folder`, with the rows of former runs. Errors: ValueError where
    nothing has been scored yet."""
    result = collect(study)
    former_path = folder / f"{study.plan.name}.json" if folder else None
    if former_path and former_path.exists():
        result = with_former(result, json.loads(former_path.read_text()), study)
    if not result["rows"]:
        raise ValueError(
            f"{study.output} holds no scored variant: run python -m examples.less_is_more.study first"
        )
    text = "\n\n".join(filter(None, (table(result), whole_table(result), pooled_table(result))))
    write_atomically(study.output / "results.json", json.dumps(result, indent=1) + "\n")
    picture(result).savefig(study.output / "picture.png", dpi=80)
    runs = [row[stage] for row in result["rows"] for stage in STAGES if stage in row]
    commits = sorted({run["commit"] or "unknown" for run in runs})
    if any(row.get("former") for row in result["rows"]):
        text += "\n\n† from a former run, compared with ours and stage 1 of that run"
    text += f"\n\nTrained at commit {', '.join(commits)}; table by: {line(result['machine'])}; "
    text += f"{result['ranks']} ranks."
    if former_path:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(former_path, json.dumps(result, indent=1) + "\n")
        write_csv(former_path.with_suffix(".csv"), csv_rows(result))
        write_csv(folder / f"{study.plan.name}-comparisons.csv", comparisons(result))
    return text


def main() -> int:
    from examples.less_is_more.study import HERE, Study

    parser = CommandParser("python -m examples.less_is_more.table", __doc__.split("\n")[0], example="")
    parser.add_argument(
        "--plan", type=Path, default=HERE / "plan.yaml", help="whose table (default: plan.yaml)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write the rows there too, as CSV and JSON (benchmarks/results)",
    )
    accept_old_name(parser, "--csv", "--out")
    options = parser.parse_args()
    try:
        print(finish(Study(options.plan), options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
