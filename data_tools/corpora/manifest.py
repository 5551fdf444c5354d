"""The project's own manifest: one JSON object a line, or a JSON array of objects."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora import (
    ENTRY_FIELDS,
    NAMES,
    Entry,
    Reader,
    Rejection,
    as_name,
    decode_entry,
    kind_of_value,
)
from data_tools.corpora.columns import proposal, time_columns, unused_times
from data_tools.sources import kind_of
from data_tools.text_files import json_items

_FIELDS = frozenset(ENTRY_FIELDS)
FACTS_OF = 1000  # rows whose keys a dry run names


class Manifest(Reader):
    """M.jsonl, or M.json that is a list, also compressed: id, audio, text, and optionally the other fields of
    an Entry.

    Other keys are left out; those that are named like times (start, end) are refused, unless ignore names
    them (ignore=start+end). A relative audio path is taken from the manifest's folder. A line without id gets
    its line number as id. Text-only samples have no audio.
    """

    def __init__(self, path: Path, ignore: str | None = None):
        self.path, self.prefix, self.name = path, os.path.join(path.parent, ""), path.name
        self.ignored = frozenset(ignore.split("+")) if ignore else frozenset()
        self.keys: Counter[str] = Counter()
        self.rows = 0

    def records(self) -> Iterator[tuple[str, Any]]:
        self.keys.clear()
        self.rows = 0
        for place, row in json_items(self.path, self.encoding, decode_entry):
            yield f"{self.name}:{place}", row

    def sample(self, row: Any, where: str) -> Entry | Rejection:
        if type(row) is Entry:  # a line that has an entry's keys alone, with their types
            self.rows += 1
            if self.rows <= FACTS_OF:
                self.keys.update(row.fields().keys() - {"corpus"})
            return self._placed(row)
        if not isinstance(row, dict):
            return Rejection(where, "bad_json", f"{kind_of_value(row)}, not an object")
        self.rows += 1
        if self.rows <= FACTS_OF:
            self.keys.update(row.keys())
        fields = {key: value for key, value in row.items() if value is not None and key in _FIELDS}
        if len(fields) < len(row) and (problem := times_problem(row, fields, self.ignored)):
            return Rejection(str(row.get("id", where)), "bad_row", f"{where}: {problem}")
        for key in NAMES:
            if key in fields:
                fields[key] = as_name(fields[key])
        if "id" not in fields:
            fields["id"] = f"{self.path.stem}-{int(where.rpartition(':')[2]):09d}"
        return self._placed(Entry(**fields))

    def _placed(self, entry: Entry) -> Entry:
        """The entry with its audio where it is from here."""
        audio = entry.audio
        if isinstance(audio, str) and not audio.startswith("/"):
            kind, rest = kind_of(audio)
            if kind == "file":
                entry.audio = self.prefix + audio
            elif kind in ("tar", "tarz"):  # ids may restart in each tar
                entry.source = os.path.basename(rest.rpartition("#")[0]).partition(".tar")[0]
        return entry

    def facts(self) -> list[str]:
        return key_facts(
            self.path.name, self.keys, _FIELDS, proposal(self.keys, ("audio", "text", "speaker", "label"))
        )


def times_problem(row: dict, fields: dict, ignored: frozenset[str]) -> str | None:
    """Why a line that has times under other keys than offset and duration cannot be read; None where it
    can."""
    if not (times := time_columns(row.keys() - fields.keys(), ignored)):
        return None
    unused = unused_times(row, times, "offset" in fields, "duration" in fields)
    if not unused:
        return None
    names = " and ".join(f"'{name}'" for name in row if name in unused)
    return (
        f"{names} would be left out: a stretch of a recording is given by offset and duration, in seconds "
        f"(ignore={'+'.join(name for name in row if name in unused)} leaves them out)"
    )


def key_facts(
    name: str, keys: Counter[str], used: frozenset[str] | set[str], proposed: dict[str, str]
) -> list[str]:
    """Lines for a dry run: keys that are read, those that are not, and what seems to be meant by the
    latter."""
    facts = [f"{name}: reads {', '.join(key for key in keys if key in used) or 'no key'}"]
    if unused := [key for key in keys if key not in used]:
        facts[0] += f"; leaves out {', '.join(unused)}"
    if proposed:
        facts.append(
            f"{name}: is {', '.join(f'{field} = {column}' for field, column in proposed.items())} meant?"
        )
    return facts
