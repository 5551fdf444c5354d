"""Readers, one small class a format, found by name: `librispeech:/data/LibriSpeech,subset=train-clean-100`.

A reader takes a path and options and yields entries (metadata alone, no audio is opened), faults (lines, rows
and members that give no sample) and what it ignored, one by one, always in the same order, in memory that
does not grow with the corpus.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from core.audio_limits import AudioError
from core.console import one_line
from core.near_names import did_you_mean, near_names
from core.unicode_paths import find_path
from data_tools.text_files import CorpusError, Problem, check_encoding

MAX_SECONDS = 1e8  # three years: offsets and durations above it are no times
_MAX_SIZE = 1 << 53


class Entry(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One sample as its corpus describes it, before any audio is opened. Seconds throughout.

    `audio` is an absolute path or one of the forms of data_tools/sources.py; None for text alone. With an
    `offset` (0 included) the stretch [offset, offset + duration) is taken; without one the whole clip is, and
    `duration` is only what planning goes by. `group` names what is costly to open more than once: entries of
    one group stay together in the shuffle. `source` is the part of the corpus, a tar for example, in which
    ids are unique; it is not written to shards.
    """

    id: str
    audio: str | None = None
    text: str | None = None
    corpus: str = ""
    task: str | None = None
    lang: str | None = None
    target_lang: str | None = None  # a translation's, by the name that an instruction has for it: German
    offset: int | float | None = None
    duration: int | float | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    speaker: str | None = None
    messages: list | None = None
    origin: str | None = None
    recording: str | None = None  # what the clip was cut from, where that matters for splits
    group: str | None = None
    hypothesis: str | None = None  # what a recogniser made of it
    sound_hash: str | None = None  # of the audio's samples, equal for duplicates
    size: int | float | None = (
        None  # bytes of the clip in the corpus, about, where the file system does not give them
    )
    source: str | None = msgspec.field(default=None, name="(source)")

    def fields(self) -> dict:
        """What is known of it, by name, without its source."""
        return {
            name: value for name, value in zip(ENTRY_FIELDS, _values(self), strict=True) if value is not None
        }

    def to_json(self) -> str:
        return _encode(self.fields())

    @classmethod
    def from_json(cls, line: str | bytes) -> Entry:
        return decode_entry(line)


#: An entry from one line of JSON. Errors: ValueError for other keys and other types than an entry has.
decode_entry = msgspec.json.Decoder(Entry).decode
ENTRY_FIELDS = tuple(name for name in Entry.__struct_fields__ if name != "source")
_values = attrgetter(*ENTRY_FIELDS)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # NaN is no JSON: shards refuse it too
_NUMBERS = ("offset", "duration", "size")
_STRINGS = tuple(name for name in ENTRY_FIELDS if name not in (*_NUMBERS, "messages"))
_strings, _numbers = attrgetter(*_STRINGS), attrgetter(*_NUMBERS)
_TEXT_KINDS = frozenset((str, type(None)))
NAMES = ("id", "speaker", "recording")  # fields that corpora number
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(slots=True)
class Rejection:
    """A line, row, member or clip that gives no sample: which, why (a fixed word that counts can be kept by),
    and the detail."""

    id: str
    reason: str
    detail: str = ""
    corpus: str = ""

    def to_json(self) -> str:
        return _encode(dataclasses.asdict(self))


@dataclass(slots=True)
class Ignored:
    """What a reader left aside because it is no sample and was not meant to be one: counted under a
    heading."""

    what: str
    count: int = 1
    corpus: str = ""


Item = Entry | Rejection | Ignored


def fault_of(error: Exception, sample_id: str, corpus: str = "", reason: str = "bad_row") -> Rejection:
    """Turn whatever one sample raised into its fault. An error may bring its own reason (ClipError)."""
    if isinstance(error, UnicodeError):
        reason = "encoding"
    elif isinstance(error, MemoryError):
        reason = "too_large"
    if isinstance(error, AudioError):
        reason = error.reason
    return Rejection(_valid(sample_id), reason, _valid(one_line(error)), corpus)


def _valid(text: Any) -> str:
    return str(text).encode("utf-8", "replace").decode()


def kind_of_value(value: Any) -> str:
    """Return what a JSON value is, in words."""
    return "NaN" if value != value else _KINDS.get(type(value), "something else")


def as_name(value: Any) -> Any:
    """Return an id or a speaker as text where a corpus numbers them; other kinds of value as they are."""
    if type(value) is int or type(value) is float and abs(value) < 2**53:
        return str(value)
    return value


