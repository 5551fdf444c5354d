"""Compare the planner's network volume with bytes on the wire between nodes, and disturb the network.

    python -m benchmarks.network [--ranks 2 4] [--only volume faults] [--out FILE]

Nodes are network namespaces of this machine, joined by a switch with limited speed (benchmarks/
virtual_network.py); one rank a node, gloo, DeepSpeed ZeRO-1/2/3, a random model.

    volume    bytes that each node's device sends in a step, headers included, and the planner's value for
              gloo's algorithms (train/planner.py)
    faults    a slow node, packet loss and a partition in a run of train/run.py: exit codes, losses, seconds

Marks: the volumes differ by at most 15 %; a slow or lossy network changes no loss; in a partition each rank
ends with an error that names the cause within twice health.timeout_minutes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tabulate import tabulate

from benchmarks.machine import keep, machine
from benchmarks.memory_model import PRELOAD, Case, write_recipe
from benchmarks.ranks import answers_of
from benchmarks.virtual_network import DEVICE, VirtualNetwork, bytes_sent, enter, missing
from core.command_line import CommandParser
from core.distributed import hard_exit

LIMIT = 0.15  # of the relative error
RATE, LATENCY = 1e9, 0.0005  # bits a second of a node, seconds one way
STEPS, MICRO_BATCHES = 2, (1, 3)
MB = 1e6
TIMEOUT_MINUTES = 0.25

SMALL = {"seconds": 12.0, "tokens": 128}
CASES = (
    Case("stage 1, ZeRO-1", "alignment", 1, "bfloat16", 512, 1, **SMALL),
    Case("stage 2, ZeRO-1", "shrinking", 1, "bfloat16", 512, 4, **SMALL),
    Case("stage 2, ZeRO-1, fp32", "shrinking", 1, "float32", 512, 4, **SMALL),
    Case("stage 2, ZeRO-2", "shrinking", 2, "bfloat16", 512, 4, **SMALL),
    Case("stage 2, ZeRO-2, fp32", "shrinking", 2, "float32", 512, 4, **SMALL),
    Case("stage 2, ZeRO-3", "shrinking", 3, "bfloat16", 512, 4, **SMALL),
    Case("stage 2, ZeRO-3, encoder", "shrinking", 3, "bfloat16", 512, 4, encoder="all", **SMALL),
    Case("stage 2, ZeRO-3, some reuse", "shrinking", 3, "bfloat16", 512, 4, **SMALL),
    Case("stage 2, ZeRO-3, no reuse", "shrinking", 3, "bfloat16", 512, 4, **SMALL),
    Case("stage 2, ZeRO-3, no reuse, checkpointing", "shrinking", 3, "bfloat16", 512, 4, True, **SMALL),
)

REUSE = {"no reuse": 0, "some reuse": 5_000_000}  # stage3_max_reuse_distance of cases


# --- one rank -----------------------------------------------------------------------------------------------


def count_bytes(recipe_path: Path) -> dict[int, float]:
    """Run steps on this rank; return bytes that its node sends in a step, by micro-batches."""
    import torch
    import torch.distributed as dist

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
    sharding = shard_while_loading(config) if deepspeed_config.stage_number(config) == 3 else None
    model = Soundwave.build(recipe.model, parts=stage.parts)
    model.set_stage(stage)
    engine = Engine(model, recipe, stage, config, ranks)
    del sharding
    batch = worst_case_batch(recipe.data, stage.name, model.tokenizer, recipe.model)
    found, step = {}, 0
    for number in MICRO_BATCHES:
        for measured in range(1 + STEPS):  # the first one is not counted: ZeRO-3 records its order in it
            if measured == 1:
                dist.barrier()
                before = bytes_sent()
            batches = [batch] * number
            engine.step(step, batches, engine.reduce_step_counts(batches))
            step += 1
        dist.barrier()
        time.sleep(0.2)  # acknowledgements
        found[number] = (bytes_sent() - before) / STEPS
    return found


def write_case(case: Case, root: Path) -> Path:
    """Write a case's recipe. No reuse: as for a model of many times stage3_max_reuse_distance, of
    which the prefetch, too, sees a small part. Some: the distance ends between the LLM's layers."""
    path = write_recipe(case, root)
    distance = next((number for name, number in REUSE.items() if name in case.name), None)
    if distance is not None:
        config = json.loads(Path("ds_configs/zero3.json").read_text())
        limits = {"stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": 0}
        config["zero_optimization"] |= limits
        (root / "zero3.json").write_text(json.dumps(config))
        recipe = yaml.safe_load(path.read_text()) | {"deepspeed": str(root / "zero3.json")}
        path.write_text(yaml.safe_dump(recipe))
    return path


