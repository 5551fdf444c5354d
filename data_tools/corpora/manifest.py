"""The project's own manifest: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import ENTRY_FIELDS, Entry, Fault

STRINGS = ("id", "audio", "text", "corpus", "task", "lang", "prompt", "response", "label", "speaker", "origin")
NUMBERS = ("offset", "duration")


class Manifest:
    """M.jsonl: id, audio, text, and optionally offset, duration, lang, task, prompt, response, label, speaker, messages.

    A relative audio path is taken from the manifest's folder. A line without id gets its line number as id. Other keys
    are left out. Text-only samples have no audio.
    """

    def __init__(self, path: str | Path, corpus: str | None = None):
        self.path = Path(path)
        self.corpus = corpus or self.path.stem

    def __iter__(self) -> Iterator[Entry | Fault]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self.entry(line, number)

    def entry(self, line: bytes, number: int) -> Entry | Fault:
        where = f"{self.path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            return Fault(where, "bad_json", str(error), self.corpus)
        if not isinstance(row, dict):
            return Fault(where, "bad_json", f"a {type(row).__name__}, not an object", self.corpus)
        row = {key: value for key, value in row.items() if key in ENTRY_FIELDS and value is not None}
        row["id"] = str(row.get("id", f"{self.path.stem}-{number:09d}"))
        for key, value in row.items():
            wanted = str if key in STRINGS else (int, float) if key in NUMBERS else list if key == "messages" else str
            if not isinstance(value, wanted) or isinstance(value, bool):
                return Fault(row["id"], "bad_json", f"{where}: {key} is a {type(value).__name__}", self.corpus)
        row.setdefault("corpus", self.corpus)
        if "audio" in row:
            row["audio"] = str(self.path.parent.absolute() / row["audio"])
        return Entry(**row)
