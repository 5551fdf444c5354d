"""The shard format: what a packed folder holds, written and read. Its one reason to change is the format
itself.

    NAME-000000.tar ...   members KEY.flac (or wav, opus, mp3 as they came) then KEY.json; text-only: KEY.json
                          alone
    index.json            shards with counts, sizes and checksums (wids reads it), string tables, hours,
                          fingerprint
    samples.npy           one SAMPLE_DTYPE row per sample, in shard order, memory-mappable

Everything here is a pure function of what is given: no time stamps, no host names, no random serials. The
same samples in the same order are the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from core.console import OneLine, one_line
from core.file_names import UnsafeName, file_size_inside, plain_name
from core.json_files import JsonError, parse_object, read_object
from core.object_store import StoreError, is_store_url, joined, shown_url
from core.private_folder import NotPrivate, check_private
from data_tools.remote_shards import RemoteShards, discard_index, fetch_index, object_sizes

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in index.json's shardlist
        ("audio_offset", "<u8"),  # bytes from the start of the tar to the audio's data (not to its header)
        ("audio_size", "<u4"),  # bytes; 0: a text-only sample
        ("json_offset", "<u8"),
        ("json_size", "<u4"),
        ("duration", "<f4"),  # seconds
        ("characters", "<u4"),  # of text, the transcript
        ("tokens", "<u4"),  # of text under the tokenizer given to pack; 0: not counted
        ("target_characters", "<u4"),  # of prompt + response, or of all turns of messages
        ("task", "<u2"),  # position in index.json's tasks
        ("lang", "<u2"),  # ... langs ("" where unknown)
        ("codec", "<u2"),  # ... codecs ("" for text only)
        ("id_hash", "<u8"),  # blake2b-64 of corpus/id
        ("audio_hash", "<u8"),  # the first 64 bits of the sha256 of the audio member's bytes; 0: text only
    ]
)
INDEX_NAME, TABLE_NAME = "index.json", "samples.npy"
RECORD_FIELDS = ("id", "corpus", "task", "text", "lang", "duration", "sample_rate")
OPTIONAL_FIELDS = ("target_lang", "prompt", "response", "label", "speaker", "recording", "messages", "origin")
_TEXT_FIELDS = tuple(
    name for name in (*RECORD_FIELDS, *OPTIONAL_FIELDS) if name not in ("duration", "sample_rate", "messages")
)
_BLOCK = 512
_WRITE_OUT_BYTES = 4 << 20
_MAX_MEMBER_BYTES = 2**32 - 1
_MAX_SHARD_BYTES = 2**62  # offsets and sizes below it can be added in int64
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECK_ROWS = 1 << 15  # rows (2 MB) that are checked at a time, so that they stay in the processor's cache
_RELEASE_ROWS = 32 * _CHECK_ROWS


class ShardError(OneLine, ValueError):
    """A packed folder that cannot be read or is not what its index says; one line: what, where, what to
    do."""


class OutputError(OneLine, OSError):
    """The output cannot be written (disk full, not writable): the run must stop, no sample is to blame."""


def id_hash(corpus: str, sample_id: str) -> int:
    """Return a 64-bit hash of one sample of one corpus."""
    return int.from_bytes(hashlib.blake2b(f"{corpus}/{sample_id}".encode(), digest_size=8).digest(), "little")


def audio_hash(audio: bytes | None) -> int:
    """Return a 64-bit hash of one compressed clip: equal clips of several samples share what is computed from
    them."""
    # sha256, for which processors have instructions: twice as fast as blake2b where they do
    return int.from_bytes(hashlib.sha256(audio).digest()[:8], "little") if audio else 0


# A ustar header but for name, size and checksum: regular file, mode 0644, no owner, time 0, so that equal
# content is equal bytes. (tarfile's own TarInfo.tobuf gives the same in ten times the time, which --codec
# copy would feel.)
_HEADER = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
_HEADER[148:156] = b" " * 8


def tar_header(name: str, size: int) -> bytes:
    """512 bytes that stand before a member's data. Errors: ValueError for a name of more than 100 bytes."""
    encoded = name.encode()
    if len(encoded) > 100:
        raise ValueError(f"member name '{name}' is longer than 100 bytes")
    header = _HEADER.copy()
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def target_characters(record: dict) -> int:
    turns = record.get("messages") or ()
    return (
        sum(len(turn.get("content") or "") for turn in turns)
        + len(record.get("prompt") or "")
        + len(record.get("response") or "")
    )


