"""A run on one page: `python -m train.report RUN` writes RUN/<stage>/report.html, pictures embedded.

RUN is the recipes' `output`, or one stage's folder. Everything comes from metrics.jsonl; run.json and
pictures/ add the state and the validation clip where they are there. The trainer writes the same page when a
stage ends, is preempted or fails.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from core.files import read_lines, write_atomically
from recipe.stages import STAGES, stages_in

POINTS = 500  # of a curve: longer runs are averaged in bins
# title, unit, {label: (kind of line, key)}, factor
PANELS = (
    ("loss", "nats", {"training": ("train", "loss"), "validation": ("valid", "loss")}, 1),
    ("parts of the loss", "nats", {}, 1),  # filled by `panels`
    ("validation WER", "", {"WER": ("valid", "wer")}, 1),
    ("gradient norm", "", {"before clipping": ("train", "grad_norm")}, 1),
    (
        "learning rates",
        "",
        {
            "adapters": ("train", "lr_adapters"),
            "CTC head": ("train", "lr_ctc_head"),
            "LoRA": ("train", "lr_lora"),
        },
        1,
    ),
    ("throughput", "s of audio / s / device", {"": ("train", "audio_seconds_per_second")}, 1),
    ("model FLOP/s", "TFLOP/s / device", {"": ("train", "flops_per_second")}, 1e-12),
    (
        "step time",
        "s",
        {"step": ("train", "step_seconds"), "waiting for data": ("train", "data_wait_seconds")},
        1,
    ),
    ("padding", "% of computed audio", {"": ("train", "padding_share")}, 100),
    ("shrink ratio", "% of frames kept", {"": ("train", "shrink_ratio")}, 100),
    (
        "rejected data",
        "in all",
        {"rejected samples": ("train", "rejected"), "read retries": ("train", "retries")},
        1,
    ),
    ("memory", "GiB, peak of rank 0", {"": ("train", "peak_memory_gib")}, 1),
)
SUMMED = ("rejected", "retries")
STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:1180px;margin:2em auto;padding:0 "
    "1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}img{max-width:100%}"
    ".panels img{width:32%;min-width:300px}"
)


def read(path: Path) -> dict[str, list[dict]]:
    """Lines of metrics.jsonl by kind."""
    lines: dict[str, list[dict]] = {"train": [], "valid": [], "event": []}
    for line in read_lines(path):
        lines.setdefault(line["kind"], []).append(line)
    return lines


def series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a key, at most POINTS of them: means of equal bins. Values that are not finite are
    gaps; of a step that was done again after a roll-back, the last one counts."""
    found = {line["step"]: line[key] for line in lines if isinstance(line.get(key), (int, float))}
    steps = np.array(sorted(found), dtype=float)
    values = np.array([found[step] for step in sorted(found)], dtype=float)
    if key in SUMMED:
        values = np.cumsum(values)
    values[~np.isfinite(values)] = np.nan
    if len(steps) > POINTS:
        bins = np.array_split(np.arange(len(steps)), POINTS)
        steps = np.array([steps[b].mean() for b in bins])
        values = np.array([np.nan if np.isnan(values[b]).all() else np.nanmean(values[b]) for b in bins])
    return steps, values


def embedded(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def panel(lines: dict[str, list[dict]], title: str, unit: str, curves: dict, factor: float) -> str:
    """One diagram as an <img>; nothing where none of its keys was logged."""
    picture = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = picture.subplots()
    drawn = 0
    for label, (kind, key) in curves.items():
        steps, values = series(lines[kind], key)
        if np.isfinite(values).any():
            axes.plot(
                steps,
                factor * values,
                "o-" if kind == "valid" else "-",
                markersize=3,
                linewidth=1.1,
                label=label,
            )
            drawn += 1
    if not drawn:
        return ""
    if drawn > 1 or next(iter(curves)):
        axes.legend(fontsize=8)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=90)
    return embedded(buffer.getvalue(), title)


def panels(noted: dict) -> list[tuple]:
    """Return PANELS, with the curves of the losses that run.json names."""
    parts = {
        f"{name.upper() if name in ('ce', 'ctc') else name}, {label}": (kind, name)
        for name in noted.get("losses", ("ce", "ctc"))
        for label, kind in (("training", "train"), ("validation", "valid"))
    }
    return [(title, unit, curves or parts, factor) for title, unit, curves, factor in PANELS]


