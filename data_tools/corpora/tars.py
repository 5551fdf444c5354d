"""WebDataset shards as a corpus: packing again in other sizes, codecs or order, and taking in what others
packed."""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any, cast

from core.console import one_line, plural
from core.tar_members import (
    MAX_TEXT_BYTES,
    Group,
    Grouper,
    Member,
    ignored_as,
    is_text_sample,
    kind_of_member,
    read_record,
    split_name,
    stands_alone,
)
from data_tools.corpora import ENTRY_FIELDS, NAMES, Entry, Ignored, Item, Reader, Rejection, as_name
from data_tools.corpora.columns import number
from data_tools.text_files import CorpusError, damage

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_NOT_TAKEN = frozenset(
    ("audio", "offset", "group", "size")
)  # of a record: they say where its clip was before
LINKS = "links and devices"


def tar_files(path: Path) -> list[Path]:
    """Return the tars of a folder in the order of their names, or the one that is given. Errors: CorpusError
    where none is."""
    if path.is_file():
        return [path]
    tars = sorted(
        file for file in path.iterdir() if file.name.endswith(_SUFFIXES) and not file.name.startswith(".")
    )
    if not tars:
        raise CorpusError(f"{path} holds no {', '.join(_SUFFIXES)} file")
    return tars


@dataclass(slots=True)
class TarMember:
    """A member as its header describes it. place: where its bytes are (data_tools/sources.py); text: of JSON
    and texts."""

    name: str
    place: str
    is_special: bool
    text: bytes | None = None
    size: int = 0


def tar_members(tar: Path, with_texts: bool = False) -> Iterator[TarMember | Rejection]:
    """Members of one tar, by their headers; audio is not touched. A tar that ends early or is damaged ends in
    a Rejection."""
    try:
        with open(tar, "rb") as file:
            head = file.read(6)
        if not head:
            yield Rejection(tar.name, "truncated", f"{tar} is empty")
            return
        form = "tarz" if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")) else "tar"
        with tarfile.open(tar) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members.clear()  # it would keep them all; typeshed hides the list
                if member.isdir():
                    continue
                special = not member.isreg() or member.issparse()
                if member.size < 0:
                    yield Rejection(tar.name, "truncated", f"{tar}: member {member.name} has a negative size")
                    return
                extension = split_name(member.name)[1]
                place = f"{form}:{tar}#{member.offset_data}+{member.size}.{extension}"
                is_text = with_texts and not special and kind_of_member(member.name) in ("json", "text")
                readable = archive.extractfile(member) if is_text and member.size <= MAX_TEXT_BYTES else None
                text = readable.read() if readable is not None else None
                yield TarMember(member.name, place, special, text, member.size)
            archive.fileobj.seek(archive.offset)
            if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                yield Rejection(
                    tar.name, "truncated", f"{tar} has no end mark: it may have been cut between two members"
                )
    except (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError, ValueError) as error:
        yield Rejection(
            tar.name,
            "truncated",
            f"{tar} ends early or is damaged ({one_line(error)}): copy or make it again",
        )


def group_of(place: str) -> str | None:
    """What is opened once for all members of a compressed tar; None for one whose members can be read by
    themselves."""
    return place.rpartition("#")[0] if place.startswith("tarz:") else None


