"""Draw what the two adapters make of an utterance.

Above, the log-mel spectrogram with a line at each compressed frame (the LLM's input); in the middle the
blank's probability over time; below, the CTC peaks with their tokens. Demo, training telemetry and the web
page draw the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

KEPT, BLANK, PEAK = "#ff7f0e", "#bbbbbb", "#1f77b4"
#: Pixels from left to right, at least.
WIDTH = 1200
#: Fonts with Chinese, Japanese and Korean characters, which matplotlib's own font lacks.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "NanumGothic",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)


def fonts() -> list[str]:
    """Return matplotlib's own font, then the installed ones of CJK_FONTS: the first with a character draws
    it."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


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
    length: about 1.6 inches a second, 6 to 40 in all, and at least WIDTH pixels. Without a mel spectrogram
    (cached features) the upper panel shows only the compressed frames.
    """
    tokens, blank = inspection["tokens"][index], inspection["blank"]
    probability = np.asarray(inspection["blank_probability"][index], dtype=np.float32)
    rate, seconds = inspection["frame_rate"], inspection["seconds"][index]
    kept = (np.asarray(inspection["kept"][index]) + 0.5) / rate
    inches = float(np.clip(1.6 * seconds + 1, 6, 40))
    picture = Figure(figsize=(inches, 5.6), dpi=max(110, math.ceil(WIDTH / inches)), layout="constrained")
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
        f"({len(kept) / seconds:.1f} a second)",
        fontfamily=fonts(),
    )

    times = (np.arange(len(tokens)) + 0.5) / rate
    middle.fill_between(times, probability, step="mid", color=BLANK)
    middle.set_ylim(0, 1)
    middle.set_ylabel("P(blank)")

    peaks = ctc_peaks(tokens, inspection["peak"][index], blank)
    if peaks:
        at = (np.array([frame for frame, _ in peaks]) + 0.5) / rate
        heights = np.exp(
            np.asarray(inspection["peak"][index], dtype=np.float32)[[frame for frame, _ in peaks]]
        )
        lower.vlines(at, 0, heights, color=PEAK)
        lower.plot(at, heights, "o", color=PEAK, markersize=3)
        for x, (_, token) in zip(at, peaks, strict=True):
            name = "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in name_of(token)) or "?"
            name = name.replace(" ", "\u2423").replace("$", r"\$")
            lower.text(x, 1.08, name, rotation=90, ha="center", va="bottom", fontsize=8, fontfamily=fonts())
    lower.set_ylim(0, 2.4)
    lower.set_yticks([0, 1])
    lower.set_ylabel("CTC peaks")
    lower.set_xlim(0, max(seconds, 1 / rate))
    lower.set_xlabel("seconds")
    picture.legend(
        handles=[
            Line2D([], [], color=KEPT, label="compressed frame (LLM input)"),
            Patch(color=BLANK, label="probability of the blank"),
            Line2D([], [], color=PEAK, marker="o", markersize=3, label="CTC peak: token, probability"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    return picture


def draw(
    inspection: dict, path: str | Path, name_of: Callable[[int], str] = str, index: int = 0, title: str = ""
) -> Path:
    """Write that picture to `path` (its suffix decides the format: .png, .svg, .pdf); arguments as in
    `figure`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(inspection, name_of, index, title).savefig(path)
    return path
