"""Audio files in a folder, with their transcripts beside them or in one file: the layout that needs no reader
of its own."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from core.tar_members import (
    MAX_TEXT_BYTES,
    Group,
    Member,
    family_of,
    group_family,
    ignored_as,
    kind_of_member,
    read_record,
)
from data_tools.corpora import Entry, Ignored, Item, Reader, Rejection, as_name
from data_tools.corpora.columns import USUAL, number, proposal
from data_tools.disk_table import DiskTable
from data_tools.text_files import (
    CorpusError,
    Problem,
    bare_suffixes,
    damage,
    json_items,
    open_text,
    table_rows,
    text_lines,
)

_METADATA = ("metadata", "transcripts", "transcript", "transcriptions", "trans")  # stems of such files
_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".txt")
_FIELDS = ("text", "speaker", "label", "lang", "id", "duration", "prompt", "response", "task", "target_lang")
_FOLDER = "folder"  # a value that means the name of the clip's folder


class Folder(Reader):
    """PATH is a folder of audio files, at any depth. A clip's transcript is the text beside it (a.wav and
    a.txt, .lab, .trn or .json), or its line in one file of the folder or of a folder above it.

    Such a file is named metadata, transcripts, transcript or trans, with .csv, .tsv, .jsonl, .json or .txt,
    or is SOMETHING.trans.txt; metadata names another one. Its rows name the file (file_name, path, audio ...,
    with its folder or not, with its extension or not) and hold text, and if they like speaker, label, lang,
    id, prompt, response; a .txt, or a table without a line of names, has the file first and its text second.
    text: of several texts of a clip, the ending of the one to take (text=normalized.txt). speaker, label: a
    value for all clips, or `folder`: the name of the clip's folder. Clips without a text, texts without a
    clip and other files are counted. The id is the path from PATH on, without extension.
    """

    def __init__(
        self,
        path: Path,
        metadata: str | None = None,
        text: str | None = None,
        speaker: str | None = None,
        label: str | None = None,
    ):
        if not path.is_dir():
            raise CorpusError(f"{path} is not a folder")
        self.path, self.ending = path, f".{text}" if text else None
        self.of_folder = [
            field for field, value in (("speaker", speaker), ("label", label)) if value == _FOLDER
        ]
        self.constant = {
            field: value
            for field, value in (("speaker", speaker), ("label", label))
            if value not in (None, _FOLDER)
        }
        self.metadata = None
        if metadata:
            self.metadata = path / metadata
            if not self.metadata.exists():
                raise CorpusError(f"metadata={metadata}: {self.metadata} does not exist")
        self.facts_read: list[str] = []

    def records(self) -> Iterator[tuple[str, Any]]:
        self.facts_read = []
        ignored: Counter[str] = Counter()
        tables: dict[str, _Metadata] = {}
        if self.metadata is not None:
            yield from self._open_table(self.metadata, self.metadata.parent, tables)
        for folder, names in _walk(self.path):
            here = os.path.relpath(folder, self.path)
            if self.metadata is None:
                for name in [name for name in names if _is_metadata(name, names)]:
                    names.remove(name)
                    yield from self._open_table(Path(folder, name), Path(folder), tables)
            elif Path(folder) == self.metadata.parent and self.metadata.name in names:
                names.remove(self.metadata.name)
            families: dict[str, list[Member[str]]] = {}
            for name in names:
                heading = ignored_as(name)
                if (
                    heading is None
                    and self.ending
                    and kind_of_member(name) == "text"
                    and not name.endswith(self.ending)
                ):
                    heading = f"texts that do not end in {self.ending}"
                if heading:
                    ignored[heading.replace("members", "files")] += 1
                else:
                    families.setdefault(family_of(name), []).append(Member(name, os.path.join(folder, name)))
            for members in families.values():
                for group in group_family(members):
                    sample_id = group.key if here == "." else f"{here}/{group.key}"
                    yield sample_id, (group, sample_id, tables)
        for table in tables.values():
            yield from table.left_over()
        yield from (("", Ignored(heading, count)) for heading, count in ignored.items())

    def _open_table(
        self, file: Path, folder: Path, tables: dict[str, _Metadata]
    ) -> Iterator[tuple[str, Rejection]]:
        table = _Metadata(file, self.encoding)
        key = os.path.relpath(folder, self.path)
        if key in tables:
            raise CorpusError(
                f"{tables[key].file} and {file} both describe {folder}: name one with metadata="
            )
        tables[key] = table
        self.facts_read.append(table.facts_read)
        yield from table.faults

    def sample(self, record: tuple[Group[str], str, dict[str, _Metadata]], where: str) -> Item | list[Item]:
        group, sample_id, tables = record
        audios = group.of("audio")
        if not audios:
            names = ", ".join(member.name for member in group.members)
            return Rejection(sample_id, "unmatched", f"{names}: no audio file of that name beside it")
        ignored: list[Item] = []
        table = _nearest(tables, sample_id)
        values = table.take(audios[0].name, sample_id) if table is not None else None
        if len(audios) > 1 and (values is not None or len(audios) < len(group.members)):
            return Rejection(
                sample_id,
                "bad_row",
                group.problem or f"several audio files ({', '.join(a.name for a in audios)})",
            )
        texts = [member for member in group.members if member.kind != "audio"]
        if values is None and texts:
            if problem := group.problem:
                return Rejection(sample_id, "bad_row", problem)
            values = _beside(group, self.encoding)
        elif values is not None and texts:
            ignored.append(Ignored("texts beside clips that have a line in a metadata file", len(texts)))
        if isinstance(values, Problem):
            return [*ignored, Rejection(sample_id, values.reason, values.detail)]
        values = dict(values or {})
        parent = PurePosixPath(sample_id).parent.name or self.path.name
        entry = Entry(
            id=values.pop("id", None) or sample_id, audio=audios[0].content, **self.constant | values
        )
        for field in self.of_folder:
            setattr(entry, field, parent)
        return [*ignored, entry]

    def facts(self) -> list[str]:
        return self.facts_read


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, sorted names of its files), links to folders followed, no folder twice."""
    visited: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield folder, sorted(names)