class Shards(Reader):
    """PATH is a folder of .tar files (also .tar.gz, .tgz, .tar.bz2, .tar.xz) or one file; audio, JSON and
    text members of one stem are a sample, in whatever order they are.

    KEY.json may be this project's (ids, tasks and texts are kept) or any object with a text under text,
    sentence or transcript; KEY.txt (.text, .transcript, .trn, .lab) is a transcript. text: of several texts
    of a clip, the ending of the one to take (text=normalized.txt). Reading is by member headers: audio is not
    touched. Members of other kinds are counted.
    """

    broken = "bad_json"

    def __init__(self, path: Path, text: str | None = None):
        self.path, self.tars, self.ending = path, tar_files(path), f".{text}" if text else None
        self.counts: Counter[str] = Counter()

    def records(self) -> Iterator[tuple[str, Any]]:
        self.counts.clear()
        for tar in self.tars:
            ignored: Counter[str] = Counter()
            grouper = Grouper(_stands_alone)
            source = tar.name.partition(".tar")[0].removesuffix(".tgz")
            for member in tar_members(tar, with_texts=True):
                if isinstance(member, Rejection):
                    yield tar.name, member
                    continue
                self.counts["members"] += 1
                heading = LINKS if member.is_special else ignored_as(member.name)
                if heading is None and self.ending and kind_of_member(member.name) == "text":
                    heading = (
                        None
                        if member.name.endswith(self.ending)
                        else f"texts that do not end in {self.ending}"
                    )
                if heading:
                    ignored[heading] += 1
                if heading is None or not heading.startswith(("files of", "texts that")):
                    content = Member(member.name, member, len(member.text or ""), not member.is_special)
                    for group in grouper.add(content):
                        yield f"{tar.name}:{group.key}", (group, source)
            for group in grouper.end():
                yield f"{tar.name}:{group.key}", (group, source)
            yield from (("", Ignored(what, count)) for what, count in ignored.items())
            self.counts["ignored"] += ignored.total()

    def sample(self, record: tuple[Group[TarMember], str], where: str) -> Item:
        item = self._sample(*record, where)
        self.counts["samples" if type(item) is Entry else "faults"] += 1
        self.counts["in samples" if type(item) is Entry else "in faults"] += sum(
            m.kind is not None for m in record[0].members
        )
        return item

    def _sample(self, group: Group[TarMember], source: str, where: str) -> Item:
        if group.problem:
            return Rejection(where, "bad_row", group.problem)
        parts: dict[str, bytes] = {}
        for member in (*group.of("json"), *group.of("text")):  # one of each at most
            text = member.content.text
            if text is None:
                return Rejection(where, "too_large", f"{member.name} has {member.content.size:,} bytes")
            if member.kind == "text" and self.encoding:
                if problem := damage(text, self.encoding):
                    return Rejection(where, problem.reason, f"{member.name}: {problem.detail}")
                text = text.decode(self.encoding).encode()
            parts[str(member.kind)] = text
        try:
            record = read_record(parts.get("json"), parts.get("text"))
        except UnicodeDecodeError:
            problem = damage(parts.get("json", b"")) or damage(parts.get("text", b""))
            return Rejection(where, "encoding", f"{group.key}: {problem.detail if problem else 'not UTF-8'}")
        except (ValueError, RecursionError) as error:
            return Rejection(where, "bad_json", one_line(error))
        audio = group.one("audio")
        if audio is None and not is_text_sample(record):
            return Rejection(where, "bad_row", group.without_audio)
        values = _values(record, group.key)
        if audio is None:
            return Entry(source=source, **values)
        return Entry(audio=audio.content.place, group=group_of(audio.content.place), source=source, **values)

    def facts(self) -> list[str]:
        n = self.counts
        return [
            f"{self.path.name}: {plural(n['members'], 'member')} in {plural(len(self.tars), 'tar')}: "
            f"{n['in samples']:,} in {plural(n['samples'], 'sample')}, {n['in faults']:,} in "
            f"{plural(n['faults'], 'refused group')}, {n['ignored']:,} ignored"
        ]


def _values(record: dict, key: str) -> dict:
    """Return an Entry's fields of a sample's JSON; a sample without an id gets the group's key."""
    values = {
        name: record[name] for name in ENTRY_FIELDS if record.get(name) is not None and name not in _NOT_TAKEN
    }
    for name in NAMES:
        if name in values:
            values[name] = as_name(values[name])
    if isinstance(values.get("duration"), str) and (seconds := number(values["duration"])) is not None:
        values["duration"] = seconds
    if values.get("id") in (None, ""):
        values["id"] = key
    return values


def _stands_alone(group: Group[TarMember]) -> bool:
    """Whether a group without audio need not wait for any."""
    member = group.one("json")
    return member is not None and member.content.text is not None and stands_alone(member.content.text)
