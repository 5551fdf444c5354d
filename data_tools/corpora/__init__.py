"""Readers, one small class a format, found by name: `librispeech:/data/LibriSpeech,subset=train-clean-100`.

A reader takes a path and options and yields entries (metadata alone, no audio is opened) and faults (lines that are none),
one by one, always in the same order, in memory that does not grow with the corpus.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from core.console import OneLine


class CorpusError(OneLine, ValueError):
    """A corpus that cannot be read as told: one line, before anything is packed."""


@dataclass(slots=True)
class Entry:
    """One sample as its corpus describes it, before any audio is opened. Seconds throughout.

    `audio` is an absolute path or one of the forms of data_tools/sources.py; None for text alone. With an `offset` (0
    included) the stretch [offset, offset + duration) is taken; without one the whole clip is, and `duration` is only what
    planning goes by. `group` names what is costly to open more than once: entries of one group stay together in the shuffle.
    """

    id: str
    audio: str | None = None
    text: str | None = None
    corpus: str = ""
    task: str | None = None
    lang: str | None = None
    target_lang: str | None = None  # a translation's, by the name that an instruction has for it: German
    offset: float | None = None
    duration: float | None = None
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
    size: int | None = None  # bytes of the clip in the corpus, about, where asking the file system would not tell

    def to_json(self) -> str:
        return _encode({name: value for name, value in zip(ENTRY_FIELDS, _values(self), strict=True) if value is not None})

    @classmethod
    def from_json(cls, line: str | bytes) -> Entry:
        return cls(**json.loads(line))


ENTRY_FIELDS = tuple(f.name for f in dataclasses.fields(Entry))
_values = attrgetter(*ENTRY_FIELDS)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # NaN is no JSON: shards refuse it too
_NUMBERS = ("offset", "duration", "size")
_TOO_MUCH = 1e12  # seconds or bytes: sums of larger ones are no numbers any more
_STRINGS = tuple(name for name in ENTRY_FIELDS if name not in (*_NUMBERS, "messages"))
_strings = attrgetter(*_STRINGS)


@dataclass(slots=True)
class Fault:
    """A line, row or clip that gives no sample: which, why (a fixed word that counts can be kept by), and the detail."""

    id: str
    reason: str
    detail: str = ""
    corpus: str = ""

    def to_json(self) -> str:
        return _encode(dataclasses.asdict(self))


def malformed(entry: Entry) -> Fault | None:
    """What is wrong with an entry's types, whatever a reader took them from; None for a sound one."""

    def fault(what: str) -> Fault:
        name, corpus = (str(value).encode("utf-8", "replace").decode() for value in (entry.id, entry.corpus))
        return Fault(name, "bad_row", what, corpus)

    for name, value in zip(_STRINGS, _strings(entry), strict=True):
        if value is not None and type(value) is not str:
            return fault(f"{name} is a {type(value).__name__}, not a string")
    for name in _NUMBERS:
        value = getattr(entry, name)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and 0 <= value < _TOO_MUCH):
            return fault(f"{name} is {value!r}, not a number from 0 on")
    if entry.messages is not None and not (isinstance(entry.messages, list) and all(map(_is_turn, entry.messages))):
        return fault('messages must be a list of {"role": ..., "content": ...}')
    if entry.audio is not None and "\0" in entry.audio:
        return fault("audio holds a null byte")
    try:
        entry.to_json().encode()
    except UnicodeEncodeError as error:
        return fault(f"not valid Unicode: {error.reason}")
    except ValueError as error:  # NaN or infinity somewhere inside messages
        return fault(str(error))
    return None


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


READERS = {
    "manifest": "manifest:Manifest",
    "table": "table:Table",
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
}
# Options of every reader: values for entries without.
_DEFAULTS = ("task", "lang", "target_lang", "prompt", "label", "speaker", "origin")
# Of these, readers of columns take a column's name, else the value of all entries.
_VALUES = ("target_lang", "prompt", "label", "speaker")


def path_of(specification: str) -> Path:
    """Of `NAME:PATH[,option=value...]`."""
    return Path(_split(specification)[1])


