"""NeMo manifests: JSON lines with audio_filepath, beside files or tars."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.languages import language_code, language_name
from core.tar_members import ignored_as
from data_tools.corpora import Entry, Ignored, Item, Reader, Rejection, as_name, kind_of_value
from data_tools.corpora.columns import proposal
from data_tools.corpora.manifest import FACTS_OF, key_facts, times_problem
from data_tools.corpora.tars import LINKS, group_of, tar_files, tar_members
from data_tools.disk_table import DiskTable
from data_tools.text_files import CorpusError, json_items

_RANGE = re.compile(r"_OP_(\d+)\.\.(\d+)_CL_|\{(\d+)\.\.(\d+)\}")
_KEYS = frozenset(
    "audio_filepath duration text offset lang source_lang target_lang speaker pred_text shard_id".split()
)


class Nemo(Reader):
    """manifest.json(l): audio_filepath, duration, text, and optionally offset, lang, speaker, pred_text
    (taken as hypothesis).

    A line whose source_lang and target_lang differ is a translation: its text is in the target language (as
    for Canary). Relative paths start from the manifest's folder. The id is the path with the offset (and a
    translation's language), which is what makes a line unique. Of a tarred dataset, tars is the folder of the
    tars, one tar, or NeMo's own pattern (tars=audio__OP_0..511_CL_.tar); members are matched by name, and
    members without a line are reported. ignore: keys named like times (start, end) to leave out, joined by +;
    others of that kind are refused.
    """

    broken = "bad_json"

    def __init__(self, path: Path, tars: str | None = None, ignore: str | None = None):
        self.path, self.tars = path, tars
        self.ignored = frozenset(ignore.split("+")) if ignore else frozenset()
        self.keys: Counter[str] = Counter()
        self.rows = 0
        if tars is not None and not self._named_tars(tars):
            raise CorpusError(f"tars={tars}: there are no such tars")

    def _named_tars(self, tars: str) -> list[Path]:
        """The tars that are named. Errors: CorpusError for one that does not exist."""
        where = self.path.parent / tars
        match = _RANGE.search(where.name)
        if match is None:
            return tar_files(where) if where.exists() else []
        first, last = (match[1] or match[3]), (match[2] or match[4])
        names = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        paths = [
            where.with_name(where.name[: match.start()] + name + where.name[match.end() :]) for name in names
        ]
        if missing := [path for path in paths if not path.exists()]:
            raise CorpusError(f"tars={tars}: {missing[0]} does not exist")
        return paths

    def records(self) -> Iterator[tuple[str, Any]]:
        self.keys.clear()
        self.rows = 0
        self.members = _Members(self._named_tars(self.tars)) if self.tars is not None else None
        if self.members is not None:
            yield from ((fault.id, fault) for fault in self.members.faults)
            yield from (("", Ignored(what, count)) for what, count in self.members.ignored.items())
        for place, row in json_items(self.path, self.encoding):
            yield f"{self.path.name}:{place}", row
        if self.members is not None:
            for name in self.members.left_over():
                yield (
                    name,
                    Rejection(name, "unmatched", f"the tars hold {name}, {self.path.name} has no line of it"),
                )

    def sample(self, row: Any, where: str) -> Item | list[Item]:
        if not isinstance(row, dict):
            return Rejection(where, "bad_json", f"{kind_of_value(row)}, not an object")
        self.rows += 1
        if self.rows <= FACTS_OF:
            self.keys.update(row.keys())
        name, offset, duration = row.get("audio_filepath"), row.get("offset"), row.get("duration")
        if not isinstance(name, str):
            return Rejection(where, "bad_json", f"{where}: no audio_filepath")
        if offset is not None and (type(offset) not in (int, float) or not offset >= 0):
            return Rejection(
                name,
                "bad_row",
                f"{where}: offset is {kind_of_value(offset)}, not a number of seconds from 0 on",
            )
        if problem := times_problem(
            row, {key: row[key] for key in row.keys() & _KEYS if row[key] is not None}, self.ignored
        ):
            return Rejection(name, "bad_row", f"{where}: {problem}")
        audio = str(self.path.parent / name) if self.members is None else self.members.find(name)
        if audio is None:
            return Rejection(name, "missing_file", f"{where}: no member {Path(name).name} in {self.tars}")
        entry_id = Path(name).with_suffix("").as_posix() + (f"@{offset:.3f}" if offset is not None else "")
        entry = Entry(
            id=entry_id,
            audio=audio,
            text=row.get("text"),
            task="asr",
            offset=offset,
            duration=None if duration is None else float(duration),
            lang=row.get("lang") or row.get("target_lang") or row.get("source_lang"),
            speaker=as_name(row.get("speaker")),
            recording=name,
            hypothesis=row.get("pred_text"),
            group=group_of(audio),
        )
        source, target = row.get("source_lang"), row.get("target_lang")
        if source and target and language_code(source) != language_code(target):
            entry.task, entry.response, entry.text, entry.hypothesis = "translation", entry.text, None, None
            entry.lang, entry.target_lang, entry.id = source, language_name(target), f"{entry_id}-{target}"
        return entry

    def facts(self) -> list[str]:
        return key_facts(self.path.name, self.keys, _KEYS, proposal(self.keys, ("speaker",)))


class _Members:
    """Audio members of a tarred dataset by name: they may be millions, and lines come in any order."""

    def __init__(self, tars: list[Path]):
        self.faults: list[Rejection] = []
        self.ignored: Counter[str] = Counter()
        self._table = DiskTable()
        for tar in tars:
            for member in tar_members(tar):
                if isinstance(member, Rejection):
                    self.faults.append(member)
                elif heading := LINKS if member.is_special else ignored_as(member.name):
                    self.ignored[heading] += 1
                elif not self._table.add(_key(member.name), member.place):
                    detail = "another member of the tars has the same name"
                    self.faults.append(Rejection(f"{tar.name}:{member.name}", "duplicate_id", detail))

    def find(self, name: str) -> str | None:
        matches = self._table.take(_key(name))
        return matches[0] if matches else None

    def left_over(self) -> Iterator[str]:
        yield from (key for key, _ in self._table.left_over())


def _key(name: str) -> str:
    """What NeMo matches by: the member's base name without its extension."""
    return Path(name).stem.encode("utf-8", "replace").decode()
