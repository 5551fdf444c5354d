"""FLEURS: read sentences in 102 languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault
from data_tools.corpora.table import rows


class Fleurs:
    """LANG/SPLIT.tsv (id, file, raw transcription, transcription, characters, samples, gender; no header) beside audio/SPLIT.

    PATH is the language's folder (en_us); split: train, dev or test; text: raw (as written) or normalised.
    """

    HEADER = ["id", "file_name", "raw", "normalised", "characters", "num_samples", "gender"]

    def __init__(self, path: Path, split: str = "train", text: str = "raw"):
        self.table, self.audio, self.column = path / f"{split}.tsv", path / "audio" / split, text
        self.lang = path.name.split("_")[0]
        if text not in ("raw", "normalised"):
            raise CorpusError(f"text={text}: raw or normalised")
        if not self.table.exists():
            raise CorpusError(f"{self.table} does not exist: give the language's folder and split=train, dev or test")

    def __iter__(self) -> Iterator[Entry | Fault]:
        for place, row in rows(self.table, quoted=False, header=self.HEADER):
            samples = row.get("num_samples") or ""
            if not row.get("file_name") or not samples.isdigit():
                yield Fault(f"{self.table.name}:{place}", "bad_row", "not FLEURS' seven columns")
                continue
            # One sentence is read by several people: the sentence's id is not the clip's, and the file's name is.
            yield Entry(
                id=Path(row["file_name"]).stem,
                audio=str(self.audio / row["file_name"]),
                text=row[self.column],
                lang=self.lang,
                task="asr",
                duration=int(samples) / 16000,
                recording=f"sentence-{row['id']}",
            )
