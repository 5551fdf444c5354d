"""Before any weight is loaded: can the nodes of this job train this recipe? One line for each thing that is
wrong, with its node.

    srun python -m train.preflight RECIPE [key=value ...]    in a job, one process per rank, as training
                                                              itself (slurm/common.sh)
    python -m train.preflight RECIPE [key=value ...]         here, one process
    python -m train.preflight RECIPE --where                 only print the stage, the output folder, whether
                                                              it is finished, and the model folder that it
                                                              starts from

1. Every rank looks at its GPU; one rank per node looks at what a node sees: packages, shards and their index,
   the frozen base, free disk space.
2. The findings travel through a TCP store (no collective, so that a missing node is named, not waited for),
   and rank 0 compares them: all nodes must see the same shards, the same base, the same versions, the same
   code.
3. If all is well so far, an all_reduce over all ranks, checked and timed.

Exit codes as in training: 0 all is well, 1 a node is at fault, 2 the recipe or its input is (starting again
does not help), 85 all is well, but SIGTERM came meanwhile (preemption): training had better not begin, 98
MASTER_PORT is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from core.command_line import CommandParser
from core.files import step_folders
from core.repository import code_hash
from recipe.config import Corpus, Recipe, RecipeError, load_recipe, start_folder
from recipe.stages import has_model, initial_folder, stage_folder, stage_of
from train.checkpoint.compatibility import check_checkpoint, finished
from train.preemption import DONE, FAILED, PORT_TAKEN, PREEMPTED, WRONG_INPUT

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "tokenizers", "numpy")
GPU_REDUCE_BYTES, CPU_REDUCE_BYTES = 256 << 20, 8 << 20
REPEATS = 5


@dataclass
class Fault:
    node: str
    text: str
    from_input: bool  # the recipe or its data is to blame, not the node: exit code 2


@dataclass
class Report:
    """What one rank found."""

    node: str
    rank: int
    facts: dict[str, str] = field(default_factory=dict)  # must be equal on all nodes
    input_faults: list[str] = field(default_factory=list)  # the recipe's or the data's: exit code 2
    node_faults: list[str] = field(default_factory=list)  # this node's: exit code 1
    notes: list[str] = field(default_factory=list)


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


# --- what one rank, or one node, sees -----------------------------------------------------------------------


def version_facts() -> dict[str, str]:
    code = code_hash(("core", "data_tools", "model", "recipe", "stream", "train"))
    facts = {"python": platform.python_version(), "code": code[:12]}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    import torch

    if torch.cuda.is_available():
        facts["CUDA"] = str(torch.version.cuda)
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["GPU"] = torch.cuda.get_device_name()
        driver = Path("/proc/driver/nvidia/version")
        facts["driver"] = driver.read_text().split("Module")[-1].split()[0] if driver.exists() else "unknown"
    return facts


def packed_folders(recipe: Recipe) -> list[Corpus]:
    """The recipe's corpora that lie in packed folders, each folder once; a pipe or pattern of tar files is
    streamed and cannot be looked at."""
    from stream.plan import is_plain_stream

    corpora = {corpus.shards: corpus for corpus in [*recipe.data.train, *recipe.data.valid]}
    return [corpus for name, corpus in corpora.items() if not is_plain_stream(name)]


def check_shards(recipe: Recipe, report: Report) -> None:
    """Every shard is there in full size, and the sample table is the one that the index was written with."""
    from data_tools.shards import ShardError, ShardIndex, fingerprint

    for corpus in packed_folders(recipe):
        try:
            index = ShardIndex.load(corpus.shards)
        except (ShardError, OSError, KeyError) as error:
            report.input_faults.append(f"data {corpus.shards}: {one_line(error)}")
            continue
        if fingerprint(index.samples, [shard["sha256"] for shard in index.shards]) != index.fingerprint:
            report.input_faults.append(
                f"data {corpus.shards}: samples.npy is not the table that index.json was written with: "
                "run the pack command's --merge again"
            )
        report.facts[f"data {corpus.shards}"] = " with ".join([index.fingerprint[:12], *index.damaged])
        if (
            report.rank == 0
        ):  # on one node only, it is a difference between nodes; on all, it costs the shard's samples
            report.notes += [f"{line}; its lost samples are left out" for line in index.damaged]


def newest(recipe: Recipe, name: str) -> tuple[Path, dict] | None:
    """The newest checkpoint whose file `name` can be read, and what it holds: training skips damaged
    ones, too."""
    for folder in step_folders(stage_folder(recipe) / "checkpoints"):
        try:
            return folder, json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return None


def check_base(recipe: Recipe, report: Report) -> None:
    """The frozen parts are there, and are those that the previous stage and this stage's checkpoints were
    made with."""
    from model import identity
    from model.artifact import describe
    from model.encoder import tensor_prefix
    from model.inheritance import differing_options
    from model.language_model import load_tokenizer
    from model.pretrained import SourceError, fingerprint, locate

    hashes, sources, settings = {}, {}, {}
    for part, name in (("encoder", recipe.model.encoder.name), ("llm", recipe.model.llm.name)):
        try:
            source = sources[part] = locate(name)
            hashes[part] = fingerprint(source.files, tensor_prefix(source) if part == "encoder" else "")
            report.facts[f"model.{part} {name}"] = hashes[part][:12]
        except (SourceError, OSError, ValueError) as error:
            report.input_faults.append(f"model.{part}: {one_line(error)}")
    if len(hashes) == 2:
        try:
            settings = identity.settings(sources, load_tokenizer(sources["llm"], recipe.model.audio_token))
            text = json.dumps(settings, sort_keys=True)
            report.facts["model settings"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        except SourceError as error:
            report.input_faults.append(f"model.llm: {one_line(error)}")
    made_with = []
    if not has_model(recipe) and (start := initial_folder(recipe)):
        report.notes += (
            [
                f"{key} was {then} when {start} was trained, and is {now} here (init_accept)"
                for key, (then, now) in differing_options(recipe.model, start).items()
            ]
            if report.rank == 0
            else []
        )
        described = describe(start)
        made_with.append((start, described["frozen"], described.get("settings")))
    saved = newest(recipe, "state.json")
    if saved:
        made_with.append((saved[0], saved[1]["facts"]["base"], saved[1]["facts"].get("settings")))
    accepted = recipe.checkpoint.accept_changes
    for where, stored, then in made_with:
        for part, digest in hashes.items():
            if stored.get(part, digest) != digest and "base" not in accepted:
                report.input_faults.append(
                    f"model.{part}: {where} was made with another one (sha256 {stored[part][:12]}..., "
                    f"here {digest[:12]}...): set model.{part}.name to the one it was made with"
                )
        for part, lines in identity.changes(then, settings).items() if then and settings else ():
            if ("tokenizer" if part == "tokenizer" else "base") not in accepted:
                report.input_faults.append(
                    f"model.{'llm' if part == 'tokenizer' else part}: {where} was made with another "
                    f"{part} "
                    f"({'; '.join(lines[:5])}): give its folder the old files back"
                )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: of the newest there is, else 16 bytes a trained number (two fp32 copies and
    Adam's two moments)."""
    if saved := newest(recipe, "manifest.json"):
        return sum(entry["size"] for entry in saved[1]["files"].values())
    from model.soundwave import Soundwave

    model = Soundwave.build(recipe.model, parts=stage_of(recipe).parts, meta=True)
    model.set_stage(stage_of(recipe))
    return 16 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_disks(recipe: Recipe, report: Report) -> None:
    """This node can write to the output folder. Rank 0: there is room for the checkpoints that are kept, and
    the one in work."""
    folder = stage_folder(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".preflight-{report.node}").write_text(report.node)
    except OSError as error:
        report.node_faults.append(f"output {folder} cannot be written: {error.strerror}")
        return
    free = shutil.disk_usage(folder).free
    if report.rank == 0 and not report.input_faults:
        existing = len(step_folders(folder / "checkpoints"))
        size, count = (
            checkpoint_bytes(recipe),
            max(1, recipe.checkpoint.keep_last + recipe.checkpoint.keep_best + 1 - existing),
        )
        report.notes.append(
            f"output {folder}: {free / 1e9:.1f} GB free, {count} more checkpoints of {size / 1e9:.3f} GB to "
            f"come"
        )
        if free < size * count:
            report.input_faults.append(
                f"output {folder}: {count} more checkpoints of {size / 1e9:.3f} GB do not fit into "
                f"the {free / 1e9:.3f} GB free: make room, lower checkpoint.keep_last, or move output"
            )


