"""GigaSpeech and WenetSpeech: one JSON of gigabytes, long recordings, segments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora import CorpusError, Entry, Item, Reader, Rejection, is_held_out, kind_of_value
from data_tools.corpora.beside import Beside
from data_tools.text_files import existing, json_array


class GigaSpeech(Reader):
    """GigaSpeech.json beside audio/; PATH is the JSON, or its folder. subset: XL, L, M, S, XS, DEV or TEST;
    without it, all but DEV and TEST. root: folder that audio paths start from (default: the JSON's).

    Punctuation tags become punctuation (punctuation=no leaves them out); garbage segments (<SIL>, <MUSIC>,
    <NOISE>, <OTHER>) are no speech and are reported as such; audio files that the JSON does not name are
    counted.
    """

    TAGS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
    GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
    ids, start, end, audio_id, default_lang = "sid", "begin_time", "end_time", "aid", "en"
    broken = "bad_json"
    has_global_ids = True

    def __init__(
        self, path: Path, subset: str | None = None, root: str | None = None, punctuation: str = "yes"
    ):
        self.beside = Beside()
        self.path = path if path.is_file() else existing(path / f"{type(self).__name__}.json")
        self.root = Path(root).absolute() if root else self.path.parent
        self.subset = subset.strip("{}").upper() if subset else None
        if punctuation not in ("yes", "no"):
            raise CorpusError(f"punctuation={punctuation}: yes or no")
        self.tags = self.TAGS if punctuation == "yes" else dict.fromkeys(self.TAGS, "")
        if not self.path.exists():
            raise CorpusError(f"{self.path} does not exist")

    def text(self, words: str) -> str:
        for tag, mark in self.tags.items():
            words = re.sub(rf"\s*{tag}", mark, words)
        return words.lstrip(" ,.?!").rstrip() if self.TAGS else words.strip()

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        for number, recording in enumerate(json_array(self.path, "audios", self.encoding), 1):
            where = f"{self.path.name}:audios {number}"
            if not isinstance(recording, dict) or not isinstance(recording.get("path"), str):
                yield where, Rejection(str(recording)[:80], "bad_json", "a recording without a path")
                continue
            self.beside.name(str(self.root / recording["path"]))
            name, segments = recording["path"], recording.get("segments") or ()
            if not isinstance(segments, list | tuple):
                yield where, Rejection(name, "bad_json", f"segments is {kind_of_value(segments)}, not a list")
                continue
            for place, segment in enumerate(segments):
                yield f"{where}, segment {place}", (recording, segment)
        yield from self.beside.left(self.path.name)

    def sample(self, record: tuple[dict, Any], where: str) -> Item | list[Item]:
        recording, segment = record
        if not isinstance(segment, dict):
            return Rejection(where, "bad_json", f"{kind_of_value(segment)}, not a segment")
        subsets = {name.strip("{}").upper() for name in segment.get("subsets", ())}
        if self.subset not in subsets if self.subset else subsets and all(map(is_held_out, subsets)):
            return []
        return self.entry(recording, segment)

    def entry(self, recording: dict, segment: dict) -> Entry | Rejection:
        name, words = str(segment.get(self.ids, "?")), segment.get("text_tn", segment.get("text", ""))
        if not isinstance(segment.get(self.start), (int, float)) or not isinstance(
            segment.get(self.end), (int, float)
        ):
            return Rejection(name, "bad_json", f"segment without {self.start} and {self.end}")
        if not isinstance(words, str):
            return Rejection(name, "bad_json", f"text is {kind_of_value(words)}, not text")
        if self.TAGS and any(tag in words for tag in self.GARBAGE) or words.strip() in self.GARBAGE:
            return Rejection(name, "no_speech", words.strip())
        return Entry(
            id=name,
            audio=str(self.root / recording["path"]),
            text=self.text(words),
            task="asr",
            lang=(recording.get("language") or self.default_lang).lower(),
            offset=float(segment[self.start]),
            duration=round(segment[self.end] - segment[self.start], 4),
            recording=str(recording.get(self.audio_id) or recording["path"]),
            speaker=None if segment.get("speaker") in (None, "N/A") else segment["speaker"],
        )


class WenetSpeech(GigaSpeech):
    """WenetSpeech.json: the same shape, Chinese. subset: L, M, S, W, DEV, TEST_NET, TEST_MEETING (without it,
    and root: as for GigaSpeech); punctuation: without effect, there are no tags."""

    TAGS: dict[str, str] = {}
    default_lang = "zh"

    def entry(self, recording: dict, segment: dict) -> Entry | Rejection:
        return super().entry({**recording, "language": None}, segment)