def _is_metadata(name: str, names: list[str]) -> bool:
    """Whether a file describes several clips. A clip that is named so itself has its text beside it."""
    suffixes = bare_suffixes(Path(name))
    if not suffixes or suffixes[-1] not in _TABLES:
        return False
    stem = name[: name.lower().rfind(suffixes[-1])]
    if stem.endswith(".trans"):
        return True
    return stem.lower() in _METADATA and not any(
        other.startswith(f"{stem}.") and kind_of_member(other) == "audio" for other in names
    )


def _nearest(tables: dict[str, _Metadata], sample_id: str) -> _Metadata | None:
    folder = os.path.dirname(sample_id) or "."
    while True:
        if folder in tables:
            return tables[folder]
        if folder == ".":
            return None
        folder = os.path.dirname(folder) or "."


def _beside(group: Group[str], encoding: str | None) -> dict[str, Any] | Problem:
    """What the text or JSON beside a clip says."""
    parts: dict[str, bytes] = {}
    for kind in ("json", "text"):
        if member := group.one(kind):
            if os.path.getsize(member.content) > MAX_TEXT_BYTES:
                return Problem("too_large", f"{member.name} is no text of one clip")
            with open_text(Path(member.content), encoding) as file:
                text = file.read()
            if problem := damage(text):
                return Problem(problem.reason, f"{member.name}: {problem.detail}")
            parts[kind] = text.encode()
    try:
        record = read_record(parts.get("json"), parts.get("text"))
    except (ValueError, RecursionError) as error:
        return Problem("bad_json", str(error) or "nested too deeply")
    return _chosen(record)


