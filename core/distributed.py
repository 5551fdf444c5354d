"""Who am I among the ranks: the same facts from torchrun, the deepspeed launcher, srun or nothing; a clean
way in and out."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from core.options import RecipeError

T = TypeVar("T")
logger = logging.getLogger("soundwave")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str  # "cpu" or "cuda:<local rank>"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _slurm_master_address() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or int(os.environ.get("SLURM_NNODES", "1")) == 1:
        return "127.0.0.1"
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
    )
    return names.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check_launcher() -> None:
    """RANK and WORLD_SIZE in a Slurm step are this step's, or those of a torchrun in each task of it.

    Left over from another job (a training script that submits its successor), they would make every task the
    only rank, and all would write one output. Errors: RecipeError.
    """
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" not in env or tasks == 1:
        return
    world_size, by_torchrun = int(env.get("WORLD_SIZE", 1)), "TORCHELASTIC_RUN_ID" in env
    expected = {tasks, tasks * int(env.get("LOCAL_WORLD_SIZE", 1))} if by_torchrun else {tasks}
    if world_size not in expected or (
        not by_torchrun and env["RANK"] != env.get("SLURM_PROCID", env["RANK"])
    ):
        variables = f"RANK={env['RANK']} WORLD_SIZE={world_size}"
        env["RANK"] = env.get("SLURM_PROCID", "0")  # one line, from one rank
        raise RecipeError(
            f"{variables} are not of this Slurm step, which has {tasks} tasks: they come from another "
            f"launcher; unset "
            "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and TORCHELASTIC_RUN_ID"
        )


def fill_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did
    not.

    srun sets SLURM_PROCID and its kin only; without any launcher this is one process. Must run before
    deepspeed is imported, which reads DS_ACCELERATOR then. Errors: RecipeError (check_launcher).
    """
    env = os.environ
    check_launcher()
    if "RANK" not in env:
        if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
            env["RANK"] = env["SLURM_PROCID"]
            env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
            env["LOCAL_RANK"] = env["SLURM_LOCALID"]
            env["LOCAL_WORLD_SIZE"] = (
                (env.get("SLURM_STEP_TASKS_PER_NODE") or "1").split("(")[0].split(",")[0]
            )
            env.setdefault("MASTER_ADDR", _slurm_master_address())
            # Every task derives the same port from the job; a second step of the same job gets another one.
            job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
            env.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 30000))
        else:
            env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            env.setdefault("MASTER_PORT", str(_free_port()))
    env.setdefault("LOCAL_RANK", env["RANK"])
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    # One cache of compiled ops per virtual environment: a shared one is spoilt by the next torch version.
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if (
        shutil.which("ninja") is None
    ):  # the compiler driver lies beside this python; started by its path, PATH lacks it
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of data workers
    import torch

    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")


class PortTaken(RuntimeError):
    """MASTER_PORT serves another program of this machine; one line: what, where, what to do."""


def check_master_port() -> None:
    """Open rank 0's port for a moment: if another run has it, this one would end in a traceback, and its
    other ranks would join that run. TORCHELASTIC_USE_AGENT_STORE: torchrun has opened it already.
    Errors: PortTaken."""
    if int(os.environ["RANK"]) != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = os.environ["MASTER_PORT"]
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise PortTaken(
            f"port {port} (MASTER_PORT) of this machine cannot be opened ({reason}), another training may "
            f"use it: "
            "give a "
            "free one, e.g. deepspeed --master_port 29501 train/run.py ..."
        ) from None


def set_threads(local_world_size: int) -> int:
    """On CPU, share the cores among the ranks of this node, one thread a core; returns the number of threads
    per rank.

    A value of OMP_NUM_THREADS is taken as meant, but for the 1 that torchrun sets of its own accord where it
    starts several.
    """
    import torch

    by_torchrun = (
        "TORCHELASTIC_RUN_ID" in os.environ
        and local_world_size > 1
        and os.environ.get("OMP_NUM_THREADS") == "1"
    )
    if "OMP_NUM_THREADS" in os.environ and not by_torchrun:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    # srun with --cpus-per-task already binds each task to its own cores.
    bound_by_slurm = "SLURM_CPUS_PER_TASK" in os.environ and cores <= int(os.environ["SLURM_CPUS_PER_TASK"])
    threads = cores if bound_by_slurm else max(1, cores // local_world_size)
    torch.set_num_threads(threads)
    return threads


def load_communication_op() -> None:
    """Load (and the first time compile, about 30 s) DeepSpeed's shared-memory collectives for CPU, one
    process at a time.

    PyTorch guards its cache of compiled ops with a file that a killed process leaves behind, and then waits
    for ever. Whoever holds the flock here, which dies with its process, may take such a file away.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    cache = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".soundwave.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (cache / builder.name / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)  # kept by the builder: init_distributed takes it from there


def connect(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group through DeepSpeed; `fill_environment` has run."""
    import torch

    # Once per call of a collective that DeepSpeed still names the old way; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(
        logging.WARNING
    )  # deepspeed sets its own level while being imported
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    set_threads(local_world_size)
    if device == "cpu":
        load_communication_op()
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    return Ranks(rank, world_size, local_rank, local_world_size, device)


# What gloo and NCCL report where a collective does not end.
_NO_ANSWER = ("Timed out waiting", "timed out", "timeout caused pair closure")
_CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "connection aborted")


def lost_contact(error: BaseException, timeout_minutes: float) -> str | None:
    """Return one line where `error` is a collective that another rank did not answer, else None."""
    import torch.distributed as dist

    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return None
    if any(part in text for part in _CLOSED):
        return "another rank has closed its connection: its log has the cause. Rerun the command to resume"
    if any(part in text for part in _NO_ANSWER):
        return (
            f"another rank has not answered for {timeout_minutes:g} minutes (health.timeout_minutes): a node "
            "or the network is down, or a rank is stuck. See the other ranks' logs; rerun the command to "
            "resume"
        )
    return None


def gather(value: T) -> list[T]:
    """Return `value` of every rank, in their order. Collective; without a process group there is one rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Return rank 0's `value` on all ranks. Collective; without a process group there is one rank."""
    import torch.distributed as dist

    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def disconnect() -> None:
    """Leave together: everyone has finished its collectives before anyone closes a socket."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def remove_shared_memory() -> None:
    """DeepSpeed's ranks on CPU talk through files in /dev/shm, which is memory, and leave them there: 66 MB a
    rank and run, until the machine has none. Its name for ours (csrc/cpu/comm/shm.cpp): user, address, port,
    rank."""
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def hard_exit(code: int) -> NoReturn:
    """End this process with `code`, without the interpreter's own farewell.

    A worker thread of gloo may still be dropping the tensors of the last collective, for which it needs the
    interpreter's lock. A thread that asks for it during finalisation is unwound by force through C++ that
    allows no exceptions: "terminate called without an active exception", exit by SIGABRT, and a run that was
    done counts as failed. DeepSpeed keeps references to process groups, so destroying them does not join
    these threads. Nothing is left to finalise here: the caller has closed its files.
    """
    # After an error data workers are still there: each would wait for ever to write into a full pipe.
    for child in multiprocessing.active_children():
        child.kill()
    remove_shared_memory()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
