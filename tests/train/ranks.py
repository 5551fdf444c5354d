"""Real ranks without the wait: a server process imports everything once and forks each run's ranks from
itself.

Importing takes longer than a tiny training run. What a rank then does is what `python train/run.py` does: its
own process, the environment that a launcher gives (one task per rank, as srun does), real DeepSpeed over
gloo, real signals.

    with Server() as server:
        run = server.start(["recipe.yaml", "optim.steps=4"], ranks=2)      .pids, .wait() -> exit codes,
        .text(): output of all

`python -m tests.train.ranks` is the server; it reads one JSON request a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0  # seconds for any one run: a hang is a failure


def _import_everything() -> None:
    os.environ.update(DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    from core.distributed import fill_environment

    kept = dict(os.environ)
    fill_environment()
    for name in set(os.environ) - set(kept) - {"TORCH_EXTENSIONS_DIR"}:
        del os.environ[name]
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.whisper.modeling_whisper  # noqa: F401

    import train.stage_run  # noqa: F401


def _be_a_rank(request: dict, rank: int, port: int) -> None:
    code = 1
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["ranks"]),
            LOCAL_WORLD_SIZE=str(request["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        import tests.train.faults
        from core.distributed import hard_exit
        from train import run

        if request["fault"]:
            name, *arguments = request["fault"]
            getattr(tests.train.faults, name)(rank, *arguments)
        hard_exit(run.main(request["arguments"]))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    _import_everything()
    children: dict[int, int | None] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            for pid in request["wait"]:
                if children.get(pid) is None:
                    _, status = os.waitpid(pid, 0 if request["block"] else os.WNOHANG)
                    if _:
                        children[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps([children[pid] for pid in request["wait"]]), flush=True)
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_a_rank(request, rank, port)
            pids.append(pid)
            children[pid] = None
        print(json.dumps(pids), flush=True)


@dataclass
class Running:
    server: Server
    pids: list[int]
    logs: list[Path]

    def codes(self) -> list[int | None]:
        """Exit codes so far, None while a rank runs; minus the signal's number for one that was killed."""
        return self.server.ask({"wait": self.pids, "block": False})

    def wait(self, limit: float = LIMIT, *, patience: float | None = None) -> list[int]:
        """Exit codes of all ranks. patience: when one has failed, kill the others after so many seconds, as
        launchers do."""
        deadline = time.monotonic() + limit
        while None in (codes := self.codes()):
            if patience is not None and any(code not in (None, 0, 85) for code in codes):
                deadline, patience = min(deadline, time.monotonic() + patience), None
            if time.monotonic() > deadline:
                self.kill()
                return self.server.ask({"wait": self.pids, "block": True})
            time.sleep(0.02)
        return codes

    def signal(self, number: int, ranks: list[int]) -> None:
        for pid, code in zip(self.pids, self.codes()):
            if code is None and self.pids.index(pid) in ranks:
                os.kill(pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL, list(range(len(self.pids))))

    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)


class Server:
    def __enter__(self) -> Server:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.number = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.ranks"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert json.loads(self.process.stdout.readline()) == "ready"
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        arguments: list,
        *,
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        fault: list | None = None,
        folder: Path = ROOT,
    ) -> Running:
        """Start `train/run.py` with `arguments` on so many ranks in `folder`. fault: a function of
        tests/train/faults.py, its arguments."""
        self.number += 1
        logs = [Path(self.folder.name) / f"{self.number}-{rank}.log" for rank in range(ranks)]
        pids = self.ask(
            {
                "arguments": [str(a) for a in arguments],
                "ranks": ranks,
                "environment": environment or {},
                "fault": fault,
                "folder": str(folder),
                "logs": [str(log) for log in logs],
            }
        )
        return Running(self, pids, logs)


if __name__ == "__main__":
    serve()
