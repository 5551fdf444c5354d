"""Where a clip's bytes come from: a file, a member of a tar, a row of a Parquet or Arrow file, a Kaldi archive, a command.

An entry's `audio` is a plain path or one of these, PATH being absolute:

    tar:PATH#OFFSET+SIZE.EXT      bytes inside a tar (its member's extension kept)
    ark:PATH#OFFSET               a WAV inside a Kaldi archive
    parquet:PATH#GROUP/ROW/COLUMN the audio of one row of one row group (Hugging Face's {bytes, path} or plain bytes)
    arrow:PATH#BATCH/ROW/COLUMN   the same of a record batch in a folder written by datasets' save_to_disk
    pipe:COMMAND                  what a shell command writes to its standard output

Whatever was opened last stays open, so that neighbours (segments of one recording, rows of one group) do not pay again.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from functools import lru_cache

import soundfile

from core.console import OneLine


class ClipError(OneLine, ValueError):
    """One clip that cannot be used: `reason` is a fixed word, the text says what was found, `seconds` its length if known."""

    def __init__(self, reason: str, detail: str, seconds: float | None = None):
        super().__init__(detail)
        self.reason, self.seconds = reason, seconds


_MAX_BYTES = 1 << 32  # of a whole clip, which is held in memory
_MAX_FRAMES_PER_BYTE = 4096  # silence in FLAC comes to about 300
_FORM = re.compile(r"(tar|ark|parquet|arrow|pipe):(.+)", re.DOTALL)


def kind_of(audio: str) -> tuple[str, str]:
    """("file" | "tar" | "ark" | "parquet" | "arrow" | "pipe", the rest)."""
    match = _FORM.fullmatch(audio)
    return (match[1], match[2]) if match else ("file", audio)


def read_bytes(audio: str) -> bytes:
    """All bytes of one clip as they stand in the corpus.

    Errors: ClipError missing_file | unreadable | command_failed | too_large.
    """
    kind, rest = kind_of(audio)
    try:
        return _READERS[kind](rest)
    except ClipError:
        raise
    except FileNotFoundError:
        raise ClipError("missing_file", f"{audio} does not exist") from None
    except OSError as error:
        raise ClipError("unreadable", f"{audio}: {error.strerror or error}") from None
    except ValueError as error:  # pyarrow's own errors, and places that do not parse
        raise ClipError("unreadable", f"{audio}: {error}") from None


def open_sound(audio: str) -> soundfile.SoundFile:
    """A recording of which stretches are wanted, open for seeking; the last one stays open.

    Errors: as read_bytes, and ClipError undecodable.
    """
    return _open_sound(audio)


@lru_cache(maxsize=1)
def _open_sound(audio: str) -> soundfile.SoundFile:
    kind, rest = kind_of(audio)
    if kind != "file":
        return sound_of(read_bytes(audio), audio)
    if not os.path.exists(rest):
        raise ClipError("missing_file", f"{rest} does not exist")
    try:
        return _believable(soundfile.SoundFile(rest), os.path.getsize(rest), audio)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ClipError("undecodable", f"{rest}: {getattr(error, 'error_string', error)}") from None


def sound_of(data: bytes, audio: str) -> soundfile.SoundFile:
    """Compressed bytes, open for decoding. Errors: ClipError zero_length | undecodable."""
    if not data:
        raise ClipError("zero_length", f"{audio} has no bytes")
    try:
        return _believable(soundfile.SoundFile(io.BytesIO(data)), len(data), audio)
    except soundfile.LibsndfileError as error:
        raise ClipError("undecodable", f"{audio}: {error.error_string}") from None


def _believable(file: soundfile.SoundFile, size: int, audio: str) -> soundfile.SoundFile:
    """Refuse headers that promise more than any codec packs into `size` bytes: memory is taken by what they say. (FLAC written
    to a pipe has no length in its header, which libsndfile reads as the largest number there is.)"""
    if file.frames > _MAX_FRAMES_PER_BYTE * size + 65536:
        raise ClipError("undecodable", f"{audio}: no length, or an impossible one, in its header; write it to a file again")
    return file


def _file(path: str) -> bytes:
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > _MAX_BYTES:
            raise ClipError("too_large", f"{path}: {size} bytes, a whole clip may have 4 GiB: give stretches of it (offset)")
        return file.read()


@lru_cache(maxsize=8)
def _descriptor(path: str) -> io.FileIO:
    return open(path, "rb", buffering=0)  # noqa: SIM115  closed when it falls out of the cache


def _tar(rest: str) -> bytes:
    path, _, place = rest.rpartition("#")
    offset, _, size = place.partition("+")
    size = int(size.partition(".")[0])
    data = os.pread(_descriptor(path).fileno(), size, int(offset))
    if len(data) != size:
        raise ClipError("truncated", f"{path} ends at {int(offset) + len(data)}, inside a member of {size} bytes")
    return data


def _ark(rest: str) -> bytes:
    path, _, offset = rest.rpartition("#")
    file = _descriptor(path).fileno()
    head = os.pread(file, 8, int(offset))
    if head[:4] != b"RIFF":
        raise ClipError("undecodable", f"{path}: no WAV at byte {offset}")
    return os.pread(file, 8 + int.from_bytes(head[4:], "little"), int(offset))


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


def _cell(value, where: str) -> bytes:
    value = value.as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return _file(value["path"])
    if not isinstance(data, bytes):
        raise ClipError("missing_file", f"{where} holds no audio bytes")
    return data


def _parquet(rest: str) -> bytes:
    path, _, place = rest.rpartition("#")
    group, row, column = place.split("/", 2)
    return _cell(_row_group(path, int(group), column)[int(row)], rest)


def _arrow(rest: str) -> bytes:
    path, _, place = rest.rpartition("#")
    batch, row, column = place.split("/", 2)
    return _cell(record_batches(path)[int(batch)].column(column)[int(row)], rest)


@lru_cache(maxsize=1)
def _pipe(command: str) -> bytes:
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()
        raise ClipError("command_failed", f"'{command}' ended with {done.returncode}: {last[-1] if last else 'no message'}")
    return done.stdout


_READERS = {"file": _file, "tar": _tar, "ark": _ark, "parquet": _parquet, "arrow": _arrow, "pipe": _pipe}
