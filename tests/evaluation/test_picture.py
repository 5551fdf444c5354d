"""The picture of an utterance."""

import numpy as np
import torch
from PIL import Image

from evaluation.picture import KEPT, ctc_peaks, draw, figure
from model import folder
from tests.evaluation.test_run import alone


def test_peaks_are_the_top_of_each_run():
    tokens = torch.tensor([9, 4, 4, 4, 9, 4, 5, 9])
    peak = torch.tensor([-0.1, -3.0, -0.5, -2.0, -0.1, -1.0, -1.5, -0.1])
    assert ctc_peaks(tokens, peak, blank=9) == [(2, 4), (5, 4), (6, 5)]
    assert ctc_peaks(torch.tensor([9, 9]), torch.zeros(2), blank=9) == []


def test_panels_show_what_was_inspected():
    inspection = {"mel": [torch.rand(80, 100)], "seconds": [1.0], "tokens": [torch.tensor([7] * 10 + [1] * 5 + [7] * 10)],
                  "blank_probability": [torch.linspace(0, 1, 25)], "peak": [torch.full((25,), -0.1)],
                  "kept": [torch.tensor([12])], "frame_rate": 25.0, "blank": 7}
    upper, middle, lower = figure(inspection, lambda token: f" t{token}$").axes
    assert upper.get_images()[0].get_array().shape == (80, 100)
    assert [segment[0][0] for segment in upper.collections[0].get_segments()] == [12.5 / 25]
    assert [text.get_text() for text in lower.texts] == ["\u2423t1\\$"]
    assert "1 kept" in upper.get_title() and middle.get_ylim() == (0, 1)


def test_model_to_file(folders, tmp_path):
    model = folder.load(folders / "alignment")
    inspection = model.inspect(alone(model, torch.randn(16000), None))
    path = draw(inspection, tmp_path / "deep" / "p.png", lambda token: model.tokenizer.decode([token]))
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    orange = np.array([int(KEPT[i:i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels - orange).sum(axis=1) < 10).sum() > 100  # lines of kept frames are really there
