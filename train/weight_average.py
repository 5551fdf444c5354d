"""The exponential moving average of the trained weights (`optim.ema_decay`), on each rank of its own shard.

The average follows DeepSpeed's fp32 masters, which ZeRO-1/2/3 shard over the ranks: an update needs no
communication. For validation and for the model folders, masters and average are exchanged and the model's
weights are made from the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.deepspeed_fixes.masters import copy_to_model, masters


def decay_at(decay: float, updates: int) -> float:
    """Return the decay of the update after `updates` others: lower at the start, or the start weights would
    dominate the average of a short run."""
    return min(decay, (1 + updates) / (10 + updates))


class WeightAverage:
    """average = d * average + (1 - d) * weights after each applied step, with d = `decay_at`.

    Args:
        optimizer: DeepSpeed's, whose masters are averaged; the average starts as their copy.
    """

    def __init__(self, optimizer, zero_stage: int, decay: float):
        self.optimizer, self.zero_stage, self.decay = optimizer, zero_stage, decay
        self.restart()

    def restart(self) -> None:
        """Begin with the weights as they are."""
        self.updates = 0
        self.shards = [shard.detach().clone() for shard in masters(self.optimizer)]

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights of one more step."""
        share = 1 - decay_at(self.decay, self.updates)
        for average, shard in zip(self.shards, masters(self.optimizer), strict=True):
            average.lerp_(shard.detach(), share)
        self.updates += 1

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards its own again, bit by bit. Collective."""
        self._exchange()
        yield
        self._exchange()  # not after an error: other ranks would be waited for, and the run ends

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, shard in zip(self.shards, masters(self.optimizer), strict=True):
            kept = shard.detach().clone()  # one shard at a time
            shard.data.copy_(average)
            average.copy_(kept)
        copy_to_model(self.optimizer, self.zero_stage)

    def state(self) -> dict:
        """Return this rank's part of a checkpoint."""
        return {"updates": self.updates, "shards": self.shards}

    def load(self, state: dict) -> None:
        """Take over the state of a checkpoint of as many ranks. Errors: ValueError for other sizes."""
        sizes = [len(shard) for shard in self.shards]
        if [len(shard) for shard in state["shards"]] != sizes:
            raise ValueError(f"its averaged weights have other sizes than {sizes}")
        self.updates = int(state["updates"])
        for average, saved in zip(self.shards, state["shards"], strict=True):
            average.copy_(saved)
