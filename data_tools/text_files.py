"""Text of corpora: lines, tables and JSON, compressed or not, in the encoding that they really have.

    open_bytes   a file, decompressed (gzip, bzip2, xz) by its first bytes, whatever its name
    lines        (line number, bytes in UTF-8 without a byte order mark)
    json_items   (number, value) of JSON lines or of the elements of a JSON array
    table_rows   (line number, {column: cell}) of a CSV or TSV

All are read one item at a time. An item that cannot be used comes as a `Problem` and costs nothing else. A
file that ends in the middle of its compressed data, or cannot be read, is a CorpusError: what is missing
is unknown.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from core.console import OneLine, one_line

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
_CHUNK = 1 << 20
_MAX_ELEMENT = 1 << 28  # characters of one element of a JSON array
_MAX_QUOTED_LINES = 100  # that one quoted cell may span
_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
_BOMS = {  # the longer ones first: that of UTF-16 is the beginning of that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BLANK = re.compile(r"[ \t\r\n]*")
_FILE_NAME = re.compile(r"\.\w{2,5}$")


def _after_blank(text: str, place: int) -> int:
    """Return the first place from `place` on that holds no white space."""
    return next(_BLANK.finditer(text, place)).end()


class CorpusError(OneLine, ValueError):
    """A corpus that cannot be read as described: one line, before anything is packed."""


@dataclass(slots=True)
class Problem:
    """An item that gives no sample: a fixed word that is counted, and one line of what is wrong."""

    reason: str
    detail: str


def existing(path: Path) -> Path:
    """Return the path, or the compressed file of that name where only that is there."""
    if path.exists():
        return path
    return next(
        (other for end in (".gz", ".bz2", ".xz") if (other := path.with_name(path.name + end)).exists()), path
    )


def bare_suffixes(path: Path) -> list[str]:
    """Return the suffixes of a file's name in lower case, without that of its compression."""
    return [suffix for suffix in map(str.lower, path.suffixes) if suffix not in (".gz", ".bz2", ".xz")]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors: CorpusError for whatever the file system or a decompressor raises."""
    try:
        yield
    except EOFError:
        raise CorpusError(f"{path} ends in the middle of its compressed data: copy it again") from None
    except (zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise CorpusError(f"{path} is damaged ({one_line(error)}): copy it again") from None
    except UnicodeError as error:
        raise CorpusError(
            f"{path} is {one_line(error)}: give its encoding (encoding=NAME), or convert it to UTF-8"
        ) from None
    except OSError as error:
        damaged = error.errno is None  # bz2 has no type of its own for damage
        what = f"is damaged ({error}): copy it again" if damaged else f"cannot be read: {error.strerror}"
        raise CorpusError(f"{path} {what}") from None


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading, decompressed. Errors: OSError, CorpusError for a compression that cannot be
    read."""
    file = open(path, "rb")  # noqa: SIM115  closed by the caller
    head = file.peek(8)[:8]
    if head.startswith(_ZSTD):
        file.close()
        raise CorpusError(f"{path} is compressed by zstd: decompress it first (zstd -d)")
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    return file if opener is None else io.BufferedReader(opener(file), _CHUNK)


def check_encoding(encoding: str | None) -> None:
    """Errors: CorpusError for a name that Python does not know."""
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        usual = "cp1252, latin-1, utf-16, gbk, shift_jis"
        raise CorpusError(f"encoding={encoding}: there is no such encoding; usual ones are {usual}") from None


def _form_of(file: io.BufferedReader, path: Path, encoding: str | None) -> tuple[int, str | None]:
    """(bytes of the mark at its beginning, encoding: None for plain UTF-8) of a file that is open at its
    beginning."""
    head = file.peek(64)[:64]
    mark, bom_encoding = next(
        ((len(bom), name) for bom, name in _BOMS.items() if head.startswith(bom)), (0, None)
    )
    if encoding is None and bom_encoding is None and b"\0" in head:
        raise CorpusError(
            f"{path} seems to be UTF-16 without a mark of its order: give encoding=utf-16-le (or -be)"
        )
    return mark, encoding or bom_encoding


def open_text(path: Path, encoding: str | None = None) -> IO[str]:
    """Open a file as text, line ends as they are. Bytes that are no UTF-8 come as lone surrogates: `damage`
    names them."""
    file = open_bytes(path)
    encoding = _form_of(file, path, encoding)[1] or "utf-8"
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return io.TextIOWrapper(file, encoding, errors, newline="")


def damage(text: str | bytes, encoding: str | None = None) -> Problem | None:
    """Return what is wrong with the encoding of a text as `open_text` or `lines` give it; None for a sound
    one."""
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        data.decode(encoding or "utf-8")
        return None
    except UnicodeEncodeError as error:
        return Problem("encoding", f"not valid Unicode ({error.reason})")
    except UnicodeDecodeError as error:
        begin, end = max(0, error.start - 15), error.start + 15
        if encoding is not None:
            return Problem("encoding", f"not {encoding} (byte 0x{data[error.start]:02x})")
        as_cp1252 = data[begin:end].decode("cp1252", "replace").strip()
        what = f"not UTF-8 (byte 0x{data[error.start]:02x}); as cp1252 it reads '{as_cp1252}'"
        return Problem(
            "encoding", f"{what}: give encoding=cp1252 if that is right, else its own, or convert the file"
        )


def lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, bytes | Problem]]:
    """(number, line in UTF-8 with its line end) of each line; nothing is decoded where a file is UTF-8
    already."""
    with reading(path), open_bytes(path) as file:
        mark, encoding = _form_of(file, path, encoding)
        if encoding and encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
            for place, text in enumerate(io.TextIOWrapper(file, encoding, newline="\n"), 1):
                yield place, text.encode("utf-8", "surrogatepass")
            return
        file.read(mark)
        if encoding is None or encoding == "utf-8-sig":
            yield from enumerate(file, 1)
            return
        for place, line in enumerate(file, 1):
            yield place, damage(line, encoding) or line.decode(encoding).encode()


def text_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str | Problem]]:
    """(number, line without its line end) of each line."""
    for place, line in lines(path, encoding):
        if isinstance(line, Problem):
            yield place, line
            continue
        try:
            yield place, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield place, damage(line) or Problem("encoding", str(error))


# --- JSON ---------------------------------------------------------------------------------------------------


def json_items(
    path: Path, encoding: str | None = None, decode: Callable[[bytes], Any] = msgspec.json.decode
) -> Iterator[tuple[int, Any | Problem]]:
    """(number, value) of each line of a JSON Lines file, or of each element of a file that is one JSON array.

    decode: what is tried first on a line; where it raises ValueError, the value is what json makes of the
    line.
    """
    with reading(path), open_text(path, encoding) as file:
        head = file.read(_CHUNK).lstrip()
    if head.startswith("[") and not _is_line_of_its_own(head):
        with reading(path), open_text(path, encoding) as file:
            yield from enumerate(_elements(file, path, None), 1)
        return
    for place, line in lines(path, encoding):
        if isinstance(line, Problem):
            yield place, line
            continue
        try:
            value = decode(line)
        except (ValueError, RecursionError):
            if not line.strip():
                continue
            value = _slowly(line)
        yield place, value


def _is_line_of_its_own(head: str) -> bool:
    """Whether a file's first line is a whole JSON array, and others follow: lines that happen to hold lists,
    not one array."""
    first, newline, rest = head.partition("\n")
    try:
        return bool(newline and rest.strip()) and isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return False


def _slowly(line: bytes) -> Any | Problem:
    """Any JSON value; json also takes NaN and halves of characters, which is for the reader to judge."""
    try:
        return msgspec.json.decode(line)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return damage(line) or Problem("bad_json", "not valid Unicode")
    except (ValueError, RecursionError, MemoryError) as error:
        return Problem("bad_json", f"not valid JSON ({one_line(error)})")


def json_array(path: Path, key: str, encoding: str | None = None) -> Iterator[Any]:
    """The elements of the array under `key` of one large JSON object, one by one: the whole file is never in
    memory."""
    with reading(path), open_text(path, encoding) as file:
        yield from _elements(file, path, key)


def _elements(file: IO[str], path: Path, key: str | None) -> Iterator[Any]:
    """Elements of the array that the file is, or of the one under `key`."""
    decoder, buffer, number = json.JSONDecoder(), "", 0
    begin = re.compile(rf'"{re.escape(key)}"\s*:\s*\[' if key else r"\s*\[")
    while (match := begin.search(buffer)) is None:
        chunk = file.read(_CHUNK)
        if not chunk:
            raise CorpusError(f'{path} holds no "{key}" list')
        buffer = buffer[-len(key or "") - 64 :] + chunk
    name, place = f'its "{key}" list' if key else "its list", match.end()

    def more() -> bool:
        """Read on, as much again as there is: an element is decoded from its beginning a few times only."""
        nonlocal buffer, place
        chunk = file.read(max(_CHUNK, len(buffer) - place))
        buffer, place = buffer[place:] + chunk, 0
        return bool(chunk)

    while True:
        place = _after_blank(buffer, place)
        if number and buffer.startswith(",", place):
            place = _after_blank(buffer, place + 1)
        if buffer.startswith("]", place):
            break
        try:
            element, end = decoder.raw_decode(buffer, place)
            end = _after_blank(buffer, end)
            if not buffer.startswith((",", "]"), end):  # a number at the buffer's end may continue
                raise ValueError("no comma after it")
        except RecursionError:
            raise CorpusError(f"{path}: element {number + 1} of {name} is nested too deeply") from None
        except ValueError as error:
            if len(buffer) - place > _MAX_ELEMENT:
                raise CorpusError(
                    f"{path}: element {number + 1} of {name} is not valid JSON ({error})"
                ) from None
            if not more():
                where = f"{path} ends in the middle of {name}, or is no JSON after element {number}"
                raise CorpusError(f"{where}: copy it again") from None
            continue
        number, place = number + 1, end
        yield element
    if key is None and (buffer[place + 1 :].strip() or file.read(_CHUNK).strip()):
        raise CorpusError(
            f"{path} continues after the end of its list: make it one list, or one JSON object a line"
        )