def environment_of(rank: int, network: VirtualNetwork, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(len(network.namespaces)),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": network.addresses[0],
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "OMP_NUM_THREADS": "1",
    }


def be_a_node(namespace: str, environment: dict[str, str], recipe: Path, log: Path, answers) -> None:
    """Count in a process that the fork server has made, and put the result into the queue."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    enter(namespace)
    os.environ.update(environment)
    answers.put(count_bytes(recipe))
    answers.close()
    answers.join_thread()
    hard_exit(0)


def measure(recipe: Path, network: VirtualNetwork) -> list[dict[int, float]]:
    """Start a rank on each node; return what each has counted. Errors: RuntimeError with a log's end."""
    ranks = range(len(network.namespaces))
    arguments = [
        (namespace, environment_of(rank, network, 29500), recipe)
        for rank, namespace in enumerate(network.namespaces)
    ]
    logs = [recipe.with_name(f"rank{rank}.log") for rank in ranks]
    return answers_of(be_a_node, arguments, logs, PRELOAD)


def predict(recipe_path: Path, ranks: int) -> dict[int, float]:
    """Return the planner's bytes of a step through gloo, by micro-batches."""
    from recipe.config import load_recipe
    from train import deepspeed_config
    from train.dry_run import meta_model
    from train.planner import GLOO, Planner

    recipe = load_recipe(recipe_path, [])
    plan = Planner(recipe, meta_model(recipe), ranks, "h100")
    zero_stage = deepspeed_config.stage_number(deepspeed_config.resolve(recipe, plan.width))
    return {number: plan.network_bytes(zero_stage, number, GLOO) for number in MICRO_BATCHES}


def volumes(counts: list[int]) -> list[dict]:
    rows = []
    for count in counts:
        with VirtualNetwork(count, RATE, LATENCY) as network:
            for case in CASES:
                with tempfile.TemporaryDirectory() as folder:
                    recipe = write_case(case, Path(folder))
                    by_rank, model = measure(recipe, network), predict(recipe, count)
                for number in MICRO_BATCHES:
                    sent = [found[number] for found in by_rank]
                    mean = sum(sent) / count
                    row = {"case": case.name, "ranks": count, "micro_batches": number, "sent": sent}
                    rows.append(row | {"model": model[number], "error": model[number] / mean - 1})
                    print(
                        f"{case.name}, {count} ranks, {number}: {mean / MB:.2f} MB, model "
                        f"{model[number] / MB:.2f} MB",
                        file=sys.stderr,
                        flush=True,
                    )
    return rows


# --- faults -------------------------------------------------------------------------------------------------


def without_folders(line: str) -> str:
    """Return a line with the names of files alone: a library's error names the folders it was built in."""
    return re.sub(r"/(?:[\w.-]+/)+", "", line)


def train(server, network: VirtualNetwork, recipe: Path, output: Path, disturb=None) -> dict:
    """Run train/run.py with a rank on each node; `disturb` is called once, when a step is done. Return exit
    codes, losses, seconds of the run and after the disturbance, the ranks' last errors."""
    from tests.train import tiny

    began, disturbed = time.monotonic(), None
    run = server.start(
        [recipe, f"output={output}", f"health.timeout_minutes={TIMEOUT_MINUTES}", "log.every_steps=1"],
        ranks=len(network.namespaces),
        environment={
            name: value for name, value in environment_of(0, network, 29500).items() if name != "RANK"
        },
        fault=["enter_namespace", *network.namespaces],
    )
    metrics = output / "alignment" / "metrics.jsonl"
    while None in run.codes() and time.monotonic() - began < 600:
        if disturb and disturbed is None and metrics.exists() and '"kind": "train"' in metrics.read_text():
            disturb()
            disturbed = time.monotonic()
        time.sleep(0.05)
    run.kill()
    codes = run.wait()
    ended = time.monotonic()
    logs = [output / "alignment" / "logs" / f"rank-{rank}.log" for rank in range(len(codes))]
    errors = [
        next(
            (without_folders(line[20:]) for line in log.read_text().splitlines() if "another rank" in line),
            None,
        )
        for log in logs
    ]
    return {
        "codes": codes,
        "losses": tiny.losses(output / "alignment") if metrics.exists() else {},
        "seconds": ended - began,
        "after": ended - disturbed if disturbed else None,
        "errors": errors,
    }