def malformed(entry: Entry) -> Rejection | None:
    """What is wrong with an entry's types, whatever a reader took them from; None for a sound one."""

    def fault(what: str, reason: str = "bad_row") -> Rejection:
        return Rejection(_valid(entry.id), reason, what, _valid(entry.corpus))

    strings = _strings(entry)
    if not _TEXT_KINDS.issuperset(map(type, strings)):
        name, value = next(
            (n, v) for n, v in zip(_STRINGS, strings, strict=True) if type(v) not in _TEXT_KINDS
        )
        return fault(f"{name} is {kind_of_value(value)}, not text")
    if not "".join(filter(None, strings)).isascii() and (problem := _damaged(strings)):
        return fault(problem, "encoding")
    for name, value in zip(_NUMBERS, _numbers(entry), strict=True):
        if value is not None and not (
            type(value) in (int, float) and 0 <= value <= (_MAX_SIZE if name == "size" else MAX_SECONDS)
        ):
            value_text = (
                f"'{value}'"
                if isinstance(value, str)
                else value
                if type(value) in (int, float)
                else kind_of_value(value)
            )
            return fault(
                f"{name} is {value_text}, not a number of seconds from 0 on"
                if name != "size"
                else f"size is {value_text}"
            )
    if entry.audio is not None and "\0" in entry.audio:
        return fault("audio holds a null byte")
    if entry.messages is not None:
        if not (isinstance(entry.messages, list) and all(map(_is_turn, entry.messages))):
            return fault('messages must be a list of {"role": ..., "content": ...}')
        try:
            _encode(entry.messages).encode()
        except UnicodeEncodeError as error:
            return fault(f"messages are not valid Unicode ({error.reason})", "encoding")
        except ValueError as error:  # NaN or infinity somewhere inside
            return fault(f"messages: {error}")
    return None


def _damaged(strings: tuple) -> str | None:
    """What is wrong with the characters of an entry's texts."""
    for name, value in zip(_STRINGS, strings, strict=True):
        if value is None or value.isascii():
            continue
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{name} is not valid Unicode ({error.reason})"
        if "\ufffd" in value and name in ("text", "prompt", "response", "label"):
            return f"{name} holds U+FFFD, the sign for characters that a wrong conversion lost: {value[:60]}"
    return None


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    )


class Reader:
    """What readers share: one record costs at most itself, whatever is wrong with it.

    A subclass gives `records` ((where, record) of each line, row or member; a Problem, Rejection or Ignored
    in place of a record is reported as it is) and `sample`, which makes an item, or a list of items, of one
    record. `encoding` is that of its text files.
    """

    encoding: str | None = None
    broken: ClassVar[str] = "bad_row"  # the reason of a record that `sample` cannot use
    has_global_ids: ClassVar[bool] = False  # the same id is the same clip, in whatever folder it is

    def records(self) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def sample(self, record: Any, where: str) -> Item | list[Item]:
        raise NotImplementedError

    def facts(self) -> list[str]:
        """Lines for the report of a dry run, known after the records were read: which columns there are, for
        example."""
        return []

    def __iter__(self) -> Iterator[Item]:
        for where, record in self.records():
            if isinstance(record, Problem):
                yield Rejection(where, record.reason, record.detail)
                continue
            if isinstance(record, Rejection | Ignored):
                yield record
                continue
            try:
                item = self.sample(record, where)
            except CorpusError:
                raise
            except Exception as error:  # whatever a record holds that no reader expects
                item = fault_of(error, where, reason=self.broken)
            if isinstance(item, list):
                yield from item
            else:
                yield item


READERS = {
    "manifest": "manifest:Manifest",
    "table": "table:Table",
    "folder": "folder:Folder",
    "librispeech": "librispeech:LibriSpeech",
    "mls": "librispeech:MLS",
    "commonvoice": "commonvoice:CommonVoice",
    "covost": "commonvoice:CoVoST",
    "gigaspeech": "gigaspeech:GigaSpeech",
    "wenetspeech": "gigaspeech:WenetSpeech",
    "fleurs": "fleurs:Fleurs",
    "kaldi": "kaldi:Kaldi",
    "nemo": "nemo:Nemo",
    "lhotse": "lhotse:Lhotse",
    "huggingface": "huggingface:HuggingFace",
    "shards": "tars:Shards",
    "audioset": "sounds:AudioSet",
    "vggsound": "sounds:VGGSound",
    "esc50": "sounds:ESC50",
    "nsynth": "music:NSynth",
    "gtzan": "music:GTZAN",
    "musiccaps": "music:MusicCaps",
    "jamendo": "music:Jamendo",
}
# Options of every reader: values for entries without.
_DEFAULTS = ("task", "lang", "target_lang", "prompt", "label", "speaker", "origin")
_COMMON = ("corpus", "encoding", *_DEFAULTS)


def path_of(specification: str) -> Path:
    """Of `NAME:PATH[,option=value...]`."""
    return Path(_split(specification)[1])


def _split(specification: str) -> tuple[str, str, list[str]]:
    """(name, path, options). A path that exists as it stands has no options, whatever signs it holds."""
    name, _, rest = specification.partition(":")
    if os.path.exists(rest):
        return name, rest, []
    path, *pairs = re.split(r",(?=\w+=)", rest)
    return name, path, pairs


