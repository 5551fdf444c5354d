"""Compare the planner's memory model (train/memory.py) with the peak that PyTorch's CPU allocator reports.

    python -m benchmarks.memory_model [--only NAME ...] [--out FILE]

Each case starts two ranks (gloo, DeepSpeed) with random models, and runs two steps of the largest micro-batch
that its recipe allows. `measured` is the peak of: bytes of all tensors before the steps, plus the allocator's
allocations less its releases in the order of their times (torch.profiler's memory events). `model` is
train.memory's value for as many compressed frames as the run had (an untrained CTC head drops some of the
noise). Not in either: what gloo, oneDNN and the interpreter allocate outside the allocator.

Mark: each error is within 15 %.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from benchmarks.machine import keep, machine
from benchmarks.ranks import answers_of
from core.command_line import CommandParser, accept_old_name
from core.distributed import hard_exit
from examples.steps import free_port

MIB = 2**20
LIMIT = 0.15  # of the relative error
RANKS = 2
PRELOAD = ["train.setup", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Case:
    """One configuration. width, layers: of the LLM; seconds and tokens: of a micro-batch."""

    name: str
    stage: str
    zero: int
    dtype: str
    width: int
    layers: int
    checkpointing: bool = False
    seconds: float = 24.0
    tokens: int = 1024
    ctc_head: str = "tied"
    vocabulary: int = 4096
    encoder: str = "none"  # train.encoder


CASES = (
    Case("stage 1, tied head", "alignment", 1, "bfloat16", 1024, 1, seconds=60, vocabulary=16384),
    Case("stage 1, free head", "alignment", 2, "float32", 512, 1, seconds=60, ctc_head="free"),
    Case("stage 2, ZeRO-1", "shrinking", 1, "bfloat16", 512, 4),
    Case("stage 2, ZeRO-2", "shrinking", 2, "bfloat16", 1024, 4),
    Case("stage 2, ZeRO-2, checkpointing", "shrinking", 2, "bfloat16", 1024, 4, True),
    Case("stage 2, ZeRO-3, fp32", "shrinking", 3, "float32", 512, 4),
    Case("stage 2, ZeRO-3, checkpointing", "shrinking", 3, "bfloat16", 1024, 4, True),
    Case("stage 3, ZeRO-1, fp32", "sft", 1, "float32", 512, 4),
    Case("stage 3, ZeRO-3", "sft", 3, "bfloat16", 1024, 4),
    Case("stage 1, width 4096", "alignment", 1, "bfloat16", 4096, 1, seconds=36),
    Case("stage 2, width 4096", "shrinking", 2, "bfloat16", 4096, 2, True),
    Case("stage 2, last layer of the encoder", "shrinking", 2, "bfloat16", 512, 4, encoder="last_1"),
    Case("stage 2, encoder, ZeRO-3", "shrinking", 3, "float32", 512, 4, encoder="all"),
)


def write_models(case: Case, root: Path) -> tuple[str, str]:
    """Write random models of a case; return the folders of the encoder and of the LLM."""
    from tests.model import tiny

    heads = max(case.width // 64, 4)
    encoder = tiny.whisper(root / "whisper", width=256, heads=4, mels=80)
    spare = case.vocabulary - 300
    return encoder, tiny.llm(
        root / "llm", width=case.width, layers=case.layers, heads=heads, spare_rows=spare
    )


def write_recipe(case: Case, root: Path) -> Path:
    import yaml

    encoder, llm = write_models(case, root)
    recipe = {
        "stage": case.stage,
        "output": str(root / "run"),
        "init_from": "fresh",
        "deepspeed": f"ds_configs/zero{case.zero}.json",
        "model": {
            "encoder": {"name": encoder},
            "llm": {"name": llm, "lora_r": 16},
            "alignment": {"ctc_head": case.ctc_head},
            "dtype": case.dtype,
        },
        "data": {
            "batch_seconds": 60.0,
            "micro_batch_seconds": case.seconds,
            "micro_batch_tokens": case.tokens,
            "max_seconds": 12.0,
        },
        "train": {"encoder": case.encoder},
        "optim": {"activation_checkpointing": case.checkpointing},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


# --- one rank -----------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all tensors' storages, once each."""
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if torch.is_tensor(thing)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(recipe_path: Path) -> dict:
    """Run two steps on this rank; return bytes held before them, and at the peak of each part of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from core.distributed import connect, fill_environment
    from model.soundwave import Soundwave
    from recipe.config import load_recipe
    from recipe.stages import stage_of
    from stream import worst_case_batch
    from train import deepspeed_config
    from train.deepspeed_fixes.zero3 import shard_while_loading
    from train.engine import Engine
    from train.setup import resolve_sizes

    fill_environment()
    recipe = load_recipe(recipe_path, [])
    ranks = connect()
    torch.manual_seed(0)
    stage = stage_of(recipe)
    config, _ = resolve_sizes(recipe, stage)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sharding = shard_while_loading(config) if deepspeed_config.stage_number(config) == 3 else None
        model = Soundwave.build(recipe.model, parts=stage.parts)
        model.set_stage(stage)
        engine = Engine(model, recipe, stage, config, ranks)
        batch = worst_case_batch(recipe.data, stage.name, model.tokenizer, recipe.model)
        before = live_bytes()
        with record_function("ready"):
            torch.empty(1)
        for step in range(2):  # gradients in fp32 are made in the first step and kept
            result = engine.step(step, [batch], engine.reduce_step_counts([batch]))
    del sharding
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held, phase, ends, peaks = (
        0,
        "",
        0,
        dict.fromkeys(("before", "forward", "backward", "update", "other"), 0),
    )
    for event in events:
        if event.name() == "ready":
            held, peaks["before"], phase = before, before, "other"
        elif phase and event.name() in ("forward", "backward", "update"):
            phase, ends = event.name(), event.end_ns()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            if phase and event.start_ns() > ends:
                phase = "other"
            if phase:
                peaks[phase] = max(peaks[phase], held)
    peak = max(value for key, value in peaks.items() if key != "before")
    clips = len(batch.audio_lengths) * ranks.world_size
    return {**peaks, "peak": peak, "kept": round(result.sums["kept"] / clips)}


def be_a_rank(recipe: Path, rank: int, port: int, log: Path, answers) -> None:
    """Measure in a process that the fork server has made, and put the result into the queue."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    answers.put(measure(recipe))
    answers.close()
    answers.join_thread()
    hard_exit(0)


