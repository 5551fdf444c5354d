"""Sound effects and scenes with labels: AudioSet, VGGSound, ESC-50, and tables of their kind."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.audio import EXTENSIONS
from data_tools.corpora import CorpusError, Entry, Ignored, Reader, Rejection
from data_tools.corpora.beside import Beside
from data_tools.corpora.columns import number
from data_tools.text_files import Problem, existing, table_rows, text_lines


def find_clip(folder: Path, *stems: str) -> Path | None:
    """The first of STEM.wav, STEM.flac ... that exists: downloaders name clips differently."""
    return next(
        (
            clip
            for stem in stems
            for extension in EXTENSIONS
            if (clip := folder / f"{stem}.{extension}").exists()
        ),
        None,
    )


class AudioSet(Reader):
    """SEGMENTS.csv (`# YTID, start_seconds, end_seconds, positive_labels`) and clips named YTID or YTID_START
    in `clips`.

    names: class_labels_indices.csv, which turns label codes into words (default: beside PATH). Several labels
    of a clip are joined by commas. Clips are the cut 10 s, not the whole video; those that SEGMENTS.csv does
    not name are counted.
    """

    has_global_ids = True

    def __init__(self, path: Path, clips: str, names: str | None = None):
        self.path, self.clips, self.beside = path, Path(clips).absolute(), Beside()
        self.names_path = existing(Path(names) if names else path.parent / "class_labels_indices.csv")
        self.names: dict[str, str] = {}
        if not self.names_path.exists():
            raise CorpusError(
                f"{self.names_path} does not exist: AudioSet's class names are needed (names=FILE)"
            )

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        for place, row in table_rows(
            self.names_path, encoding=self.encoding, required=("mid", "display_name")
        ):
            if isinstance(row, Problem):
                raise CorpusError(f"{self.names_path}:{place}: {row.detail}")
            self.names[row["mid"]] = row["display_name"]
        for place, line in text_lines(self.path, self.encoding):
            if isinstance(line, Problem) or line.strip() and not line.startswith("#"):
                yield f"{self.path.name}:{place}", line
        yield from self.beside.left(self.path.name)

    def sample(self, line: str, where: str) -> Entry | Rejection:
        try:
            row = next(csv.reader([line], skipinitialspace=True, strict=True))
        except csv.Error:
            row = []
        if len(row) != 4 or number(row[1]) is None:
            return Rejection(where, "bad_row", "not YTID, start, end, labels")
        name, start, codes = row[0], float(row[1]), row[3].split(",")
        clip = find_clip(
            self.clips,
            f"{name}_{start:g}",
            f"{name}_{start:.3f}",
            f"{name}_{int(start * 1000)}",
            name,
            f"Y{name}",
        )
        if clip is None:
            return Rejection(f"{name}_{start:g}", "missing_file", f"no clip of {name} in {self.clips}")
        self.beside.name(str(clip))
        label = ", ".join(self.names.get(code, code) for code in codes)
        return Entry(id=f"{name}_{start:g}", audio=str(clip), task="sound", recording=name, label=label)


class VGGSound(Reader):
    """vggsound.csv (`ytid,start,label,split`, no header), clips named YTID_START (six digits) in `clips`;
    split: train, test. Clips that the table does not name are counted."""

    has_global_ids = True
    HEADER = ["ytid", "start", "label", "split"]

    def __init__(self, path: Path, clips: str, split: str | None = None):
        self.path, self.clips, self.split, self.beside = path, Path(clips).absolute(), split, Beside()

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        for place, row in table_rows(self.path, ",", header=self.HEADER, encoding=self.encoding):
            yield f"{self.path.name}:{place}", row
        yield from self.beside.left(self.path.name + (f", split {self.split}" if self.split else ""))

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection | list:
        start = number(row["start"])
        if start is None or not row["label"]:
            return Rejection(where, "bad_row", "not ytid,start,label,split")
        if self.split and row["split"] != self.split:
            return []
        name = f"{row['ytid']}_{int(start):06d}"
        clip = find_clip(self.clips, name, f"{row['ytid']}_{int(start)}")
        if clip is None:
            return Rejection(name, "missing_file", f"no clip of {name} in {self.clips}")
        self.beside.name(str(clip))
        return Entry(id=name, audio=str(clip), task="sound", label=row["label"], recording=row["ytid"])


class ESC50(Reader):
    """PATH is the repository, or its esc50.csv (filename, fold, category, src_file). folds: 1+2+3+4 (default:
    all); clips: folder of the audio (default: ../audio from the table, as the repository unpacks). Clips that
    the table does not have are counted."""

    has_global_ids = True

    def __init__(self, path: Path, folds: str | None = None, clips: str | None = None):
        self.path = path if path.is_file() else existing(path / "meta" / "esc50.csv")
        self.clips = Path(clips).absolute() if clips else self.path.parent.parent / "audio"
        self.folds = set(folds.split("+")) if folds else None
        if not self.path.exists():
            raise CorpusError(
                f"{self.path} does not exist: give the repository's folder or its meta/esc50.csv"
            )

    def records(self) -> Iterator[tuple[str, Any]]:
        clips = {name for name in os.listdir(self.clips) if name[0] != "."} if self.clips.is_dir() else set()
        for place, row in table_rows(
            self.path, ",", encoding=self.encoding, required=("filename", "category")
        ):
            if isinstance(row, dict):
                clips.discard(row["filename"])
            yield f"{self.path.name}:{place}", row
        if clips:
            yield "", Ignored(f"clips that {self.path.name} has no line of", len(clips))

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection | list:
        if not row["filename"] or not row["category"]:
            return Rejection(where, "bad_row", "no filename or no category")
        if self.folds and row.get("fold") not in self.folds:
            return []
        return Entry(
            id=Path(row["filename"]).stem,
            audio=str(self.clips / row["filename"]),
            task="sound",
            label=row["category"],
            recording=row.get("src_file"),
        )
