"""Kill real two-rank ZeRO-3 training again and again, over the three stages; the final weights must equal the
undisturbed run's.

    python -m tests.train.soak --kills 30 --minutes 20 --json result.json          or: make soak

Each kill comes at a random moment: after a random number of steps since the start, or as soon as a checkpoint
is being written.
    kill_one     SIGKILL to one rank; the other one, as under a launcher, a moment later
    kill_all     SIGKILL to both
    in_save      SIGKILL to both while a checkpoint is being written
    term, usr1   to one rank: both save and exit with 85
    disk_full    the file system of the checkpoints (a small tmpfs, where mounting is allowed) fills up, then
                 SIGKILL to both
After each, the same command starts again. A kill counts when it met a running stage; ranks are forked from
one process that has imported everything (tests/train/ranks.py).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.train.ranks import Running, Server
from tests.train.tiny import STAGES, losses, weights, workspace

WAYS = ("kill_one", "in_save", "term", "disk_full", "kill_all", "usr1")
OPTIONS = ["checkpoint.every_steps=5", "data.valid=[]", "log.tensorboard=false"]


class SoakError(AssertionError):
    """What went wrong, with the output of the ranks."""


class SmallDisk:
    """A tmpfs for checkpoints; without the right to mount, `mounted` is False and the disk cannot be
    filled."""

    def __init__(self, folder: Path, megabytes: int = 16):
        self.folder, self.size = folder, megabytes << 20
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self) -> None:
        with open(self.folder / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(met, run: Running, limit: float = 300.0, every: float = 0.01) -> bool:
    """False where the run ended first."""
    deadline = time.monotonic() + limit
    while not met():
        if None not in run.codes():
            return False
        if time.monotonic() > deadline:
            raise SoakError(f"nothing happened for {limit:.0f} s:\n{run.text()[-4000:]}")
        time.sleep(every)
    return True


def disturb(way: str, run: Running, folder: Path, disk: SmallDisk, dice: random.Random, steps: int) -> bool:
    """One kill; returns whether it met a running stage."""
    checkpoints = folder / "checkpoints"
    # A resumed run first cuts the lines behind its checkpoint off, so a smaller number than now is reached
    # soon.
    wanted = dice.randint(1, steps // 8)
    lines, new = steps_written(folder), 0

    def enough() -> bool:
        nonlocal lines, new
        now = steps_written(folder)
        new += max(0, now - lines)
        lines = now
        return new >= wanted

    if not wait_until(enough, run):
        return False
    if way == "in_save" and not wait_until(lambda: any(checkpoints.glob("step-*.partial")), run, every=0.002):
        return False
    time.sleep(dice.random() * (0.02 if way == "in_save" else 0.2))
    if None not in run.codes():
        return False
    rank = dice.randrange(2)
    if way in ("term", "usr1"):
        run.signal(signal.SIGTERM if way == "term" else signal.SIGUSR1, [rank])
        codes = run.wait()
        if codes == [0, 0]:
            return False  # it came behind the last step
        if codes != [85, 85]:
            raise SoakError(f"{way} on rank {rank}: exit codes {codes} instead of 85\n{run.text()[-4000:]}")
        return True
    if way == "disk_full":
        disk.fill()
        told = ("no room for a checkpoint", "could not be written")
        met = wait_until(lambda: any(line in run.text() for line in told), run)
        run.kill()
        codes = run.wait()
        disk.free()
        return met and -signal.SIGKILL in codes
    run.signal(signal.SIGKILL, [rank] if way == "kill_one" else [0, 1])
    time.sleep(dice.random())
    run.kill()
    return -signal.SIGKILL in run.wait()


def soak(kills: int, minutes: float, seed: int, folder: Path, steps: int = 60) -> dict:
    """Returns the result; raises SoakError where a run failed or its end differs from the undisturbed one."""
    dice, begun = random.Random(seed), time.monotonic()
    workspace(folder)
    done: list[dict] = []
    launches = 0
    disk = SmallDisk(folder / "small")
    ways = [way for way in WAYS if disk.mounted or way != "disk_full"]
    try:
        with Server() as server:

            def start(stage: int, output: Path) -> Running:
                return server.start(
                    [folder / f"stage{stage}.yaml", f"output={output}", f"optim.steps={steps}", *OPTIONS]
                )

            for number in STAGES:
                run = start(number, folder / "still")
                if run.wait() != [0, 0]:
                    raise SoakError(f"the undisturbed run failed:\n{run.text()[-4000:]}")
            for number, stage in STAGES.items():
                (folder / "killed" / stage).mkdir(parents=True)
                (disk.folder / stage).mkdir()
                (folder / "killed" / stage / "checkpoints").symlink_to(disk.folder / stage)
                share = kills * number // len(STAGES)  # kills that are done when this stage is
                while True:
                    run, launches = start(number, folder / "killed"), launches + 1
                    late = time.monotonic() - begun > 60 * minutes
                    if len(done) < share and not late:
                        way = ways[len(done) % len(ways)]
                        counts = disturb(way, run, folder / "killed" / stage, disk, dice, steps)
                        if counts:
                            done.append({"stage": stage, "way": way})
                            print(f"{len(done)}/{kills} {stage} {way}", file=sys.stderr, flush=True)
                            continue
                    codes = run.wait(patience=20)
                    if codes != [0, 0]:
                        raise SoakError(
                            f"stage {stage} ended with {codes} though nothing was done to "
                            f"it:\n{run.text()[-4000:]}"
                        )
                    break
    finally:
        disk.close()
    equal = 0
    for stage in STAGES.values():
        ours, theirs = weights(folder / "killed" / stage), weights(folder / "still" / stage)
        different = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
        if different or ours.keys() != theirs.keys():
            raise SoakError(
                f"{stage}: {len(different)} of {len(theirs)} tensors differ from the still run's: "
                f"{different[:3]}"
            )
        if losses(folder / "killed" / stage) != losses(folder / "still" / stage):
            raise SoakError(f"{stage}: the losses differ from the undisturbed run's")
        equal += len(theirs)
    return {
        "kills": len(done),
        "ways": dict(Counter(kill["way"] for kill in done)),
        "stages": dict(Counter(kill["stage"] for kill in done)),
        "starts": launches,
        "tensors_equal": equal,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.train.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="no more kills after so long (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            result = soak(options.kills, options.minutes, options.seed, Path(folder))
        except SoakError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
