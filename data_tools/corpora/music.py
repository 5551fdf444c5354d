"""Music: NSynth (instruments), GTZAN (genres, tempo), MusicCaps (captions), MTG-Jamendo (genres, instruments,
moods)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.audio import EXTENSIONS
from data_tools.corpora import CorpusError, Entry, Ignored, Reader, Rejection, kind_of_value
from data_tools.corpora.beside import Beside
from data_tools.corpora.columns import number
from data_tools.corpora.sounds import find_clip
from data_tools.text_files import Problem, damage, existing, open_text, reading, table_rows, text_lines


class NSynth(Reader):
    """The folder of a split (nsynth-train), or its examples.json, with notes in audio/: task instrument.

    The label is the instrument's family; the instrument is the speaker, by which splits keep notes together.
    Clips that examples.json does not name are counted.
    """

    has_global_ids = True

    def __init__(self, path: Path):
        self.path = existing(path / "examples.json") if path.is_dir() else path
        self.audio, self.beside = self.path.parent / "audio", Beside()
        if not self.path.exists():
            raise CorpusError(f"{self.path} does not exist: give the folder of one split, as nsynth-train")

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        try:
            with reading(self.path), open_text(self.path, self.encoding) as file:
                notes = json.load(file)
        except ValueError as error:
            raise CorpusError(f"{self.path} is not valid JSON: {error}") from None
        if not isinstance(notes, dict):
            raise CorpusError(f"{self.path} holds {kind_of_value(notes)}, not an object of notes")
        for name, note in notes.items():
            yield name, (name, note)
        yield from self.beside.left(self.path.name)

    def sample(self, record: tuple[str, Any], where: str) -> Entry | Rejection:
        name, note = record
        family = note.get("instrument_family_str") if isinstance(note, dict) else None
        if not isinstance(family, str) or not family:
            return Rejection(name, "bad_row", "no instrument_family_str")
        if problem := damage(name) or damage(family):
            return Rejection(name, problem.reason, problem.detail)
        clip = find_clip(self.audio, name)
        if clip is None:
            return Rejection(name, "missing_file", f"no clip of {name} in {self.audio}")
        self.beside.name(str(clip))
        return Entry(
            id=name, audio=str(clip), task="instrument", label=family, speaker=note.get("instrument_str")
        )


class GTZAN(Reader):
    """PATH/GENRE/GENRE.NNNNN.wav or .au, or the folder with genres_original or genres: task genre.

    tempo: folder with gtzan_GENRE_NNNNN.bpm files; the task is tempo then, the label whole beats a minute.
    list: file with lines GENRE/GENRE.NNNNN.wav, as train_filtered.txt; other clips are counted (default:
    all).
    """

    has_global_ids = True

    def __init__(self, path: Path, tempo: str | None = None, list: str | None = None):
        inner = [path / name for name in ("genres_original", "genres") if (path / name).is_dir()]
        self.path = inner[0] if inner else path
        self.tempo = Path(tempo).absolute() if tempo else None
        self.list = Path(list).absolute() if list else None
        for given in (self.tempo, self.list):
            if given and not given.exists():
                raise CorpusError(f"{given} does not exist")

    def records(self) -> Iterator[tuple[str, Any]]:
        listed = None if self.list is None else self._listed(self.list)
        clips = [
            clip
            for clip in sorted(self.path.glob("*/*"))
            if clip.suffix[1:].lower() in EXTENSIONS and clip.name[0] != "."
        ]
        if not clips:
            raise CorpusError(f"{self.path} has no audio: its folders are genres, with a clip a file")
        for clip in clips:
            if listed is None or f"{clip.parent.name}/{clip.stem}" in listed:
                yield clip.stem, clip
        stems = {f"{clip.parent.name}/{clip.stem}" for clip in clips}
        if listed is not None:
            if left := len(stems - listed):
                yield "", Ignored(f"clips that {self.list} does not name", left)
            for name in sorted(listed - stems):
                yield name, Problem("missing_file", f"no clip {name} in {self.path}")

    def _listed(self, path: Path) -> set[str]:
        found = set()
        for place, line in text_lines(path, self.encoding):
            if isinstance(line, Problem):
                raise CorpusError(f"{path}:{place}: {line.detail}")
            if line.strip():
                found.add(str(Path(line.strip()).with_suffix("")))
        return found

    def sample(self, clip: Path, where: str) -> Entry | Rejection:
        if self.tempo is None:
            return Entry(id=clip.stem, audio=str(clip), task="genre", label=clip.parent.name)
        file = self.tempo / f"gtzan_{clip.stem.replace('.', '_')}.bpm"
        if not file.exists():
            return Rejection(clip.stem, "missing_file", f"no tempo in {file}")
        tempo = number(file.read_text(encoding="utf-8", errors="replace").strip())
        if tempo is None or not tempo > 0:
            return Rejection(clip.stem, "bad_row", f"{file} holds no number above 0")
        return Entry(id=clip.stem, audio=str(clip), task="tempo", label=str(round(tempo)))


class MusicCaps(Reader):
    """musiccaps-public.csv (ytid, start_s, end_s, caption ...) and clips named YTID, YTID_START or
    [YTID]-[START-END] in `clips`: task caption.

    split: train or eval, by is_audioset_eval (default: both). Clips are the cut 10 s, not the whole video;
    those that the table does not name are counted.
    """

    has_global_ids = True

    def __init__(self, path: Path, clips: str, split: str | None = None):
        if split not in (None, "train", "eval"):
            raise CorpusError(f"split={split}: train or eval")
        self.path = existing(path / "musiccaps-public.csv") if path.is_dir() else path
        self.clips, self.split, self.beside = Path(clips).absolute(), split, Beside()

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        required = ("ytid", "start_s", "end_s", "caption", "is_audioset_eval")
        for place, row in table_rows(self.path, ",", encoding=self.encoding, required=required):
            yield f"{self.path.name}:{place}", row
        yield from self.beside.left(self.path.name + (f", split {self.split}" if self.split else ""))

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection | list:
        name, start, end = row["ytid"], number(row["start_s"]), number(row["end_s"])
        if not name or start is None or end is None or not row["caption"].strip():
            return Rejection(where, "bad_row", "no ytid, start_s, end_s or caption")
        if self.split and self.split != ("eval" if row["is_audioset_eval"].lower() == "true" else "train"):
            return []
        clip = find_clip(
            self.clips, f"{name}_{start:g}", f"[{name}]-[{start:g}-{end:g}]", f"{name}_{int(start):06d}", name
        )
        if clip is None:
            return Rejection(f"{name}_{start:g}", "missing_file", f"no clip of {name} in {self.clips}")
        self.beside.name(str(clip))
        caption = " ".join(row["caption"].split())
        return Entry(
            id=f"{name}_{start:g}", audio=str(clip), task="caption", response=caption, recording=name
        )


class Jamendo(Reader):
    """autotagging.tsv or another table of MTG-Jamendo (TRACK_ID, ARTIST_ID, ALBUM_ID, PATH, DURATION, TAGS),
    and tracks in `clips` (14/214.mp3, or 14/214.low.mp3).

    tags: genre, instrument or mood (default: genre), which is the task. Tags of a track are joined by commas;
    one=yes takes only tracks with exactly one. seconds: of the middle of the track (default: 30). The artist
    is the speaker, by which splits keep tracks together. Tracks without such a tag are counted.
    """

    has_global_ids = True
    COLUMNS = ("TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS")
    TAGS = {"genre": "genre---", "instrument": "instrument---", "mood": "mood/theme---"}

    def __init__(self, path: Path, clips: str, tags: str = "genre", one: str = "no", seconds: str = "30"):
        self.path, self.clips, self.tags, self.one = path, Path(clips).absolute(), tags, one == "yes"
        length = number(seconds)
        if tags not in self.TAGS:
            raise CorpusError(f"tags={tags}: {', '.join(self.TAGS)}")
        if one not in ("yes", "no"):
            raise CorpusError(f"one={one}: yes or no")
        if length is None or length <= 0:
            raise CorpusError(f"seconds={seconds}: a number above 0")
        self.seconds, self.left = length, 0

    def records(self) -> Iterator[tuple[str, Any]]:
        self.left, header = 0, False
        for place, line in text_lines(self.path, self.encoding):
            if not header:
                columns = () if isinstance(line, Problem) else tuple(line.split("\t"))
                if columns != self.COLUMNS:
                    raise CorpusError(
                        f"{self.path}: the first line is not {' '.join(self.COLUMNS)}, separated by tabs"
                    )
                header = True
            elif isinstance(line, Problem) or line.strip():
                yield f"{self.path.name}:{place}", line
        if not header:
            raise CorpusError(f"{self.path} is empty")
        if self.left:
            many = "other than one tag" if self.one else "no tag"
            yield "", Ignored(f"tracks with {many} of {self.tags}", self.left)

    def sample(self, line: str, where: str) -> Entry | Rejection | list:
        cells = line.split("\t")
        duration = number(cells[4]) if len(cells) > 5 else None
        if duration is None:
            return Rejection(where, "bad_row", "fewer cells than columns, or DURATION is no number")
        track, artist, _, path = cells[:4]
        prefix = self.TAGS[self.tags]
        tags = [tag.removeprefix(prefix) for tag in cells[5:] if tag.startswith(prefix)]
        if not tags or self.one and len(tags) > 1:
            self.left += 1
            return []
        stem = Path(path)
        clip = find_clip(self.clips / stem.parent, stem.stem, f"{stem.stem}.low")
        if clip is None:
            return Rejection(track, "missing_file", f"no {path} in {self.clips}")
        length = min(self.seconds, duration)
        return Entry(
            id=track,
            audio=str(clip),
            task=self.tags,
            label=", ".join(tags),
            speaker=artist,
            offset=round((duration - length) / 2, 3),
            duration=length,
        )
