"""Text for terminals and logs that comes, in part, from data: it must not carry control sequences, and an
error is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TextIO

# C0 and C1 controls but tab and line feed, and the marks that reverse the order of what is displayed.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_REASON = 300  # characters of a library's message that are quoted
_LONGEST_VALUE = 80


def printable(text: object) -> str:
    """Return `text` with control characters written as escapes (\\x1b), line breaks and tabs as they are."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def printable_line(text: object) -> str:
    """Return `text` on one line: line breaks and tabs are escapes, too."""
    text = printable(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def one_line(error: object) -> str:
    """Return why something failed, in one printable line: the first line of an exception's message, or a
    sentence for exceptions whose message needs one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(_sentence(error, lines[0] if lines else ""))[:_LONGEST_REASON]


def _sentence(error: object, text: str) -> str:
    match error:
        case UnicodeDecodeError():
            byte = error.object[error.start : error.start + 1].hex()
            return f"not {error.encoding} (byte 0x{byte} at position {error.start})"
        case UnicodeEncodeError():
            return f"not valid Unicode ({error.reason})"
        case RecursionError():
            return "nested too deeply"
        case MemoryError():
            return "needs more memory than there is"
        case OverflowError():
            return f"a number out of range ({text or 'too large'})"
        case EOFError():
            return "ends early"
        case KeyError():
            return f"no {error.args[0]!r}" if error.args else "a key is missing"
        case OSError():
            reason = error.strerror or text
            return f"{error.filename}: {reason}" if error.filename and error.strerror else reason
        case TypeError() | AttributeError() | IndexError():
            return f"a value of another kind than expected ({text})"
    return text or f"an unknown error ({type(error).__name__})"


def shown(value: object, longest: int = _LONGEST_VALUE) -> str:
    """Return a value as YAML writes it on one line, shortened: null, true, 'text', [1, 2], {key: value}."""
    text = printable_line(_in_yaml(value))
    return text if len(text) < longest else f"{text[: longest - 4]} ..."


def _in_yaml(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'"
        case Mapping():
            return f"{{{', '.join(f'{key}: {_in_yaml(inner)}' for key, inner in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_in_yaml, value))}]"
    return str(value)


class OneLine:
    """Mixin for exceptions that are shown to users: one printable line, whatever data is quoted in it."""

    def __str__(self) -> str:
        return " ".join(printable(super().__str__()).splitlines())


def print_text(*values: object, sep: str = " ", file: TextIO | None = None, flush: bool = False) -> None:
    """`print`, made printable."""
    print(printable(sep.join(map(str, values))), file=file, flush=flush)


def print_error(*values: object) -> None:
    """Print one line on standard error, whatever line breaks the values hold."""
    print(" ".join(printable(" ".join(map(str, values))).splitlines()), file=sys.stderr)


def plural(count: int, noun: str) -> str:
    """Return a count and its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a length of time with three digits or so and its unit: 4.2 s, 12.5 min, 3.40 h, 1,250 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.2f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"