# --- tables -------------------------------------------------------------------------------------------------

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}


def usual_delimiter(path: Path) -> str:
    return "," if ".csv" in bare_suffixes(path) else "\t"


class _Lines:
    """Lines for csv.reader, counted; those of one record can be given back, and are not without end."""

    def __init__(self, file: IO[str]):
        self._file = file
        self._given_back: deque[str] = deque()
        self.taken: list[str] = []
        self.place = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.taken) >= _MAX_QUOTED_LINES:
            raise StopIteration  # the record is read as if the file ended here
        line = self._given_back.popleft() if self._given_back else next(self._file)
        self.place += 1
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """All lines of the record but its first."""
        self.place -= len(self.taken) - 1
        self._given_back.extendleft(reversed(self.taken[1:]))


def table_rows(
    path: Path,
    delimiter: str | None = None,
    quoted: bool = True,
    header: list[str] | None = None,
    escape: str | None = None,
    encoding: str | None = None,
    required: Collection[str] = (),
) -> Iterator[tuple[int, dict[str, str] | Problem]]:
    """(number of the last line, {column: cell}) of each row of a CSV or TSV.

    header: column names of a file without a header line; escape: the sign before signs that would mean
    something else; required: columns without which the file is another one than it should be. A row
    with another number of cells than there are columns, and one that is not valid between quotes, is a
    Problem; what such quotes swallowed is read again. Errors: CorpusError for a file or header that cannot be
    used.
    """
    delimiter = delimiter or usual_delimiter(path)
    options: dict[str, Any] = {
        "delimiter": delimiter,
        "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        "escapechar": escape,
    }
    with reading(path), open_text(path, encoding) as file:
        source = _Lines(file)
        reader = csv.reader(source, strict=quoted, **options)
        columns = header
        while True:
            source.taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                source.give_back()
                yield source.place, Problem("bad_row", _quote_problem(error))
                continue
            if not cells:
                continue
            if columns is None:
                columns = _checked_header(cells, delimiter, path, required)
                continue
            if not "".join(cells).isascii() and (problem := next(filter(None, map(damage, cells)), None)):
                yield source.place, problem
            elif len(cells) != len(columns):
                yield (
                    source.place,
                    Problem("bad_row", _count_problem(len(cells), len(columns), delimiter, quoted)),
                )
            elif len(source.taken) > 1 and _swallowed(cells, source.taken[1:], options):
                source.give_back()
                yield (
                    source.place,
                    Problem("bad_row", "a quote that is not closed: it would take in the rows that follow"),
                )
            else:
                yield source.place, dict(zip(columns, cells, strict=True))


def _checked_header(cells: list[str], delimiter: str, path: Path, required: Collection[str]) -> list[str]:
    if problem := damage("".join(cells)):
        raise CorpusError(f"{path}: its first line is {problem.detail}")
    names = [name for name in cells if name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CorpusError(
            f"{path} has two columns named '{twice}': rename one; if its first line holds no names, give "
            f"them: columns=audio+text"
        )
    if len(cells) == 1 and (other := next((d for d in DELIMITERS if d != delimiter and d in cells[0]), None)):
        used, other_sign = DELIMITERS.get(delimiter, delimiter), DELIMITERS[other]
        raise CorpusError(
            f"{path} has one column, '{cells[0]}', between {used}s: give delimiter={other_sign} if its cells "
            f"are divided by {other_sign}s"
        )
    if missing := [name for name in required if name not in cells]:
        raise CorpusError(
            f"{path} has no column {' and no column '.join(missing)}: its columns are {', '.join(cells)}"
        )
    return cells


def _quote_problem(error: csv.Error) -> str:
    if "end of data" in str(error):
        return "a quote that is not closed: close it, or give quoting=no where cells are not quoted"
    return "a quote inside a quoted cell: double it, or give quoting=no where cells are not quoted"


def _count_problem(cells: int, columns: int, delimiter: str, quoted: bool) -> str:
    sign = DELIMITERS.get(delimiter, f"'{delimiter}'")
    if cells < columns:
        return f"{cells} cells, the header has {columns} columns: cells are missing, or the line is cut"
    fix = "put such a cell in double quotes" if quoted else "no cell may hold one"
    return f"{cells} cells, the header has {columns} columns: a {sign} inside a cell? {fix}"


def _swallowed(cells: list[str], more: list[str], options: dict) -> bool:
    """Whether lines inside a quoted cell are rows themselves: as many cells, and a file of the same kind in
    the same column."""
    for line in more:
        inner = next(csv.reader([line], **options), [])
        if len(inner) == len(cells) and any(
            (mine := _FILE_NAME.search(a.strip()))
            and (theirs := _FILE_NAME.search(b.strip()))
            and mine[0] == theirs[0]
            for a, b in zip(cells, inner, strict=True)
        ):
            return True
    return False
