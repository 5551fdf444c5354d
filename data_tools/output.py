"""The folder that is packed into: no other files, and one process at a time for each part."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from core.console import duration, printable_line
from data_tools.corpora import CorpusError
from data_tools.shards import INDEX_NAME, TABLE_NAME, OutputError

WORK = ".pack"  # folder inside the output: the plan, unfinished shards, and what is known of finished ones
_LOCK = "lock"
PATIENCE_SECONDS = 120.0  # that a lock is waited for: a node that died keeps its locks on NFS for about 90 s
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class InUse(OutputError):
    """Another process packs into the same folder."""


def check_output(folder: Path) -> None:
    """Refuse a folder that holds what pack did not write. Errors: CorpusError."""
    if not folder.is_dir() or (folder / INDEX_NAME).exists() or (folder / WORK / "done").is_dir():
        return
    try:
        strange = sorted(name for name in os.listdir(folder) if not _may_be_there(folder / name))
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror}") from error
    if strange:
        some = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
        raise CorpusError(
            f"{folder} holds {some}, which this command did not write: give a new or empty --out"
        )


def _may_be_there(path: Path) -> bool:
    """Whether a file may be in a folder before anything is packed into it."""
    if path.name == "lost+found":  # of a file system's top folder
        return True
    if path.name == WORK:
        return path.is_dir() and not any(path.iterdir())
    if path.name == "rejected.jsonl":  # what a command left that found nothing to pack
        try:
            with open(path, "rb") as file:
                line = file.readline(1 << 20)
            return not line or "reason" in json.loads(line)
        except (OSError, ValueError):
            return False
    return path.name == f".{TABLE_NAME}" or path.name.startswith(".nfs")


@contextmanager
def locked(folder: Path, part: tuple[int, int] | None) -> Iterator[None]:
    """Keep others from packing the same part of a folder, or from merging it meanwhile. Whoever is killed
    lets go of it.

    Errors: InUse after a while; OutputError where the folder cannot be written. A file system without locks
    is used without.
    """
    with ExitStack() as stack:
        work = folder / WORK
        if part is None:
            _lock(stack, work / _LOCK, fcntl.LOCK_EX, folder)
        else:
            _lock(stack, work / _LOCK, fcntl.LOCK_SH, folder)
            _lock(stack, work / f"{_LOCK}-{part[0]}-of-{part[1]}", fcntl.LOCK_EX, folder)
        yield


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stack: ExitStack, path: Path, kind: int, folder: Path) -> None:
    until, is_logged = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            path.parent.mkdir(exist_ok=True)  # whoever finishes the packing removes it
            file: IO[str] = stack.enter_context(open(path, "a+"))
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            # Not flock: workers that outlive a killed parent for a moment would hold that.
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
            if _is_at(file, path):
                break
            file.close()  # removed between the two calls: no other process sees this lock
            continue
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read(200).strip() or "unknown"
            file.close()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OutputError(f"cannot lock {path}: {error.strerror}") from error
            return
        what = f"{folder} is being packed by another process ({who})"
        if time.monotonic() >= until:
            raise InUse(f"{what}: wait until it has ended; if it has ended already, remove {path}")
        if not is_logged:
            print(
                f"{printable_line(what)}: waiting for up to {duration(PATIENCE_SECONDS)}",
                file=sys.stderr,
                flush=True,
            )
            is_logged = True
        time.sleep(1.0)
    if kind == fcntl.LOCK_EX:
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