def faults() -> list[dict]:
    """The same run on a quiet, a slow, a lossy and a parted network of two nodes."""
    from tests.train import tiny
    from tests.train.ranks import Server

    found = []
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        recipe = tiny.workspace(Path(folder)) / "stage1.yaml"
        for name, rate, loss in (
            ("quiet", RATE, 0.0),
            ("a node at 1 Mbit/s", 1e6, 0.0),
            ("2 % of packets lost", RATE, 0.02),
            ("partition", RATE, 0.0),
        ):
            with VirtualNetwork(2, RATE, LATENCY, loss) as network:
                network.rates[1] = rate

                def part(network: VirtualNetwork = network) -> None:
                    network.groups[1] = 1

                disturb = part if name == "partition" else None
                row = train(server, network, recipe, Path(folder) / name.replace(" ", "-"), disturb)
                found.append({"fault": name, **row, "packets_lost": network.lost})
                print(name, row["codes"], f"{row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found


# --- report -------------------------------------------------------------------------------------------------


def volume_table(rows: list[dict]) -> str:
    return tabulate(
        [
            (
                row["case"],
                row["ranks"],
                row["micro_batches"],
                sum(row["sent"]) / row["ranks"] / MB,
                max(row["sent"]) / MB,
                row["model"] / MB,
                f"{row['error']:+.1%}",
            )
            for row in rows
        ],
        headers=("case", "ranks", "micro-batches", "MB sent a node", "most", "planner MB", "error"),
        floatfmt=".2f",
    )


def fault_table(rows: list[dict]) -> str:
    quiet = rows[0]["losses"]
    return tabulate(
        [
            (
                row["fault"],
                " ".join(map(str, row["codes"])),
                "equal" if row["losses"] == quiet else f"{len(row['losses'])} of {len(quiet)} steps",
                row["packets_lost"],
                row["seconds"],
                row["after"],
            )
            for row in rows
        ],
        headers=("network", "exit codes", "losses", "packets lost", "seconds", "s after the fault"),
        floatfmt=".1f",
    )


def problems(volume: list[dict], fault: list[dict]) -> list[str]:
    """Return what misses a mark."""
    found = [
        f"{row['case']}, {row['ranks']} ranks: {row['error']:+.1%}"
        for row in volume
        if abs(row["error"]) > LIMIT
    ]
    for row in fault:
        if row["fault"] != "partition":
            if set(row["codes"]) != {0} or row["losses"] != fault[0]["losses"]:
                found.append(f"{row['fault']}: exit codes {row['codes']}, or other losses")
        elif (
            set(row["codes"]) != {1}
            or None in row["errors"]
            or not (row["after"] or 1e9) <= 120 * TIMEOUT_MINUTES
        ):
            found.append(f"partition: exit codes {row['codes']}, errors {row['errors']}, {row['after']} s")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser("python -m benchmarks.network", __doc__.splitlines()[0], example="--ranks 2 4")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="nodes, one rank each")
    parser.add_argument("--only", choices=("volume", "faults"), help="one of the two parts")
    parser.add_argument("--out", type=Path, help="write the report here, and its table beside it")
    options = parser.parse_args(argv)
    lack = missing()
    if lack:
        print(f"error: {lack}", file=sys.stderr)
        return 2
    facts = machine()
    volume = [] if options.only == "faults" else volumes(options.ranks)
    fault = [] if options.only == "volume" else faults()
    misses = problems(volume, fault)
    parts = [volume_table(volume)] if volume else []
    if fault:
        parts += [fault_table(fault)]
        parts += [f"partition, rank {rank}: {line}" for rank, line in enumerate(fault[-1]["errors"])]
    parts += [f"missed: {miss}" for miss in misses] or ["all marks are reached"]
    text = "\n\n".join(parts)
    print(text)
    if options.out:
        report = {"machine": facts, "limit": LIMIT, "rate": RATE, "latency": LATENCY}
        keep(options.out, {**report, "volume": volume, "faults": fault}, text)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
