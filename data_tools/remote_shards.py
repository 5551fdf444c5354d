"""Shards of a packed folder in an object store: a sample is one range request, asked for ahead of its turn,
kept on the node's disk, and compared with the hashes of the index each time it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import numpy as np

from core.object_store import Fetched, ObjectStore, StoreError
from core.private_folder import private_folder
from data_tools.shard_cache import ShardCache, cache_bytes, cache_folder

SIZES_NAME = "objects.json"
SIZES_SECONDS = 600.0  # how long the processes of a node use one look at the objects' sizes
MOST_AHEAD = 512  # samples that are asked for and not read yet
GAP = 1 << 16  # bytes between audio and JSON that are read along rather than asked for apart

Check = Callable[[np.void, bytes | None, bytes], bool]


class RemoteShards:
    """Reads the samples of one packed folder at a URL. Safe to pickle and to fork.

    check: whether audio and JSON are those that the index knows (data_tools/shards.py).
    """

    def __init__(self, url: str, folder: Path, shards: list[dict], samples: np.ndarray, check: Check):
        self.url, self.folder, self.shards, self._check = url, folder, shards, check
        counts = np.array([shard["nsamples"] for shard in shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])  # row of each shard's first sample
        self.samples = samples
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._store = ObjectStore(self.url)
        self._cache = ShardCache(self.folder, cache_bytes())
        self._ahead: OrderedDict[int, list[Future[Fetched]]] = OrderedDict()

    def _own(self) -> None:
        """Requests, locks and threads stay behind in a fork: begin anew."""
        if self._pid != os.getpid():
            self._begin()

    def prefetch(self, rows: list[int]) -> None:
        """Ask for samples that will be read soon. Errors come when they are read."""
        self._own()
        for row in rows:
            name, position = self._shard(row)["url"], row - int(self._first[self.samples["shard"][row]])
            if row in self._ahead or self._cache.has(name, position):
                continue
            with suppress(StoreError):
                self._ahead[row] = self._request(row)
        while len(self._ahead) > MOST_AHEAD:
            self._ahead.popitem(last=False)

    def read(self, row: int) -> tuple[bytes | None, bytes]:
        """Return audio and JSON of a sample. Errors: StoreError, also where the object was changed."""
        self._own()
        if (parts := self._cached(row)) is not None:
            return parts
        sample, entry = self.samples[row], self._shard(row)
        pieces = [self._store.result(future) for future in self._ahead.pop(row, None) or self._request(row)]
        for fetched, (_, size) in zip(pieces, self._spans(sample), strict=True):
            if fetched.size != entry["filesize"]:
                raise StoreError(
                    f"the object has {fetched.size} bytes now, the index says {entry['filesize']}: it was "
                    "changed after packing"
                )
            if len(fetched.data) != size:
                raise StoreError(f"{len(fetched.data)} bytes came, {size} were asked for")
        parts = self._parts(sample, [fetched.data for fetched in pieces])
        if not self._check(sample, *parts):
            raise StoreError(
                f"the object (ETag {pieces[0].etag}) does not hold what was packed: it was changed after that"
            )
        shard = int(sample["shard"])
        for (start, _), fetched in zip(self._spans(sample), pieces, strict=True):
            self._cache.write(
                entry["url"],
                entry["nsamples"],
                entry["filesize"],
                row - int(self._first[shard]),
                start,
                fetched.data,
            )
        return parts

    def download(self, shard: int, path: Path) -> None:
        """Write one whole shard to `path`. Errors: StoreError, OSError."""
        self._own()
        self._store.download(self.shards[shard]["url"], self.shards[shard]["filesize"], path)

    def close(self) -> None:
        """End the client process and drop its requests: the next read begins anew."""
        if self._pid == os.getpid():
            self._ahead.clear()
            self._store.close()
            self._cache.close()

    def _shard(self, row: int) -> dict:
        return self.shards[int(self.samples["shard"][row])]

    def _request(self, row: int) -> list[Future[Fetched]]:
        name = self._shard(row)["url"]
        return [self._store.request(name, start, size) for start, size in self._spans(self.samples[row])]

    @staticmethod
    def _spans(sample: np.void) -> list[tuple[int, int]]:
        """(start, size) of the requests for a sample: one where pack put JSON behind audio."""
        audio, audio_size = int(sample["audio_offset"]), int(sample["audio_size"])
        text, text_size = int(sample["json_offset"]), int(sample["json_size"])
        if not audio_size:
            return [(text, text_size)]
        if audio + audio_size <= text <= audio + audio_size + GAP:
            return [(audio, text + text_size - audio)]
        return [(audio, audio_size), (text, text_size)]

    def _parts(self, sample: np.void, pieces: list[bytes]) -> tuple[bytes | None, bytes]:
        audio_size, text_size = int(sample["audio_size"]), int(sample["json_size"])
        if len(pieces) == 2:
            return pieces[0], pieces[1]
        data = pieces[0]
        return (data[:audio_size] if audio_size else None), data[len(data) - text_size :]

    def _cached(self, row: int) -> tuple[bytes | None, bytes] | None:
        sample, entry = self.samples[row], self._shard(row)
        position = row - int(self._first[int(sample["shard"])])
        pieces = []
        for start, size in self._spans(sample):
            data = self._cache.read(entry["url"], position, start, size)
            if data is None:
                return None
            pieces.append(data)
        parts = self._parts(sample, pieces)
        return parts if self._check(sample, *parts) else None

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "samples": None,
            "_store": None,
            "_cache": None,
            "_ahead": None,
            "_pid": None,
        }


def fetch_index(url: str, index_name: str, table_name: str) -> tuple[Path, ObjectStore]:
    """Read the index of a packed folder at `url` once for all processes of this node; return its local folder
    and the store.

    The folder is named by index.json's content, so another index is another folder. Errors: StoreError.
    """
    store = ObjectStore(url)
    index = store.read(index_name).data
    base = private_folder(cache_folder())
    folder = private_folder(base / hashlib.sha256(index).hexdigest()[:32])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / table_name).exists():
            answer = store.sizes([table_name])[table_name]
            if isinstance(answer, StoreError):
                raise StoreError(f"{table_name}: {answer}", answer.errno or 0)
            store.download(table_name, answer[0], folder / f".{table_name}")
            os.replace(folder / f".{table_name}", folder / table_name)
        if not (folder / index_name).exists():
            (folder / f".{index_name}").write_bytes(index)
            os.replace(folder / f".{index_name}", folder / index_name)
    return folder, store


def discard_index(folder: Path, table_name: str) -> None:
    """Remove a table that does not belong to its index, so that the next process reads it again."""
    with suppress(OSError):
        (folder / table_name).unlink()


def object_sizes(store: ObjectStore, folder: Path, names: list[str]) -> dict[str, int | StoreError]:
    """Return the sizes of the objects `names`, or why there is none; one look serves a node's processes."""
    path = folder / SIZES_NAME
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError, ValueError, TypeError):
            if time.time() - path.stat().st_mtime < SIZES_SECONDS:
                cached = json.loads(path.read_text())
                return {name: int(cached[name]) for name in names}
        answers = store.sizes(names)
        sizes: dict[str, int | StoreError] = {
            name: value if isinstance(value, StoreError) else value[0] for name, value in answers.items()
        }
        if not any(isinstance(value, StoreError) for value in sizes.values()):
            path.write_text(json.dumps(sizes))
    return sizes