def run_ranks(recipe: Path) -> list[dict]:
    """Start the ranks of a case; return what each has measured. Errors: RuntimeError with the log's end."""
    port = free_port()
    logs = [recipe.with_name(f"rank{rank}.log") for rank in range(RANKS)]
    return answers_of(be_a_rank, [(recipe, rank, port) for rank in range(RANKS)], logs, PRELOAD)


def predict(recipe_path: Path, kept: int) -> dict:
    """Return what train.memory computes for a rank of a case, in bytes. kept: frames of a clip that the LLM
    has read."""
    from model.pretrained import locate, text_config
    from recipe.config import load_recipe
    from train import deepspeed_config
    from train.dry_run import meta_model
    from train.memory import activation_bytes, rank_memory

    recipe = load_recipe(recipe_path, [])
    model = meta_model(recipe)
    width = text_config(locate(recipe.model.llm.name, sizes_only=True).config).hidden_size
    config = deepspeed_config.resolve(recipe, width)
    activations = activation_bytes(
        model,
        recipe,
        micro_batch_seconds=recipe.data.micro_batch_seconds,
        tokens=recipe.data.micro_batch_tokens,
        zero_stage=deepspeed_config.stage_number(config),
        kept=kept,
        on_gpu=False,
    )
    memory = rank_memory(model, recipe, RANKS, deepspeed_config.stage_number(config), config, activations)
    return {**asdict(memory), "total": memory.total}


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m benchmarks.memory_model", __doc__.splitlines()[0], example="--out memory_model.json"
    )
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    parser.add_argument("--out", type=Path, help="write the report here, and its table beside it")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args(argv)
    facts, rows = machine(), []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(case, Path(folder))
            measured = max(run_ranks(recipe), key=lambda rank: rank["peak"])
            kept = measured.pop("kept")
            parts = predict(recipe, kept)
        error = parts["total"] / measured["peak"] - 1
        rows.append({**asdict(case), "kept": kept, "measured": measured, "model": parts, "error": error})
        line = {key: round(value / MIB) for key, value in {**measured, **parts}.items()}
        print(f"{case.name}: {error:+.1%} {line}", file=sys.stderr, flush=True)
    table = tabulate(
        [
            (
                row["name"],
                row["width"],
                row["layers"],
                row["dtype"],
                "on" if row["checkpointing"] else "off",
                row["measured"]["peak"] / MIB,
                row["model"]["total"] / MIB,
                f"{row['error']:+.1%}",
            )
            for row in rows
        ],
        headers=("case", "width", "layers", "dtype", "checkpointing", "measured MiB", "model MiB", "error"),
        floatfmt=".0f",
    )
    largest = max(abs(row["error"]) for row in rows)
    table += f"\n\nlargest error {largest:.1%} (mark: at most {LIMIT:.0%})"
    print(table)
    if options.out:
        keep(options.out, {"machine": facts, "limit": LIMIT, "ranks": RANKS, "cases": rows}, table)
    return 0 if largest <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
