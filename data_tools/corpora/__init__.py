"""What a corpus is to the packer: a reader yields entries (metadata alone) and faults (lines that are none)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(slots=True)
class Entry:
    """One sample as its corpus describes it, before any audio is opened. Seconds throughout.

    `audio` is a path, or one of the forms that data_tools/audio.py lists (a member of a tar, a row of a parquet file, the
    output of a command); None for text alone. With an `offset` (0 included) the stretch [offset, offset + duration) is taken;
    without one the whole file is, and `duration` is only what planning goes by. `group` names what is costly to open more than once: entries of one group
    stay together in the shuffle.
    """

    id: str
    audio: str | None = None
    text: str | None = None
    corpus: str = ""
    task: str | None = None
    lang: str | None = None
    offset: float | None = None
    duration: float | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    speaker: str | None = None
    messages: list | None = None
    origin: str | None = None
    group: str | None = None

    def to_json(self) -> str:
        return json.dumps({f: v for f in ENTRY_FIELDS if (v := getattr(self, f)) is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Entry:
        return cls(**json.loads(line))


ENTRY_FIELDS = tuple(f.name for f in dataclasses.fields(Entry))


@dataclass(slots=True)
class Fault:
    """A line, row or clip that gives no sample: which, why (a fixed word that counts can be kept by), and the detail."""

    id: str
    reason: str
    detail: str = ""
    corpus: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)
