"""Copy a packed folder to or from an object store, or between two.

    python -m data_tools.copy_packed shards/train s3://BUCKET/shards/train
    python -m data_tools.copy_packed gs://BUCKET/shards/train shards/train

Each shard is compared with the checksum of its index on the way. The index is written last, so a folder that
has one is complete; the same command again continues where an interruption ended it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from core.command_line import CommandParser
from core.console import one_line
from core.object_store import ObjectStore, StoreError, is_store_url, joined
from data_tools.progress import watched
from data_tools.shards import INDEX_NAME, TABLE_NAME, ShardError, ShardIndex


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Target:
    """Where a copy goes: a local folder or a URL."""

    def __init__(self, location: str):
        self.location = location
        self.store = ObjectStore(location) if is_store_url(location) else None
        if self.store is None:
            Path(location).mkdir(parents=True, exist_ok=True)

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Return what is there already. Errors: StoreError for anything but a missing object."""
        if self.store is None:
            paths = {name: Path(self.location) / name for name in names}
            return {name: path.stat().st_size if path.exists() else None for name, path in paths.items()}
        sizes: dict[str, int | None] = {}
        for name, answer in self.store.sizes(names).items():
            if isinstance(answer, StoreError):
                if answer.errno != errno.ENOENT:
                    raise answer
                sizes[name] = None
            else:
                sizes[name] = answer[0]
        return sizes

    def write(self, source: Path, name: str) -> None:
        """Errors: StoreError, OSError."""
        if self.store is not None:
            self.store.upload(source.absolute(), name)
            return
        unfinished = Path(self.location) / f".{name}.{os.getpid()}"
        try:
            shutil.copyfile(source, unfinished)
            os.replace(unfinished, Path(self.location) / name)
        finally:
            unfinished.unlink(missing_ok=True)


def copy(source: str, target: str) -> str:
    """Copy a packed folder; return what to print. Errors: ShardError, StoreError, OSError."""
    index, to = ShardIndex.load(source), Target(target)
    if index.damaged:
        raise ShardError(index.damaged[0])
    present_sizes = to.sizes([shard["url"] for shard in index.shards])
    todo = [n for n, shard in enumerate(index.shards) if present_sizes[shard["url"]] != shard["filesize"]]
    for number in watched(todo, "copying shards", " shards", len(todo)):
        shard = index.shards[number]
        with TemporaryDirectory() as scratch:
            path = index.folder / shard["url"]
            if index.is_remote:
                path = Path(scratch) / shard["url"]
                index.download(number, path)
            if sha256_of(path) != shard["sha256"]:
                raise ShardError(
                    f"shard {joined(source, shard['url'])} does not have the checksum of its index: copy or "
                    "pack it again"
                )
            to.write(path, shard["url"])
    for name in (TABLE_NAME, INDEX_NAME):
        to.write(index.folder / name, name)
    return f"{target}: {len(todo)} of {len(index.shards)} shards copied, the index last"


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m data_tools.copy_packed", __doc__, example="shards/train s3://bucket/train"
    )
    parser.add_argument("source", help="a packed folder or its URL")
    parser.add_argument("target", help="a folder or URL: s3://, gs://, or http(s):// of a WebDAV server")
    options = parser.parse_args(argv)
    try:
        print(copy(options.source, options.target))
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.target}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
