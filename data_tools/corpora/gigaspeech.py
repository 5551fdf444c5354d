"""GigaSpeech and WenetSpeech: one JSON of gigabytes, long recordings, segments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault, is_held_out

_CHUNK = 1 << 20


def json_array(path: Path, key: str) -> Iterator[dict]:
    """The elements of the array under `key`, decoded one by one: the whole file is never in memory."""
    decoder, buffer = json.JSONDecoder(), ""
    with open(path, encoding="utf-8") as file:
        while (match := re.search(rf'"{key}"\s*:\s*\[', buffer)) is None:
            chunk = file.read(_CHUNK)
            if not chunk:
                raise CorpusError(f'{path} holds no "{key}" list')
            buffer = buffer[-len(key) - 64 :] + chunk
        buffer = buffer[match.end() :]
        while True:
            buffer = buffer.lstrip().removeprefix(",").lstrip()
            if buffer.startswith("]"):
                return
            try:
                element, end = decoder.raw_decode(buffer)
            except ValueError:
                # Twice the buffer each time: an element is decoded from its beginning only a few times.
                chunk = file.read(max(_CHUNK, len(buffer)))
                if not chunk:
                    raise CorpusError(f'{path} ends in the middle of its "{key}" list: copy it again') from None
                buffer += chunk
                continue
            yield element
            buffer = buffer[end:]


class GigaSpeech:
    """GigaSpeech.json beside audio/; PATH is the JSON, or its folder. subset: XL, L, M, S, XS, DEV or TEST; without it, all but
    DEV and TEST. root: folder that audio paths start from (default: the JSON's).

    Punctuation tags become punctuation (punctuation=no leaves them out); garbage segments (<SIL>, <MUSIC>, <NOISE>,
    <OTHER>) are no speech and are reported as such.
    """

    TAGS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
    GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
    ids, start, end, audio_id, default_lang = "sid", "begin_time", "end_time", "aid", "en"

    def __init__(self, path: Path, subset: str | None = None, root: str | None = None, punctuation: str = "yes"):
        self.path = path if path.is_file() else path / f"{type(self).__name__}.json"
        self.root = Path(root).absolute() if root else self.path.parent
        self.subset = subset.strip("{}").upper() if subset else None
        if punctuation not in ("yes", "no"):
            raise CorpusError(f"punctuation={punctuation}: yes or no")
        self.tags = self.TAGS if punctuation == "yes" else dict.fromkeys(self.TAGS, "")
        if not self.path.exists():
            raise CorpusError(f"{self.path} does not exist")

    def text(self, words: str) -> str:
        for tag, mark in self.tags.items():
            words = words.replace(f" {tag}", mark)
        return words.strip()

    def __iter__(self) -> Iterator[Entry | Fault]:
        for recording in json_array(self.path, "audios"):
            if not isinstance(recording, dict) or "path" not in recording:
                yield Fault(str(recording)[:80], "bad_json", "a recording without a path")
                continue
            for segment in recording.get("segments", ()):
                subsets = {name.strip("{}").upper() for name in segment.get("subsets", ())}
                if self.subset not in subsets if self.subset else subsets and all(map(is_held_out, subsets)):
                    continue
                yield self.entry(recording, segment)

    def entry(self, recording: dict, segment: dict) -> Entry | Fault:
        name, words = str(segment.get(self.ids, "?")), segment.get("text_tn", segment.get("text", ""))
        if not isinstance(segment.get(self.start), (int, float)) or not isinstance(segment.get(self.end), (int, float)):
            return Fault(name, "bad_json", f"segment without {self.start} and {self.end}")
        if words.strip() in self.GARBAGE:
            return Fault(name, "no_speech", words.strip())
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
    """WenetSpeech.json: the same shape, Chinese. subset: L, M, S, W, DEV, TEST_NET, TEST_MEETING (without it, and root: as for
    GigaSpeech); punctuation: without effect, there are no tags."""

    TAGS: dict[str, str] = {}
    default_lang = "zh"

    def entry(self, recording: dict, segment: dict) -> Entry | Fault:
        return super().entry({**recording, "language": None}, segment)
