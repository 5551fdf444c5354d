"""A stage is data: what is trained, what is loaded, which losses, and how it is scored. The loop is the same for all."""

from __future__ import annotations

import json
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
