"""What ranks sum in the one collective that opens a step: denominators of the losses, flags, the stream's
counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from core.distributed import Ranks
from model.batch import Batch
from model.losses import LOSSES
from stream import StepBatches


def all_reduce(values: list[float], ranks: Ranks) -> list[float]:
    """Sum over ranks in float64, in one collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


class StepFlags(NamedTuple):
    """What a rank reports before a step, 0 or 1 each; summed, the number of ranks that report it."""

    stop: float = 0.0  # a signal, a STOP file or the time limit
    written: float = 0.0  # its part of the checkpoint is on disk
    save: float = 0.0  # checkpoint.every_minutes have passed (rank 0 alone)
    data_failed: float = 0.0  # the stream gives no batch


class StreamSums(NamedTuple):
    """What the stream did for a step: one rank's share, or summed over ranks."""

    seconds: float = 0.0  # of audio
    padded_seconds: float = 0.0
    samples: float = 0.0
    audios: float = 0.0
    rejected: float = 0.0
    retries: float = 0.0

    @classmethod
    def of(cls, batch: StepBatches | None) -> StreamSums:
        """None (the data failed): zeros."""
        if batch is None:
            return cls()
        audios = sum(0 if b.audio_is_dummy else len(b.audio_lengths) for b in batch.micro_batches)
        return cls(
            batch.seconds, batch.padded_seconds, batch.samples, audios, len(batch.rejected), batch.retries
        )


class StepCounts(NamedTuple):
    """Sums over all ranks."""

    losses: dict[str, float]  # denominators
    target_tokens: float
    flags: StepFlags
    streamed: StreamSums


def reduce_step_counts(
    losses: tuple[str, ...],
    micro_batches: list[Batch],
    ranks: Ranks,
    flags: StepFlags = StepFlags(),
    streamed: StreamSums = StreamSums(),
) -> StepCounts:
    """Sum this rank's counts over all ranks. Collective. A rank whose data failed comes with no
    micro-batches."""
    local = [float(sum(LOSSES[name].count(batch) for batch in micro_batches)) for name in losses]
    tokens = float(sum(batch.ce_count for batch in micro_batches))
    summed = all_reduce([*local, tokens, *flags, *streamed], ranks)
    counts, (tokens, *rest) = summed[: len(losses)], summed[len(losses) :]
    return StepCounts(
        dict(zip(losses, counts, strict=True)),
        tokens,
        StepFlags(*rest[: len(flags)]),
        StreamSums(*rest[len(flags) :]),
    )