def check_gpu(report: Report) -> None:
    """This rank's GPU is there, free, and computes; where PyTorch sees none, that none is there to be
    seen."""
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        if Path("/dev/nvidiactl").exists() and not hidden and first_of_node(report.rank):
            report.node_faults.append(
                f"the node has NVIDIA GPUs but PyTorch {torch.__version__} sees none: make setup GPU=1 "
                "installs a CUDA build; or set CUDA_VISIBLE_DEVICES= to train on CPU"
            )
        elif report.rank == 0:
            report.notes.append("no GPU is seen: training will run on CPU")
        return
    if local_rank >= torch.cuda.device_count():
        report.node_faults.append(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; make "
            "--ntasks-per-node the number of GPUs per node"
        )
        return
    try:
        torch.cuda.set_device(local_rank)
        free, total = torch.cuda.mem_get_info()
        if free < 0.9 * total:
            report.node_faults.append(
                f"GPU {local_rank}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are taken already: "
                "another process runs on it (nvidia-smi)"
            )
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
        result = (a.to("cuda", torch.bfloat16) @ b.to("cuda", torch.bfloat16)).float().cpu()
        expected = a.bfloat16().float() @ b.bfloat16().float()
        if not torch.allclose(
            result, expected, atol=2.0, rtol=0.02
        ):  # entries of about 32, rounded to 8 bits
            report.node_faults.append(
                f"GPU {local_rank} multiplies matrices wrongly: leave it out (--exclude={report.node})"
            )
    except RuntimeError as error:
        report.node_faults.append(f"GPU {local_rank}: {one_line(error)}")


