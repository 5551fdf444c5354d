"""`train/run.py --profile N`: where the time of N steps goes. The run continues afterwards.

torch.profiler on rank 0, after one step to warm up and one to start the profiler, into <stage
folder>/profile/: *.pt.trace.json.gz is the timeline (https://ui.perfetto.dev opens it, so does TensorBoard
with its profiler plugin), summary.txt the operations by their own time. While it records, steps are slower:
their times in metrics.jsonl are not the run's speed.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

logger = logging.getLogger("soundwave")

ROWS = 30  # of summary.txt


class Profiler:
    """Call `step()` after each optimizer step and `close()` at the end; steps: how many are recorded, 0:
    none."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.inner = folder / "profile", None
        if steps:
            activities = [
                ProfilerActivity.CPU,
                *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
            ]
            self.inner = profile(
                activities=activities,
                schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self.inner.start()

    def _write(self, recorded: profile) -> None:
        tensorboard_trace_handler(str(self.folder), use_gzip=True)(recorded)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.folder / "summary.txt").write_text(recorded.key_averages().table(sort_by=by, row_limit=ROWS))
        logger.info("profile: %s", self.folder)

    def step(self) -> None:
        if self.inner is not None:
            self.inner.step()

    def close(self) -> None:
        if self.inner is not None:
            self.inner.stop()
            self.inner = None
