"""Write DeepSpeed's states to files: copied to host memory at once, written and hashed by a thread."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import IO, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from core.console import one_line


class _HashingFile:
    """A file for torch.save that hashes what passes, so that no byte is read twice."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _on_host(value):
    """A copy of a nested state that later optimizer steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((k, _on_host(v)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on_host(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(v) for v in value)
    return value


class BackgroundWriter(CheckpointEngine):
    """DeepSpeed hands its states here instead of to torch.save: copied at once, written by a thread."""

    def __init__(self):
        super().__init__()
        self.name = "BackgroundWriter"
        self.thread: threading.Thread | None = None
        self.pending: list[tuple[dict, Path]] = []
        self.queued: set[str] = set()  # names of the files that the thread has to write
        self.written: dict[str, dict] = {}  # file name -> size and sha256
        self.error: BaseException | None = None

    def create(self, info) -> None:
        pass

    def save(self, state_dict, path: str) -> None:
        self.pending.append((_on_host(state_dict), Path(path)))

    def load(self, path: str, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)  # inside safe_load.data_only

    def commit(self, info) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False

    def start(self) -> None:
        self.written, self.error = {}, None
        work, self.pending = self.pending, []
        self.queued = {path.name for _, path in work}

        def write() -> None:
            try:
                for state, path in work:
                    file = _HashingFile(path)
                    try:
                        torch.save(state, cast(IO[bytes], file))  # it has what torch.save calls
                    finally:
                        file.close()
                    self.written[path.name] = {"size": file.size, "sha256": file.digest.hexdigest()}
            except BaseException as error:  # e.g. no memory; exceptions in a thread are otherwise lost
                self.error = error

        self.thread = threading.Thread(target=write, name="checkpoint-writer")
        self.thread.start()

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    @property
    def problem(self) -> str | None:
        """Why not all that was queued is on disk; asked when the thread has ended."""
        if self.error is not None:
            return one_line(self.error)
        missing = sorted(self.queued - self.written.keys())
        return f"not written: {', '.join(missing)}" if missing else None