class Corpus:
    """A reader by name, its options checked, and the values that hold for all its entries.

    label: a name that distinguishes it from the other corpora of a command; ids get it in front where
    `qualify` asks for it.
    """

    def __init__(self, specification: str):
        """`NAME:PATH[,option=value...]`. Errors: CorpusError for an unknown name, option or path."""
        name, path, pairs = _split(specification)
        if not path or name not in READERS:
            near = near_names(name, READERS)
            raise CorpusError(
                f"corpus '{specification}' must be NAME:PATH[,option=value...], NAME one of "
                f"{', '.join(READERS)}" + (f"; {did_you_mean(near)}" if near else "")
            )
        options = dict(pair.split("=", 1) for pair in pairs)
        module, class_name = READERS[name].split(":")
        reader = getattr(importlib.import_module(f"data_tools.corpora.{module}"), class_name)
        parameters = [p for p in inspect.signature(reader).parameters if p != "path"]
        given_name, encoding = options.pop("corpus", None), options.pop("encoding", None)
        check_encoding(encoding)
        self.defaults = {
            key: options.pop(key) for key in _DEFAULTS if key in options and key not in parameters
        }
        for option in options:
            if option not in parameters:
                everything = list(dict.fromkeys([*parameters, *_COMMON]))
                nearest = did_you_mean(near_names(option, everything))
                raise CorpusError(
                    f"corpus '{specification}': unknown option '{option}'"
                    f"{f', {nearest}' if nearest else ''} ({name} takes {', '.join(everything)})"
                )
        existing_path = find_path(path)
        if existing_path is None:
            raise CorpusError(f"corpus '{specification}': {path} does not exist")
        self.specification, self.path, self.format = specification, Path(existing_path).absolute(), name
        try:
            self.reader: Reader = reader(self.path, **options)
        except TypeError as error:
            raise CorpusError(f"corpus '{specification}': {str(error).partition(') ')[2] or error}") from None
        self.reader.encoding = encoding
        # A reader may know a better name than the path's: one that distinguishes corpora with the
        # same ids.
        self.name: str = (
            given_name
            or getattr(self.reader, "corpus", None)
            or Path(path.rstrip("/")).name.partition(".")[0]
        )
        self.label = self.name
        self._by_corpus = self._by_source = False

    def qualify(self, by_corpus: bool, by_source: bool) -> bool:
        """Put the corpus' label, its parts' names or both in front of ids from now on. Returns whether that
        is a change."""
        before = self._by_corpus, self._by_source
        self._by_corpus, self._by_source = self._by_corpus or by_corpus, self._by_source or by_source
        return before != (self._by_corpus, self._by_source)

    def qualified(self) -> list[str]:
        """A line about what is put in front of ids; none where nothing is."""
        form = "/".join([self.label] * self._by_corpus + ["PART"] * self._by_source)
        return (
            [f"ids of {self.name} are those of other clips too: they are written as {form}/ID"]
            if form
            else []
        )

    def __iter__(self) -> Iterator[Item]:
        for item in self.reader:
            item.corpus = item.corpus or self.name
            if type(item) is Rejection:
                item.id, item.detail, item.corpus = _valid(item.id), _valid(item.detail), _valid(item.corpus)
            elif type(item) is Entry:
                for key, value in self.defaults.items():
                    if getattr(item, key) is None:
                        setattr(item, key, value)
                item = malformed(item) or item
                if type(item) is Entry:
                    if self._by_source and item.source:
                        item.id = f"{item.source}/{item.id}"
                    if self._by_corpus:
                        item.id = f"{self.label}/{item.id}"
            yield item


def open_corpora(specifications: Iterable[str]) -> list[Corpus]:
    """Open corpora, with labels that tell apart those of one name: the parts of their paths that differ.
    Errors: CorpusError."""
    corpora = [Corpus(specification) for specification in specifications]
    for corpus in corpora:
        paths = {other.path.parts for other in corpora if other.name == corpus.name}
        if len(paths) == 1:
            continue
        length = next(
            n for n in range(1, 1 + max(map(len, paths))) if len({path[-n:] for path in paths}) == len(paths)
        )
        ends = [tuple(reversed(path[-length:])) for path in paths]
        mine = tuple(reversed(corpus.path.parts[-length:]))
        distinct_parts = [
            part for place, part in enumerate(mine) if any(end[place : place + 1] != (part,) for end in ends)
        ]
        corpus.label = "/".join(reversed(distinct_parts)).strip("/") or corpus.name
    return corpora


def open_apart(specifications: Iterable[str]) -> list[Corpus]:
    """open_corpora, and ids of corpora of one name told apart from the start: for manifests, where they end
    in one file."""
    corpora = open_corpora(specifications)
    for corpus in corpora:
        if corpus.label != corpus.name and not corpus.reader.has_global_ids:
            corpus.qualify(by_corpus=True, by_source=False)
    return corpora


def is_held_out(name: str) -> bool:
    """Whether a part of a corpus bears the name of one that is kept for tests: no corpus gives those
    unasked."""
    return re.match("(dev|test|valid|validation)([^a-z]|$)", name.lower()) is not None
