"""When to stop early: SIGUSR1, SIGTERM, a time limit or a STOP file on any rank becomes one decision of all
ranks.

A signal only sets the reason; the ranks' flags are summed in the all-reduce that opens every step, so all
ranks stop before the same step, save, and exit with code PREEMPTED. SLURM gives the end of the job in
SLURM_JOB_END_TIME; the margin before it is three times the longest save seen, at least two minutes, and never
more than half of the allocation that is left at the start.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

logger = logging.getLogger("soundwave")

DONE, FAILED, WRONG_INPUT, PREEMPTED = 0, 1, 2, 85
PORT_TAKEN = 98  # rank 0 cannot listen on MASTER_PORT: the job scripts try the next one (EADDRINUSE on Linux)
MINIMUM_MARGIN = 120.0  # seconds


class Preemption:
    def __init__(self, folder: Path, *, end_time: float | None = None):
        """`folder`: where a file named STOP asks for a stop. `end_time`: seconds since the epoch; default
        SLURM_JOB_END_TIME."""
        self.stop_file = folder / "STOP"
        self.reason: str | None = None
        if end_time is None and os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            end_time = float(os.environ["SLURM_JOB_END_TIME"])
        self.end_time = end_time
        self.started = time.time()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame) -> None:
        self.reason = signal.Signals(number).name

    def margin(self, save_seconds: float) -> float:
        """Seconds before the time limit at which saving has to begin."""
        seconds = max(MINIMUM_MARGIN, 3.0 * save_seconds)
        return (
            seconds if self.end_time is None else min(seconds, 0.5 * max(0.0, self.end_time - self.started))
        )

    def stop_reason(self, save_seconds: float, step_seconds: float) -> str | None:
        """Return why this rank should stop before the next step, or None."""
        if self.reason is None and self.stop_file.exists():
            self.reason = "STOP file"
        if self.reason is None and self.end_time is not None:
            needed = step_seconds + self.margin(save_seconds)
            if time.time() + needed >= self.end_time:
                self.reason = "time limit"
        return self.reason