def table(rows: list[tuple], header: tuple[str, ...] = ()) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def summary(lines: dict[str, list[dict]], noted: dict) -> list[tuple[str, str]]:
    """What the run was, in numbers; shares are over all steps, not means of shares."""
    train, rows = lines["train"], []

    def total(key: str) -> float:
        return float(sum(line.get(key, 0.0) for line in train))

    if noted:
        state = noted.get("status", "unknown") + (f": {noted['reason']}" if noted.get("reason") else "")
        rows.append(
            (
                "state",
                f"{state} (step {noted.get('step', 0)} of {noted.get('steps', '?')}, "
                f"{noted.get('world_size', '?')} rank(s), {noted.get('host', '?')})",
            )
        )
    if train:
        seconds = np.array([line["step_seconds"] for line in train])
        rows.append(
            ("steps", f"{train[0]['step']} to {train[-1]['step']}, {seconds.sum() / 3600:.2f} hours in steps")
        )
        middle, slow, slowest = np.percentile(seconds, (50, 95, 99))
        rows.append(
            ("seconds a step", f"median {middle:.3g}, 95 % below {slow:.3g}, 99 % below {slowest:.3g}")
        )
        rows.append(("audio", f"{total('audio_seconds') / 3600:.2f} hours seen"))
        rows.append(("waiting for data", f"{total('data_wait_seconds') / seconds.sum():.2%} of the time"))
        real = total("audio_seconds")
        padded = sum(
            line.get("audio_seconds", 0.0) / max(1e-9, 1 - line.get("padding_share", 0.0)) for line in train
        )
        rows.append(
            ("padding", f"{1 - real / padded:.1%} of the audio that was computed" if padded else "no audio")
        )
        rows.append(("steps not applied", str(sum("skipped" in line for line in train))))
        rows.append(("rejected samples, read retries", f"{total('rejected'):.0f}, {total('retries'):.0f}"))
        passes = next((line["passes"] for line in reversed(train) if "passes" in line), {})
        rows += [(f"passes over {name}", f"{number:.2f}") for name, number in passes.items()]
    scored = [line for line in lines["valid"] if line.get("words") and "wer" in line]
    if scored:
        best = min(scored, key=lambda line: line["wer"])
        rows.append(
            (
                "validation WER",
                f"last {scored[-1]['wer']:.3f} (step {scored[-1]['step']}), "
                f"best {best['wer']:.3f} (step {best['step']})",
            )
        )
    return rows


def page(folder: Path) -> str:
    lines = read(folder / "metrics.jsonl")
    noted = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    name = folder.name
    title = f"Stage {STAGES[name].number}: {name}" if name in STAGES else name
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        table(summary(lines, noted)),
        '<div class="panels">',
        *(panel(lines, *definition) for definition in panels(noted)),
        "</div>",
    ]
    events = [line for kind, found in lines.items() if kind not in ("train", "valid") for line in found]
    if events:
        known = ("kind", "step", "time")
        parts += [
            "<h2>Events</h2>",
            table(
                [
                    (line["step"], json.dumps({k: v for k, v in line.items() if k not in known}))
                    for line in events[-50:]
                ],
                ("step", "what"),
            ),
        ]
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    if pictures:
        parts.append("<h2>One validation clip: kept frames, P(blank), CTC peaks</h2>")
        parts += [
            f"<p>{embedded(path.read_bytes(), path.stem)}</p>"
            for path in dict.fromkeys((pictures[0], pictures[-1]))
        ]
    samples = next((line for line in reversed(lines["valid"]) if line.get("samples")), None)
    if samples:
        parts += [
            f"<h2>Validation samples at step {samples['step']}</h2>",
            table(samples["samples"], ("reference", "written")),
        ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write(folder: Path) -> Path:
    """Write <folder>/report.html of one stage; returns its path. Needs metrics.jsonl there."""
    path = folder / "report.html"
    write_atomically(path, page(folder))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="A run on one page, from its files alone."
    )
    parser.add_argument("run", type=Path, help="the recipes' `output` folder, or a stage's folder in it")
    run = parser.parse_args(argv).run
    folders = [f for f in (run, *(run / name for name in stages_in(run))) if (f / "metrics.jsonl").exists()]
    if not folders:
        print(
            f"error: {run} holds no metrics.jsonl, nor does a stage's folder in it ({', '.join(STAGES)})",
            file=sys.stderr,
        )
        return 2
    for folder in folders:
        print(write(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
