"""Where a clip's bytes come from: a file, a member of a tar, a row of a Parquet or Arrow file, a Kaldi
archive, a command.

An entry's `audio` is a plain path or one of these, PATH being absolute:

    tar:PATH#OFFSET+SIZE.EXT      bytes inside a tar (its member's extension kept)
    tarz:PATH#OFFSET+SIZE.EXT     the same of a compressed tar, the offset being that in the decompressed one
    ark:PATH#OFFSET               a WAV inside a Kaldi archive
    parquet:PATH#GROUP/ROW/COLUMN the audio of one row of one row group (bytes, a path, or Hugging Face's
    structs: _cell)
    arrow:PATH#BATCH/ROW/COLUMN   the same of a record batch in a folder written by datasets' save_to_disk
    pipe:COMMAND                  what a shell command writes to its standard output

Whatever was opened last stays open, so that neighbours (segments of one recording, rows of one group) do not
pay again.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from core.audio import MAX_FILE_BYTES, Recording, read_file, typed_errors
from core.audio import AudioError as ClipError
from core.containers import open_regular
from core.unicode_paths import find_path
from data_tools.shards import OutputError
from data_tools.text_files import open_bytes

_MAX_READ = 0x7FFF_F000  # bytes that Linux reads at once
_FORM = re.compile(r"(tarz?|ark|parquet|arrow|pipe):(.+)", re.DOTALL)


def kind_of(audio: str) -> tuple[str, str]:
    """("file" | "tar" | "tarz" | "ark" | "parquet" | "arrow" | "pipe", the rest)."""
    match = _FORM.fullmatch(audio)
    return (match[1], match[2]) if match else ("file", audio)


def read_bytes(audio: str) -> bytes:
    """All bytes of one clip as they are in the corpus.

    Errors: ClipError missing_file | unreadable | undecodable | truncated | command_failed | too_large;
    OutputError where there is no room to decompress a tar.
    """
    kind, rest = _located(audio)
    if kind == "tarz":
        _make_room(rest.rpartition("#")[0])
    with typed_errors(audio):
        try:
            return _READERS[kind](rest)
        except (ClipError, OSError, MemoryError):
            raise
        except Exception as error:  # pyarrow's own errors, and places that do not parse
            raise ClipError("unreadable", f"{error}".partition("\n")[0]) from None


def _located(audio: str) -> tuple[str, str]:
    """kind_of, a file by the name that it has on the disk."""
    kind, rest = kind_of(audio)
    if kind == "file" and not rest.isascii():
        rest = find_path(rest) or rest
    return kind, rest


@lru_cache(maxsize=1)
def open_recording(audio: str) -> Recording:
    """A recording of which segments are wanted; the last one stays open. Errors: as read_bytes, and ClipError
    undecodable."""
    kind, rest = _located(audio)
    source = rest if kind == "file" else read_bytes(audio)
    with typed_errors(audio):
        return Recording(source)


@lru_cache(maxsize=8)
def _descriptor(path: str) -> io.FileIO:
    return io.FileIO(open_regular(path))  # closed when it falls out of the cache


def _make_room(path: str) -> None:
    """Decompress a tar beforehand: that the disk is full is no clip's fault. Errors: OutputError."""
    try:
        _decompressed(path)
    except OutputError:
        raise
    except Exception:  # whatever is wrong with it is found again, and named, when its member is read
        return


