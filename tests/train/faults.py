"""What goes wrong, on purpose, inside a rank that a test has started (tests/train/ranks.py). Each is given its rank first."""

from __future__ import annotations

import os
import signal

import torch


def _after_step(number: int, act) -> None:
    from train.engine import Engine

    step_of = Engine.step

    def step(self, step: int, *args):
        result = step_of(self, step, *args)
        if step == number:
            act(self)
        return result

    Engine.step = step


def signal_after(rank: int, step: int, name: str, which: int) -> None:
    """Rank `which` gets a signal when it has done `step`."""
    if rank == which:
        _after_step(step, lambda engine: os.kill(os.getpid(), getattr(signal, name)))


def other_weights(rank: int, step: int, which: int, parameter: str) -> None:
    """After `step`, rank `which` holds another value in a parameter, in its whole copy or its shard: a silent hardware fault."""

    def change(engine) -> None:
        found = dict(engine.model.named_parameters())[parameter]
        with torch.no_grad():
            (found.data if found.data.numel() else found.ds_tensor.data).view(-1)[0] += 1.0

    if rank == which:
        _after_step(step, change)


def loud_clips(rank: int, first: int, last: int) -> None:
    """In the data of steps `first` to `last` every clip is so loud that its spectrum overflows."""
    from train.data.stream import MicroBatchReader

    read = MicroBatchReader.__getitem__

    def louder(self, job):
        loaded = read(self, job)
        if first <= job.step <= last:
            loaded.batch.waveforms *= 1e30
        return loaded

    MicroBatchReader.__getitem__ = louder
