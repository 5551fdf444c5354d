"""What a recipe's stage is: its entry of STAGES (model/stages.py), its folder, where it starts from, its
losses."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from pathlib import Path

from model.inheritance import StartError, held_parts, tuned_parts
from model.stages import STAGES, Stage, chosen
from recipe.config import Recipe, RecipeError, start_folder

__all__ = ["STAGES", "Stage"]


def stage_of(recipe: Recipe) -> Stage:
    """Return the recipe's stage with what its `train` section chooses. Errors: RecipeError."""
    if recipe.stage not in STAGES:
        raise RecipeError(STAGES.describe_unknown(recipe.stage))
    try:
        return chosen(STAGES[recipe.stage], dataclasses.asdict(recipe.train))
    except ValueError as error:
        raise RecipeError(str(error)) from None


def stage_folder(recipe: Recipe) -> Path:
    return Path(recipe.output) / recipe.stage


def stages_in(run: Path) -> list[str]:
    """Return the names of the stages that a run's folder may hold: the known ones, then others by their
    files."""
    folders = sorted(
        {path.parent.name for name in ("run.json", "metrics.jsonl") for path in run.glob(f"*/{name}")}
    )
    return [*STAGES, *(name for name in folders if name not in STAGES)]


def title_of(name: str) -> str:
    """Return how lists call a stage: "2 shrinking", or its name where its plugin is not loaded."""
    return f"{STAGES[name].number} {name}" if name in STAGES else name


def has_model(recipe: Recipe) -> bool:
    """Whether the stage has ended before, whatever the recipe was (train/checkpoint/compatibility.py
    compares)."""
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
    """The model folder that this stage starts from: `init_from`, or the previous stage's. None in stage 1 by
    default, and where `init_from` is `fresh`: new adapters (a baseline, not the method).

    Errors: RecipeError where the folder does not hold a finished model, or not all that the stage leaves as
    it is.
    """
    stage = stage_of(recipe)
    folder = start_folder(recipe)
    if folder is None:
        if stage.frozen and stage.previous:
            raise RecipeError(
                f"init_from: stage {stage.number} ({stage.name}) trains {_trained(stage)}: give the model "
                f"folder of {_previous(stage)}, not `fresh`"
            )
        return None
    if not (folder / "soundwave.json").exists():
        hint = f"finish {_previous(stage)} first, or set init_from"
        if recipe.init_from:
            hint = "give a model folder (<output>/<stage>/model), or convert the official checkpoint into it"
        raise NotThereYet(
            f"stage {stage.number} ({stage.name}) starts from {folder}, which holds no finished model: {hint}"
        )
    if stage.frozen and stage.previous:
        try:
            untrained = [module for module in stage.frozen if module not in held_parts(folder)]
        except StartError as error:
            raise RecipeError(str(error)) from None
        if untrained:
            raise RecipeError(
                f"stage {stage.number} ({stage.name}) trains {_trained(stage)}, and {folder}, which it "
                f"starts from, holds no trained {' and no '.join(_MODULE_NAMES[m] for m in untrained)}: "
                f"give the model folder of {_previous(stage)}"
            )
    return folder


_MODULE_NAMES: dict[str, str] = {
    "alignment": "alignment adapter",
    "ctc_head": "CTC head",
    "shrinking": "shrinking adapter",
    "lora": "LoRA",
    "encoder": "encoder",
    "encoder_lora": "LoRA of the encoder",
    "llm": "LLM",
}


def _trained(stage: Stage) -> str:
    """Return what a stage trains, in words: "LoRA alone"."""
    *others, last = (_MODULE_NAMES[name] for name in stage.trains)
    return f"{', '.join(others)} and {last} alone" if others else f"{last} alone"


def _previous(stage: Stage) -> str:
    previous = STAGES.get(stage.previous)
    return f"stage {previous.number}" if previous else "a stage that trains them"


def check_trains_something(recipe: Recipe) -> None:
    """Errors: RecipeError for a stage whose every trained part is switched off."""
    stage = stage_of(recipe)
    if stage.trains == ("lora",) and recipe.model.llm.lora_r == 0:
        raise RecipeError(
            f"model.llm.lora_r is 0, and stage {stage.number} ({stage.name}) trains LoRA alone: nothing "
            "would be trained; give a rank, e.g. 64"
        )


