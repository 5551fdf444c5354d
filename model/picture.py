"""Draw what the two adapters make of an utterance.

Above, the log-mel spectrogram with a line at each compressed frame (the LLM's input); in the middle the
blank's probability over time; below, the CTC peaks with their tokens. Demo, training telemetry and the web
page draw the same picture.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import unicodedata
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
#: Fonts with Chinese, Japanese and Korean characters; the first that has a character draws it.
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
LONGEST_NAME = 12  # columns of a peak's token
logger = logging.getLogger(__name__)


@functools.cache
def _fonts() -> list[tuple[str, str]]:
    """Return family and file of the installed fonts, in the order of preference: matplotlib's own, then
    those of CJK_FONTS, then the others. Bold, italic and last-resort fonts are left out."""
    found = {
        font.name: font.fname
        for font in reversed(font_manager.fontManager.ttflist)
        if font.style == "normal" and font.weight in (400, "normal", "regular", "book")
        if "Last Resort" not in font.name
    }
    first = [name for name in ("DejaVu Sans", *CJK_FONTS) if name in found]
    return [(name, found[name]) for name in dict.fromkeys([*first, *sorted(found)])]


@functools.cache
def _characters(path: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(path).get_charmap())


@functools.cache
def font_of(character: str) -> str | None:
    """Return the family of the first installed font that has a character, None where none has."""
    found = (name for name, path in _fonts() if ord(character) in _characters(path))
    return next(found, None)


@functools.cache
def _warn_missing(package: str) -> None:
    """Log once which package has the missing characters."""
    logger.warning(
        "no installed font has some characters of a picture: it shows their codes; install a font (e.g. "
        "apt-get install %s) and start again",
        package,
    )


def printable(text: str) -> str:
    """Return a text as a picture can show it: "?" for control characters and broken bytes, the code
    (\\u4eca) of characters that no font has."""
    shown = []
    for character in text:
        if not character.isprintable() or character == "\ufffd":
            shown.append("?")
        elif font_of(character) is None:
            is_cjk = unicodedata.east_asian_width(character) in "WF"
            _warn_missing("fonts-noto-cjk" if is_cjk else "fonts-noto-core")
            code = ord(character)
            shown.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
        else:
            shown.append(character)
    return "".join(shown)


def units(text: str) -> list[str]:
    """Return the characters of a printable text; the code of one is one unit."""
    return re.findall(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|.", text, re.DOTALL)


def families(text: str) -> list[str]:
    """Return the fonts that draw a printable text; matplotlib takes the first that has a character."""
    found = {font_of(character) for character in text} - {None}
    return [name for name, _ in _fonts() if name in {"DejaVu Sans", *found}]


def wrapped(text: str, width: int, lines: int) -> str:
    """Return a text in lines of at most `width` columns, a wide character being two; cut after `lines`."""
    rows = [""]
    for unit in units(text):
        columns = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in rows[-1] + unit)
        if unit == "\n" or columns > width:
            rows.append("")
        if unit != "\n":
            rows[-1] += unit
    return "\n".join([*rows[: lines - 1], rows[lines - 1] + "…"] if len(rows) > lines else rows)


def peak_names(tokens: list[int], name_of: Callable[[list[int]], str]) -> list[str]:
    """Return a name for each token of a sequence. A character that takes several tokens is the name of its
    last one; the others have none."""
    names, pending = [], []
    for number, token in enumerate(tokens):
        pending.append(token)
        text = name_of(pending)
        if (
            text.endswith("\ufffd") and len(pending) < 4 and number + 1 < len(tokens)
        ):  # UTF-8: 4 bytes at most
            names.append("")
            continue
        names.append(printable(text) or "?")
        pending = []
    return [wrapped(name, LONGEST_NAME, lines=1) for name in names]


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


def figure(inspection: dict, name_of: Callable[[list[int]], str], index: int = 0, title: str = "") -> Figure:
    """The picture of audio number `index` of `Soundwave.inspect`'s result.

    name_of: token ids -> text to print at their peaks (e.g. `tokenizer.decode`). Widths follow the length:
    about 1.6 inches a second, 9 to 40 in all, and at least WIDTH pixels. Without a mel spectrogram the upper
    panel shows only the compressed frames.
    """
    tokens, blank = inspection["tokens"][index], inspection["blank"]
    probability = np.asarray(inspection["blank_probability"][index], dtype=np.float32)
    rate, seconds = inspection["frame_rate"], inspection["seconds"][index]
    kept = (np.asarray(inspection["kept"][index]) + 0.5) / rate
    inches = float(np.clip(1.6 * seconds + 1, 9, 40))
    picture = Figure(figsize=(inches, 5.6), dpi=max(110, math.ceil(WIDTH / inches)), layout="constrained")
    upper, middle, lower = picture.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 1.6])

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
    title = title or (
        f"{seconds:.2f} s: {len(tokens)} frames, {len(kept)} compressed ({len(kept) / seconds:.1f} a second)"
    )
    shown = "\n".join(printable(line) for line in title.split("\n"))
    shown = wrapped(shown, int(11 * inches), lines=4)
    upper.set_title(shown, fontfamily=families(shown), fontsize=10, loc="left", parse_math=False)

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
        names = peak_names([token for _, token in peaks], name_of)
        for x, name in zip(at, names, strict=True):
            upright = len(name) == 1 and unicodedata.east_asian_width(name) in "WF"
            lower.text(
                x,
                1.08,
                name.replace(" ", "\u2423"),
                rotation=0 if upright else 90,
                ha="center",
                va="bottom",
                fontsize=8,
                fontfamily=families(name),
                parse_math=False,
            )
    lower.set_ylim(0, 3)
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
    inspection: dict,
    path: str | Path,
    name_of: Callable[[list[int]], str] = str,
    index: int = 0,
    title: str = "",
) -> Path:
    """Write that picture to `path` (its suffix decides the format: .png, .svg, .pdf); arguments as in
    `figure`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(inspection, name_of, index, title).savefig(path)
    return path