def check_cpu(recipe: Recipe, report: Report) -> None:
    """DeepSpeed's ops for the CPU were compiled for the one that `make setup` ran on: another would end them
    by SIGILL."""
    import torch

    from train import deepspeed_config
    from train.optim import missing_offload_op

    offloads = deepspeed_config.offloads_optimizer(deepspeed_config.resolve(recipe, hidden_size=1024))
    if offloads and (problem := missing_offload_op()):
        report.input_faults.append(problem)
    built, info = Path(sys.prefix) / ".setup" / "cpu", Path("/proc/cpuinfo")
    if (offloads or not torch.cuda.is_available()) and built.exists() and info.exists():
        here = set(info.read_text().split())
        flags = [flag for flag in built.read_text().split() if flag.startswith(("avx", "fma", "amx", "sve"))]
        if lacking := [flag for flag in flags if flag not in here]:
            report.node_faults.append(
                f"DeepSpeed's CPU ops were built for a CPU with {' '.join(lacking)}, which this node's has "
                "not: run make setup on a node of the weakest kind, with another VENV"
            )


def check_ecc(report: Report) -> None:
    """Uncorrected memory errors since the driver started, where nvidia-smi counts them. Noted: the driver
    retires such rows."""
    if shutil.which("nvidia-smi") is None:
        return
    command = [
        "nvidia-smi",
        "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        report.node_faults.append(
            f"nvidia-smi does not answer within 60 s: leave the node out (--exclude={report.node})"
        )
        return
    if answer.returncode != 0:
        report.node_faults.append(f"nvidia-smi: {one_line(answer.stdout + answer.stderr)}")
    for line in answer.stdout.splitlines():
        index, _, count = line.partition(", ")
        if count.strip().isdigit() and int(count) > 0:
            report.notes.append(
                f"node {report.node}: GPU {index} counts {count.strip()} uncorrected memory errors"
            )


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:400]