def check_record(record: dict) -> None:
    """Check that no field has another type than pack writes; null is always right. Errors: ValueError ("has
    no text as lang")."""
    for name in _TEXT_FIELDS:
        value = record.get(name)
        if value is not None and not _is_text(value):
            raise ValueError(f"has no text as {name}")
    if type(record.get("id")) is not str:
        raise ValueError("has no id")
    for name in ("duration", "sample_rate"):
        value = record.get(name)
        if value is not None and not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"has no number from 0 on as {name}")
    messages = record.get("messages")
    if messages is not None and not (isinstance(messages, list) and all(map(_is_turn, messages))):
        raise ValueError('has messages that are not a list of {"role": text, "content": text}')


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and _is_text(turn.get("role")) and _is_text(turn.get("content"))


def _is_text(value: object) -> bool:
    """Half of a surrogate pair, which JSON can hold as an escape, is no text: no tokenizer or file takes
    it."""
    return type(value) is str and (value.isascii() or not _SURROGATE.search(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class ShardSummary:
    """What is known about one finished shard; rows point into this summary's own tables until the index joins
    them."""

    name: str
    rows: np.ndarray  # [n] of SAMPLE_DTYPE
    filesize: int
    sha256: str
    tasks: list[str] = field(default_factory=list)
    langs: list[str] = field(default_factory=list)
    codecs: list[str] = field(default_factory=list)


class ShardWriter:
    """Writes one tar at `path`, sample by sample, in one pass; the checksum is taken on the way.

    The caller gives `path` a name that no reader takes for a shard and renames it after `close()`.
    Errors: OutputError for anything the file system refuses.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: list[tuple] = []
        self._tables: dict[str, dict[str, int]] = {"task": {}, "lang": {}, "codec": {}}
        self._digest, self._offset, self._written_out = hashlib.sha256(), 0, 0
        try:
            self._file = open(self.path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, key: str, audio: bytes | None, codec: str, record: dict, tokens: int = 0) -> None:
        """Append KEY.`codec` (unless audio is None) and KEY.json. `record` is written as given, in its own
        key order."""
        if "." in key or "/" in key or not key:
            raise ValueError(
                f"key '{key}' must be non-empty and hold no dot or slash: WebDataset groups members by the "
                f"first dot"
            )
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        if max(len(audio or b""), len(text)) > _MAX_MEMBER_BYTES:
            raise ValueError(f"sample {key} is larger than 4 GiB")
        audio_offset = audio_size = 0
        if audio is not None:
            audio_offset, audio_size = self._member(f"{key}.{codec}", audio), len(audio)
        json_offset = self._member(f"{key}.json", text)

        def position(table: str, value: str) -> int:
            return self._tables[table].setdefault(value, len(self._tables[table]))

        self._rows.append(
            (
                0,
                audio_offset,
                audio_size,
                json_offset,
                len(text),
                record["duration"] or 0.0,
                len(record["text"] or ""),
                tokens,
                target_characters(record),
                position("task", record["task"]),
                position("lang", record["lang"] or ""),
                position("codec", codec if audio is not None else ""),
                id_hash(record["corpus"], record["id"]),
                audio_hash(audio),
            )
        )

    def _member(self, name: str, data: bytes) -> int:
        self._write(tar_header(name, len(data)))
        offset = self._offset
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise OutputError(f"cannot write {self.path} at byte {self._offset}: {error.strerror}") from error
        self._digest.update(data)
        self._offset += len(data)
        if self._offset - self._written_out >= _WRITE_OUT_BYTES:
            self._write_out()

    def _write_out(self) -> None:
        """Let the disk begin with what is there, so that little is left for close() to wait for. Linux does
        so for pages that will not be needed; elsewhere, and where a file system has no such thing, it is
        advice that changes nothing."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(
                    self._file.fileno(),
                    self._written_out,
                    self._offset - self._written_out,
                    os.POSIX_FADV_DONTNEED,
                )
        self._written_out = self._offset

    def close(self, name: str) -> ShardSummary:
        """End the archive, bring it to the disk, and return what the index needs. `name`: the shard's final
        file name."""
        self._write(bytes(2 * _BLOCK))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        return ShardSummary(
            name,
            np.array(self._rows, dtype=SAMPLE_DTYPE),
            self._offset,
            self._digest.hexdigest(),
            *(list(table) for table in self._tables.values()),
        )


def fingerprint(table: np.ndarray, checksums: list[str]) -> str:
    """sha256 over the sample table's bytes and the shards' checksums: one name for a packed folder's
    content."""
    digest = hashlib.sha256()
    for start in range(0, len(table), 1 << 20):
        digest.update(np.ascontiguousarray(table[start : start + (1 << 20)]).tobytes())
    for checksum in checksums:
        digest.update(checksum.encode())
    return digest.hexdigest()


def replace_file(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write a file atomically. scratch: a folder of the same file
    system for what is not finished (default: the file's own), so that a kill leaves nothing beside finished
    files."""
    unfinished = (scratch or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def write_index(
    folder: str | Path, name: str, summaries, extra: dict | None = None, scratch: Path | None = None
) -> dict:
    """Join the shards' summaries into samples.npy and index.json; returns the index.

    `summaries` is gone through twice, in shard order, and may load each summary when it is its turn: memory
    is then that of one shard's table. index.json is written last: a folder with an index is a complete one.
    scratch: as in replace_file.
    """
    folder = Path(folder)
    tables: dict[str, set[str]] = {"tasks": set(), "langs": set(), "codecs": set()}
    shardlist, count = [], 0
    for summary in summaries:
        for table, values in tables.items():
            values.update(getattr(summary, table))
        shardlist.append(
            {
                "url": summary.name,
                "nsamples": len(summary.rows),
                "filesize": summary.filesize,
                "sha256": summary.sha256,
            }
        )
        count += len(summary.rows)
    sorted_tables = {table: sorted(values) for table, values in tables.items()}
    unfinished = (scratch or folder) / f".{TABLE_NAME}.{os.getpid()}"
    seconds, digest = 0.0, hashlib.sha256()
    try:
        with open(unfinished, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE),
                    "fortran_order": False,
                    "shape": (count,),
                },
            )
            for position, summary in enumerate(summaries):
                rows = summary.rows.copy()
                rows["shard"] = position
                for column, table in (("task", "tasks"), ("lang", "langs"), ("codec", "codecs")):
                    places = np.array(
                        [sorted_tables[table].index(value) for value in getattr(summary, table)],
                        dtype=np.uint16,
                    )
                    rows[column] = places[rows[column]] if len(rows) else rows[column]
                seconds += float(rows["duration"].astype(np.float64).sum())
                digest.update(rows.tobytes())
                file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / TABLE_NAME)
    except OSError as error:
        raise OutputError(f"cannot write {folder / TABLE_NAME}: {error.strerror}") from error
    for shard in shardlist:
        digest.update(shard["sha256"].encode())
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": name,
        "shardlist": shardlist,
        **sorted_tables,
        "samples": count,
        "hours": round(seconds / 3600, 6),
        "fingerprint": digest.hexdigest(),
        **(extra or {}),
    }
    replace_file(
        folder / INDEX_NAME, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode(), scratch
    )
    return index


def _reason(error: Exception) -> str:
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def _read_index(folder: Path) -> dict:
    """index.json, with every value that is used later checked. Errors: ShardError."""
    path = folder / INDEX_NAME
    try:
        file_size_inside(folder, INDEX_NAME)
        index = read_object(path)
    except (UnsafeName, JsonError, OSError) as error:
        raise ShardError(f"{path} {_reason(error)}: pack the corpus again") from None

    _check_fields(index, path)
    _check_shard_list(index, path)
    return index


def _wrong(path: Path, what: str) -> ShardError:
    return ShardError(f"{path}: {what}: copy it again, or pack the corpus again")


def _check_fields(index: dict, path: Path) -> None:
    for key, kind, name in (
        ("name", str, "text"),
        ("shardlist", list, "a list"),
        ("tasks", list, "a list"),
        ("langs", list, "a list"),
        ("codecs", list, "a list"),
        ("fingerprint", str, "text"),
    ):
        if not isinstance(index.get(key), kind):
            raise _wrong(path, f"'{key}' is {'missing' if key not in index else f'not {name}'}")
    for key in ("tasks", "langs", "codecs"):
        if not all(isinstance(value, str) for value in index[key]):
            raise _wrong(path, f"'{key}' holds something else than text")
    for key in ("rejected", "rejected_hours"):  # reason -> how many, how long; for people
        counts = index.get(key, {})
        if not isinstance(counts, dict) or not all(
            _is_number(count) and math.isfinite(count) for count in counts.values()
        ):
            raise _wrong(path, f"'{key}' is not an object of numbers")
    hours = index.get("hours")
    if hours is None or not _is_number(hours) or not 0 <= hours < math.inf:
        raise _wrong(path, "'hours' is not a number of hours")
    if not _SHA256.fullmatch(index["fingerprint"]):
        raise _wrong(path, "'fingerprint' is not a sha256 of 64 hexadecimal digits")


def _check_shard_list(index: dict, path: Path) -> None:
    names = set()
    for number, shard in enumerate(index["shardlist"]):
        if not isinstance(shard, dict):
            raise _wrong(path, f"entry {number} of 'shardlist' is not an object")
        try:
            name = plain_name(shard.get("url"))
        except UnsafeName as error:
            raise _wrong(
                path, f"the url of shard {number} {error} ({ascii(shard.get('url'))[:100]})"
            ) from None
        if name in names or name in (INDEX_NAME, TABLE_NAME):
            raise _wrong(path, f"two files are named {name}")
        names.add(name)
        for key, most in (("nsamples", 2**32), ("filesize", _MAX_SHARD_BYTES)):
            value = shard.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
                raise _wrong(path, f"'{key}' of shard {name} is not a number from 0 to {most - 1}")
        if not isinstance(shard.get("sha256"), str) or not _SHA256.fullmatch(shard["sha256"]):
            raise _wrong(path, f"'sha256' of shard {name} is not 64 hexadecimal digits")


def _read_table(folder: Path, index: dict) -> np.ndarray:
    """samples.npy as a memory map, every row checked against `index`. Errors: ShardError."""
    path = folder / TABLE_NAME
    try:
        file_size_inside(folder, TABLE_NAME)
        samples = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: copy it again, or run pack --merge again") from None
    except (UnsafeName, OSError) as error:
        raise ShardError(f"{path} {_reason(error)}: pack the corpus again") from None
    except Exception as error:  # numpy evaluates the header, and has no list of what a broken one raises
        raise ShardError(
            f"{path} is not a table of numpy "
            f"({str(error).splitlines()[0] if str(error) else 'broken header'}): "
            "pack the corpus again"
        ) from None
    if samples.dtype != SAMPLE_DTYPE:
        raise ShardError(f"{path} does not have the columns of this version: pack the corpus again")
    counts = np.array([shard["nsamples"] for shard in index["shardlist"]], np.int64)
    if samples.ndim != 1 or len(samples) != counts.sum():
        raise ShardError(
            f"{path} has {samples.size} rows, {INDEX_NAME} counts {counts.sum()}: run pack --merge again"
        )
    _check_rows(samples, index, counts, path)
    return samples


def _check_rows(samples: np.ndarray, index: dict, counts: np.ndarray, path: Path) -> None:
    """Errors: ShardError that names the first row with a number that cannot be right."""
    sizes = np.array([shard["filesize"] for shard in index["shardlist"]], np.uint64)
    ends = np.cumsum(counts)  # the row after each shard's last one
    tables = {"task": len(index["tasks"]), "lang": len(index["langs"]), "codec": len(index["codecs"])}
    for start in range(0, len(samples), _CHECK_ROWS):
        if start % _RELEASE_ROWS == 0:  # 10 million rows are 0.7 GB, which every rank would keep in memory
            cast(Any, samples)._mmap.madvise(mmap.MADV_DONTNEED)  # numpy has no public name for it
        rows = samples[start : start + _CHECK_ROWS]
        expected = np.searchsorted(ends, np.arange(start, start + len(rows)), side="right")
        file_sizes = sizes[expected]
        faults = {"is not in the order of the shards": rows["shard"] != expected}
        for member in ("audio", "json"):
            offset, size = rows[f"{member}_offset"], rows[f"{member}_size"]
            inside = (offset <= file_sizes) & (size <= file_sizes - np.minimum(offset, file_sizes))
            faults[f"has {member} beyond the end of its shard"] = ~inside
        for column, length in tables.items():
            faults[f"names a {column} that {INDEX_NAME} does not list"] = rows[column] >= length
        faults["has a duration that is negative or not finite"] = ~(
            np.isfinite(rows["duration"]) & (rows["duration"] >= 0)
        )
        for fault, where in faults.items():
            if where.any():
                raise ShardError(
                    f"{path}: row {start + int(where.argmax())} {fault}: copy it again, or pack the corpus "
                    f"again"
                )


def _is_packed(sample: np.void, audio: bytes | None, text: bytes) -> bool:
    """Whether audio and JSON are those that the index was written for."""
    if sample["audio_hash"] and audio_hash(audio) != int(sample["audio_hash"]):
        return False
    try:
        record = parse_object(text)
        return id_hash(record["corpus"], record["id"]) == int(sample["id_hash"])
    except (ValueError, KeyError, RecursionError):
        return False


class ShardIndex:
    """A packed folder, read by sample number: two preads and nothing else, so it serves any order and any
    worker. A folder in an object store: one range request, or the node's cache (data_tools/remote_shards.py).

    location: the folder's path or URL;       folder: where its index is on this machine;

    samples: np.memmap [n] of SAMPLE_DTYPE;  shards: the shardlist of index.json;  tasks, langs, codecs:
                                             string tables;
    fingerprint: str;  hours: float;  damaged: one line for each shard whose size is not what the index says
                                      (its lost
    samples raise ShardError when read, the others are served).

    Files are opened at first use and at most `open_files` are kept open. Safe to pickle and to fork. Where
    the environment names a folder of node-local copies in SOUNDWAVE_LOCAL_SHARDS (checked by load: only this
    user may write there), a shard whose complete copy is there as FINGERPRINT/NAME is read from there.
    """

    def __init__(self, folder: Path, index: dict, samples: np.ndarray, open_files: int = 64):
        self.folder, self.samples = folder, samples
        self.location = str(folder)
        self._remote: RemoteShards | None = None
        self.name: str = index["name"]
        self.shards: list[dict] = index["shardlist"]
        self.tasks: list[str] = index["tasks"]
        self.langs: list[str] = index["langs"]
        self.codecs: list[str] = index["codecs"]
        self.hours: float = index["hours"]
        self.fingerprint: str = index["fingerprint"]
        self.damaged: list[str] = []
        local = os.environ.get("SOUNDWAVE_LOCAL_SHARDS")
        self._copies = Path(local) / self.fingerprint if local else None
        self._open_files = open_files
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Check and open a packed folder: whoever made it can make neither this nor a later read leave the
        folder.

        Errors: ShardError where the folder, its index or a shard is missing, where they do not fit each
        other, and for shard names, checksums, types and numbers in the index or the table that pack does not
        write.
        """
        if is_store_url(folder):
            return cls._load_remote(str(folder))
        folder = Path(folder)
        if not (folder / INDEX_NAME).exists():
            why = "does not exist" if not folder.exists() else f"holds no {INDEX_NAME}"
            raise ShardError(
                f"{folder} {why}: give a folder that data_tools/pack.py has finished (run its command again, "
                f"or --merge)"
            )
        index = _read_index(folder)
        samples = _read_table(folder, index)
        loaded = cls(folder, index, samples)
        loaded._check_copies()
        for shard in index["shardlist"]:
            path = folder / shard["url"]
            try:
                size = file_size_inside(folder, shard["url"])
            except FileNotFoundError:
                raise ShardError(f"shard {path} is missing: copy or pack it again") from None
            except (UnsafeName, OSError) as error:
                raise ShardError(
                    f"shard {path} {_reason(error)}: copy the file itself, or pack the corpus again"
                ) from None
            if size != shard["filesize"]:
                loaded.damaged.append(
                    f"{path} has {size} bytes, the index says {shard['filesize']}: copy or pack it again"
                )
        return loaded

    @classmethod
    def _load_remote(cls, url: str) -> ShardIndex:
        """A packed folder in an object store. Errors: ShardError."""
        store = None
        try:
            folder, store = fetch_index(url, INDEX_NAME, TABLE_NAME)
            index = _read_index(folder)
            samples = _read_table(folder, index)
            if (
                fingerprint(samples, [shard["sha256"] for shard in index["shardlist"]])
                != index["fingerprint"]
            ):
                discard_index(folder, TABLE_NAME)
                raise ShardError(
                    f"{shown_url(url)}: {TABLE_NAME} does not belong to its {INDEX_NAME}: copy both again"
                )
            loaded = cls(folder, index, samples)
            loaded.location = url.rstrip("/")
            sizes = object_sizes(store, folder, [shard["url"] for shard in index["shardlist"]])
            loaded._remote = RemoteShards(url, folder, loaded.shards, samples, _is_packed)
        except (StoreError, NotPrivate) as error:
            missing = isinstance(error, StoreError) and error.errno == errno.ENOENT
            hint = (
                ": give a URL that a packed folder was copied to (data_tools.copy_packed)" if missing else ""
            )
            raise ShardError(f"{shown_url(url)}: {error}{hint}") from error
        except OSError as error:
            raise ShardError(f"{shown_url(url)}: its index cannot be cached: {one_line(error)}") from error
        except ValueError as error:
            raise (
                error if isinstance(error, ShardError) else ShardError(f"{shown_url(url)}: {error}")
            ) from None
        finally:
            if store is not None:
                store.close()
        loaded._check_copies()
        for shard in index["shardlist"]:
            size, path = sizes[shard["url"]], joined(url, shard["url"])
            if isinstance(size, StoreError):
                raise ShardError(f"shard {path}: {size}: copy or pack it again") from size
            if size != shard["filesize"]:
                loaded.damaged.append(
                    f"{path} has {size} bytes, the index says {shard['filesize']}: copy or pack it again"
                )
        return loaded

    def _check_copies(self) -> None:
        """Of a node-local copy only the size is compared, so other users must not write there. Errors:
        ShardError."""
        if self._copies is not None and self._copies.parent.exists():
            try:
                check_private(self._copies.parent)
            except NotPrivate as error:
                raise ShardError(f"SOUNDWAVE_LOCAL_SHARDS: {error}") from None

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: int) -> tuple[bytes | None, dict]:
        """Return the audio bytes as they are in the shard (None for text only) and the JSON record of sample
        number `row`.

        Errors: ShardError where the bytes are not there or the JSON is no record (see check_record).
        """
        sample = self.samples[row]
        if self._remote is not None and self._copy(sample["shard"]) is None:
            try:
                audio, text = self._remote.read(row)
            except StoreError as error:
                raise ShardError(f"sample {row} of {self._path(sample['shard'])}: {error}") from error
        else:
            audio = (
                self._pread(sample["shard"], sample["audio_offset"], sample["audio_size"], row)
                if sample["audio_size"]
                else None
            )
            text = self._pread(sample["shard"], sample["json_offset"], sample["json_size"], row)
        try:
            record = parse_object(text)
            check_record(record)
            return audio, record
        except ValueError as error:
            raise ShardError(
                f"{self._path(sample['shard'])}: JSON of sample {row} {error}; check with data_tools.verify"
            ) from None

    def prefetch(self, rows: Iterable[int]) -> None:
        """Ask an object store for samples that will be read soon; of a local folder nothing."""
        if self._remote is not None:
            self._remote.prefetch([row for row in rows if self._copy(self.samples["shard"][row]) is None])

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    def download(self, shard: int, path: Path) -> None:
        """Write a whole shard of a folder in an object store to `path`. Errors: OSError."""
        assert self._remote is not None
        self._remote.download(shard, path)

    def _copy(self, shard: int) -> Path | None:
        """Return the node-local copy of a shard, where there is a complete one."""
        if self._copies is None:
            return None
        entry = self.shards[int(shard)]
        copy = self._copies / entry["url"]
        return copy if copy.exists() and copy.stat().st_size == entry["filesize"] else None

    def _path(self, shard: int) -> Path | str:
        name = self.shards[int(shard)]["url"]
        return self._copy(shard) or (joined(self.location, name) if self.is_remote else self.folder / name)

    def _pread(self, shard: int, offset: int, size: int, row: int) -> bytes:
        shard = int(shard)
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            try:
                self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"cannot open shard {self._path(shard)}: {error.strerror}") from error
            while len(self._files) > self._open_files:
                os.close(self._files.popitem(last=False)[1])
        try:
            data = os.pread(self._files[shard], int(size), int(offset))
        except OSError as error:
            raise ShardError(f"cannot read shard {self._path(shard)}: {error.strerror}") from error
        if len(data) != int(size):
            raise ShardError(
                f"shard {self._path(shard)} ends inside sample {row}: copy or pack it again "
                f"(data_tools.verify names all such)"
            )
        return data

    def keep_open(self, files: int) -> None:
        """How many files may stay open from now on."""
        self._open_files = files

    def close(self) -> None:
        if self._remote is not None:
            self._remote.close()
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "samples": None, "_files": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(
            state, samples=np.load(state["folder"] / TABLE_NAME, mmap_mode="r"), _files=OrderedDict()
        )
        if self._remote is not None:
            self._remote.samples = self.samples