@lru_cache(maxsize=1)
def _decompressed(path: str) -> IO[bytes]:
    """A compressed tar as a temporary file without a name: its members are wanted in any order. Errors:
    OSError, OutputError."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed when it falls out of the cache
    # Of one that is cut, the members up to there are good.
    with open_bytes(Path(path)) as compressed, suppress(EOFError, zlib.error, lzma.LZMAError):
        while block := compressed.read(1 << 22):
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise OutputError(
                    f"cannot decompress {path} in {tempfile.gettempdir()}: {error.strerror}"
                ) from error
    return file


def _tar(rest: str) -> bytes:
    return _member(rest, _descriptor)


def _tarz(rest: str) -> bytes:
    return _member(rest, _decompressed)


def _member(rest: str, opened: Callable[[str], IO[bytes]]) -> bytes:
    path, _, place = rest.rpartition("#")
    offset, _, rest = place.partition("+")
    size = int(rest.partition(".")[0])
    if size > _MAX_READ:
        raise ClipError("too_large", f"a member of {size:,} bytes, more than {_MAX_READ:,}")
    data = os.pread(opened(path).fileno(), size, int(offset))
    if len(data) != size:
        raise ClipError(
            "truncated", f"the tar ends at {int(offset) + len(data)}, inside a member of {size} bytes"
        )
    return data


def _ark(rest: str) -> bytes:
    path, _, offset = rest.rpartition("#")
    file = _descriptor(path).fileno()
    head = os.pread(file, 8, int(offset))
    if head[:4] != b"RIFF":
        raise ClipError("undecodable", f"no WAV at byte {offset}")
    size = 8 + int.from_bytes(head[4:], "little")
    if size > _MAX_READ:
        raise ClipError(
            "undecodable", f"the WAV at byte {offset} has no size in its header: write it to a file first"
        )
    return os.pread(file, size, int(offset))


@lru_cache(maxsize=1)
def _row_group(path: str, group: int, column: str):
    import pyarrow.parquet

    with open(path, "rb"):  # a vanished file is an OSError of the usual kind
        return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


@lru_cache(maxsize=4)
def record_batches(path: str) -> list:
    """Record batches of an Arrow stream file, memory-mapped (nothing is read before it is asked for)."""
    import pyarrow

    with pyarrow.memory_map(path) as source:
        return list(pyarrow.ipc.open_stream(source))


def may_hold_audio(kind) -> bool:
    """Whether cells of a pyarrow type can be audio (`_cell`)."""
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    if types.is_struct(kind):
        return bool({"bytes", "path", "array"} & set(kind.names))
    return any(test(kind) for test in tests)


def _cell(value, folder: str) -> bytes:
    """A cell's audio: bytes, a path (relative to the table's folder), or Hugging Face's structs of either or
    of samples."""
    from pyarrow import types

    path = None
    if not may_hold_audio(value.type):
        raise ClipError("unreadable", f"a column of {value.type} holds no audio")
    if types.is_struct(value.type) and value.is_valid:
        fields = {name: value[name] for name in value.type.names if value[name].is_valid}
        if "array" in fields and "bytes" not in fields:
            return _wav_of(fields["array"], fields.get("sampling_rate"))
        path, value = fields.get("path"), fields.get("bytes")
    elif types.is_string(value.type) or types.is_large_string(value.type):
        path, value = value if value.is_valid else None, None
    if value is not None and value.is_valid:
        return value.as_py()
    if path is None:
        raise ClipError("missing_file", "its cell is empty")
    with typed_errors(path.as_py()):
        return read_file(os.path.join(folder, path.as_py()))


def _wav_of(array, rate) -> bytes:
    """Samples in a table, [frames] or [channels][frames], as a WAV: floats, or integers of 16 bits."""
    if rate is None or not rate.as_py() > 0:
        raise ClipError("unreadable", "its samples have no sampling_rate")
    nested = hasattr(array.values.type, "value_type")
    rows = [channel.values for channel in array] if nested else [array.values]
    samples = np.stack([row.to_numpy(zero_copy_only=False) for row in rows], axis=1)
    if samples.dtype.kind != "f" and samples.dtype != np.int16:
        raise ClipError("unreadable", f"its samples are {samples.dtype}: floats or int16 are wanted")
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, int(rate.as_py()), "FLOAT" if samples.dtype.kind == "f" else "PCM_16", format="WAV"
    )
    return buffer.getvalue()


def _parquet(rest: str) -> bytes:
    path, _, place = rest.rpartition("#")
    group, row, column = place.split("/", 2)
    return _cell(_row_group(path, int(group), column)[int(row)], os.path.dirname(path))


def _arrow(rest: str) -> bytes:
    path, _, place = rest.rpartition("#")
    batch, row, column = place.split("/", 2)
    return _cell(record_batches(path)[int(batch)].column(column)[int(row)], os.path.dirname(path))


@lru_cache(maxsize=1)
def _pipe(command: str) -> bytes:
    blocks, size = [], 0
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdout is not None  # a pipe
        while block := process.stdout.read(1 << 24):
            blocks.append(block)
            size += len(block)
            if size > MAX_FILE_BYTES:
                process.kill()
                raise ClipError("too_large", f"the command writes more than {MAX_FILE_BYTES:,} bytes")
        if code := process.wait():
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()
            raise ClipError(
                "command_failed", f"'{command}' ended with {code}: {last[-1] if last else 'no message'}"
            )
    return b"".join(blocks)


_READERS: dict[str, Callable[[str], bytes]] = {
    "file": read_file,
    "tar": _tar,
    "tarz": _tarz,
    "ark": _ark,
    "parquet": _parquet,
    "arrow": _arrow,
    "pipe": _pipe,
}
