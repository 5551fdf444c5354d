"""What a run records: metrics.jsonl for machines, trackers for curves and pictures, a log per rank, rank 0
on the console."""

from __future__ import annotations

import faulthandler
import json
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm
from tqdm.contrib.logging import _TqdmLoggingHandler

from core.console import printable
from core.distributed import Ranks
from core.files import truncate_log
from recipe.config import RecipeError
from train.engine import StepResult
from train.flops import Flops
from train.gpus import peak_of
from train.step_counts import StreamSums
from train.trackers import RunInfo, Trackers

logger = logging.getLogger("soundwave")


class PrintableFormatter(logging.Formatter):
    """Ids and texts of data are logged: they must not carry control sequences to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def start_logging(folder: Path, ranks: Ranks) -> None:
    """Every rank appends to logs/rank-R.log; rank 0 also speaks on the console, above its progress bars.

    SIGUSR2 writes the stacks of all threads to the rank's log: where does a run hang?
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    faulthandler.register(
        signal.SIGUSR2, file=open(folder / "logs" / f"rank-{ranks.rank}.log", "a"), all_threads=True
    )
    formatter = PrintableFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "logs" / f"rank-{ranks.rank}.log")]
    if ranks.is_main:
        console = _TqdmLoggingHandler()
        console.stream = sys.stderr
        handlers.append(console)
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def stop_logging() -> None:
    for handler in list(logger.handlers):
        handler.flush()
        handler.close()
        logger.removeHandler(handler)


def peak_memory() -> float:
    """GiB: the most that this process has had at once, of GPU memory for tensors, or of main memory where
    there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """A step's numbers as they are logged; docs/monitor.md explains each."""

    def __init__(self, model, ranks: Ranks):
        self.flops, self.world_size = Flops.of(model), ranks.world_size
        fast = torch.cuda.is_available() and model.config.dtype in ("bfloat16", "float16")
        self.peak = peak_of(torch.cuda.get_device_name()) if fast else None

    def values(
        self, result: StepResult, streamed: StreamSums, waited: float, seconds: float
    ) -> dict[str, float]:
        """streamed: over all ranks; waited, seconds: this rank's wait for data and whole step."""
        sums = result.sums
        operations = sum(
            self.flops.step(
                sums["frames"],
                streamed.audios,
                sums["llm_tokens"],
                streamed.samples,
                sums["target_tokens"],
                sums["kept"],
            ).values()
        )
        rate = operations / seconds / self.world_size
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **{f"lr_{name}": rate for name, rate in result.lr.items()},
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            "compute_seconds": result.seconds["compute"],
            "update_seconds": result.seconds["update"],
            "audio_seconds": streamed.seconds,
            "audio_seconds_per_second": streamed.seconds / seconds / self.world_size,
            "padding_share": 1 - streamed.seconds / streamed.padded_seconds
            if streamed.padded_seconds
            else 0.0,
            "samples": streamed.samples,
            "shrink_ratio": sums["kept"] / max(sums["frames"], 1.0),
            "micro_batches": sums["micro_batches"],
            "llm_tokens": sums["llm_tokens"],
            "target_tokens": sums["target_tokens"],
            "flops_per_second": rate,
            "utilisation": rate / self.peak if self.peak else None,
            "peak_memory_gib": peak_memory(),
            "rejected": streamed.rejected,
            "retries": streamed.retries,
        }
        for name in result.losses:
            if name in values:
                raise RecipeError(
                    f"the loss '{name}' has the name of a metric: register it under another one"
                )
        values = {"loss": result.loss, **result.losses, **values}
        return {name: value for name, value in values.items() if value is not None}


class Telemetry:
    """Rank 0's record of the run; on other ranks every method does nothing.

    `first_step`: the step that this process starts with. Lines of later steps, written by a process that was
    killed after its last checkpoint or before a roll-back, are taken out, so that each step stands once;
    events stay.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        first_step: int,
        steps: int,
        stage: str,
        trackers: list[str],
        settings: dict | None = None,
    ):
        """trackers: names of TRACKERS (train/trackers); settings: the recipe, which they show."""
        self.active = ranks.is_main
        self.file: TextIO
        self.bar: tqdm
        self.trackers: Trackers
        self.totals = {"rejected": 0.0, "retries": 0.0}  # over the whole stage, earlier processes included
        if not self.active:
            return
        self.pictures = folder / "pictures"
        self.path = folder / "metrics.jsonl"
        for line in self._open(first_step):
            self._count(line)
        name = "/".join(folder.resolve().parts[-2:])
        self.trackers = Trackers(
            trackers, RunInfo(folder, name, first_step=first_step, settings=settings or {})
        )
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            desc=stage,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def _open(self, first_step: int) -> list[dict]:
        """metrics.jsonl, ready for lines of `first_step`; returns those that stand before it."""
        earlier = truncate_log(self.path, first_step)
        self.file = open(self.path, "a")
        return earlier

    def go_back(self, step: int) -> None:
        """The next line is of `step` once more."""
        if self.active:
            try:
                self._close_file()
                self._open(step)
            except OSError as error:
                logger.error("%s still has the steps that are forgotten: %s", self.path, error)
                self.file = open(self.path, "a")
            self.bar.update(step - self.bar.n)

    def _close_file(self) -> None:
        try:
            self.file.close()
        except OSError as error:  # what did not fit before does not fit now
            logger.error("%s: %s", self.path, error)

    def line(self, kind: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl: kind (train | valid | event), step, time and the values; flushed at
        once."""
        if self.active:
            self._count(values)
            try:
                self.file.write(
                    json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n"
                )
                self.file.flush()
            except OSError as error:  # a full disk must not end what is in memory alone
                logger.error("step %d is not in %s: %s", step, self.path, error)

    def _count(self, values: dict) -> None:
        for name in self.totals:
            self.totals[name] += values.get(name, 0.0)

    def scalars(self, prefix: str, step: int, values: dict) -> None:
        if self.active:
            self.trackers.scalars(step, prefix, values)

    def advance(self, values: dict[str, str]) -> None:
        if self.active:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update()

    def picture(self, step: int, inspection: dict, title: str, name_of: Callable[[list[int]], str]) -> None:
        """What the adapters make of one clip (`Soundwave.inspect`'s result), to pictures/step-N.png and to
        the trackers."""
        if not self.active:
            return
        from model.picture import figure

        drawn = figure(inspection, name_of, title=title)
        self.pictures.mkdir(exist_ok=True)
        path = self.pictures / f"step-{step:06d}.png"
        drawn.savefig(path)
        self.trackers.picture(step, "valid/clip", path)

    def table(self, name: str, step: int, columns: list[str], rows: list[list[str]]) -> None:
        if self.active:
            self.trackers.table(step, name, columns, rows)

    def close(self, hurry: bool = False) -> None:
        if self.active:
            self.bar.close()
            self._close_file()
            self.trackers.close(hurry)
