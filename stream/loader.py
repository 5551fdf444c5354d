"""Jobs through worker processes, results in order: the machinery under the streams, with a watchdog that
names what is slow."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from core.console import OneLine
from model.batch import Batch

SLOW_AFTER = 60.0  # seconds on one utterance before the watchdog names the worker
STUCK_AFTER = 900.0  # seconds on one utterance before the worker is ended and the run stops
SMALL = 1 << 16  # bytes of a tensor that goes through the pipe between processes
PHASES = ("read", "decode", "prepare", "collate")  # of a worker's time
LOGGER = logging.getLogger(__name__)


class StreamStalled(OneLine, RuntimeError):
    """A worker died or delivers nothing; the message names it and what it was reading."""


@dataclass
class Job:
    """One micro-batch to make. entries [n] of PLANNED."""

    step: int
    position: int  # of this micro-batch in the step
    count: int  # micro-batches of the step
    entries: np.ndarray
    following: np.ndarray | None = None  # entries of this worker's next job, to be read ahead


@dataclass
class Loaded:
    """One micro-batch, made."""

    job: Job
    batch: Batch
    metas: list[dict]  # the JSON of each row
    seconds: float  # of audio
    padded_seconds: float
    rejected: list[dict]
    retries: int
    timings: dict[str, float]  # seconds of a worker, by PHASES

    def pin_memory(self) -> Loaded:
        return self.unpacked()._each(torch.Tensor, torch.Tensor.pin_memory)

    def packed(self) -> Loaded:
        """Small tensors as arrays: a tensor leaves a worker as a file of shared memory, which costs more than
        they do."""
        return self._each(torch.Tensor, lambda value: value.numpy() if value.nbytes <= SMALL else value)

    def unpacked(self) -> Loaded:
        return self._each(np.ndarray, torch.from_numpy)

    def _each(self, kind: type, change: Callable) -> Loaded:
        for name, value in vars(self.batch).items():
            if isinstance(value, kind):
                setattr(self.batch, name, change(value))
        return self


class Reader(Protocol):
    """What a Loader runs: a torch Dataset that knows what its workers are at."""

    at: (
        torch.Tensor
    )  # [workers, 4] float64, shared: [time it began (0: idle), three numbers that `doing` understands]

    def doing(self, worker: int) -> tuple[float, str] | None:
        """(seconds, what) of the utterance that a worker is at."""


def _packed(loaded: Loaded) -> Loaded:
    return loaded.packed() if torch.utils.data.get_worker_info() else loaded


def _init_worker(worker: int) -> None:
    """Signals of the batch system go to all processes of a job; what they mean is decided by the main process
    alone."""
    for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: speed perturbation rounds by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _kill(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


class Loader:
    """Runs jobs through worker processes and yields the results in the order of the jobs; 0 workers: in this
    process.

    jobs: None where the reader makes up its own (an IterableDataset): then worker after worker gives one
    result.
    Errors: StreamStalled where a worker died, or was at one utterance for `stuck_after` seconds; what a
    worker raises.
    """

    def __init__(
        self,
        reader: Reader,
        jobs: Iterator[Job] | None,
        workers: int,
        prefetch: int,
        *,
        slow_after: float = SLOW_AFTER,
        stuck_after: float = STUCK_AFTER,
    ):
        self._reader, self._jobs, self._workers, self._prefetch = reader, jobs, workers, max(prefetch, 1)
        self._slow_after, self._stuck_after = slow_after, stuck_after
        self._stop = threading.Event()
        self._stuck: dict[int, float] = {}  # worker -> seconds it was at one utterance when it was ended
        self._finalizer: weakref.finalize | None = None

    def __iter__(self) -> Iterator[Loaded]:
        # A fast tokenizer that has run threads before a fork warns and falls back by itself; this avoids
        # the warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        many: dict[str, Any] = (
            {
                "prefetch_factor": self._prefetch,
                "multiprocessing_context": "fork",
                "worker_init_fn": _init_worker,
            }
            if self._workers
            else {}
        )
        # train/checks.py warns once, by the recipe's key.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        # Its own generator: the loader draws a base seed, which must not move the global one (dropout) from
        # run to run.
        loader: DataLoader[Any] = DataLoader(
            cast(Dataset, self._reader),  # it is one; the protocol names what is asked of it here
            batch_size=None,
            sampler=self._jobs,
            num_workers=self._workers,
            collate_fn=cast(Any, _packed),  # without batch_size it gets one item, not a list
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **many,
        )
        results: Any = iter(loader)  # its processes have no public name
        processes = list(getattr(results, "_workers", []))
        # Workers ignore SIGTERM (above), so whatever ends this process must end them by SIGKILL.
        self._finalizer = weakref.finalize(self, _kill, processes)
        if processes:
            # torch raises from SIGCHLD when a worker dies, wherever the main thread is then: inside a
            # backward pass, say. Taken off its list, a death is found by next() below (it looks every 5 s),
            # where the run can stop in good order.
            _remove_worker_pids(id(results))
            results._worker_pids_set = False
            threading.Thread(target=self._watch, args=(processes,), daemon=True).start()
        try:
            while True:
                try:
                    with nullcontext() if processes else _one_thread():
                        loaded = next(results)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader "):  # raised by the work itself
                        raise
                    raise StreamStalled(self._describe(processes, error)) from error
                yield loaded.unpacked()
        finally:
            self._stop.set()
            if processes:
                results._shutdown_workers()  # a traceback may keep `results` alive
                _kill(processes)

    def _watch(self, processes: list) -> None:
        """Names a worker that is slow, once per utterance, and ends one that is stuck: next() then finds it
        dead."""
        named: dict[int, str] = {}
        while not self._stop.wait(min(self._slow_after / 4, 5.0)):
            for worker, process in enumerate(processes):
                seconds, what = self._reader.doing(worker) or (0.0, "")
                if seconds > self._stuck_after and process.is_alive():
                    self._stuck[worker] = seconds
                    process.kill()
                elif seconds > self._slow_after and named.get(worker) != what:
                    named[worker] = what
                    LOGGER.warning(
                        "data worker %d has been at %s for %.0f s: slow storage or a stuck mount?",
                        worker,
                        what,
                        seconds,
                    )

    def _describe(self, processes: list, error: RuntimeError) -> str:
        states = []
        for worker, process in enumerate(processes):
            doing = self._reader.doing(worker)
            at = f", at {doing[1]}" if doing else ""
            if worker in self._stuck:
                states.append(
                    f"worker {worker} (pid {process.pid}) was stuck for {self._stuck[worker]:.0f} s and was "
                    f"ended{at}: "
                    "look at that file's storage"
                )
            elif not process.is_alive():
                states.append(
                    f"worker {worker} (pid {process.pid}) is dead, exit code {process.exitcode}{at}; -9 is "
                    f"often the "
                    "memory limit: lower data.prefetch or data.workers"
                )
        return f"the data stream stopped: {'; '.join(states) or str(error).splitlines()[0]}"
