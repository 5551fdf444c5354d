"""The one picture: what the two adapters make of an utterance.

Above, the log-mel spectrogram with a line at each frame that was kept for the LLM; in the middle the blank's
probability over time; below, the CTC peaks with their tokens. Demo, training telemetry and the web page draw
the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

KEPT = "#ff7f0e"


def ctc_peaks(tokens: torch.Tensor, peak: torch.Tensor, blank: int) -> list[tuple[int, int]]:
    """(frame, token) of each CTC peak: the most probable frame of every run of one non-blank token; tokens,
    peak [T]."""
    peaks, start = [], 0
    values = tokens.tolist()
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            if values[start] != blank:
                peaks.append((start + int(peak[start:end].argmax()), values[start]))
            start = end
    return peaks


def figure(inspection: dict, name_of: Callable[[int], str], index: int = 0, title: str = "") -> Figure:
    """The picture of audio number `index` of `Soundwave.inspect`'s result.

    name_of: token id -> text to print at a peak (e.g. `lambda i: tokenizer.decode([i])`). Widths follow the
    length: about 1.6 inches a second, 6 to 40 in all. Without a mel spectrogram (cached features) the upper
    panel shows only the CTC peaks.
    """
    tokens, blank = inspection["tokens"][index], inspection["blank"]
    probability = np.asarray(inspection["blank_probability"][index], dtype=np.float32)
    rate, seconds = inspection["frame_rate"], inspection["seconds"][index]
    kept = (np.asarray(inspection["kept"][index]) + 0.5) / rate
    picture = Figure(figsize=(float(np.clip(1.6 * seconds + 1, 6, 40)), 5.6), layout="constrained")
    upper, middle, lower = picture.subplots(3, 1, sharex=True, height_ratios=[3, 1.4, 1.2])

    mel = inspection["mel"][index]
    if mel is not None:
        upper.imshow(
            np.asarray(mel, dtype=np.float32),
            origin="lower",
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            extent=(0, mel.shape[1] / 100, 0, mel.shape[0]),
        )
    upper.vlines(kept, 0, 1, transform=upper.get_xaxis_transform(), color=KEPT, linewidth=1.2)
    upper.set_ylabel("mel band")
    upper.set_title(
        title
        or f"{seconds:.2f} s: {len(tokens)} frames, {len(kept)} kept for the LLM "
        f"({len(kept) / seconds:.1f} a second)"
    )

    times = (np.arange(len(tokens)) + 0.5) / rate
    middle.fill_between(times, probability, step="mid", color="#bbbbbb")
    middle.set_ylim(0, 1)
    middle.set_ylabel("P(blank)")

    peaks = ctc_peaks(tokens, inspection["peak"][index], blank)
    if peaks:
        at = (np.array([frame for frame, _ in peaks]) + 0.5) / rate
        heights = np.exp(
            np.asarray(inspection["peak"][index], dtype=np.float32)[[frame for frame, _ in peaks]]
        )
        lower.vlines(at, 0, heights, color="#1f77b4")
        lower.plot(at, heights, "o", color="#1f77b4", markersize=3)
        for x, (_, token) in zip(at, peaks, strict=True):
            name = "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in name_of(token)) or "?"
            name = name.replace(" ", "\u2423").replace("$", r"\$")
            lower.text(x, 1.08, name, rotation=90, ha="center", va="bottom", fontsize=8)
    lower.set_ylim(0, 2.4)
    lower.set_yticks([0, 1])
    lower.set_ylabel("CTC peaks")
    lower.set_xlim(0, max(seconds, 1 / rate))
    lower.set_xlabel("seconds")
    return picture


def draw(
    inspection: dict, path: str | Path, name_of: Callable[[int], str] = str, index: int = 0, title: str = ""
) -> Path:
    """Write that picture to `path` (its suffix decides the format: .png, .svg, .pdf); arguments as in
    `figure`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(inspection, name_of, index, title).savefig(path, dpi=110)
    return path
