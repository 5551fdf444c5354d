"""vLLM as the LLM behind the server: embeddings go out, tokens come back (serving/vllm_worker.py).

vLLM needs other versions of torch and transformers, so it has an environment (`make setup-vllm`) and a
process of its own. The length of compressed audio is known only after CTC, so prompts are sent as embeddings.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from serving.jobs import Sampling

WORKER = Path(__file__).with_name("vllm_worker.py")
PYTHON = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
START_SECONDS = 900.0
Receiver = Callable[[list[int], str | None], None]


class BackendError(RuntimeError):
    """vLLM cannot be started or has ended: one line."""


class _Row(NamedTuple):
    receive: Receiver  # new tokens; why the answer ends, if it does: stop | length
    fail: Callable[[str], None]


class VLLM:
    """vLLM's process and the connection to it. close() ends both."""

    def __init__(
        self,
        llm: str | Path,
        *,
        dtype: str,
        rows: int,
        positions: int | None,
        python: str | Path = PYTHON,
        worker: Path = WORKER,
        start_seconds: float = START_SECONDS,
    ):
        """llm: a folder of transformers' format, with LoRA merged. rows: answered at a time. Errors:
        BackendError."""
        if not Path(python).exists():
            raise BackendError(f"there is no {python}: make setup-vllm, or give --vllm-python")
        self.folder = tempfile.TemporaryDirectory(prefix="soundwave-vllm-")  # mode 700
        path = str(Path(self.folder.name) / "socket")
        self.log = Path(self.folder.name) / "log"
        command = [str(python), str(worker), "--model", str(llm), "--socket", path]
        command += ["--dtype", dtype, "--rows", str(rows)]
        command += ["--positions", str(positions)] if positions else []
        environment = os.environ | {
            "PYTHONSAFEPATH": "1",  # modules of serving/ do not hide vLLM's
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        }
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        self.rows: dict[int, _Row] = {}
        self.lock = threading.Lock()  # of rows, number and alive
        self.sending = threading.Lock()
        self.number = 0
        self.alive = False
        try:
            self.socket = self._connect(path, start_seconds)
        except BaseException:
            self._end_process()
            self.folder.cleanup()
            raise
        self.alive = True
        self.thread = threading.Thread(target=self._read, name="vllm", daemon=True)
        self.thread.start()

    def _connect(self, path: str, seconds: float) -> socket.socket:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
                errors = [line for line in lines if "Error" in line] or lines or ["no output"]
                raise BackendError(f"vLLM did not start: {errors[-1].strip()[:300]}")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
                return sock
            except OSError:
                sock.close()
                time.sleep(0.2)
        raise BackendError(f"vLLM did not start within {seconds:g} s")

    def submit(
        self,
        embeddings: torch.Tensor,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[int],
        receive: Receiver,
        fail: Callable[[str], None],
    ) -> int:
        """Queue a prompt [L, D]; return its number. receive and fail are called in another thread."""
        data = embeddings.float().cpu().contiguous().numpy().tobytes()
        with self.lock:
            self.number += 1
            number, is_alive = self.number, self.alive
            if is_alive:
                self.rows[number] = _Row(receive, fail)
        if not is_alive:
            fail("vLLM has ended")
            return number
        message = {
            "id": number,
            "shape": list(embeddings.shape),
            "bytes": len(data),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(stop),
        }
        with contextlib.suppress(OSError):  # the reading thread fails what is open
            self._send(message, data)
        return number

    def cancel(self, number: int) -> None:
        """Give up an answer: nothing more is received of it."""
        with self.lock:
            known = self.rows.pop(number, None)
        if known is not None:
            with contextlib.suppress(OSError):
                self._send({"cancel": number})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.socket.close()
        self._end_process()
        self.folder.cleanup()

    def _end_process(self) -> None:
        """The worker ends with its standard input; a worker that does not is killed."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: dict[str, Any], data: bytes = b"") -> None:
        head = json.dumps(message).encode()
        with self.sending:
            self.socket.sendall(struct.pack(">I", len(head)) + head + data)

    def _received(self) -> dict[str, Any]:
        (size,) = struct.unpack(">I", self._exactly(4))
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise ConnectionError("the connection is closed")
            data += piece
        return data

    def _read(self) -> None:
        try:
            while True:
                self._handle(self._received())
        except (OSError, ValueError):
            with self.lock:
                self.alive = False
                rows, self.rows = list(self.rows.values()), {}
            for row in rows:
                row.fail("vLLM has ended")

    def _handle(self, message: dict[str, Any]) -> None:
        number = message.get("id", -1)  # the greeting has none
        ends = bool(message.get("error") or message.get("finish"))
        with self.lock:
            row = self.rows.get(number)
            if row is not None and ends:
                del self.rows[number]
        if row is None:
            return
        if message.get("error"):
            row.fail(message["error"])
        else:
            row.receive(message["tokens"], message["finish"])
