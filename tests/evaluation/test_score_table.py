"""The table of scores: rates in percent, with their intervals."""

from __future__ import annotations

from evaluation import score


def test_rates_are_in_percent():
    row = {
        "id": "a",
        "corpus": "c",
        "task": "asr",
        "lang": "en",
        "prediction": "red green",
        "reference": "red blue",
    }
    right = row | {"id": "b", "prediction": "red blue"}
    text = score.table(score.score_rows([row, right]))
    assert "WER 25.0 % [0.0, 50.0]" in text and "CER" in text  # one of four words; of one of two rows
