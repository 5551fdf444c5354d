"""What columns and keys of other people's files mean: their usual names, and the times among them that must
not be left out."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.near_names import did_you_mean, near_names
from data_tools.text_files import CorpusError

# Names under which files have a field, the usual ones first.
USUAL = {
    "audio": ("audio", "path", "file_name", "filename", "file", "audio_filepath", "audio_path", "audio_file", "wav", "wav_path",  # noqa: E501
              "filepath", "file_path", "clip", "recording_path"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription", "raw_text", "utterance",  # noqa: E501
             "transcript_text", "words", "txt"),
    "id": ("id", "utt_id", "uttid", "utterance_id", "segment_id", "sid", "key", "uid"),
    "speaker": ("speaker", "speaker_id", "spk_id", "spk", "client_id", "spkid"),
    "duration": ("duration", "seconds", "dur", "length", "duration_seconds"),
    "label": ("label", "emotion", "class", "category", "event"),
}  # fmt: skip
# Of these options, readers of columns take a column's name, else the value of all entries.
VALUES = ("target_lang", "prompt", "label", "speaker")

_PART = r"(?:(?:seg(?:ment)?|audio|clip|utt(?:erance)?|time|ts|t|sample|frame)s?)?"
_UNIT = r"(?:(?:time)?(?:stamp)?s?(?:in)?(?:s|sec|secs|seconds?|ms|msecs?|millis(?:econds)?|samples?|frames?|pos)?)"  # noqa: E501
_START = re.compile(rf"{_PART}(?:start|begin|onset|from|offset){_UNIT}|t0|xmin|tmin")
_END = re.compile(rf"{_PART}(?:end|stop|finish|to|until){_UNIT}|t1|xmax|tmax")
_LENGTH = re.compile(
    r"(?:length|len|dur|duration|n|num)(?:in)?(?:s|secs?|seconds|ms|msecs?|milliseconds|samples|frames)?|seconds|secs|samples|frames"
)
_TIME = re.compile(r"\s*[-+]?\d+(?:[.,:]\d+)*\s*(?:s|ms|sec)?\s*", re.IGNORECASE)


def number(text: str | float | None) -> float | None:
    """Return the number in a table's cell; None where there is none."""
    try:
        return float(text) if text not in (None, "") and not isinstance(text, bool) else None
    except (ValueError, TypeError, OverflowError):  # TypeError: what JSON has beside strings and numbers
        return None


@lru_cache(maxsize=4096)
def _meaning(name: str) -> str | None:
    """start, end, length or None: which time the name of a column or key means."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for meaning, pattern in (("start", _START), ("end", _END), ("length", _LENGTH)):
        if pattern.fullmatch(plain):
            return meaning
    return None


def time_columns(columns: Iterable[str], used: Collection[str]) -> dict[str, str]:
    """Return {column: start | end | length} of those that are named like times and are not used."""
    return {
        name: meaning
        for name in columns
        if isinstance(name, str) and name not in used and (meaning := _meaning(name))
    }


def unused_times(
    row: Mapping[str, Any], times: Mapping[str, str], has_offset: bool, has_length: bool
) -> list[str]:
    """Return the columns of `times` without which the row would be another stretch of its recording than it
    says.

    A start or end always; a length only where a stretch begins somewhere and has none.
    """
    meanings = ("start", "end", "length") if has_offset and not has_length else ("start", "end")
    return [name for name, meaning in times.items() if meaning in meanings and _is_time(row.get(name))]


def _is_time(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_TIME.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def proposal(
    columns: Collection[str], fields: Collection[str] = ("audio", "text", "id", "speaker", "duration")
) -> dict[str, str]:
    """Return {field: column} as the columns' names suggest, for fields that have no column of their own
    name."""
    by_lower = {str(column).lower(): column for column in columns}
    columns_of_fields: dict[str, str] = {}
    for field in fields:
        if field not in by_lower:
            name = next((name for name in USUAL[field] if name in by_lower), None)
            if name is not None:
                columns_of_fields[field] = by_lower[name]
    return columns_of_fields


def as_options(columns: Mapping[str, str]) -> str:
    """Return {field: column} as a command line has it: audio=path,text=sentence."""
    return ",".join(f"{field}={column}" for field, column in columns.items())


def columns_and_values(
    fields: dict[str, str], columns: Iterable[str], where: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """({field: column}, {field: value for every entry}) of a reader's options, for a file with these columns.

    Errors: CorpusError for what is no column and cannot be a value, or is nearly a column's name.
    """
    columns = [column for column in columns if isinstance(column, str)]
    by_lower = {column.lower(): column for column in columns}
    values = {field: value for field, value in fields.items() if value not in columns}
    for field, value in values.items():
        near = near_names(value.lower(), by_lower, cutoff=0.8)  # a misspelt column would label every entry
        if near or field not in VALUES:
            hint = f", {did_you_mean([by_lower[one] for one in near])}" if near else ":"
            raise CorpusError(f"{where} has no column '{value}'{hint} its columns are {', '.join(columns)}")
    return {field: column for field, column in fields.items() if field not in values}, values


def check_same_meaning(before: tuple[dict, dict], now: tuple[dict, dict], where: Path | str) -> None:
    """Errors: CorpusError where an option names a column of one file or line, and would be a value for
    another."""
    for field, value in before[1].items() ^ now[1].items():
        raise CorpusError(
            f"{where}: '{value}' is a column in some places and none in others: {field}={value} is ambiguous"
        )
