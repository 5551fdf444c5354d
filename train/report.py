"""Write a run's report.html for each stage, pictures embedded.

    python -m train.report RUN         also writes RUN/report.html with all stages

RUN is the recipes' `output`, or one stage's folder. Everything comes from metrics.jsonl; run.json and
pictures/ add the state and the validation clip where they are there. The trainer writes the same page when a
stage ends, is preempted or fails.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from core.command_line import CommandParser
from core.console import duration, plural, shown
from core.files import read_lines, write_atomically
from recipe.config import CORPORA, Corpus, Recipe
from recipe.stages import STAGES, stages_in

_CORPUS = asdict(Corpus())
POINTS = 500  # of a curve: longer runs are averaged in bins
# title, unit, {label: (kind of line, key)}, factor
PANELS: tuple[tuple[str, str, dict[str, tuple[str, str]], float], ...] = (
    ("loss", "nats", {"training": ("train", "loss"), "validation": ("valid", "loss")}, 1),
    ("parts of the loss", "nats", {}, 1),  # filled by `panels`
    ("validation WER", "%", {"": ("valid", "wer")}, 100),
    ("gradient norm", "", {"before clipping": ("train", "grad_norm")}, 1),
    (
        "learning rates",
        "",
        {
            "adapters": ("train", "lr_adapters"),
            "CTC head": ("train", "lr_ctc_head"),
            "LoRA": ("train", "lr_lora"),
            "encoder": ("train", "lr_encoder"),
            "LLM": ("train", "lr_llm"),
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
    ("shrink ratio", "% of the frames", {"": ("train", "shrink_ratio")}, 100),
    (
        "rejected data",
        "in all",
        {"rejected samples": ("train", "rejected"), "read retries": ("train", "retries")},
        1,
    ),
    ("memory", "GiB, peak of rank 0", {"": ("train", "peak_memory_gib")}, 1),
)
SUMMED = ("rejected", "retries")
LOGARITHMIC = ("loss", "parts of the loss", "gradient norm")
FROM_ZERO = ("validation WER", "step time", "rejected data", "memory")  # a small change stays small
SMOOTHED = 50  # a moving average covers this part of a curve: a fiftieth
STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:1180px;margin:2em auto;padding:0 "
    "1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}img{max-width:100%}"
    ".panels img{width:32%;min-width:300px}"
    "del{background:#ffd7d5}ins{background:#ccffd8;text-decoration:none}h1{margin-top:2em}"
)


def read(path: Path) -> dict[str, list[dict]]:
    """Lines of metrics.jsonl by kind."""
    lines: dict[str, list[dict]] = {"train": [], "valid": [], "event": []}
    for line in read_lines(path):
        lines.setdefault(line["kind"], []).append(line)
    return lines


def series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a key, at most POINTS points: means of equal bins. Values that are not finite are
    gaps; of a step that was done again after a roll-back, the last one counts."""
    by_step = {line["step"]: line[key] for line in lines if isinstance(line.get(key), (int, float))}
    steps = np.array(sorted(by_step), dtype=float)
    values = np.array([by_step[step] for step in sorted(by_step)], dtype=float)
    if key in SUMMED:
        values = np.cumsum(values)
    values[~np.isfinite(values)] = np.nan
    if len(steps) > POINTS:
        bins = np.array_split(np.arange(len(steps)), POINTS)
        steps = np.array([steps[b].mean() for b in bins])
        values = np.array([np.nan if np.isnan(values[b]).all() else np.nanmean(values[b]) for b in bins])
    return steps, values


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a fiftieth of the points; gaps stay gaps."""
    width = len(values) // SMOOTHED
    if width < 2:
        return values
    is_finite = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(is_finite, values, 0.0), window, mode="same")
    count = np.convolve(is_finite.astype(float), window, mode="same")
    return np.where(is_finite, total / np.maximum(count, 1), np.nan)


def single_loss(lines: dict[str, list[dict]]) -> bool:
    """Whether only one term of the loss was logged, so that its curve is the loss itself."""
    return not all(any(key in line for line in lines["train"]) for key in ("ce", "ctc"))


def embedded(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def panel(lines: dict[str, list[dict]], title: str, unit: str, curves: dict, factor: float) -> str:
    """One diagram as an <img>; nothing where none of its keys was logged."""
    picture = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = picture.subplots()
    drawn, positive = 0, True
    for label, (kind, key) in curves.items():
        steps, values = series(lines[kind], key)
        if np.isfinite(values).any():
            smooth = smoothed(values) if kind == "train" and key not in SUMMED else values
            (line,) = axes.plot(
                steps,
                factor * smooth,
                "o-" if kind == "valid" else "-",
                markersize=3,
                linewidth=1.3,
                label=label,
            )
            if smooth is not values:
                axes.plot(steps, factor * values, color=line.get_color(), linewidth=0.8, alpha=0.3, zorder=1)
            drawn += 1
            positive = positive and bool((values[np.isfinite(values)] > 0).all())
    if not drawn or (title == "parts of the loss" and drawn <= 2 and single_loss(lines)):
        return ""
    if title in LOGARITHMIC and positive:
        axes.set_yscale("log")
    elif title in FROM_ZERO:
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)
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
                f"{plural(noted.get('world_size', 0), 'rank')}, {noted.get('host', '?')})",
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
        passes: dict[str, float] = next((line["passes"] for line in reversed(train) if "passes" in line), {})
        rows += [(f"epochs of {name}", f"{number:.2f}") for name, number in passes.items()]
    scored = [line for line in lines["valid"] if line.get("words") and "wer" in line]
    if scored:
        best = min(scored, key=lambda line: line["wer"])
        named = [("first", scored[0]), ("best", best), ("last", scored[-1])]
        text = ", ".join(f"{name} {100 * line['wer']:.1f} % (step {line['step']})" for name, line in named)
        rows.insert(1 if noted else 0, ("validation WER", text))
    steps = noted.get("steps")
    if noted.get("status") == "running" and steps and train:
        left = (steps - noted.get("step", 0)) * float(
            np.median([line["step_seconds"] for line in train[-50:]])
        )
        rows.insert(1, ("time left", duration(left)))
    return rows


def changed_keys(path: Path) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of a resolved recipe for the keys that differ from the defaults."""
    if not path.exists():
        return []
    defaults, values = flat(asdict(Recipe())), flat(yaml.safe_load(path.read_text()) or {})
    return [
        (key, _in_words(key, value), _in_words(key, defaults.get(key)))
        for key, value in values.items()
        if value != defaults.get(key)
    ]


