"""A study's scores as one table and one picture: `python -m examples.less_is_more.table [--plan PLAN] [--docs
docs/results.md]`.

results.json holds each variant and seed: WER with its 95 % bootstrap interval, the paired test against ours
on the same utterances, hours of data, kept frames, seconds; the machine, versions and commit. What has not
been run yet is not in the table.

The whole study takes longer than many a machine is at hand. So with --docs the rows are kept beside the
document, by the plan's name (docs/less_is_more.json), and those of former runs stay in the table until the
same variant and seed is run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.machine import line, machine
from core.files import read_lines, write_atomically
from evaluation.compare import compare
from evaluation.metrics.error_rates import word_counts
from evaluation.predictions import read_rows, row_key
from evaluation.resampling import paired_test
from examples.documents import put_between
from stream import Plan

if TYPE_CHECKING:
    from examples.less_is_more.study import Study
    from recipe.config import Recipe

OURS, BASELINE = "ours", "projector"
STAGES = ("stage_1", "stage_2", "stage_3")
ERRORS = ("substitutions", "deletions", "insertions")
# How a variant is read out: what that adds to its name and title.
DECODES = {"generate": ("", ""), "joint": (", joint", ": LLM and CTC head together, beam search")}


def marks(study: Study) -> tuple[str, str]:
    """Between which lines of a document the table stands."""
    return (
        f"<!-- {study.plan.name}: written by examples/less_is_more/table.py -->",
        f"<!-- end of {study.plan.name} -->",
    )


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
        sum(order.total for order in Plan.open(recipe.data, recipe.stage, recipe.optim.steps).orders) / 3.6e6
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
    found = compare(ours, other)["tasks"]["asr"]["metrics"]["wer"]
    return {"difference": found["difference"], "ci95": found["difference_ci95"], "p_value": found["p_value"]}


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
    found = paired_test(*sums, units * len(pairs))
    return {
        "wer": found["second"],
        "difference": found["difference"],
        "ci95": found["difference_ci95"],
        "p_value": found["p_value"],
    }


def collect(study: Study) -> dict:
    """What has been run so far, of any seed and variant of the plan."""
    shards = list(study.plan.score.shards)
    rows, first_stages = [], []

    def files(folder: Path, decode: str) -> dict[str, Path]:
        """Predictions on each test set; {} where one has not been scored."""
        found = {data: study.predictions(folder, decode, data) for data in shards}
        return found if all(path.with_suffix(".scores.json").exists() for path in found.values()) else {}

    def whole(folder: Path, decode: str) -> Path | None:
        """Predictions on every utterance of the first test set; None where it has not been scored so."""
        path = study.predictions(folder, decode, shards[0], whole=True)
        return path if path.with_suffix(".scores.json").exists() else None

    # The plan's seeds, and those that --seeds has added.
    run = {int(path.name.rpartition("-seed-")[2]) for path in study.output.glob("*-seed-*")}
    for seed in sorted({*study.plan.seeds, *run}):
        ours = {decode: files(study.folder(OURS, seed), decode) for decode in DECODES}
        for name, variant in study.plan.variants.items():
            folder = study.folder(name, seed)
            if not files(folder, "generate"):
                continue
            first = study.first(variant.alignment, seed)
            held = [
                hours(study.recipe(name, stage, seed)) for stage in study.stages(name) if stage != "sft"
            ]  # the same clips
            second = study.folder(variant.get("after", name), seed)
            common = {"seed": seed, "stage_2": trained(second), "hours": max(held)}
            if variant.alignment:
                common["stage_1"] = trained(first)
            if folder != second:
                common["stage_3"] = trained(folder)
            common["minutes"] = sum(common[stage]["minutes"] for stage in STAGES if stage in common)
            for decode in DECODES:
                if not (found := files(folder, decode)):
                    continue
                row = {
                    "variant": name + DECODES[decode][0],
                    "title": variant.title + DECODES[decode][1],
                    **common,
                    "scores": {data: wer_of(path) for data, path in found.items()},
                }
                # Against ours read out the same way; ours together with CTC against ours alone.
                same = decode if name != OURS else "generate" if decode != "generate" else None
                for key, others in (
                    ("against_ours", same and ours[same]),
                    ("against_ctc", files(first, "ctc")),
                ):
                    if others:
                        row[key] = {data: against(others[data], path) for data, path in found.items()}
                if of := whole(folder, decode):
                    row["whole"] = wer_of(of)
                    for key, other in (
                        ("whole_against_ours", same and whole(study.folder(OURS, seed), same)),
                        ("whole_against_ctc", whole(first, "ctc")),
                    ):
                        if other:
                            row[key] = against(other, of)
                if decode == "generate" and (folder / "speed.json").exists():
                    row["first_token_ms"] = json.loads((folder / "speed.json").read_text())[
                        "first_token_ms_median"
                    ]
                rows.append(row)
        for kind in study.plan.alignments:
            if found := files(study.first(kind, seed), "ctc"):
                scores = {data: wer_of(path) for data, path in found.items()}
                row = {"alignment": kind, "seed": seed, "scores": scores}
                if of := whole(study.first(kind, seed), "ctc"):
                    row["whole"] = wer_of(of)
                first_stages.append(row)
    pooled = []
    for name, variant in study.plan.variants.items():
        for decode, (suffix, addition) in DECODES.items():
            pairs: dict[str, dict[int, tuple[Path, Path]]] = {"its stage I's CTC": {}, "ours": {}}
            for seed in sorted({*study.plan.seeds, *run}):
                of = whole(study.folder(name, seed), decode)
                if of and variant.alignment and (ctc := whole(study.first(variant.alignment, seed), "ctc")):
                    pairs["its stage I's CTC"][seed] = ctc, of
                if of and name != OURS and (ours_whole := whole(study.folder(OURS, seed), decode)):
                    pairs["ours"][seed] = ours_whole, of
            pooled += [
                {
                    "variant": name + suffix,
                    "title": variant.title + addition,
                    "against": title,
                    "seeds": list(found),
                    **over_seeds(list(found.values())),
                }
                for title, found in pairs.items()
                if len(found) > 1
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
        found = {(row[of], row["seed"]): row for row in [*former[kind], *result[kind]] if row[of] in order}
        merged[kind] = [found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))]
    # Of a former run those alone of which no seed was run again.
    kept = [row for row in former.get("over_seeds", []) if not fresh & set(row["seeds"])]
    pooled = {(row["variant"], row["against"]): row for row in [*kept, *result["over_seeds"]]}
    there = [key for key in pooled if key[0] in variants]
    merged["over_seeds"] = [
        pooled[key] for key in sorted(there, key=lambda key: (variants.index(key[0]), key[1]))
    ]
    return merged


def score(found: dict) -> str:
    digits = 2 if found["wer"] > 1 else 3
    return f"{found['wer']:.{digits}f} [{found['ci95'][0]:.{digits}f}, {found['ci95'][1]:.{digits}f}]"


def errors(found: dict) -> str:
    """Of words; "" in rows of runs that did not keep them apart."""
    return " + ".join(str(found["errors"][kind]) for kind in ERRORS) if "errors" in found else ""


def p_of(row: dict, compared: dict | None) -> str:
    return f"{compared['p_value']:.2g}" + " †" * row.get("former", False) if compared else ""


def whole_table(result: dict) -> str:
    """What was scored on every utterance of the first test set; "" where nothing was."""
    lines = [
        [
            f"stage I alone, CTC read-out ({row['alignment']})",
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
            "replaced + left out + added",
            "against ours",
            "p",
            "p, against its stage I",
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
            f"replaced + left out + added, {first}": errors(scores[first]),
        }

    lines = [line("Whisper's own decoder, greedy", "", result["whisper"])] if result["whisper"] else []
    lines += [
        line(f"stage I alone, CTC read-out ({row['alignment']})", row["seed"], row["scores"])
        for row in result["stage_1_ctc"]
    ]
    for row in result["rows"]:
        speed = row.get("first_token_ms")
        lines.append(
            {
                **line(row["title"], row["seed"], row["scores"]),
                "p, against ours": p_of(row, row.get("against_ours", {}).get(first)),
                "p, against its stage I": p_of(row, row.get("against_ctc", {}).get(first)),
                "hours": f"{row['hours']:.2f}",
                "frames / s to the LLM": f"{row['scores'][first]['kept_per_second']:.1f}",
                "first token, ms": "" if speed is None else f"{speed:.0f}",
                "s / step, II": f"{row['stage_2']['step_seconds']:.1f}",
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
        found, place = row["scores"][data], names.index(row["variant"]) + 0.15 * row["seed"]
        left.errorbar(
            found["wer"],
            place,
            xerr=[[found["wer"] - found["ci95"][0]], [found["ci95"][1] - found["wer"]]],
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


def finish(study: Study, docs: Path | None = None) -> str:
    """Collects, writes results.json, its table (.txt) and picture.png into the study's folder, and into
    `docs` between its marks, there with the rows of former runs. Errors: ValueError where nothing has been
    scored yet, or the marks are missing."""
    result = collect(study)
    kept = docs.with_name(f"{study.plan.name}.json") if docs else None
    if kept and kept.exists():
        result = with_former(result, json.loads(kept.read_text()), study)
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
        text += "\n\n† of a former run, against ours and stage I of that run, which are not in the table any more."  # noqa: E501
    told = f"{text}\n\nTrained at commit {', '.join(commits)}; table by: {line(result['machine'])}; {result['ranks']} ranks."  # noqa: E501
    if docs:
        put_between(docs, marks(study), told)
        write_atomically(kept, json.dumps(result, indent=1) + "\n")
        picture(result).savefig(docs.with_name(f"{study.plan.name}.png"), dpi=80)
    return told


def main() -> int:
    from examples.less_is_more.study import HERE, Study

    parser = argparse.ArgumentParser(
        prog="python -m examples.less_is_more.table", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--plan", type=Path, default=HERE / "plan.yaml", help="whose table (default: plan.yaml)"
    )
    parser.add_argument(
        "--docs", type=Path, help="put the table there too, between its marks, and a picture beside it"
    )
    options = parser.parse_args()
    try:
        print(finish(Study(options.plan), options.docs))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
