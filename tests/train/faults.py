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


def tell_types(rank: int) -> None:
    """Prints what numbers the trained parameters are of, as they compute and as DeepSpeed shards them."""

    def tell(engine) -> None:
        types = {f"{name.split('.')[0]} {parameter.dtype} {parameter.ds_tensor.dtype if hasattr(parameter, 'ds_tensor') else ''}"
                 for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
        print(f"trained: {sorted(types)}", flush=True)

    _after_step(0, tell)


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


def no_memory_to_save(rank: int, step: int) -> None:
    """The thread that writes the checkpoint of `step` gets no memory."""
    from train import checkpoint

    save_of = checkpoint.torch.save

    def save(state, file, *args, **kwargs):
        if f"step-{step:06d}" in str(getattr(getattr(file, "file", None), "name", "")):
            raise MemoryError("no memory")
        return save_of(state, file, *args, **kwargs)

    checkpoint.torch.save = save


def stop_after_pack(rank: int, name: str, which: int) -> None:
    """Encoder features go into packs of 2 s; rank `which` gets a signal when it has filled its first."""
    from train.data import cache

    cache.PACK_SECONDS = 2.0
    fill = cache._fill_pack

    def filled(*args):
        broken = fill(*args)
        os.kill(os.getpid(), getattr(signal, name))
        return broken

    if rank == which:
        cache._fill_pack = filled
