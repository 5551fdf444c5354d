"""GPUs that a plan can be made for: peak of dense bf16 matrix products, and memory, from the data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from core.near_names import did_you_mean, near_names
from core.options import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """peak: FLOP/s, dense, bf16 with fp32 sums; memory: GiB; device: part of what
    torch.cuda.get_device_name() returns."""

    peak: float
    memory: float
    device: str


# Names that hold another one come first: "H100 PCIe" before "H100".
GPUS = {
    "h100-pcie": GPU(756e12, 80, "H100 PCIe"),
    "h100-nvl": GPU(835e12, 94, "H100 NVL"),
    "h100": GPU(989e12, 80, "H100"),
    "gh200": GPU(989e12, 96, "GH200"),
    "h200": GPU(989e12, 141, "H200"),
    "a100-40": GPU(312e12, 40, "A100-PCIE-40GB"),
    "a100-80": GPU(312e12, 80, "A100"),
    "l40s": GPU(362e12, 45, "L40S"),
    "l4": GPU(121e12, 22, "L4"),
    "a10g": GPU(70e12, 22, "A10G"),
    "a10": GPU(125e12, 22, "A10"),
    "a30": GPU(165e12, 24, "A30"),
    "rtx4090": GPU(165e12, 24, "RTX 4090"),
    "mi300x": GPU(1307e12, 192, "MI300X"),
}


def peak_of(device_name: str) -> float | None:
    """FLOP/s that a device can reach in bf16; None where it is not known."""
    return next((gpu.peak for gpu in GPUS.values() if gpu.device in device_name), None)


def gpu_named(name: str) -> GPU:
    """Errors: RecipeError with the nearest name."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = {"rtx-4090": "rtx4090", "4090": "rtx4090", "h100-80": "h100", "a100": "a100-80"}.get(key, key)
    if key in GPUS:
        return GPUS[key]
    near = near_names(key, GPUS)
    raise RecipeError(
        f"--gpu {name} is not known{f'; {did_you_mean(near)}' if near else '.'} Known: {', '.join(GPUS)}"
    )
