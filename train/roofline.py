"""Lower bounds of a micro-batch's time on a GPU, by part: arithmetic, weights that are read, bytes sent.

FLOPs and bytes are the planner's (train/planner.py); peaks and bandwidths are those of the data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from train import deepspeed_config
from train.gpus import gpu_named
from train.planner import GPUS_PER_NODE, Planner


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second. memory: of the GPU; inside: to GPUs of the node, one way; adapter: to other nodes,
    through the network adapter of each GPU."""

    memory: float
    inside: float
    adapter: float


# SXM modules: HBM3 and HBM2e, NVLink 4 and 3; an adapter of 400 and 200 Gbit/s for each GPU.
BANDWIDTHS = {"h100": Bandwidths(3.35e12, 450e9, 50e9), "a100-80": Bandwidths(2.039e12, 300e9, 25e9)}


@dataclass(frozen=True)
class Part:
    """A part of the network in a micro-batch. weight_bytes: of its matrices, once for each product."""

    name: str
    flops: float
    weight_bytes: float

    def seconds(self, gpu: str) -> tuple[float, float]:
        """Return the least time for the arithmetic, and for reading the weights."""
        return self.flops / gpu_named(gpu).peak, self.weight_bytes / BANDWIDTHS[gpu].memory


def parts_of(planner: Planner, seconds: float) -> list[Part]:
    """Return the parts of a micro-batch of `seconds` of audio."""
    products = planner.flops_by_part(seconds, with_attention=False)
    positions = planner.positions(seconds)
    return [
        Part(name, flops, planner.weight_bytes * products[name] / (2 * positions[name]))
        for name, flops in planner.flops_by_part(seconds).items()
    ]


def zero_stage_of(planner: Planner) -> int:
    """Return the ZeRO stage of the planner's recipe."""
    return deepspeed_config.stage_number(deepspeed_config.resolve(planner.recipe, planner.width))


def network_seconds(planner: Planner, gpu: str) -> tuple[float, float]:
    """Return the least time for the collectives of a step of one micro-batch: within a node, between nodes.

    What a GPU sends in a ring leaves the node once; as many rings as adapters share it.
    """
    sent = planner.network_bytes(zero_stage_of(planner), 1)
    return sent / BANDWIDTHS[gpu].inside, sent / (GPUS_PER_NODE * BANDWIDTHS[gpu].adapter)
