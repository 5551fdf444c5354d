"""A stage is data: what is trained, what is loaded, which losses, and how it is scored. The loop is the same for all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from train.config import Recipe, RecipeError

FRESH = "fresh"  # init_from: start from no model folder


@dataclass(frozen=True)
class Stage:
    name: str
    number: str
    # What Soundwave.build is asked for; without "llm" the language model's layers are never read.
    parts: tuple[str, ...]
    losses: tuple[str, ...]
    # Groups of model.parameter_groups() that are trained.
    trains: tuple[str, ...]
    previous: str | None
    # How validation scores it: the CTC head's own transcript, or what the language model writes.
    score: str


STAGES = {
    stage.name: stage
    for stage in (
        Stage("alignment", "I", ("encoder", "adapters"), ("ctc",), ("adapters", "ctc_head"), None, "ctc"),
        Stage("shrinking", "II", ("encoder", "adapters", "llm"), ("ce", "ctc"), ("adapters", "ctc_head", "lora"),
              "alignment", "generate"),
        Stage("sft", "III", ("encoder", "adapters", "llm"), ("ce",), ("lora",), "shrinking", "generate"),
    )
}


def stage_of(recipe: Recipe) -> Stage:
    if recipe.stage not in STAGES:
        raise RecipeError(f"stage: '{recipe.stage}' is not one of {', '.join(STAGES)}")
    return STAGES[recipe.stage]


def stage_folder(recipe: Recipe) -> Path:
    return Path(recipe.output) / recipe.stage


def finished(recipe: Recipe) -> bool:
    """Whether training this stage again would end at once: its model is there, and it was made with as many steps."""
    folder = stage_folder(recipe)
    if not (folder / "model" / "soundwave.json").exists() or not (folder / "run.json").exists():
        return False
    recorded = json.loads((folder / "run.json").read_text())
    return recorded.get("status") == "done" and recorded.get("steps") == recipe.optim.steps


def trained_by(recipe: Recipe) -> int | None:
    """The process of this machine that is training this stage in the same output, beside this one; None where there is none.
    (Of other machines slurm/common.sh asks Slurm.)"""
    path = stage_folder(recipe) / "run.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    pid = noted.get("pid", 0)
    if noted.get("host") != os.uname().nodename or noted.get("status") not in ("starting", "running") or pid == os.getpid():
        return None
    try:
        if began(pid) > noted.get("updated", 0.0):  # it has the number of one that died
            return None
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return pid if any(word.endswith(b"train/run.py") or word == b"train.run" for word in words) else None


def began(pid: int) -> float:
    """When a process of this machine began, in seconds since 1970 (proc(5): ticks since the boot). Errors: OSError."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def initial_folder(recipe: Recipe) -> Path | None:
    """The model folder that this stage starts from: `init_from`, or the previous stage's. None in stage I by default, and
    where `init_from` is `fresh`: new adapters in any stage (a baseline, not the method).

    Errors: RecipeError where the folder does not hold a finished model.
    """
    stage = stage_of(recipe)
    if recipe.init_from == FRESH or (recipe.init_from is None and stage.previous is None):
        return None
    folder = Path(recipe.init_from) if recipe.init_from else Path(recipe.output) / stage.previous / "model"
    if not (folder / "soundwave.json").exists():
        hint = "check init_from" if recipe.init_from else f"finish stage {STAGES[stage.previous].number} first, or set init_from"
        raise RecipeError(f"stage {stage.number} ({stage.name}) starts from {folder}, which holds no finished model: {hint}")
    return folder