def first_of_node(rank: int) -> bool:
    """Whether this rank is the first of its node. Not by LOCAL_RANK, the GPU's number: it is 0 on every rank
    where the site shows each rank its own GPU alone."""
    if (
        "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    ):  # torchrun's ranks inherit torchrun's own
        return os.environ["SLURM_LOCALID"] == "0"
    return rank % int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 0


def node_report(recipe: Recipe, rank: int) -> Report:
    report = Report(node_name(), rank)
    check_gpu(report)
    if first_of_node(rank):
        report.facts.update(version_facts())
        check_cpu(recipe, report)
        check_ecc(report)
        check_shards(recipe, report)
        check_base(recipe, report)
        check_disks(recipe, report)
    return report


# --- all ranks together -------------------------------------------------------------------------------------


def compare(reports: list[Report]) -> list[Fault]:
    """What the ranks found, and where the nodes differ: the minority is at fault."""
    faults = []
    for report in reports:
        faults += [Fault(report.node, text, True) for text in report.input_faults]
        faults += [Fault(report.node, text, False) for text in report.node_faults]
    first: dict[str, dict[str, str]] = {}
    for report in reports:
        if report.facts:
            first.setdefault(report.node, report.facts)
    for fact in sorted(
        {name for facts in first.values() for name in facts} - {"driver"}
    ):  # which sites update node by node
        values = {node: facts.get(fact, "missing") for node, facts in first.items()}
        usual, _ = Counter(values.values()).most_common(1)[0]
        with_usual = [node for node, value in values.items() if value == usual]
        for node, value in values.items():
            if value != usual and "missing" not in (value, usual):  # what is missing has a fault of its own
                where = with_usual[0] + (f" and {len(with_usual) - 1} more" if len(with_usual) > 1 else "")
                faults.append(
                    Fault(node, f"{fact} is {value}, but {usual} on {where}: give all nodes the same", False)
                )
    return faults


def gather(store, world_size: int, seconds: float) -> tuple[list[Report], list[Fault]]:
    """The reports of all ranks, and a fault for each node from which some did not come within `seconds`."""
    deadline, reports = time.monotonic() + seconds, []
    missing: dict[str, list[int]] = {}
    nodes = os.environ.get("SOUNDWAVE_NODES", "").split()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for rank in range(world_size):
        try:
            store.wait([f"report-{rank}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
            reports.append(Report(**json.loads(store.get(f"report-{rank}"))))
        except RuntimeError:
            node = nodes[rank // per_node] if rank // per_node < len(nodes) else "unknown"
            missing.setdefault(node, []).append(rank)
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return reports, [
        Fault(
            node,
            f"no word from rank {', '.join(map(str, ranks))} within {seconds:.0f} s: is the node up, does "
            f"Python start there, can it reach {master}?",
            False,
        )
        for node, ranks in missing.items()
    ]


def check_shared_output(recipe: Recipe, reports: list[Report]) -> list[Fault]:
    """Rank 0 sees what every node wrote into the output folder: checkpoints need one shared folder."""
    folder, faults = stage_folder(recipe), []
    for node in {report.node for report in reports if report.facts and not report.node_faults}:
        mark = folder / f".preflight-{node}"
        for _ in range(20):  # a network file system may show a new file some seconds late
            if mark.exists():
                break
            os.listdir(folder)
            time.sleep(0.5)
        else:
            text = f"output {folder} is not the folder that {node_name()} sees: put output on a shared file system"  # noqa: E501
            faults.append(Fault(node, text, from_input=True))
        mark.unlink(missing_ok=True)
    return faults


def all_reduce_line(store, rank: int, world_size: int, seconds: float) -> tuple[str, str | None]:
    """(how fast, what went wrong or None) of an all_reduce over all ranks, at the size of one gradient
    bucket.

    Bus bandwidth is bytes / seconds * 2 (n - 1) / n: what each link carries in a ring (NVIDIA nccl-tests,
    PERFORMANCE.md).
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("preflight", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    size = GPU_REDUCE_BYTES if on_gpu else CPU_REDUCE_BYTES
    times = []
    for _ in range(REPEATS + 1):  # the first one opens the connections
        tensor = torch.full((size // 4,), float(rank + 1), device=device)
        started = time.perf_counter()
        work = dist.all_reduce(tensor, async_op=True)
        while not work.is_completed():
            if time.perf_counter() - started > seconds:
                return (
                    "",
                    f"an all_reduce over {world_size} ranks does not end; NCCL_DEBUG=INFO logs the network "
                    f"that it uses",
                )
            time.sleep(1e-5 if on_gpu else 1e-4)
        work.wait()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        expected = world_size * (world_size + 1) / 2
        if not bool((tensor == expected).all()):
            return (
                "",
                f"an all_reduce gave {tensor.min().item()}..{tensor.max().item()} instead of {expected}",
            )
    best = min(times[1:])
    bus = size / best * 2 * (world_size - 1) / world_size / 1e9
    return (
        f"all_reduce of {size >> 20} MiB over {world_size} ranks: {best * 1e3:.1f} ms, bus bandwidth "
        f"{bus:.2f} GB/s",
        None,
    )


def check_all_reduce(store, rank: int, world_size: int, seconds: float) -> int:
    """Return the exit code of an all_reduce over all ranks; print its speed, or what is wrong."""
    try:
        speed, problem = all_reduce_line(store, rank, world_size, seconds)
    except RuntimeError as error:
        speed, problem = "", f"all_reduce: {one_line(error)}"
    if problem:
        print(f"error: node {node_name()}: rank {rank}: {problem}", file=sys.stderr)
        return FAILED
    if rank == 0:
        print(f"preflight: {speed}")
    return DONE


def run(recipe: Recipe, seconds: float, faults_to: Path | None = None) -> int:
    import torch.distributed as dist

    env = os.environ
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "0" if world_size == 1 else "29500")
    serves = (
        rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # torchrun has opened a store there already
    try:
        store = dist.TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            world_size,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if serves and "EADDRINUSE" in str(error):
            print(
                f"error: node {node_name()}: port {env['MASTER_PORT']} is taken by another program",
                file=sys.stderr,
            )
            return PORT_TAKEN
        print(
            f"error: node {node_name()}: rank {rank} cannot reach rank 0 at "
            f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} "
            f"({one_line(error)[:120]}): see the firewall and the nodes' host names",
            file=sys.stderr,
        )
        return FAILED
    report = node_report(recipe, rank)
    store.set(f"report-{rank}", json.dumps(asdict(report)))
    code = DONE
    if rank == 0:
        reports, faults = gather(store, world_size, seconds)
        faults += compare(reports) + check_shared_output(recipe, reports)
        for fault in faults:
            print(f"error: node {fault.node}: {fault.text}", file=sys.stderr)
        if faults and faults_to:
            write_faults(faults_to, [f"node {fault.node}: {fault.text}" for fault in faults])
        if faults:
            code = WRONG_INPUT if any(fault.from_input for fault in faults) else FAILED
        else:
            facts = reports[0].facts
            print(
                f"preflight: {len({r.node for r in reports})} nodes, {world_size} ranks agree: "
                + ", ".join(f"{name} {value}" for name, value in facts.items())
            )
            for note in (note for r in reports for note in r.notes):
                print(f"preflight: {note}")
        store.set("verdict", str(code))
    else:
        try:
            store.wait(["verdict"], timedelta(seconds=2 * seconds + 60))
            code = int(store.get("verdict"))
        except RuntimeError as error:
            print(
                f"error: node {node_name()}: rank {rank} lost the connection to rank 0 "
                f"({one_line(error)[:120]})",
                file=sys.stderr,
            )
            return FAILED
    if code == DONE:
        code = check_all_reduce(store, rank, world_size, seconds)
    # Rank 0 holds the store, so it leaves last; after a fault it does not wait long for those who never came,
    # or are stuck.
    try:
        store.set(f"left-{rank}", "")
        if rank == 0:
            expected = range(world_size) if code == DONE else [report.rank for report in reports]
            store.wait([f"left-{r}" for r in expected], timedelta(seconds=seconds if code == DONE else 10))
    except RuntimeError as error:
        if code == DONE:
            print(f"error: node {node_name()}: rank {rank}: {one_line(error)[:200]}", file=sys.stderr)
            code = FAILED
    return code


def print_where(recipe: Recipe) -> None:
    """Print what the job scripts ask for, a marked line each: other programs may print to the same standard
    output."""
    is_finished = finished(recipe)
    if not is_finished:
        check_checkpoint(recipe)
    state = "finished" if is_finished else "unfinished"
    for name, value in (
        ("stage", recipe.stage),
        ("output", recipe.output),
        ("state", state),
        ("start", start_folder(recipe) or ""),
    ):
        print(f"soundwave-where {name} {value}")


def write_faults(path: Path, faults: list[str]) -> None:
    """Write the faults for `python -m train.status`. A file that cannot be written changes no outcome: they
    are printed, too."""
    try:
        path.write_text("".join(f"{fault}\n" for fault in faults))
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m train.preflight",
        "Check the nodes of a job before training.",
        example="train/recipes/stage1.yaml",
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to change")
    parser.add_argument(
        "--where", action="store_true", help="print stage, output folder, (un)finished and start folder"
    )
    parser.add_argument("--faults-to", type=Path, help="write the faults to this file, one a line")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for the other ranks")
    args = parser.parse_intermixed_args(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        stage_of(recipe)
        if args.where:
            print_where(recipe)
            return DONE
        if not has_model(recipe):  # else it may be finished, and then it needs no start
            initial_folder(recipe)
        if not recipe.data.train:
            raise RecipeError(
                "data.train is empty: name at least one packed folder, e.g. data.train=[{shards: data/train}]"
            )
    except RecipeError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
            if args.faults_to:
                write_faults(args.faults_to, [one_line(error)])
        return WRONG_INPUT
    return run(recipe, args.timeout, args.faults_to)


if __name__ == "__main__":
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # Slurm's warning is the batch script's business until training listens
    terms: list[int] = []
    signal.signal(
        signal.SIGTERM, lambda number, _frame: terms.append(number)
    )  # which the batch script does not see
    exit_code = main()
    if exit_code == DONE and terms:
        exit_code = PREEMPTED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # gloo's threads would abort an ordinary interpreter exit now and then
