"""vLLM as the LLM of the server and of evaluation: embeddings go out, tokens come back (vllm_worker.py).

vLLM needs other versions of torch and transformers, so it has an environment (`make setup-vllm`) and a
process of its own. The length of compressed audio is known only after CTC, so prompts are sent as embeddings.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.console import OneLine
from model.artifact import LORA, FolderError, tuned_parts
from model.export import export_llm
from model.generation.running import Choice, sampler
from model.language_model import base_of, context_length
from model.soundwave import Soundwave

WORKER = Path(__file__).with_name("vllm_worker.py")
PYTHON = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
START_SECONDS = 900.0
GPU_SHARE = 0.9  # vLLM's, of the GPU memory that the encoder and the adapters leave
Receiver = Callable[[list[int], str | None], None]


class BackendError(OneLine, RuntimeError):
    """vLLM cannot be started or has ended: one line."""


class Sampling(NamedTuple):
    """How tokens are drawn; temperature 0: the most probable one."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The same for `Soundwave.generate`."""
        if self.temperature == 0.0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}

    @property
    def choice(self) -> Choice | None:
        """The same for a row of `model.generation.running`."""
        return sampler(self.temperature, self.top_p) if self.temperature else None


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
        device: torch.device | None = None,
        python: str | Path = PYTHON,
        worker: Path = WORKER,
        start_seconds: float = START_SECONDS,
    ):
        """llm: a folder of transformers' format, with LoRA merged. rows: answered at a time. device: the
        GPU, where it is one. Errors: BackendError."""
        if not Path(python).exists():
            raise BackendError(f"there is no {python}: make setup-vllm, or give --vllm-python")
        self.folder = tempfile.TemporaryDirectory(prefix="soundwave-vllm-")  # mode 700
        path = str(Path(self.folder.name) / "socket")
        self.log = Path(self.folder.name) / "log"
        command = [str(python), str(worker), "--model", str(llm), "--socket", path]
        command += ["--dtype", dtype, "--rows", str(rows)]
        command += ["--positions", str(positions)] if positions else []
        command += gpu_options(device)
        environment = os.environ | {
            "PYTHONSAFEPATH": "1",  # modules of serving/ do not hide vLLM's
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            **gpu_environment(device),
        }
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its process group, which is killed with it
            )
        self.rows = rows
        self.open: dict[int, _Row] = {}
        self.lock = threading.Lock()  # of open, number and alive
        self.sending = threading.Lock()
        self.number = 0
        self.alive = self.closing = False
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
                self.open[number] = _Row(receive, fail)
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

    def answer(
        self, embeddings: torch.Tensor, *, max_tokens: int, sampling: Sampling, stop: Sequence[int]
    ) -> Future[list[int]]:
        """Queue a prompt [L, D]; return its answer's tokens, without the end of turn, as they will be. Errors
        of the result: BackendError."""
        tokens: list[int] = []
        answer: Future[list[int]] = Future()

        def receive(new: list[int], why: str | None) -> None:
            tokens.extend(new)
            if why is not None:
                end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
                answer.set_result(tokens[:end])

        self.submit(
            embeddings,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            receive=receive,
            fail=lambda why: answer.set_exception(BackendError(why)),
        )
        return answer

    def cancel(self, number: int) -> None:
        """Give up an answer: nothing more is received of it."""
        with self.lock:
            request = self.open.pop(number, None)
        if request is not None:
            with contextlib.suppress(OSError):
                self._send({"cancel": number})

    def close(self) -> None:
        self.closing = True
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
        self._kill_group()

    def _kill_group(self) -> None:
        """vLLM's engine processes outlive a worker that was killed, and keep their memory."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

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
                rows, self.open = list(self.open.values()), {}
            if not self.closing:
                self._kill_group()
            for row in rows:
                row.fail("vLLM has ended")

    def _handle(self, message: dict[str, Any]) -> None:
        number = message.get("id", -1)  # the greeting has none
        ends = bool(message.get("error") or message.get("finish"))
        with self.lock:
            row = self.open.get(number)
            if row is not None and ends:
                del self.open[number]
        if row is None:
            return
        if message.get("error"):
            row.fail(message["error"])
        else:
            row.receive(message["tokens"], message["finish"])


def llm_folder(model: Soundwave, run: Path, out: Path, llm: str | None = None) -> Path:
    """Return a folder with a loaded model's LLM as it was trained: LoRA (DoRA, too), layers trained whole and
    a trained LLM merged into `out`; the LLM's own folder where it was not trained. Errors: FolderError,
    SourceError."""
    is_trained = (run / LORA).is_dir() or "llm" in tuned_parts(run)
    return export_llm(run, out, llm) if is_trained else model.sources["llm"].files


def start(
    model: Soundwave, run: Path, *, llm: str | None = None, rows: int, python: str | Path | None = None
) -> VLLM:
    """Start vLLM on the LLM of a loaded model folder, with LoRA merged, and drop the model's own copy of its
    layers. llm: the LLM's folder, where it is not where `run` names it. Errors: FolderError, SourceError,
    BackendError."""
    if model.llm is None:
        raise FolderError(f"{run} is of stage 1 and has no LLM: leave --backend vllm out")
    base: Any = base_of(model.llm)
    base.get_decoder().layers = torch.nn.ModuleList()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="soundwave-llm-") as merged:
        return VLLM(
            llm_folder(model, run, Path(merged), llm),
            dtype=model.config.dtype,
            rows=rows,
            positions=context_length(base.config),
            device=next(model.parameters()).device,
            python=python or PYTHON,
            worker=WORKER,
        )


def gpu_options(device: torch.device | None) -> list[str]:
    """vLLM's share of a GPU beside what is on it already."""
    if device is None or device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    return ["--gpu-share", f"{GPU_SHARE * free / total:.3f}"]


def gpu_environment(device: torch.device | None) -> dict[str, str]:
    """The model's GPU as the only one: vLLM takes the first."""
    if device is None or device.type != "cuda":
        return {}
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}
