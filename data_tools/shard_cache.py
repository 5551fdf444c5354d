"""Samples of remote shards on the node's own disk: a bounded cache that all processes of the node share.

    FOLDER/INDEX/index.json samples.npy   a packed folder's index, as it was read
    FOLDER/INDEX/NAME.data                a shard's size, with holes where nothing was read yet
    FOLDER/INDEX/NAME.rows                a byte for each of its samples: 1 where the data is there

Nothing here is trusted: the caller compares what it reads with the index's hashes, and takes a sample that
differs for one that is not there. So no lock is needed between a reader and another process that evicts.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

from core.private_folder import private_folder

DEFAULT_GB = 50.0
FREE_SHARE = 0.1  # of the disk that the cache leaves free
OPEN_SHARDS = 64
LOGGER = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $SOUNDWAVE_SHARD_CACHE, or a folder of this user in the node's temporary files."""
    configured = os.environ.get("SOUNDWAVE_SHARD_CACHE")
    return (
        Path(configured) if configured else Path(tempfile.gettempdir()) / f"soundwave-shards-{os.geteuid()}"
    )


def cache_bytes() -> int:
    """Return the most that the cache may hold, from SOUNDWAVE_SHARD_CACHE_GB. Errors: ValueError."""
    text = os.environ.get("SOUNDWAVE_SHARD_CACHE_GB", f"{DEFAULT_GB:g}")
    try:
        size = float(text) * 1e9
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e18:
        raise ValueError(f"SOUNDWAVE_SHARD_CACHE_GB={text}: give a number of GB, 0 for no cache")
    return int(size)


class ShardCache:
    """The cached samples of one packed folder. folder: FOLDER/INDEX. most: bytes of all of FOLDER."""

    def __init__(self, folder: Path, most: int):
        self.folder = private_folder(folder)
        self.most = most
        self._open: OrderedDict[str, tuple[int, mmap.mmap]] = OrderedDict()
        self._written = most  # so that a process begins by looking

    def has(self, shard: str, position: int) -> bool:
        """Whether a shard's sample number `position` is cached."""
        if not self.most:
            return False
        opened = self._open.get(shard) or self._start(shard, 0, 0)
        return opened is not None and position < len(opened[1]) and bool(opened[1][position])

    def read(self, shard: str, position: int, start: int, size: int) -> bytes | None:
        """Return the bytes of a shard's sample number `position`; None where they are not cached."""
        if not self.has(shard, position):
            return None
        opened = self._open[shard]
        try:
            data = os.pread(opened[0], size, start)
        except OSError:
            return None
        return data if len(data) == size else None

    def write(self, shard: str, samples: int, filesize: int, position: int, start: int, data: bytes) -> None:
        """Keep a sample's bytes. A disk that refuses ends the caching, not the reading."""
        if not self.most:
            return
        try:
            self._written += len(data)
            if self._written > min(self.most // 50, 1 << 28):
                self._written = 0
                self._make_room()
            opened = self._open.get(shard) or self._start(shard, samples, filesize)
            if opened is not None:
                os.pwrite(opened[0], data, start)
                opened[1][position] = 1
        except OSError as error:
            LOGGER.warning("%s: nothing more is cached: %s", self.folder, error.strerror)
            self.most = 0

    def close(self) -> None:
        while self._open:
            descriptor, rows = self._open.popitem()[1]
            rows.close()
            os.close(descriptor)

    def _start(self, shard: str, samples: int, filesize: int) -> tuple[int, mmap.mmap] | None:
        """Open a shard's two files; make them where `samples` is given."""
        data, rows = self.folder / f"{shard}.data", self.folder / f"{shard}.rows"
        flags = os.O_RDWR | (os.O_CREAT if samples else 0)
        try:
            marks = os.open(rows, flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            if samples and os.fstat(marks).st_size < samples:
                os.ftruncate(marks, samples)
            mapped = mmap.mmap(marks, 0)
            os.utime(marks)  # the order in which shards make room
            descriptor = os.open(data, flags, 0o600)
        except (ValueError, FileNotFoundError):  # another process is making them
            return None
        finally:
            os.close(marks)
        if filesize and os.fstat(descriptor).st_size < filesize:
            os.ftruncate(descriptor, filesize)
        self._open[shard] = descriptor, mapped
        while len(self._open) > OPEN_SHARDS:
            old, old_rows = self._open.popitem(last=False)[1]
            old_rows.close()
            os.close(old)
        return descriptor, mapped

    def _make_room(self) -> None:
        """Empty the shards that were opened longest ago, of any packed folder, until the rest fits."""
        with open(self.folder.parent / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            entries = []
            for rows in self.folder.parent.glob("*/*.rows"):
                data = rows.with_suffix(".data")
                if data.exists() and (used := data.stat().st_blocks * 512):
                    entries.append((rows.stat().st_mtime, used, rows, data))
            disk = shutil.disk_usage(self.folder)
            used = sum(size for _, size, _, _ in entries)
            allowed = min(self.most, used + disk.free - int(FREE_SHARE * disk.total))
            if used <= allowed:
                return
            for _, size, rows, data in sorted(entries):
                with open(rows, "r+b") as file:
                    file.write(bytes(os.fstat(file.fileno()).st_size))
                whole = data.stat().st_size
                os.truncate(data, 0)
                os.truncate(data, whole)
                used -= size
                if used <= 0.8 * allowed:
                    return
