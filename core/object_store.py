"""Objects under one URL of an object store or web server: read by range, listed by size, written.

    s3://BUCKET/PREFIX   gs://BUCKET/PREFIX   http(s)://HOST/PATH

The client is obstore (requirements-stores.txt), which runs its requests in threads of its own and hangs in a
process that was forked after its first request. Data workers are forked, so it runs in a child process
(core/object_client.py), one for each process that reads. Credentials are found there, where each service's
own tools look for them; a URL that holds any is refused.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from core.console import OneLine, printable_line

SCHEMES = ("s3", "gs", "http", "https")
PART = 8 << 20  # bytes of one request for a large object
PARTS_AT_A_TIME = 4
ROOT = Path(__file__).resolve().parent.parent


class StoreError(OneLine, OSError):
    """A request that failed after the client's own retries; one line without credentials."""

    def __init__(self, reason: str, number: int = errno.EIO):
        super().__init__(number, reason)

    def __str__(self) -> str:
        return printable_line(self.strerror)

    def __reduce__(self) -> tuple:
        return type(self), (self.strerror, self.errno)


@dataclass
class Fetched:
    """What a request brought. size: of the whole object."""

    data: bytes
    size: int
    etag: str | None


def timeout_seconds() -> float:
    """Return how long one request may take, from SOUNDWAVE_STORE_TIMEOUT (30)."""
    try:
        seconds = float(os.environ.get("SOUNDWAVE_STORE_TIMEOUT", "30"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise StoreError("SOUNDWAVE_STORE_TIMEOUT is not a number of seconds from 0 to 3600", errno.EINVAL)
    return seconds


def is_store_url(text: object) -> bool:
    return str(text).partition("://")[0] in SCHEMES and "://" in str(text)


def is_folder_url(text: object) -> bool:
    """Whether a URL may be that of a packed folder. Names of tar files and patterns of several are streamed
    without an index (stream/unindexed.py)."""
    last = str(text).rstrip("/").rpartition("/")[2]
    is_tar = ".tar" in last or last.endswith((".tgz", ".tbz2", ".txz"))
    return is_store_url(text) and not is_tar and not set(str(text)) & set("{}*[]") and "::" not in str(text)


def folder_name(location: object) -> str:
    """Return the last part of a path or URL."""
    return Path(urlsplit(str(location)).path).name if is_store_url(location) else Path(str(location)).name


def joined(location: object, name: str) -> str:
    """Return the path or URL of `name` in a folder."""
    return (
        f"{str(location).rstrip('/')}/{name}" if is_store_url(location) else str(Path(str(location)) / name)
    )


def shown_url(url: str) -> str:
    """Return a URL without what may be a password or a token in it."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def check_url(url: str) -> None:
    """Errors: StoreError for a URL without a host, and for one with a password, a token or a query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise StoreError("the URL cannot be parsed", errno.EINVAL) from None
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise StoreError(
            "the URL holds credentials or a query: remove them; credentials belong where the service's own "
            "tools find them (docs/prepare-data.md)",
            errno.EINVAL,
        )
    if not parts.netloc:
        raise StoreError("the URL names no bucket or host", errno.EINVAL)


class ObjectStore:
    """Reads and writes objects below one URL. One process's own: after a fork make another.

    Errors of all methods: StoreError.
    """

    def __init__(self, url: str):
        check_url(url)
        self.url = url.rstrip("/")
        self._limit = timeout_seconds()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._waiting: dict[int, Future] = {}
        self._next = 0

    def request(self, name: str, start: int | None = None, size: int | None = None) -> Future[Fetched]:
        """Ask for an object, or `size` bytes of it from `start` on; returns at once."""
        return self._request({"do": "get", "name": name, "start": start, "size": size})

    def result(self, future: Future) -> Fetched:
        """Wait for a request. A client that answers nothing in twice its own limit is ended."""
        try:
            return future.result(self._limit * 8 + 30)
        except FutureTimeout:
            self.close()
            raise StoreError("the object store's client process does not answer", errno.ETIMEDOUT) from None

    def read(self, name: str, start: int | None = None, size: int | None = None) -> Fetched:
        fetched = self.result(self.request(name, start, size))
        if size is not None and len(fetched.data) != size:
            raise StoreError(f"{len(fetched.data)} bytes came, {size} were asked for")
        return fetched

    def sizes(self, names: Iterable[str]) -> dict[str, tuple[int, str | None] | StoreError]:
        """Return size and ETag of objects, or why there is none."""
        futures = {name: self._request({"do": "head", "name": name}) for name in names}
        sizes: dict[str, tuple[int, str | None] | StoreError] = {}
        for name, future in futures.items():
            try:
                answer = self.result(future)
                sizes[name] = answer.size, answer.etag
            except StoreError as error:
                sizes[name] = error
        return sizes

    def download(self, name: str, size: int, path: Path) -> None:
        """Write an object of `size` bytes to `path`, a few parts at a time."""
        starts = list(range(0, size, PART))
        with open(path, "wb") as file:
            pending: list[Future] = []
            for position, start in enumerate(starts):
                while len(pending) < PARTS_AT_A_TIME and position + len(pending) < len(starts):
                    at = starts[position + len(pending)]
                    pending.append(self.request(name, at, min(PART, size - at)))
                fetched = self.result(pending.pop(0))
                if len(fetched.data) != min(PART, size - start) or fetched.size != size:
                    raise StoreError(f"{name} has {fetched.size} bytes now, {size} were expected")
                file.write(fetched.data)

    def upload(self, path: Path, name: str) -> None:
        """Write a local file to the store; it appears there whole or not at all."""
        self._request({"do": "put", "name": name, "path": str(path)}).result()

    def names(self) -> list[str]:
        """Return the names of objects below the URL, at most the first 1,000."""
        return json.loads(self.result(self._request({"do": "list", "name": ""})).data)

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error where the service has none for it."""
        self.result(self._request({"do": "delete", "name": name}))

    def close(self) -> None:
        """End the client process."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _request(self, question: dict) -> Future:
        future: Future = Future()
        with self._lock:
            process = self._start()
            self._next += 1
            self._waiting[self._next] = future
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"id": self._next, **question}).encode() + b"\n")
                process.stdin.flush()
            except OSError:  # it has ended; _read_answers fails the requests that wait
                self._waiting.pop(self._next, None)
                self._process = None
                future.set_exception(StoreError("the object store's client process has ended"))
        return future

    def _start(self) -> subprocess.Popen:
        if self._process is not None:
            return self._process
        if importlib.util.find_spec("obstore") is None:
            raise StoreError(
                f"{self.url} needs the package obstore: make setup EXTRAS=stores, or pip install -r "
                "requirements-stores.txt",
                errno.ENOSYS,
            )
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "core" / "object_client.py"), self.url, f"{self._limit:g}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ""},
        )
        self._waiting = {}
        threading.Thread(target=self._read_answers, args=(self._process, self._waiting), daemon=True).start()
        return self._process

    @staticmethod
    def _read_answers(process: subprocess.Popen, waiting: dict[int, Future]) -> None:
        """Give each answer to the request that waits for it."""
        output = process.stdout
        assert output is not None
        with suppress(OSError, ValueError):
            while line := output.readline():
                answer = json.loads(line)
                data = output.read(answer.get("bytes", 0))
                future = waiting.pop(answer["id"], None)
                if future is None:
                    continue
                if "error" in answer:
                    future.set_exception(StoreError(answer["error"], answer["errno"]))
                elif len(data) != answer["bytes"]:
                    future.set_exception(StoreError("the object store's client process has ended"))
                else:
                    future.set_result(Fetched(data, answer["size"], answer["etag"]))
        while waiting:
            _, future = waiting.popitem()
            future.set_exception(StoreError("the object store's client process has ended"))
