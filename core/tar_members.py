"""Which members of a tar make up one sample: the rule for packing foreign shards and for streaming them.

A member's name is STEM.EXTENSION, cut at the last dot, since ids hold dots (`sp0.9-utt1.wav`). The extension
is its kind: audio, JSON or a text. Audio and JSON or text of one stem are a sample. Last parts of a stem
that only say what a member is (`a.audio.wav`, `a.meta.json`) are taken off where a member has no partner
otherwise. Nothing is guessed: several audio members make a sample unusable, and members of other kinds are
counted by their extension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from core.audio import EXTENSIONS

TEXT_EXTENSIONS = frozenset("txt text transcript trans trn lab".split())
JSON_EXTENSION = "json"
MAX_TEXT_BYTES = 16 << 20  # of a JSON or text member: a sample's is a few kB
TEXT_KEYS = ("text", "sentence", "transcript", "transcription")  # of other people's JSON

# What a member is: `a.left.wav`, `a.16k.wav`. Anything else behind a dot is a part of the id:
# `sp0.9-utt1.wav`.
_ROLE = re.compile(r"[A-Za-z][A-Za-z_]*|\d+k(hz)?", re.IGNORECASE)
_AUDIO_ROLES = frozenset("audio speech sound wav wave clip voice mono source input flac mp3 ogg opus".split())
_TEXT_ROLES = frozenset(
    "meta metadata info json text txt transcript transcription label labels annotation sentence".split()
)

Kind = Literal["audio", "json", "text"]
Content = TypeVar("Content")


def split_name(name: str) -> tuple[str, str]:
    """Return (stem with its folders, extension in lower case)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    if not dot or not stem:
        return name, ""
    return folder + slash + stem, extension.lower()


def kind_of_member(name: str) -> Kind | None:
    """Return what a member is; None where its extension says nothing."""
    extension = split_name(name)[1]
    if extension in EXTENSIONS:
        return "audio"
    return "json" if extension == JSON_EXTENSION else "text" if extension in TEXT_EXTENSIONS else None


def ignored_as(name: str) -> str | None:
    """Return the heading under which a member is counted that belongs to no sample; None for audio, JSON and
    text."""
    parts = name.split("/")
    if (
        parts[-1].startswith("._")
        or "__MACOSX" in parts
        or parts[-1] in (".DS_Store", "Thumbs.db", "desktop.ini")
    ):
        return "files of an operating system (._*, .DS_Store)"
    if kind_of_member(name):
        return None
    extension = split_name(name)[1]
    return (
        f".{extension} members" if extension and len(extension) <= 12 else "members without a known extension"
    )


def family_of(name: str) -> str:
    """Return the name that members share which may belong together: the stem, without last parts that only
    say what it is."""
    stem = split_name(name)[0]
    return _parents(stem)[-1] if _parents(stem) else stem


def _parents(stem: str) -> list[str]:
    """Return the stem without its last role, without its last two, and so on."""
    folder, slash, base = stem.rpartition("/")
    parents: list[str] = []
    while True:
        base, dot, last = base.rpartition(".")
        if not dot or not base or not _ROLE.fullmatch(last):
            return parents
        parents.append(folder + slash + base)


@dataclass
class Member(Generic[Content]):
    """A member that may belong to a sample. content: what the caller needs to read it; size: bytes that it
    holds in memory.

    A member without a kind is part of no sample, and is kept beside its neighbours so that it can be named: a
    link, a device, or a file with an extension that says nothing.
    """

    name: str
    content: Content
    size: int = 0
    is_file: bool = True

    @property
    def kind(self) -> Kind | None:
        return kind_of_member(self.name) if self.is_file else None


@dataclass
class Group(Generic[Content]):
    """Members of one sample, under its key."""

    key: str
    members: list[Member[Content]] = field(default_factory=list)

    def of(self, kind: Kind | None) -> list[Member[Content]]:
        return [member for member in self.members if member.kind == kind]

    def one(self, kind: Kind) -> Member[Content] | None:
        return next(iter(self.of(kind)), None)

    @property
    def is_complete(self) -> bool:
        kinds = {member.kind for member in self.members}
        return "audio" in kinds and bool(kinds & {"json", "text"})

    @property
    def problem(self) -> str | None:
        """Return why the members make no sample; None where they may."""
        names_of_kinds: dict[Kind, str] = {"audio": "audio", "json": "JSON", "text": "text"}
        for kind, what in names_of_kinds.items():
            if len(members := self.of(kind)) > 1:
                names = ", ".join(member.name for member in members)
                return f"several {what} members ({names}): which one is meant is not known"
        return None

    @property
    def without_audio(self) -> str:
        """Return a report's words for a missing audio: which members there are instead."""
        strange = [
            member.name + ("" if member.is_file else " is a link or device") for member in self.of(None)
        ]
        return "no audio member" + (f" (not understood: {', '.join(strange)})" if strange else "")