def _split(specification: str) -> tuple[str, str, list[str]]:
    """(name, path, options)"""
    name, _, rest = specification.partition(":")
    path, *pairs = re.split(r",(?=\w+=)", rest)
    return name, path, pairs


class Corpus:
    """A reader by name, its options checked, and the values that hold for all its entries."""

    def __init__(self, specification: str):
        """`NAME:PATH[,option=value...]`. Errors: CorpusError for an unknown name, option or path."""
        name, path, pairs = _split(specification)
        if not path or name not in READERS:
            near = difflib.get_close_matches(name, READERS, n=1)
            raise CorpusError(
                f"corpus '{specification}' must be NAME:PATH[,option=value...], NAME one of {', '.join(READERS)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        options = dict(pair.split("=", 1) for pair in pairs)
        module, class_name = READERS[name].split(":")
        reader = getattr(importlib.import_module(f"data_tools.corpora.{module}"), class_name)
        known = [p for p in inspect.signature(reader).parameters if p != "path"]
        given_name = options.pop("corpus", None)
        self.defaults = {key: options.pop(key) for key in _DEFAULTS if key in options and key not in known}
        for option in options:
            if option not in known:
                everything = [*known, "corpus", *_DEFAULTS]
                near = difflib.get_close_matches(option, everything, n=1, cutoff=0.0)[0]
                raise CorpusError(
                    f"corpus '{specification}': unknown option '{option}', did you mean '{near}'? ({name} takes "
                    f"{', '.join(everything)})"
                )
        if not Path(path).exists():
            raise CorpusError(f"corpus '{specification}': {path} does not exist")
        try:
            self.reader: Iterable[Entry | Fault] = reader(Path(path).absolute(), **options)
        except TypeError as error:
            raise CorpusError(f"corpus '{specification}': {str(error).partition(') ')[2] or error}") from None
        # A reader may know a better name than the path's: one that tells apart corpora whose ids are the same.
        self.name: str = given_name or getattr(self.reader, "corpus", None) or Path(path.rstrip("/")).name.partition(".")[0]

    def __iter__(self) -> Iterator[Entry | Fault]:
        for item in self.reader:
            item.corpus = item.corpus or self.name
            if isinstance(item, Entry):
                for key, value in self.defaults.items():
                    if getattr(item, key) is None:
                        setattr(item, key, value)
                item = malformed(item) or item
            yield item


def is_held_out(name: str) -> bool:
    """Whether a part of a corpus bears the name of one that is kept for tests: no corpus gives those unasked."""
    return re.match("(dev|test|valid|validation)([^a-z]|$)", name.lower()) is not None


def number(text: str | float | None) -> float | None:
    """A number out of a table's cell; None where there is none."""
    try:
        return float(text) if text not in (None, "") else None
    except (ValueError, TypeError):  # TypeError: what JSON has beside strings and numbers
        return None


def columns_and_values(named: dict[str, str], columns: Iterable[str], where: Path) -> tuple[dict[str, str], dict[str, str]]:
    """({field: column}, {field: value for every entry}) of a reader's options, for a file with these columns.

    Errors: CorpusError for what is no column and cannot be a value, or is nearly a column's name.
    """
    columns = [column for column in columns if isinstance(column, str)]
    by_lower = {column.lower(): column for column in columns}
    values = {field: value for field, value in named.items() if value not in columns}
    for field, value in values.items():
        near = difflib.get_close_matches(value.lower(), by_lower, n=1, cutoff=0.8)  # a slip of the pen would label every entry
        if near or field not in _VALUES:
            hint = f", did you mean '{by_lower[near[0]]}'?" if near else ":"
            raise CorpusError(f"{where} has no column '{value}'{hint} its columns are {', '.join(columns)}")
    return {field: column for field, column in named.items() if field not in values}, values


def check_same_meaning(before: tuple[dict, dict], now: tuple[dict, dict], where: Path | str) -> None:
    """Errors: CorpusError where an option names a column of one file or line, and would be a value for another."""
    for field, value in before[1].items() ^ now[1].items():
        raise CorpusError(f"{where}: '{value}' is a column in some places and none in others: {field}={value} is ambiguous")