def _chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row or JSON that an entry takes, names as text."""
    values = {field: record[field] for field in _FIELDS if record.get(field) not in (None, "")}
    for field in ("id", "speaker"):
        if field in values:
            values[field] = as_name(values[field])
    if "duration" in values:
        values["duration"] = number(values["duration"])
    if isinstance(values.get("text"), str):
        values["text"] = values["text"].strip()
    return values


class _Metadata:
    """Rows of one file by the clip that they name."""

    def __init__(self, file: Path, encoding: str | None):
        self.file, self.faults = file, []
        self._rows = DiskTable()
        self.facts_read = f"{file.name}: each line is a file's name and its text"
        suffix = bare_suffixes(file)[-1] if bare_suffixes(file) else ""
        rows = self._lines(encoding) if suffix == ".txt" or not suffix else self._table(suffix, encoding)
        for place, name, values in rows:
            where = f"{file.name}:{place}"
            if isinstance(values, Problem):
                self.faults.append((where, Rejection(where, values.reason, values.detail)))
            elif not self._rows.add(_key(name), msgspec.json.encode(values).decode()):
                self.faults.append(
                    (where, Rejection(where, "duplicate_id", f"an earlier line names {name} too"))
                )

    def _lines(self, encoding: str | None) -> Iterator[tuple[int, str, dict | Problem]]:
        """NAME TEXT, divided by a tab, a bar or a blank."""
        for place, line in text_lines(self.file, encoding):
            if isinstance(line, Problem):
                yield place, "", line
            elif line.strip():
                divider = next((sign for sign in "\t|" if sign in line), None)
                name, _, text = line.strip().partition(divider or " ")
                yield place, name, {"text": text.split("|")[0].strip() if divider == "|" else text.strip()}

    def _table(self, suffix: str, encoding: str | None) -> Iterator[tuple[int, str, dict | Problem]]:
        if suffix in (".jsonl", ".json"):
            rows: Iterator = json_items(self.file, encoding)
        else:
            delimiter, header = _form_of(self.file, encoding)
            if header is None and delimiter in ",;":
                raise CorpusError(
                    f"{self.file} has no line of column names: give --corpus table:FILE,columns=audio+text "
                    f"instead"
                )
            if header is None:
                yield from self._lines(encoding)
                return
            rows = table_rows(self.file, delimiter, delimiter in ",;", encoding=encoding)
        columns: dict[str, str] = {}
        for place, row in rows:
            if isinstance(row, Problem):
                yield place, "", row
                continue
            if not isinstance(row, dict):
                yield place, "", Problem("bad_json", "not a JSON object")
                continue
            if not columns:
                columns = {field: field for field in ("audio", *_FIELDS) if field in row} | proposal(
                    row, tuple(USUAL)
                )
                if "audio" not in columns:
                    raise CorpusError(
                        f"{self.file} has no column that names files (file_name, path, audio ...): "
                        f"{', '.join(row)}"
                    )
                self.facts_read = f"{self.file.name}: reads " + ", ".join(
                    f"{column} (as {field})" if column != field else field
                    for field, column in columns.items()
                )
            name = row.get(columns["audio"])
            if not isinstance(name, str) or not name:
                yield place, "", Problem("bad_row", f"no file name under '{columns['audio']}'")
                continue
            yield place, name, _chosen({field: row.get(column) for field, column in columns.items()})

    def take(self, name: str, sample_id: str) -> dict[str, Any] | Problem | None:
        """The row of a clip: by its path from this file on or a shorter one, with or without its
        extension."""
        path = f"{os.path.dirname(sample_id)}/{name}".strip("/")
        parts = path.split("/")
        for first in range(len(parts)):
            tail = "/".join(parts[first:])
            for key in (tail, tail.rpartition(".")[0]):
                row = self._rows.take(_key(key), path)
                if row is None:
                    continue
                if row[1] not in (None, path):
                    raise CorpusError(
                        f"{self.file}: '{key}' fits {row[1]} and {path}: write the folder into the names"
                    )
                return msgspec.json.decode(row[0])
        return None

    def left_over(self) -> Iterator[tuple[str, Rejection]]:
        for key, _ in self._rows.left_over():
            yield (
                key,
                Rejection(
                    key, "missing_file", f"{self.file.name} names {key}, and there is no such audio file"
                ),
            )


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.removeprefix("./").strip()).encode("utf-8", "replace").decode()


def _form_of(file: Path, encoding: str | None) -> tuple[str, list[str] | None]:
    """(delimiter, columns) of a table; None for the columns where its first line is none of names."""
    with open_text(file, encoding) as text:
        first = text.readline(1 << 16).strip()
    counts = {sign: first.count(sign) for sign in ("\t", "|", ";", ",")}
    delimiter = next((sign for sign, count in counts.items() if count), ",")
    columns = [cell.strip('"').lower() for cell in first.split(delimiter)]
    return delimiter, columns if any(
        column in names for column in columns for names in (USUAL["audio"], USUAL["text"])
    ) else None
