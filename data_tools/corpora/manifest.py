"""The project's own manifest: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import ENTRY_FIELDS, Entry, Fault
from data_tools.sources import kind_of


class Manifest:
    """M.jsonl: id, audio, text, and optionally the other fields of an Entry; other keys are left out.

    A relative audio path is taken from the manifest's folder. A line without id gets its line number as id. Text-only
    samples have no audio.
    """

    def __init__(self, path: Path):
        self.path, self.folder, self.name = path, str(path.parent), path.name

    def __iter__(self) -> Iterator[Entry | Fault]:
        with open(self.path, "rb") as file:
            for place, line in enumerate(file, 1):
                if line.strip():
                    yield self.entry(line, place)

    def entry(self, line: bytes, place: int) -> Entry | Fault:
        where = f"{self.name}:{place}"
        try:
            row = json.loads(line)
        except ValueError as error:
            return Fault(where, "bad_json", str(error))
        if not isinstance(row, dict):
            return Fault(where, "bad_json", f"a {type(row).__name__}, not an object")
        row = {key: value for key, value in row.items() if key in ENTRY_FIELDS and value is not None}
        row["id"] = str(row["id"]) if "id" in row else f"{self.path.stem}-{place:09d}"
        if isinstance(row.get("audio"), str) and kind_of(row["audio"])[0] == "file":
            row["audio"] = os.path.join(self.folder, row["audio"])
        return Entry(**row)
