"""A stage is data: what is trained, what is loaded, which losses, and how it is scored. The loop is the same
for all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from model.inheritance import StartError, held_parts
from recipe.config import PREVIOUS, Recipe, RecipeError, start_folder


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
    # Keys (and sections, with a dot at their end) that change nothing of what the stage trains.
    without_effect: tuple[str, ...]


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "alignment",
            "I",
            ("encoder", "adapters"),
            ("ctc",),
            ("adapters", "ctc_head"),
            PREVIOUS["alignment"],
            "ctc",
            (
                "model.llm.lora_r",
                "model.llm.lora_alpha",
                "model.llm.lora_dropout",
                "model.llm.lora_targets",
                "model.shrinking.",
                "model.prompt",
                "model.system_prompt",
                "optim.lr_lora",
                "loss.ctc_weight",
                "data.micro_batch_tokens",
            ),
        ),
        Stage(
            "shrinking",
            "II",
            ("encoder", "adapters", "llm"),
            ("ce", "ctc"),
            ("adapters", "ctc_head", "lora"),
            PREVIOUS["shrinking"],
            "generate",
            (),
        ),
        Stage(
            "sft",
            "III",
            ("encoder", "adapters", "llm"),
            ("ce",),
            ("lora",),
            PREVIOUS["sft"],
            "generate",
            (
                "model.alignment.dropout",
                "model.shrinking.dropout",
                "optim.lr_adapters",
                "optim.lr_ctc_head",
                "loss.ctc_weight",
            ),
        ),
    )
}


def stage_of(recipe: Recipe) -> Stage:
    if recipe.stage not in STAGES:
        raise RecipeError(f"stage: '{recipe.stage}' is not one of {', '.join(STAGES)}")
    return STAGES[recipe.stage]


def stage_folder(recipe: Recipe) -> Path:
    return Path(recipe.output) / recipe.stage


def has_model(recipe: Recipe) -> bool:
    """Whether the stage has ended before, whatever the recipe was (train/resume.py compares)."""
    return (stage_folder(recipe) / "model" / "soundwave.json").exists()


def trained_by(recipe: Recipe) -> int | None:
    """The process of this machine that is training this stage in the same output, beside this one; None where
    there is none. (Of other machines slurm/common.sh asks Slurm.)"""
    path = stage_folder(recipe) / "run.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    pid = noted.get("pid", 0)
    if (
        noted.get("host") != os.uname().nodename
        or noted.get("status") not in ("starting", "running")
        or pid == os.getpid()
    ):
        return None
    try:
        if began(pid) > noted.get("updated", 0.0):  # it has the number of one that died
            return None
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return pid if is_trainer(words) else None


def is_trainer(words: list[bytes]) -> bool:
    """Return whether a process's command line started training: a script, a module or `soundwave train`."""
    console = any(
        word.rpartition(b"/")[2] == b"soundwave" and following == b"train"
        for word, following in zip(words, words[1:], strict=False)
    )
    return console or any(word.endswith(b"train/run.py") or word == b"train.run" for word in words)


def began(pid: int) -> float:
    """When a process of this machine began, in seconds since 1970 (proc(5): ticks since the boot). Errors:
    OSError."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime")
    )
    return boot + ticks / os.sysconf("SC_CLK_TCK")


class NotThereYet(RecipeError):
    """The model folder that a stage starts from does not exist: an earlier stage may still make it."""


def initial_folder(recipe: Recipe) -> Path | None:
    """The model folder that this stage starts from: `init_from`, or the previous stage's. None in stage I by
    default, and where `init_from` is `fresh`: new adapters (a baseline, not the method).

    Errors: RecipeError where the folder does not hold a finished model, or not all that the stage leaves as
    it is.
    """
    stage = stage_of(recipe)
    frozen = () if "adapters" in stage.trains else ("alignment", "ctc_head", "shrinking")
    folder = start_folder(recipe)
    if folder is None:
        if frozen:
            raise RecipeError(
                f"init_from: stage {stage.number} ({stage.name}) trains LoRA alone, behind adapters that "
                f"earlier "
                "stages "
                f"trained: give the model folder of stage {STAGES[stage.previous].number}, not `fresh`"
            )
        return None
    if not (folder / "soundwave.json").exists():
        hint = (
            "check init_from"
            if recipe.init_from
            else f"finish stage {STAGES[stage.previous].number} first, or set init_from"
        )
        raise NotThereYet(
            f"stage {stage.number} ({stage.name}) starts from {folder}, which holds no finished model: {hint}"
        )
    if frozen:
        try:
            untrained = [part for part in frozen if part not in held_parts(folder)]
        except StartError as error:
            raise RecipeError(str(error)) from None
        if untrained:
            raise RecipeError(
                f"stage {stage.number} ({stage.name}) trains LoRA alone, and {folder}, which it starts from, "
                "holds no "
                f"trained {' and no '.join(map(_ADAPTER_NAMES.get, untrained))}: give the model folder of "
                f"stage "
                f"{STAGES[stage.previous].number}"
            )
    return folder


_ADAPTER_NAMES = {"alignment": "alignment adapter", "ctc_head": "CTC head", "shrinking": "shrinking adapter"}


def check_trains_something(recipe: Recipe) -> None:
    """Errors: RecipeError for a stage whose every trained part is switched off."""
    stage = stage_of(recipe)
    if stage.trains == ("lora",) and recipe.model.llm.lora_r == 0:
        raise RecipeError(
            f"model.llm.lora_r is 0, and stage {stage.number} ({stage.name}) trains LoRA alone: nothing "
            f"would be "
            "trained; give a rank, e.g. 64"
        )
