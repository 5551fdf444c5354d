"""A packed folder that is written to an object store shard by shard.

    URL/.pack-begun.json      written first: the options of whoever packs here; removed last
    URL/NAME-000000.tar ...   each uploaded when it is complete, and then removed from this disk
    URL/index.json            written last, after samples.npy: a folder with an index is complete

Plan and summaries stay in the local work folder (`pack --work`) until the index is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from core.object_store import ObjectStore, StoreError, joined
from core.private_folder import NotPrivate, private_folder
from data_tools.corpora import CorpusError
from data_tools.shards import INDEX_NAME, TABLE_NAME, OutputError

SCHEMES = ("s3", "gs")  # of stores that list and remove objects
_BEGUN = ".pack-begun.json"
_WRONG = (errno.EINVAL, errno.ENOSYS)  # of the command or the environment, not of the store
_LISTS = ("rejected.jsonl", "findings.jsonl")

T = TypeVar("T")


def work_folder(url: str) -> Path:
    """Return where the unfinished work of a URL is by default. Errors: OutputError."""
    base = Path(tempfile.gettempdir()) / f"soundwave-pack-{os.geteuid()}"
    try:
        return private_folder(base) / hashlib.sha256(url.encode()).hexdigest()[:16]
    except (NotPrivate, OSError) as error:
        raise OutputError(f"{error}: give --work DIR") from None


class Upload:
    """Objects below one URL. May be used in a process and its forks.

    Errors of all methods: OutputError where the store fails, CorpusError for what has to be fixed first.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._store: ObjectStore | None = None
        self._owner = 0

    def close(self) -> None:
        """End the client process."""
        if self._store is not None and self._owner == os.getpid():
            self._store.close()
        self._store = None

    def check(self, name: str, digest: str) -> None:
        """Refuse a place that holds what this command did not write. name: of the shards."""
        there = self._do("list", lambda store: store.names())
        if not there:
            return
        if _BEGUN in there:
            begun = self._read(_BEGUN)
            if begun is not None and json.loads(begun).get("options") != digest:
                raise CorpusError(
                    f"{self.url} was begun with other options: finish it with those, or remove what is there"
                )
        # rejected.jsonl alone: of a command that found nothing to pack.
        ours = {_BEGUN, INDEX_NAME, TABLE_NAME, *_LISTS} if _BEGUN in there else {"rejected.jsonl"}
        shard = re.compile(re.escape(name) + r"-\d{6,}\.tar") if _BEGUN in there else None
        strange = sorted(n for n in there if n not in ours and not (shard and shard.fullmatch(n)))
        if strange:
            some = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
            raise CorpusError(
                f"{self.url} holds {some}, which this command did not write: give another --out, or remove it"
            )

    def begin(self, digest: str, scratch: Path) -> None:
        """Claim the place for one command's options."""
        path = scratch / f"{_BEGUN}.{os.getpid()}"
        path.write_text(json.dumps({"options": digest}) + "\n")
        self._do(f"write {_BEGUN}", lambda store: store.upload(path.absolute(), _BEGUN))
        path.unlink()

    def index(self) -> dict | None:
        """Return the index of a finished folder; None where there is none."""
        data = self._read(INDEX_NAME)
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            raise CorpusError(f"{joined(self.url, INDEX_NAME)} is no JSON: remove it") from None

    def put(self, path: Path, name: str) -> None:
        """Upload a file, and compare the object's size with it."""
        self._do(f"write {name}", lambda store: store.upload(path.absolute(), name))
        size, stored = path.stat().st_size, self.sizes([name])[name]
        if stored != size:
            raise OutputError(f"{joined(self.url, name)} has {stored} bytes after its upload, not {size}")

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the sizes of objects, None for those that are not there."""
        found: dict[str, int | None] = {}
        for name, answer in self._do("read sizes", lambda store: store.sizes(names)).items():
            if isinstance(answer, StoreError) and answer.errno != errno.ENOENT:
                raise self._failed(f"read {name}", answer)
            found[name] = None if isinstance(answer, StoreError) else answer[0]
        return found

    def finish(self, folder: Path) -> None:
        """Upload what the merge has written into `folder`, the index last."""
        for name in (*_LISTS, TABLE_NAME, INDEX_NAME):
            if (folder / name).exists():
                self.put(folder / name, name)
        self.end()

    def end(self) -> None:
        """Give the place up, if a kill has not let `finish` do so."""
        if _BEGUN in self._do("list", lambda store: store.names()):
            self._do(f"remove {_BEGUN}", lambda store: store.delete(_BEGUN))

    @staticmethod
    def remove_copies(folder: Path) -> None:
        """Remove from the work folder what `finish` has uploaded."""
        for name in (*_LISTS, TABLE_NAME, INDEX_NAME):
            (folder / name).unlink(missing_ok=True)

    def _read(self, name: str) -> bytes | None:
        def read(store: ObjectStore) -> bytes | None:
            try:
                return store.read(name).data
            except StoreError as error:
                if error.errno == errno.ENOENT:
                    return None
                raise

        return self._do(f"read {name}", read)

    def _do(self, what: str, act: Callable[[ObjectStore], T]) -> T:
        if self._store is None or self._owner != os.getpid():
            try:
                self._store, self._owner = ObjectStore(self.url), os.getpid()
            except StoreError as error:
                raise self._failed(what, error) from None
        try:
            return act(self._store)
        except StoreError as error:
            raise self._failed(what, error) from None

    def _failed(self, what: str, error: StoreError) -> OutputError | CorpusError:
        kind = CorpusError if error.errno in _WRONG else OutputError
        return kind(f"{self.url}: cannot {what}: {error}")