def check_train(recipe: Recipe) -> None:
    """Errors: RecipeError for choices of `train` that do not go together with the model, the losses or the
    feature cache."""
    from model.losses import LOSSES

    stage, choice = stage_of(recipe), recipe.train
    encoder, llm, start = recipe.model.encoder, recipe.model.llm, start_folder(recipe)
    tuned_before = tuned_parts(start) if start else []
    trains_encoder = next(
        (f"train.encoder={choice.encoder} trains" for m in stage.trains if m in ENCODER), None
    )
    if choice.llm == "lora" and llm.lora_r == 0:
        raise RecipeError("train.llm is lora, and model.llm.lora_r is 0: give a rank, e.g. 64")
    if "llm" in stage.trains and llm.lora_r:
        raise RecipeError(
            f"train.llm is all, and model.llm.lora_r is {llm.lora_r}: set model.llm.lora_r=0 (of a model "
            "folder with LoRA make one without first: python -m model.export FOLDER --merge)"
        )
    if "encoder_lora" in stage.trains and encoder.lora_r == 0:
        raise RecipeError(
            "train.encoder is lora, and model.encoder.lora_r is 0: give a rank, e.g. model.encoder.lora_r=16"
        )
    if "encoder" in stage.trains and encoder.lora_r:
        raise RecipeError(
            f"train.encoder is {choice.encoder}, and model.encoder.lora_r is {encoder.lora_r}: set "
            "train.encoder=lora, or model.encoder.lora_r=0"
        )
    if encoder.lora_r and not trains_encoder and "encoder" not in tuned_before:
        raise RecipeError(
            f"model.encoder.lora_r is {encoder.lora_r}, and nothing trains it: set train.encoder=lora, or "
            "model.encoder.lora_r=0"
        )
    if choice.ctc_head == "all" and not any(LOSSES[name].uses_ctc for name in losses_of(recipe)):
        raise RecipeError(
            f"train.ctc_head is all, and no loss of stage {stage.number} ({stage.name}) trains it: add one, "
            "loss.weights.ctc=0.3"
        )
    if recipe.data.cache_features and (trains_encoder or "encoder" in tuned_before):
        why = trains_encoder or f"{start} holds a trained encoder in place of"
        raise RecipeError(
            f"data.cache_features keeps the output of the encoder of model.encoder.name, and {why} it: set "
            "data.cache_features=null"
        )


ENCODER = ("encoder", "encoder_lora")


def _auxiliary_of(recipe: Recipe) -> dict[str, float]:
    """Return the losses of the compressor with their default weights; {} where it is not trained. Errors:
    RecipeError."""
    from model.compressors import compressor_of
    from model.config import OptionError

    try:
        kind = compressor_of(recipe.model)
    except OptionError as error:
        raise RecipeError(str(error)) from None
    return dict(kind.auxiliary) if "shrinking" in stage_of(recipe).trains else {}


def losses_of(recipe: Recipe) -> dict[str, float]:
    """Return the stage's losses and those of `loss.weights`, with their weights, in the order they are added.

    The stage's first loss has weight 1, unless `loss.weights` names it. Errors: RecipeError.
    """
    from model.losses import LOSSES, CompressorLoss  # PyTorch, for those who ask

    stage, auxiliary = stage_of(recipe), _auxiliary_of(recipe)
    given = {**auxiliary, **recipe.loss.weights}
    weights: dict[str, float] = {}
    for name in (*stage.losses, *(name for name in given if name not in stage.losses)):
        if name not in LOSSES:
            where = f"stage {stage.name}" if name in stage.losses else "loss.weights"
            raise RecipeError(f"{where}: {LOSSES.describe_unknown(name)}")
        loss = LOSSES[name]
        if isinstance(loss, CompressorLoss) and name not in auxiliary:
            raise RecipeError(
                f"loss.weights: the compressor '{recipe.model.compressor}' computes no loss '{name}' in "
                f"stage {stage.number} ({stage.name}): remove it, or set model.compressor"
            )
        if loss.needs_llm and not stage.needs_llm:
            raise RecipeError(
                f"loss.weights: the loss '{name}' needs the LLM, which stage {stage.number} ({stage.name}) "
                "does not load"
            )
        if loss.needs_frozen_llm and "llm" in stage.trains:
            raise RecipeError(
                f"loss.weights: the loss '{name}' compares with the LLM's own weights, which train.llm=all "
                "changes: remove it, or set train.llm=lora"
            )
        if given.get(name, 0.0) < 0:
            raise RecipeError(f"loss.weights.{name} is {given[name]:g}: must be at least 0")
        if name in given and loss.weight_key and name in stage.losses:
            raise RecipeError(f"loss.weights.{name}: its weight is {loss.weight_key}; write that")
        if not weights or name in given:
            weights[name] = given.get(name, 1.0)
        else:
            weights[name] = operator.attrgetter(loss.weight_key)(recipe) if loss.weight_key else 1.0
    return weights
