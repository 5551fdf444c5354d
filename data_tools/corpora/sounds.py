"""Sound effects and scenes with labels: AudioSet, VGGSound, ESC-50, and tables of their kind."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from core.audio import EXTENSIONS
from data_tools.corpora import CorpusError, Entry, Fault, number
from data_tools.corpora.table import open_text, rows


def find_clip(folder: Path, *stems: str) -> Path | None:
    """The first of STEM.wav, STEM.flac ... that exists: downloaders name clips differently."""
    return next(
        (clip for stem in stems for extension in EXTENSIONS if (clip := folder / f"{stem}.{extension}").exists()),
        None,
    )


class AudioSet:
    """SEGMENTS.csv (`# YTID, start_seconds, end_seconds, positive_labels`) and clips named YTID or YTID_START in `clips`.

    names: class_labels_indices.csv, which turns label codes into words (default: beside PATH). Several labels of a clip
    are joined by commas. Clips are the cut 10 s, not the whole video.
    """

    def __init__(self, path: Path, clips: str, names: str | None = None):
        self.path, self.clips = path, Path(clips).absolute()
        names_path = Path(names) if names else path.parent / "class_labels_indices.csv"
        if not names_path.exists():
            raise CorpusError(f"{names_path} does not exist: AudioSet's class names are needed (names=FILE)")
        self.names = {row["mid"]: row["display_name"] for _, row in rows(names_path)}

    def __iter__(self) -> Iterator[Entry | Fault]:
        with open_text(self.path) as file:
            for place, row in enumerate(csv.reader(file, skipinitialspace=True), 1):
                if not row or row[0].startswith("#"):
                    continue
                if len(row) < 4 or number(row[1]) is None:
                    yield Fault(f"{self.path.name}:{place}", "bad_row", "not YTID, start, end, labels")
                    continue
                name, start, codes = row[0], float(row[1]), row[3].split(",")
                clip = find_clip(
                    self.clips, f"{name}_{start:g}", f"{name}_{start:.3f}", f"{name}_{int(start * 1000)}", name, f"Y{name}"
                )
                if clip is None:
                    yield Fault(f"{name}_{start:g}", "missing_file", f"no clip of {name} in {self.clips}")
                    continue
                yield Entry(
                    id=f"{name}_{start:g}",
                    audio=str(clip),
                    task="sound",
                    recording=name,
                    label=", ".join(self.names.get(code, code) for code in codes),
                )


class VGGSound:
    """vggsound.csv (`ytid,start,label,split`, no header), clips named YTID_START (six digits) in `clips`; split: train, test."""

    def __init__(self, path: Path, clips: str, split: str | None = None):
        self.path, self.clips, self.split = path, Path(clips).absolute(), split

    def __iter__(self) -> Iterator[Entry | Fault]:
        for place, row in rows(self.path, delimiter=",", header=["ytid", "start", "label", "split"]):
            start = number(row["start"])
            if start is None or not row["label"]:
                yield Fault(f"{self.path.name}:{place}", "bad_row", "not ytid,start,label,split")
                continue
            if self.split and row["split"] != self.split:
                continue
            name = f"{row['ytid']}_{int(start):06d}"
            clip = find_clip(self.clips, name, f"{row['ytid']}_{int(start)}")
            if clip is None:
                yield Fault(name, "missing_file", f"no clip of {name} in {self.clips}")
                continue
            yield Entry(id=name, audio=str(clip), task="sound", label=row["label"], recording=row["ytid"])


class ESC50:
    """PATH is the repository, or its esc50.csv (filename, fold, category, src_file). folds: 1+2+3+4 (default: all); clips:
    folder of the audio (default: ../audio from the table, as the repository unpacks)."""

    def __init__(self, path: Path, folds: str | None = None, clips: str | None = None):
        self.path = path if path.is_file() else path / "meta" / "esc50.csv"
        self.clips = Path(clips).absolute() if clips else self.path.parent.parent / "audio"
        self.folds = set(folds.split("+")) if folds else None
        if not self.path.exists():
            raise CorpusError(f"{self.path} does not exist: give the repository's folder or its meta/esc50.csv")

    def __iter__(self) -> Iterator[Entry | Fault]:
        for place, row in rows(self.path, delimiter=","):
            if not row.get("filename") or not row.get("category"):
                yield Fault(f"{self.path.name}:{place}", "bad_row", "no filename or no category")
                continue
            if self.folds and row.get("fold") not in self.folds:
                continue
            yield Entry(
                id=Path(row["filename"]).stem,
                audio=str(self.clips / row["filename"]),
                task="sound",
                label=row["category"],
                recording=row.get("src_file"),
            )