def _in_words(key: str, value: object) -> str:
    """Return a value in YAML's notation; of a corpus only what differs from the defaults."""
    if key in CORPORA and isinstance(value, list):
        value = [{k: v for k, v in corpus.items() if v != _CORPUS.get(k)} for corpus in value]
    return value if isinstance(value, str) and value else shown(value, longest=1000)


def flat(node: dict, prefix: str = "") -> dict[str, object]:
    flattened: dict[str, object] = {}
    for key, value in node.items():
        flattened |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return flattened


def compared(reference: str, hypothesis: str) -> tuple[str, str]:
    """Return both texts as HTML with the words marked that differ in more than case and punctuation."""
    left, right = reference.split(), hypothesis.split()
    marked: tuple[list[str], list[str]] = ([], [])
    matched = SequenceMatcher(None, [*map(_bare, left)], [*map(_bare, right)], autojunk=False)
    for kind, a, b, c, d in matched.get_opcodes():
        for words, out, tag in ((left[a:b], marked[0], "del"), (right[c:d], marked[1], "ins")):
            text = html.escape(" ".join(words))
            if text:
                out.append(text if kind == "equal" else f"<{tag}>{text}</{tag}>")
    return " ".join(marked[0]), " ".join(marked[1])


def _bare(word: str) -> str:
    """Return a word in lower case without punctuation."""
    return re.sub(r"[^\w]", "", word).casefold() or word


def sample_table(samples: list) -> str:
    rows = (compared(str(reference), str(hypothesis)) for reference, hypothesis in samples)
    body = "".join(f"<tr><td>{reference}</td><td>{hypothesis}</td></tr>" for reference, hypothesis in rows)
    return f"<table><tr><th>reference</th><th>hypothesis</th></tr>{body}</table>"


def page(sections: dict[Path, str]) -> str:
    """Return one HTML page of the sections of one or several stages."""
    title = " and ".join(map(heading, sections))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections.values())}</body></html>\n"
    )


def heading(folder: Path) -> str:
    return f"Stage {STAGES[folder.name].number}: {folder.name}" if folder.name in STAGES else folder.name


def section(folder: Path) -> str:
    lines = read(folder / "metrics.jsonl")
    noted = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    parts = [
        f"<h1>{html.escape(heading(folder))}</h1>",
        table(summary(lines, noted)),
        '<div class="panels">',
        *(panel(lines, *definition) for definition in panels(noted)),
        "</div>",
    ]
    events = [line for kind, records in lines.items() if kind not in ("train", "valid") for line in records]
    if events:
        common = ("kind", "step", "time")
        parts += [
            "<h2>Events</h2>",
            table(
                [
                    (line["step"], json.dumps({k: v for k, v in line.items() if k not in common}))
                    for line in events[-50:]
                ],
                ("step", "what"),
            ),
        ]
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    if pictures:
        parts.append("<h2>One validation clip: spectrogram, compressed frames, P(blank), CTC peaks</h2>")
        parts += [
            f"<p>{embedded(path.read_bytes(), path.stem)}</p>"
            for path in dict.fromkeys((pictures[0], pictures[-1]))
        ]
    samples = next((line for line in reversed(lines["valid"]) if line.get("samples")), None)
    if samples:
        parts += [
            f"<h2>Validation samples at step {samples['step']}</h2>",
            sample_table(samples["samples"]),
        ]
    if changed := changed_keys(folder / "recipe.yaml"):
        parts += [
            "<h2>Recipe: keys that differ from the defaults</h2>",
            table(changed, ("key", "value", "default")),
        ]
    return "".join(parts)


def write(folder: Path) -> Path:
    """Write <folder>/report.html of one stage; returns its path. Needs metrics.jsonl there."""
    path = folder / "report.html"
    write_atomically(path, page({folder: section(folder)}))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m train.report", "A run on one page, from its files alone.", example="runs/me"
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
    sections = {folder: section(folder) for folder in folders}
    for folder, text in sections.items():
        write_atomically(folder / "report.html", page({folder: text}))
        print(folder / "report.html")
    if len(sections) > 1:
        write_atomically(run / "report.html", page(sections))
        print(run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
