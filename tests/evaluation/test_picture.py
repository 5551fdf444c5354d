"""The picture of an utterance."""

from types import SimpleNamespace

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image

from evaluation import picture
from model.picture import KEPT, ctc_peaks, figure, fonts


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
    drawn = figure(inspection, lambda token: f" t{token}$")
    upper, middle, lower = drawn.axes
    assert upper.get_images()[0].get_array().shape == (80, 100)
    assert [segment[0][0] for segment in upper.collections[0].get_segments()] == [12.5 / 25]
    assert [text.get_text() for text in lower.texts] == ["\u2423t1\\$"]
    assert "1 kept" in upper.get_title() and middle.get_ylim() == (0, 1)
    (legend,) = drawn.legends
    assert len(legend.get_texts()) == 3
    assert drawn.get_figwidth() * drawn.get_dpi() >= 1200


def test_a_cjk_font_is_used_where_one_is_installed(monkeypatch):
    """matplotlib draws each character in the first font of the list that has it."""
    assert fonts()[0] == "DejaVu Sans"
    installed = [SimpleNamespace(name=name) for name in ("Noto Sans CJK JP", "Other", "WenQuanYi Zen Hei")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", installed)
    assert fonts() == ["DejaVu Sans", "Noto Sans CJK JP", "WenQuanYi Zen Hei"]


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
