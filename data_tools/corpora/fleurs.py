"""FLEURS: read sentences in 102 languages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora import CorpusError, Entry, Ignored, Reader, Rejection
from data_tools.text_files import existing, table_rows


class Fleurs(Reader):
    """LANG/SPLIT.tsv (id, file, raw transcription, transcription, characters, samples, gender; no header)
    beside audio/SPLIT.

    PATH is the language's folder (en_us); split: train, dev or test; text: raw (as written) or normalised.
    Clips that the table does not have are counted.
    """

    HEADER = ["id", "file_name", "raw", "normalised", "characters", "num_samples", "gender"]

    def __init__(self, path: Path, split: str = "train", text: str = "raw", lang: str | None = None):
        self.audio, self.column = path / "audio" / split, text
        self.table = existing(path / f"{split}.tsv")
        self.lang = lang or path.name.split("_")[0]
        if text not in ("raw", "normalised"):
            raise CorpusError(f"text={text}: raw or normalised")
        if not self.table.exists():
            raise CorpusError(
                f"{self.table} does not exist: give the language's folder and split=train, dev or test"
            )
        if lang is None and not re.fullmatch(r"[a-z]{2,3}(_[a-z]{4})?_([a-z]{2}|\d{3})", path.name):
            raise CorpusError(
                f"{path}: '{path.name}' is no language of FLEURS (as en_us): give its code, lang=en for "
                f"example"
            )

    def records(self) -> Iterator[tuple[str, Any]]:
        clips = set(os.listdir(self.audio)) if self.audio.is_dir() else set()
        for place, row in table_rows(self.table, "\t", False, self.HEADER, encoding=self.encoding):
            if isinstance(row, dict):
                clips.discard(row["file_name"])
            yield f"{self.table.name}:{place}", row
        if unlisted := sum(not name.startswith(".") for name in clips):
            yield "", Ignored(f"clips that {self.table.name} has no line of", unlisted)

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection:
        if not row["file_name"] or not row["num_samples"].isdigit():
            return Rejection(where, "bad_row", "not FLEURS' seven columns")
        # One sentence is read by several people: the sentence's id is not the clip's, and the file's name is.
        return Entry(
            id=Path(row["file_name"]).stem,
            audio=str(self.audio / row["file_name"]),
            text=row[self.column],
            lang=self.lang,
            task="asr",
            duration=int(row["num_samples"]) / 16000,
            recording=f"sentence-{row['id']}",
        )
