"""The reference that disturbed chains are held against: the same stages, one rank, without Slurm.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python -m tests.slurm.undisturbed RECIPE ...

Each stage runs in a fork of this process, because the imports take longer than training anything so small.
"""

from __future__ import annotations

import os
import sys

from core.distributed import fill_environment


def main(recipes: list[str]) -> int:
    fill_environment()
    import train.stage_run  # noqa: F401
    from train.run import main as train

    port = int(os.environ["MASTER_PORT"])
    for number, recipe in enumerate(recipes):
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = str(port + number)
            os._exit(train([recipe]))
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
