"""What a run tells: metrics.jsonl for machines, TensorBoard for curves and pictures, a log per rank, rank 0 on the console."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import _TqdmLoggingHandler

from train.distributed import Ranks

logger = logging.getLogger("soundwave")


def start_logging(folder: Path, ranks: Ranks) -> None:
    """Every rank appends to logs/rank-R.log; rank 0 also speaks on the console, above its progress bars.

    SIGUSR2 writes the stacks of all threads to the rank's log: where does a run hang?
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    faulthandler.register(signal.SIGUSR2, file=open(folder / "logs" / f"rank-{ranks.rank}.log", "a"), all_threads=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "logs" / f"rank-{ranks.rank}.log")]
    if ranks.is_main:
        handlers.append(_TqdmLoggingHandler())
        handlers[-1].stream = sys.stderr
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


class Telemetry:
    """Rank 0's record of the run; on other ranks every method does nothing.

    `first_step`: the step that this process starts with. Lines of later steps, written by a process that was killed after its
    last checkpoint, are taken out, so that each step stands once.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, first_step: int, steps: int, stage: str, tensorboard: bool):
        self.active = ranks.is_main
        self.board = self.file = self.bar = None
        if not self.active:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < first_step]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self.file = open(path, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step, flush_secs=30)
        self.bar = tqdm(total=steps, initial=first_step, desc=stage, unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30)

    def line(self, kind: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl: kind (train | valid | event), step, time and the values; flushed at once."""
        if self.active:
            self.file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()

    def scalars(self, prefix: str, step: int, values: dict) -> None:
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self.board.add_scalar(f"{prefix}/{name}", value, step)

    def advance(self, values: dict) -> None:
        if self.active:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self.bar.update()

    def text(self, name: str, step: int, text: str) -> None:
        if self.board is not None:
            self.board.add_text(name, text, step)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board is not None:
                self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a kill
