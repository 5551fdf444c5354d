"""A real Slurm of a few nodes on this one machine: munged, slurmctld and one slurmd per node, started and
stopped by pid.

Two kinds. `loop`: every node has a loopback address of its own; it starts within two seconds. `netns`: every
node lives in a network namespace behind a bridge, so a node can be cut off and killed as a power failure
would (`kill_node`).

Each slurmd runs in a mount and UTS namespace of its own, so that a node has its own host name and /etc/hosts,
and a test may lay another file over a path on one node alone (`overlay`). GPUs are character devices that
nothing opens; CPUs are make-believe too (`config_overrides`), because honest ones would leave the project's
scripts pending for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey", "unshare", "nsenter"]
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "PREEMPTED",
}


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def install() -> str | None:
    """Install the Debian packages where they are missing. Returns why that cannot be done, or None.

    One process at a time: the test workers of one machine all begin here. A package manager that runs for
    another reason is waited for.
    """
    with open(Path(tempfile.gettempdir()) / f"soundwave-install-slurm-{os.geteuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not missing_programs():
            return None
        if os.geteuid() != 0:
            return (
                f"Slurm is not installed ({', '.join(missing_programs())} missing) and installing it "
                "needs root"
            )
        if shutil.which("apt-get") is None:
            return f"Slurm is not installed ({', '.join(missing_programs())} missing) and there is no apt-get"
        waiting = ["-o", "DPkg::Lock::Timeout=300"]
        command = ["apt-get", "install", "-y", "--no-install-recommends", *waiting, *PACKAGES]
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        for attempt in (command, ["apt-get", "update"], command):  # a fresh image has no package lists
            done = subprocess.run(attempt, env=environment, capture_output=True, text=True, timeout=600)
            if not missing_programs():
                return None
        return f"apt-get could not install {' '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1:]}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """A slurmd for each name in `nodes`, with `gpus` GPUs each. Use as a context manager.

    `gpu_type` gives the GPUs a type. `partitions` holds the options of the default partition, `debug`, and of
    further ones: {"high": "PriorityTier=10"}. `settings` are further lines of slurm.conf, e.g. JobRequeue=0.
    Raises RuntimeError, with the daemons' last words, when the nodes are not idle within 120 seconds.
    """

    def __init__(
        self,
        kind: str = "loop",
        nodes: tuple[str, ...] = ("n1", "gpu-b7"),
        gpus: int = 8,
        gpu_type: str = "",
        partitions: dict[str, str] | None = None,
        **settings: object,
    ):
        self.kind, self.gpus, self.gpu_type, self.settings = kind, gpus, gpu_type, settings
        self.partitions = {"debug": "", **(partitions or {})}
        self.nodes = list(nodes)
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-")
        )  # short: munge's socket path must fit in 108 characters
        self.tag = self.folder.name[-4:]
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    # --- up and down ----------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _address(self, index: int) -> str:
        return f"{self.subnet}.{11 + index}" if self.kind == "netns" else f"127.0.0.{11 + index}"

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        self.folder.chmod(0o755)
        for name in ("munge", "log", "state", "gpu", *(f"spool/{n}" for n in self.nodes)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "munge").chmod(0o711)
        self.subnet = f"10.{77 + os.getpid() % 100}.{int.from_bytes(os.urandom(1), 'big')}"
        controller = f"{self.subnet}.1" if self.kind == "netns" else "127.0.0.1"
        ports = free_ports(1 + len(self.nodes))
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}({controller})",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # a requeued job starts after 11 s, not 125 s
            "AuthInfo": f"socket={folder}/munge/munge.sock,cred_expire=5",
            "CredType": "cred/munge",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmdLogFile": folder / "log/slurmd-%n.log",
            "SlurmdSpoolDir": folder / "spool/%n",
            "StateSaveLocation": folder / "state",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SchedulerType": "sched/backfill",
            "KillWait": 5,
            "MinJobAge": 3600,
            "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
        } | self.settings
        conf = [f"{key}={value}" for key, value in lines.items()]
        hosts = Path("/etc/hosts").read_text().splitlines()
        for i, node in enumerate(self.nodes):
            hosts.append(f"{self._address(i)} {node}")
            host_name = node if self.kind == "netns" else "localhost"
            conf.append(
                f"NodeName={node} NodeHostname={host_name} NodeAddr={self._address(i)} Port={ports[1 + i]} "
                f"CPUs=64 "
                f"Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 State=UNKNOWN "
                f"Gres=gpu:{self.gpu_type + ':' if self.gpu_type else ''}{self.gpus}"
            )
        if self.kind == "netns":
            hosts.append(f"{controller} {host}")
        for name, options in self.partitions.items():
            default = "YES" if name == "debug" else "NO"
            conf.append(
                f"PartitionName={name} Nodes=ALL Default={default} MaxTime=INFINITE State=UP {options}"
            )
        (folder / "slurm.conf").write_text("\n".join(conf) + "\n")
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        for i in range(self.gpus):  # a plain Count is refused
            os.mknod(folder / f"gpu/nvidia{i}", 0o20666, os.makedev(1, 3))
        devices = f"{folder}/gpu/nvidia[0-{self.gpus - 1}]"
        kind = f"Type={self.gpu_type} " if self.gpu_type else ""
        (folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu {kind}File={devices}\n")

    def _daemon(self, name: str, command: list[str]) -> None:
        out = open(self.folder / f"log/{name}.out", "ab")
        self.daemons[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=self._environment(),
            start_new_session=True,
        )
        out.close()

    def _environment(self) -> dict[str, str]:
        """This process's, without what an outer Slurm may have left in it."""
        return {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))
        } | self.environment

    def start_node(self, node: str) -> None:
        inside = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(node)}"] if self.kind == "netns" else []
        self._daemon(node, [*enter, "unshare", "--mount", "--uts", "bash", "-c", inside])

    def _namespace(self, node: str) -> str:
        return f"sw{self.tag}{node}"

    def _link(self, node: str) -> str:
        return f"v{self.tag}{self.nodes.index(node)}"  # the kernel takes 15 characters at most

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10)

    def _start(self) -> None:
        munge = self.folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={munge}/munge.key"], check=True, timeout=10)
        self._daemon(
            "munged",
            [
                "munged",
                "--foreground",
                f"--key-file={munge}/munge.key",
                f"--socket={munge}/munge.sock",
                f"--pid-file={munge}/munged.pid",
                f"--log-file={munge}/munged.log",
                f"--seed-file={munge}/seed",
            ],
        )
        wait_for(lambda: (munge / "munge.sock").exists(), 10, "munged's socket")
        if self.kind == "netns":
            bridge = f"br{self.tag}"
            self._ip("link", "add", bridge, "type", "bridge")
            self._ip("addr", "add", f"{self.subnet}.1/24", "dev", bridge)
            self._ip("link", "set", bridge, "up")
            for i, node in enumerate(self.nodes):
                space = self._namespace(node)
                self._ip("netns", "add", space)
                self._ip(
                    "link", "add", self._link(node), "type", "veth", "peer", "name", "eth0", "netns", space
                )
                self._ip("link", "set", self._link(node), "master", bridge, "up")
                self._ip("-n", space, "addr", "add", f"{self._address(i)}/24", "dev", "eth0")
                self._ip("-n", space, "link", "set", "eth0", "up")
                self._ip("-n", space, "link", "set", "lo", "up")
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for node in self.nodes:
            self.start_node(node)
        try:
            wait_for(lambda: self.node_states() == ["idle"] * len(self.nodes), 120, "idle nodes")
        except TimeoutError:
            words = {p.name: p.read_text()[-800:] for p in sorted((self.folder / "log").iterdir())}
            raise RuntimeError("the test cluster did not come up: " + json.dumps(words, indent=1)) from None

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            self.client("scancel", "--user", "root", check=False)
            with contextlib.suppress(TimeoutError):  # the daemons are stopped below in any case
                wait_for(lambda: not self.client("squeue", "-h", check=False).strip(), 20, "an empty queue")
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.daemons.values():
                if process.poll() is None:
                    process.send_signal(signal_number)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and any(p.poll() is None for p in self.daemons.values()):
                time.sleep(0.05)
        for pid in self.step_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.kind == "netns":
            for node in self.nodes:
                subprocess.run(["ip", "link", "del", self._link(node)], capture_output=True, timeout=10)
                subprocess.run(["ip", "netns", "del", self._namespace(node)], capture_output=True, timeout=10)
            subprocess.run(["ip", "link", "del", f"br{self.tag}"], capture_output=True, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def step_processes(self) -> list[int]:
        """Processes that the daemons started (job steps and their keepers): their environment names this
        slurm.conf."""
        mine, found = str(self.folder / "slurm.conf").encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if b"SLURM_CONF=" + mine in environment:
                    found.append(int(entry.name))
        return found

    # --- what tests do with it ------------------------------------------------------------------------------

    def client(
        self,
        *command: str,
        check: bool = True,
        timeout: float = 120,
        env: dict | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Run a Slurm client command; its standard output. Nothing waits longer than `timeout` seconds."""
        done = subprocess.run(
            command,
            env=self._environment() | (env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout

    def node_states(self) -> list[str]:
        lines = self.client("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return [line.split()[1] for line in sorted(set(lines))]  # one line for each node and partition

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        words = self.client("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, states: set[str] = ENDED, timeout: float = 120) -> dict[str, str]:
        """Wait until the job is in one of `states`, and no longer than `timeout` seconds."""
        wait_for(
            lambda: self.job(job_id)["JobState"] in states,
            timeout,
            lambda: f"job {job_id} in {sorted(states)}; it is {self.job(job_id)['JobState']}",
        )
        return self.job(job_id)

    def overlay(self, node: str, path: Path, content: Path) -> None:
        """On one node alone, let `path` show the file `content`."""
        subprocess.run(
            [
                "nsenter",
                f"--mount=/proc/{self.daemons[node].pid}/ns/mnt",
                "mount",
                "--bind",
                str(content),
                str(path),
            ],
            check=True,
            timeout=10,
        )

    def remove_overlay(self, node: str, path: Path) -> None:
        subprocess.run(
            ["nsenter", f"--mount=/proc/{self.daemons[node].pid}/ns/mnt", "umount", str(path)],
            check=True,
            timeout=10,
        )

    def kill_node(self, node: str) -> None:
        """Power failure (netns only): the network goes first, so that no last message is sent, then every
        process at once."""
        self._ip("link", "set", self._link(node), "down")
        pids = subprocess.run(
            ["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True, timeout=10
        ).stdout
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.daemons.pop(node).wait(timeout=10)

    def revive_node(self, node: str) -> None:
        self._ip("link", "set", self._link(node), "up")
        self.start_node(node)


def wait_for(condition, timeout: float, what) -> None:
    """Poll `condition` every 0.2 s; TimeoutError, saying `what` was awaited, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what() if callable(what) else what}")
        time.sleep(0.2)
