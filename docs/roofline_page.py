"""The page docs/reference/roofline.md: lower bounds of a micro-batch's time, from the planner's functions."""

from __future__ import annotations

from recipe.config import load_recipe
from train.dry_run import meta_model
from train.planner import CLIP_SECONDS, GPUS_PER_NODE, Planner
from train.roofline import BANDWIDTHS, Part, network_seconds, parts_of, zero_stage_of

GPUS = 16
NAMES = {"h100": "H100", "a100-80": "A100"}

INTRODUCTION = f"""The least time that a micro-batch of `train/recipes/stage*.yaml` can take on a GPU, for
clips of {CLIP_SECONDS:g} s. Nothing here was measured. Measured steps are slower: the planner assumes 40 % of
the peak.

- **Arithmetic**: FLOPs over the peak of dense bf16 products.
- **Weights**: each product reads its matrix once from the GPU's memory. Activations are not counted.
- **Network**: the collectives of a step of one micro-batch on {GPUS} GPUs in nodes of {GPUS_PER_NODE}. Rings
  leave a node through all its adapters. Under ZeRO-3 each further micro-batch sends nearly as much again.

A part takes at least the larger one of its two times. `recomputed` is activation checkpointing.
"""


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"


def _row(part: Part) -> list[str]:
    times = [_ms(value) for gpu in BANDWIDTHS for value in part.seconds(gpu)]
    return [part.name, f"{part.flops / 1e12:,.2f}", f"{part.weight_bytes / 1e9:,.2f}", *times]


def _total(parts: list[Part]) -> list[str]:
    bounds = [sum(max(part.seconds(gpu)) for part in parts) for gpu in BANDWIDTHS]
    flops, weights = (sum(getattr(part, name) for part in parts) for name in ("flops", "weight_bytes"))
    row = ["larger ones, summed", f"{flops / 1e12:,.2f}", f"{weights / 1e9:,.2f}"]
    for bound in bounds:
        row += [_ms(bound), ""]
    return row


def page(head: str, table) -> str:
    """Return the page. table: writes a Markdown table from its header and rows."""
    text = f"# Roofline\n\n{head}{INTRODUCTION}"
    columns = [f"{NAMES[gpu]} {what}, ms" for gpu in BANDWIDTHS for what in ("arithmetic", "weights")]
    network = []
    for number in (1, 2, 3):
        recipe = load_recipe(f"train/recipes/stage{number}.yaml", [])
        planner = Planner(recipe, meta_model(recipe), GPUS, "h100")
        seconds = recipe.data.micro_batch_seconds
        parts = parts_of(planner, seconds)
        rows = [*map(_row, parts), _total(parts)]
        text += f"\n## Stage {number}, {recipe.model.llm.name}, {seconds:g} s of audio\n\n"
        text += table(["part", "TFLOP", "weights, GB", *columns], rows)
        zero_stage = zero_stage_of(planner)
        times = [_ms(value) for gpu in BANDWIDTHS for value in network_seconds(planner, gpu)]
        sent = planner.network_bytes(zero_stage, 1)
        network.append([f"stage {number}, ZeRO-{zero_stage}", f"{sent / 1e9:,.2f}", *times])
    links = [f"{NAMES[gpu]} {where}, ms" for gpu in BANDWIDTHS for where in ("in a node", "between nodes")]
    text += "\n## Network\n\n" + table(["step of one micro-batch", "GB sent by a GPU", *links], network)
    return text + "\n" + _assumptions(table)


def _assumptions(table) -> str:
    rows = [
        [NAMES[gpu], f"{speed.memory / 1e12:g}", f"{speed.inside / 1e9:g}", f"{speed.adapter / 1e9:g}"]
        for gpu, speed in BANDWIDTHS.items()
    ]
    header = ["data sheet", "memory, TB/s", "NVLink one way, GB/s", "adapter of a GPU, GB/s"]
    return table(header, rows)