def group_family(members: Iterable[Member[Content]]) -> list[Group[Content]]:
    """Return the groups of one family's members, in the order of their first members.

    Audio and JSON or text of one stem belong together. Members without such a partner go to the nearest
    shorter stem that lacks one too (`a.audio.wav` to `a.json`); where there is none, roles pair them
    (`a.audio.wav` and `a.meta.json`).
    """
    groups: dict[str, Group[Content]] = {}
    for member in members:
        stem = split_name(member.name)[0]
        groups.setdefault(stem, Group(stem)).members.append(member)
    lone = {stem for stem, group in groups.items() if not group.is_complete}
    for stem in sorted(lone, key=lambda stem: -stem.count(".")) if len(lone) > 1 else ():
        parent = next((parent for parent in _parents(stem) if parent in lone), None)
        if parent is not None and not groups[stem].is_complete:
            groups[parent].members += groups.pop(stem).members
    siblings: dict[str, list[Group[Content]]] = {}
    for group in groups.values():
        if not group.is_complete and _parents(group.key) and _has_known_role(group):
            siblings.setdefault(_parents(group.key)[0], []).append(group)
    for parent, family in siblings.items():
        if len(family) > 1 and parent not in groups:
            groups[family[0].key] = Group(parent, [member for group in family for member in group.members])
            for group in family[1:]:
                del groups[group.key]
    return list(groups.values())


def _has_known_role(group: Group) -> bool:
    last = group.key.rpartition(".")[2].lower()
    return all(last in (_AUDIO_ROLES if member.kind == "audio" else _TEXT_ROLES) for member in group.members)


class Grouper(Generic[Content]):
    """Makes groups of members as they come. Neighbours are grouped at once; members without a partner wait
    for one.

    stands_alone: whether a group without audio is whole, so that it need not wait. most_bytes: of the
    contents that wait; past it the oldest is given up, and comes as an incomplete group.
    """

    def __init__(self, stands_alone: Callable[[Group[Content]], bool], most_bytes: float = float("inf")):
        self._stands_alone, self._most = stands_alone, most_bytes
        self._family = ""  # of the members in _run
        self._run: list[Member[Content]] = []
        self._waiting: dict[str, list[Member[Content]]] = {}
        self._bytes = self._run_bytes = 0

    def add(self, member: Member[Content]) -> Iterator[Group[Content]]:
        """Groups that are whole now."""
        family = family_of(member.name)
        if family != self._family or self._run_bytes > self._most:
            yield from self._close_run()
            self._family = family
        self._run.append(member)
        self._run_bytes += member.size

    def end(self) -> Iterator[Group[Content]]:
        """All groups that are left, at the end of the tar."""
        yield from self._close_run()
        for family in list(self._waiting):
            yield from self._give_up(family)

    def _close_run(self) -> Iterator[Group[Content]]:
        if not self._run:
            return
        waited = self._waiting.pop(self._family, [])
        self._bytes -= sum(member.size for member in waited)
        members, self._run, self._run_bytes = waited + self._run, [], 0
        waiting = []
        for group in group_family(members):
            if group.is_complete or group.problem or not group.of("audio") and self._stands_alone(group):
                yield group
            else:
                waiting += group.members
        if waiting:
            self._waiting[self._family] = waiting
            self._bytes += sum(member.size for member in waiting)
        while self._bytes > self._most:
            yield from self._give_up(next(iter(self._waiting)))

    def _give_up(self, family: str) -> Iterator[Group[Content]]:
        members = self._waiting.pop(family)
        self._bytes -= sum(member.size for member in members)
        yield from (group for group in group_family(members) if any(member.kind for member in group.members))


def stands_alone(json_text: bytes) -> bool:
    """Whether a JSON member without audio is whole: a text sample's, or one whose fault can be reported at
    once."""
    try:
        record = read_record(json_text, None)
    except (ValueError, RecursionError):
        return True
    return "sample_rate" in record and record["sample_rate"] is None or record.get("task") == "text"


def is_text_sample(record: dict) -> bool:
    """Whether a sample's JSON is that of a sample that never had audio."""
    if "sample_rate" in record and record["sample_rate"] is None or record.get("task") == "text":
        return True
    messages = record.get("messages")
    answered = bool(messages or record.get("prompt") and record.get("response"))
    names_audio = record.get("duration") or "<audio_patch>" in str(messages)
    return answered and record.get("task") in (None, "chat") and not names_audio


def read_record(json_text: bytes | None, text: bytes | None) -> dict:
    """Return a sample's JSON object, its transcript under `text`: its own, that of the text member, or
    another usual key's.

    Errors: ValueError, RecursionError; UnicodeDecodeError for a text that is not UTF-8.
    """
    record = {}
    if json_text is not None:
        try:
            record = json.loads(json_text)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise ValueError(f"not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError("its JSON is not an object")
    if record.get("text") in (None, ""):
        other = (
            text.decode("utf-8-sig")
            if text is not None
            else next((record[k] for k in TEXT_KEYS if record.get(k)), None)
        )
        if other is not None:
            record["text"] = other
    return record
