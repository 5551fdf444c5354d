"""A web server of a folder that answers range requests, with latency and faults: the other side of
core/object_store.py in tests and in benchmarks/object_store.py.

    python -m tests.stream.range_server FOLDER DELAY        prints its port, serves until its input ends
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class RangeServer(ThreadingHTTPServer):
    """faults: what the next GETs of shards do instead of answering: an HTTP status, "cut" (less than the
    promised bytes), "hang". asked: (method, name) -> requests. headers: of each request."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.delay = Path(folder), delay
        self.faults: list[int | str] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.headers: list[dict[str, str]] = []
        self.etags: dict[tuple[str, int], str] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that was ended closes its connections: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_PUT(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._head(201, 0, '"written"')

    def _head(self, status: int, length: int, etag: str, span: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.flush()

    def _answer(self, with_body: bool) -> None:
        server = self.server
        path = server.folder / unquote(self.path).lstrip("/")
        with server.lock:
            server.asked[self.command, path.name] += 1
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults and with_body and path.suffix == ".tar" else None
        time.sleep(server.delay)
        if fault == "hang":
            time.sleep(30)
        if not path.is_file() or isinstance(fault, int):
            self._head(fault or 404, 0, '""')
            return
        size = path.stat().st_size
        key = str(path), path.stat().st_mtime_ns
        if key not in server.etags:
            server.etags[key] = f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
        etag = server.etags[key]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        self._head(
            206 if wanted else 200, end - start, etag, f"bytes {start}-{end - 1}/{size}" if wanted else None
        )
        if not with_body:
            return
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.wfile.flush()
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_) -> None:
        pass


if __name__ == "__main__":
    server = RangeServer(Path(sys.argv[1]), float(sys.argv[2]))
    print(server.server_port, flush=True)
    sys.stdin.read()
