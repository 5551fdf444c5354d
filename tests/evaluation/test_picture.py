"""The picture of an utterance."""

import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from evaluation import picture
from model import picture as picture_module
from model.picture import (
    CJK_FONTS,
    KEPT,
    ctc_peaks,
    families,
    figure,
    font_of,
    peak_names,
    printable,
    wrapped,
)


def test_peaks_are_the_top_of_each_run():
    tokens = torch.tensor([9, 4, 4, 4, 9, 4, 5, 9])
    peak = torch.tensor([-0.1, -3.0, -0.5, -2.0, -0.1, -1.0, -1.5, -0.1])
    assert ctc_peaks(tokens, peak, blank=9) == [(2, 4), (5, 4), (6, 5)]
    assert ctc_peaks(torch.tensor([9, 9]), torch.zeros(2), blank=9) == []


def test_panels_show_what_was_inspected():
    inspection = {
        "mel": [torch.rand(80, 100)],
        "seconds": [1.0],
        "tokens": [torch.tensor([7] * 10 + [1] * 5 + [7] * 10)],
        "blank_probability": [torch.linspace(0, 1, 25)],
        "peak": [torch.full((25,), -0.1)],
        "kept": [torch.tensor([12])],
        "frame_rate": 25.0,
        "blank": 7,
    }
    drawn = figure(inspection, lambda tokens: f" t{tokens[0]}$")
    upper, middle, lower = drawn.axes
    assert upper.get_images()[0].get_array().shape == (80, 100)
    assert [segment[0][0] for segment in upper.collections[0].get_segments()] == [12.5 / 25]
    assert [text.get_text() for text in lower.texts] == ["\u2423t1$"]
    assert "1 compressed" in upper.get_title(loc="left") and middle.get_ylim() == (0, 1)
    (legend,) = drawn.legends
    assert len(legend.get_texts()) == 3
    assert drawn.get_figwidth() * drawn.get_dpi() >= 1200


TEXTS = {
    "Latin": "Où est la Straße? $5, Łódź",
    "Chinese": "今天天气很好，我们去公园散步。",
    "Japanese": "今日はとても良い天気です、カタカナ",
    "Korean": "오늘은 날씨가 정말 좋습니다",
    "Arabic": "السلام عليكم ورحمة الله",
    "Devanagari": "नमस्ते दुनिया",
}


def shown(inspection: dict, tokens: list[str], title: str) -> tuple[Figure, str]:
    """The picture, drawn, with a warning as an error; and its title."""
    peaks = torch.full((2 * len(tokens) + 1,), 99)
    peaks[1::2] = torch.arange(len(tokens))
    inspection |= {"tokens": [peaks], "peak": [torch.zeros(len(peaks))]}
    inspection |= {"blank_probability": [torch.zeros(len(peaks))], "blank": 99}
    drawn = figure(inspection, lambda ids: "".join(tokens[i] for i in ids), title=title)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        drawn.savefig(io.BytesIO(), dpi=40)
    return drawn, drawn.axes[0].get_title(loc="left")


@pytest.fixture
def no_warning_yet():
    picture_module._warn_missing.cache_clear()


@pytest.mark.parametrize("script", TEXTS)
def test_every_script_is_drawn_without_boxes(script, caplog, no_warning_yet):
    text = TEXTS[script]
    inspection = {"mel": [None], "seconds": [3.0], "kept": [torch.tensor([1])], "frame_rate": 10.0}
    drawn, title = shown(inspection, text.split(), f"reference: {text}\nhypothesis: {text}")
    assert drawn.get_figwidth() * drawn.get_dpi() >= 1200
    installed = {font.name for font in font_manager.fontManager.ttflist}
    if script in ("Latin", "Arabic"):  # matplotlib's own font has them
        assert title == f"reference: {text}\nhypothesis: {text}" and not caplog.records
    elif not installed & {*CJK_FONTS, "Noto Sans Devanagari"}:
        package = "fonts-noto-core" if script == "Devanagari" else "fonts-noto-cjk"
        assert [package in record.getMessage() for record in caplog.records] == [True], "one line"
        codes = "".join(c if c == " " else f"\\u{ord(c):04x}" for c in text)
        assert title.replace("\n", "") == f"reference: {codes}hypothesis: {codes}"


def test_an_installed_font_is_used_for_the_characters_it_has(monkeypatch):
    """The order is: matplotlib's own, a CJK font, another one; a last-resort font draws boxes."""
    characters = {"DejaVu Sans": "ab", "Noto Sans CJK JP": "a今", "Other": "a今न", "Last Resort": "a今नx"}
    fonts = [
        SimpleNamespace(name=name, fname=name, style="normal", weight=400) for name in reversed(characters)
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(picture_module, "_characters", lambda path: {ord(c) for c in characters[path]})
    for cached in (picture_module._fonts, picture_module.font_of):
        cached.cache_clear()
    try:
        assert [font_of(c) for c in "b今नx"] == ["DejaVu Sans", "Noto Sans CJK JP", "Other", None]
        assert families("a今") == ["DejaVu Sans", "Noto Sans CJK JP"]
    finally:
        for cached in (picture_module._fonts, picture_module.font_of):
            cached.cache_clear()


def test_a_character_of_several_tokens_is_the_name_of_the_last():
    parts = ["今".encode()[:1], "今".encode()[1:], b" a", b"\xff", b"b"]
    names = peak_names(list(range(5)), lambda ids: b"".join(parts[i] for i in ids).decode("utf8", "replace"))
    assert names == ["", printable("今"), " a", "", "?b"]
    assert peak_names([0], lambda ids: "\ufffd") == ["?"]


def test_long_titles_are_wrapped_by_columns():
    assert wrapped("abcd\nef", 3, lines=4) == "abc\nd\nef"
    assert wrapped("今天天气", 4, lines=4) == "今天\n天气"
    assert wrapped("abcdef", 2, lines=2) == "ab\ncd…"
    assert wrapped(r"ab\u4eca", 6, lines=4) == "ab\n\\u4eca", "a code is not divided"


def test_command_draws_a_packed_clip(folders, packed, tmp_path, capsys):
    out = tmp_path / "deep" / "p.png"
    command = ["--model", str(folders / "alignment"), "--shards", str(packed), "--out", str(out), "--index"]
    assert picture.main([*command, "1"]) == 0
    pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3).astype(int)
    orange = np.array([int(KEPT[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels - orange).sum(axis=1) < 10).sum() > 100  # lines of CTC peaks are really there
    for index, message in (("10", "text only"), ("11", "has samples 0 to 10"), ("7", "audio")):
        assert picture.main([*command, index]) == 2
        assert message in capsys.readouterr().err
