"""What goes wrong, on purpose, inside a rank that a test has started (tests/train/ranks.py). Each is given
its rank first."""

from __future__ import annotations

import hashlib
import json
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


def enter_namespace(rank: int, *namespaces: str) -> None:
    """Run on a node of benchmarks/virtual_network.py."""
    from benchmarks.virtual_network import enter

    enter(namespaces[rank])


def signal_after(rank: int, step: int, name: str, which: int) -> None:
    """Rank `which` gets a signal when it has done `step`."""
    if rank == which:
        _after_step(step, lambda engine: os.kill(os.getpid(), getattr(signal, name)))


def tell_types(rank: int) -> None:
    """Prints what numbers the trained parameters are of, as they compute and as DeepSpeed shards them."""

    def tell(engine) -> None:
        types = {
            f"{name.split('.')[0]} {parameter.dtype} "
            f"{parameter.ds_tensor.dtype if hasattr(parameter, 'ds_tensor') else ''}"
            for name, parameter in engine.model.named_parameters()
            if parameter.requires_grad
        }
        print(f"trained: {sorted(types)}", flush=True)

    _after_step(0, tell)


def _optimizer_states(engine) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """This rank's fp32 masters and moments."""
    outer = engine.optimizer
    masters = next(
        getattr(outer, name)
        for name in (
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
            "single_partition_of_fp32_groups",
        )
        if hasattr(outer, name)
    )
    moments = [
        value
        for state in outer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    return list(masters), moments


def steep_step(rank: int, step: int, factor: float) -> None:
    """In `step` gradients are `factor` times as large. Prints what the optimizer holds before it, after it
    and after the next."""
    from train.engine import Engine

    step_of, loss_of = Engine.step, Engine.weighted_loss

    def tell(engine, when: str) -> None:
        digest = hashlib.sha256()
        for held in sum(_optimizer_states(engine), []):
            digest.update(held.detach().float().contiguous().numpy().tobytes())
        print(f"held on rank {rank} {when} {digest.hexdigest()}", flush=True)

    def steep(self, number: int, *args):
        if number == step:
            tell(self, "before")
            Engine.weighted_loss = lambda engine, *of: factor * loss_of(engine, *of)
        result = step_of(self, number, *args)
        Engine.weighted_loss = loss_of
        if number in (step, step + 1):
            tell(self, "after" if number == step else "later")
        return result

    Engine.step = steep


def tell_states(rank: int) -> None:
    """Prints the bytes that this rank holds of weights, and of fp32 masters and moments, after the first
    step."""

    def tell(engine) -> None:
        parameters = list(engine.model.parameters())
        masters, moments = _optimizer_states(engine)
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        print(
            "states "
            + json.dumps(
                {
                    "rank": rank,
                    "trained": trained,
                    "frozen": whole - trained,
                    **{
                        name: sum(t.numel() * t.element_size() for t in held)
                        for name, held in (
                            ("weights", [getattr(p, "ds_tensor", p) for p in parameters]),
                            ("masters", masters),
                            ("moments", moments),
                        )
                    },
                }
            ),
            flush=True,
        )

    _after_step(0, tell)


def other_weights(rank: int, step: int, which: int, parameter: str) -> None:
    """After `step`, rank `which` holds another value in a parameter, in its whole copy or its shard: a silent
    hardware fault."""

    def change(engine) -> None:
        found = dict(engine.model.named_parameters())[parameter]
        with torch.no_grad():
            (found.data if found.data.numel() else found.ds_tensor.data).view(-1)[0] += 1.0

    if rank == which:
        _after_step(step, change)


def loud_clips(rank: int, first: int, last: int) -> None:
    """In the data of steps `first` to `last` every clip is so loud that its spectrum overflows."""
    from stream.packed import MicroBatchReader

    read = MicroBatchReader.__getitem__

    def louder(self, job):
        loaded = read(self, job)
        if first <= job.step <= last:
            loaded.batch.waveforms *= 1e30
        return loaded

    MicroBatchReader.__getitem__ = louder


def no_memory_to_save(rank: int, step: int) -> None:
    """The thread that writes the checkpoint of `step` gets no memory."""
    from train.checkpoint import writer

    save_of = writer.torch.save

    def save(state, file, *args, **kwargs):
        if f"step-{step:06d}" in str(getattr(getattr(file, "file", None), "name", "")):
            raise MemoryError("no memory")
        return save_of(state, file, *args, **kwargs)

    writer.torch.save = save


def stop_after_pack(rank: int, name: str, which: int) -> None:
    """Encoder features go into packs of 2 s; rank `which` gets a signal when it has filled its first."""
    from stream import cache

    cache.PACK_SECONDS = 2.0
    fill = cache._fill_pack

    def filled(*args):
        broken = fill(*args)
        os.kill(os.getpid(), getattr(signal, name))
        return broken

    if rank == which:
        cache._fill_pack = filled


def scores(rank: int, error_rates: list[float], losses: list[float]) -> None:
    """Validations give these numbers, one after the other."""
    from train import trainer

    found = iter(zip(error_rates, losses, strict=True))

    def validate(*_) -> dict:
        wer, loss = next(found)
        return {"wer": wer, "loss": loss, "words": 10.0, "samples": [], "clip": None}

    trainer.validate = validate


def count_gathers(rank: int) -> None:
    """Prints the elements of weights that ZeRO-3's hooks gather in each step, and its micro-batches."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from train.engine import Engine

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, step_of = getattr(PartitionedParameterCoordinator, name), Engine.step
    counted = [0]

    def counting(self, params, *args, **options):
        counted[0] += sum(p.ds_numel for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, params, *args, **options)

    def step(self, number: int, micro_batches, *args):
        counted[0] = 0
        result = step_of(self, number, micro_batches, *args)
        found = {"rank": rank, "step": number, "batches": len(micro_batches), "elements": counted[0]}
        print(f"gathered {json.dumps(found)}", flush=True)
        return result

    setattr(PartitionedParameterCoordinator, name, counting)
    Engine.step = step
