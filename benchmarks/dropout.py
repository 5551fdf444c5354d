"""Measure what keyed dropout costs in a step of stage 2, against torch's masks and none.

    python -m benchmarks.dropout RECIPE [key=value ...] [--clips 12] [--steps 5] [--rounds 3] [--out FILE]

RECIPE: a stage 2 recipe. Forward and backward of its first global batch, on one process without DeepSpeed,
at the recipe's rates of dropout (`model.llm.lora_dropout=0.05` shows LoRA's). The sides alternate; a number
is the median over --rounds x --steps. On CPU it is processor time, which other programs on the machine
disturb less.

    keyed   masks by (seed, step, utterance, place, position): model/dropout.py
    torch   masks as before: F.dropout on the same tensors, and dropout inside of attention
    none    all rates 0: what the masks cost is the difference

Mark: keyed <= 1.01 x torch.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import keep, machine
from benchmarks.train_step import wait
from core.command_line import CommandParser, accept_old_name
from core.distributed import fill_environment
from core.keys import signed_key64
from model import alignment, artifact, ops
from model.compressors import ctc_peaks
from model.dropout import KeyedDropout, LoraDropout
from model.rows import probe
from model.soundwave import Soundwave
from recipe.config import Recipe, RecipeError, load_recipe
from stream import Plan, Stream

SIDES = ("keyed", "torch", "none")


@contextmanager
def masks_of_torch(model: Soundwave) -> Iterator[None]:
    """Every mask drawn by torch, as before there were keys."""
    attend = F.scaled_dot_product_attention

    def alignment_attention(*arguments, **options):
        p = model.alignment.layers[0].drop_frames.p if model.alignment.training else 0.0
        return attend(*arguments, **options, dropout_p=p)

    def lookback_attention(*arguments, **options):
        p = model.shrinking.drop_frames.p if model.shrinking.training else 0.0
        with mock.patch.object(
            ops.lookback, "scaled_dot_product_attention", lambda *a, **o: attend(*a, **o, dropout_p=p)
        ):
            return plain_lookback(*arguments, **options)

    def drop(self: KeyedDropout, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return F.dropout(x, self.p, self.training)

    plain_lookback = ops.lookback_attention
    with (
        mock.patch.object(KeyedDropout, "forward", drop),
        mock.patch.object(LoraDropout, "forward", drop),
        mock.patch.object(alignment, "dropped_frames", lambda dropout, value, keys: value),
        mock.patch.object(ctc_peaks, "dropped_frames", lambda dropout, value, keys: value),
        mock.patch.object(
            alignment,
            "F",
            SimpleNamespace(relu=F.relu, pad=F.pad, scaled_dot_product_attention=alignment_attention),
        ),
        mock.patch.object(ops, "lookback_attention", lookback_attention),
    ):
        yield


@contextmanager
def no_masks(model: Soundwave) -> Iterator[None]:
    rates = {module: module.p for module in model.modules() if isinstance(module, KeyedDropout)}
    for module in rates:
        module.p = 0.0
    yield
    for module, p in rates.items():
        module.p = p


def clock() -> float:
    wait()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def step(model: Soundwave, batches: list, losses: tuple[str, ...]) -> float:
    """Seconds of forward and backward over micro-batches."""
    model.zero_grad(set_to_none=True)
    started = clock()
    for batch in batches:
        output = model(batch.at_step(signed_key64("step", 0, 0)), losses=losses)
        (output.ce_sum + output.ctc_sum).backward()
    return clock() - started


def measure(recipe: Recipe, steps: int, rounds: int) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.seed)
    model = Soundwave.build(recipe.model, device=device)
    if recipe.init_from:
        artifact.load_trained(model, recipe.init_from)
    model.set_stage("shrinking")
    model.train()
    if recipe.optim.activation_checkpointing:
        model.enable_activation_checkpointing()
    model.llm.joins_rows = probe(model.llm, model.audio_id).kept_apart
    plan = Plan.open(recipe.data, recipe.stage, 1)
    stream = Stream(recipe.data, recipe.stage, model.tokenizer, recipe.model, 0, 1, 0, 1, plan=plan)
    batches = [batch.to(device) for batch in next(iter(stream)).micro_batches]
    stream.close()
    sides = {"keyed": None, "torch": masks_of_torch, "none": no_masks}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for side, context in sides.items():
            with context(model) if context else mock.patch.dict({}):
                taken = [step(model, batches, ("ce", "ctc")) for _ in range(steps if turn else 1)]
            if turn:  # the first round warms up
                seconds[side] += taken
    median = {side: statistics.median(taken) for side, taken in seconds.items()}
    return {
        "seconds": median,
        "keyed_over_torch": median["keyed"] / median["torch"],
        "masks_share": {side: median[side] / median["none"] - 1 for side in ("keyed", "torch")},
        "rates": {
            "alignment": recipe.model.alignment.dropout,
            "shrinking": recipe.model.shrinking.dropout,
            "lora": recipe.model.llm.lora_dropout,
        },
        "clips": sum(len(batch.ids) for batch in batches),
        "micro_batches": len(batches),
        "samples": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m benchmarks.dropout", __doc__.splitlines()[0], example="examples/quickstart/stage2.yaml"
    )
    parser.add_argument("recipe", help="YAML file of a stage 2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument(
        "--clips", type=int, default=12, help="clips of 10 s that a step holds, about (default: 12)"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides alternate (default: 3)")
    parser.add_argument("--out", type=Path, help="write the result there too")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_intermixed_args(argv)
    fill_environment()
    facts = machine("cuda" if torch.cuda.is_available() else "cpu")
    try:
        recipe = load_recipe(options.recipe, [f"data.batch_seconds={10 * options.clips}", *options.overrides])
        recipe.data = replace(recipe.data, workers=0)
        result = measure(recipe, options.steps, options.rounds)
    except (RecipeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [(side, result["seconds"][side], result["masks_share"].get(side, 0.0) * 100) for side in SIDES]
    rates = ", ".join(f"{part} {rate:g}" for part, rate in result["rates"].items())
    table = (
        f"{result['clips']} clips in {result['micro_batches']} micro-batches; dropout: {rates}\n"
        f"{tabulate(rows, headers=('masks', 'seconds a step', '% over none'), floatfmt=('', '.3f', '.2f'))}\n"
        f"keyed / torch: {result['keyed_over_torch']:.3f} (mark: at most 1.01)"
    )
    print(table)
    if options.out:
        keep(
            options.out,
            {"machine": facts, "recipe": options.recipe, "overrides": options.overrides, "result": result},
            table,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
