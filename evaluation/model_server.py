"""The server of a model (`python -m serving`) as the web demo uses it: its process, and requests to it."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

import httpx2

from core.console import OneLine, one_line, print_error, printable
from evaluation.endpoint import checked_key, checked_url, sent_in_clear

PATIENCE = 30.0  # seconds beyond the server's own time limit
STOP_SECONDS = 90.0


class ServerError(OneLine, ValueError):
    """What the server refuses, or that there is none; one line for visitors."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class ModelServer:
    """A running server. Errors of the constructor: AddressError, ServerError."""

    def __init__(
        self, url: str, key: str | None = None, *, key_source: str = "the environment", seconds: float = 600.0
    ):
        """seconds: that an answer may take."""
        self.url = checked_url(url).removesuffix("/v1") + "/v1"
        key = checked_key(key, key_source)
        if key is not None and sent_in_clear(self.url):
            print_error(f"warning: the key goes to {self.url} unencrypted")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = seconds + PATIENCE
        # A proxy of the environment does not know this machine's loopback.
        self._client = httpx2.Client(headers=headers, timeout=timeout, trust_env=url.startswith("https:"))
        self.description: dict[str, Any] = self._json("GET", "/models")["data"][0]

    @property
    def name(self) -> str:
        return self.description["id"]

    @property
    def has_llm(self) -> bool:
        return self.description.get("llm") is not None

    @property
    def max_seconds(self) -> float:
        return self.description["max_seconds"]

    def transcribe(self, data: bytes) -> dict:
        """Return the verbose_json of a recording, with its words and frames. Errors: ServerError."""
        fields = {
            "model": self.name,
            "response_format": "verbose_json",
            "timestamp_granularities[]": "word",
            "include[]": "frames",
        }
        return self._json("POST", "/audio/transcriptions", data=fields, files={"file": ("audio", data)})

    def stream_answer(
        self, data: bytes, question: str, include: list[str]
    ) -> Generator[str | dict[str, Any]]:
        """Yield the answer to a question about audio in pieces, then the last chunk, with what `include`
        names. The server gives up the answer where the iterator is closed. Errors: ServerError."""
        audio = {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
        }
        content = [audio, *([{"type": "text", "text": question}] if question else [])]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "include": include,
        }
        with self._answering("POST", "/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise _refusal(event)
                (choice,) = event["choices"]
                if piece := choice["delta"].get("content"):
                    yield piece
                if choice["finish_reason"] is not None:
                    yield event

    def _json(self, method: str, path: str, **request: Any) -> dict:
        with self._answering(method, path, **request) as response:
            return json.loads(response.read())

    @contextlib.contextmanager
    def _answering(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        try:
            with self._client.stream(method, self.url + path, **request) as response:
                if response.status_code != 200:
                    raise _refusal(json.loads(response.read()))
                yield response
        except (httpx2.HTTPError, ValueError) as error:
            if isinstance(error, ServerError):
                raise
            print_error(f"error: {self.url}{path}: {one_line(error)}")
            raise ServerError("the server does not answer: try again later") from None


def _refusal(body: dict) -> ServerError:
    error = body.get("error") or {}
    return ServerError(printable(error.get("message") or "the server refused the request"), error.get("code"))


@contextlib.contextmanager
def own_server(arguments: list[str]) -> Iterator[str]:
    """Start `python -m serving ARGUMENTS` on a free port of the loopback; yield its address and end it
    afterwards. Errors: ServerError; the server's own line is printed."""
    command = [sys.executable, "-m", "serving", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    ready: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, ready), daemon=True).start()
    try:
        url = ready.get()
        if url is None:
            raise ServerError("the server did not start")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], ready: queue.Queue[str | None]) -> None:
    """Put the server's address into the queue, None at its end; print what is no information."""
    assert process.stderr is not None
    for line in process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            print_error(line.rstrip("\n"))
            continue
        if event.get("event") == "ready":
            ready.put(event["url"])
        elif event.get("level") not in ("info", "debug"):
            print_error(f"{event.get('level')}: {event.get('event')}")
    ready.put(None)
