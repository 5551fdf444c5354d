"""A substitute for train/run.py where a test is about the scripts and the queue: the real one needs 20 s to
start on two cores.

The same command line, recipe, ranks, exit codes and signals, and the same files as far as the scripts and
`preflight --where` read them; what it trains is a number. It counts steps of 0.2 s; at USR1, TERM or a STOP
file it saves and ends with 85; started again it resumes. A file OUTPUT/FAIL-<stage> makes it fail with the
exit code in it, at step 3, on the last rank.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipe.config import RecipeError, load_recipe  # noqa: E402

STEP_SECONDS = 0.2
GENERATION = "first"  # a test edits this line while a job waits


def main() -> int:
    try:
        recipe = load_recipe(sys.argv[1], sys.argv[2:])
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(recipe.output) / recipe.stage
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"state-{rank}.json"
    saved = json.loads(state.read_text()) if state.exists() else {"step": 0, "value": 1, "starts": 0}
    saved["starts"] += 1
    wishes = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: wishes.append(number))
    print(
        f"rank {rank} of {world_size} local {os.environ['LOCAL_RANK']} on {os.environ['SLURMD_NODENAME']}: "
        f"{recipe.stage} from "
        f"step {saved['step']}, generation {GENERATION}, end {os.environ['SLURM_JOB_END_TIME']}",
        flush=True,
    )
    fail = Path(recipe.output) / f"FAIL-{recipe.stage}"
    stop = folder / "STOP"
    while saved["step"] < recipe.optim.steps and not wishes and not stop.exists():
        time.sleep(STEP_SECONDS)
        saved["step"] += 1
        saved["value"] = saved["value"] * 31 % 1000003
        (folder / f"progress-{rank}").write_text(str(saved["step"]))
        if fail.exists() and saved["step"] == 3 and rank == world_size - 1:
            print(f"rank {rank} fails, as told", flush=True)
            return int(fail.read_text())
    for number in (
        signal.SIGUSR1,
        signal.SIGTERM,
    ):  # as train/run.py: a signal that comes late must not spoil the end
        signal.signal(number, signal.SIG_IGN)
    state.write_text(json.dumps(saved))
    note = {"step": saved["step"], "steps": recipe.optim.steps, "updated": time.time()}
    if saved["step"] < recipe.optim.steps:
        reason = "signal on rank 0" if wishes else "STOP file on rank 0"
        (folder / "run.json").write_text(json.dumps({"status": "preempted", **note, "reason": reason}))
        return 85
    if rank == 0:
        (folder / "model").mkdir(exist_ok=True)
        save_file(
            {f"{part}.weight": numpy.zeros(1) for part in ("alignment", "ctc_head", "shrinking")},
            folder / "model" / "adapters.safetensors",
        )
        (folder / "model" / "soundwave.json").write_text(
            json.dumps(
                {
                    "value": saved["value"],
                    "config": asdict(recipe.model),
                    "stage": recipe.stage,
                    "frozen": {},
                    "step": saved["step"],
                    "recipe": asdict(recipe),
                }
            )
        )
        (folder / "run.json").write_text(json.dumps({"status": "done", **note}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
