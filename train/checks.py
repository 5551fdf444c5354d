"""What is wrong with a recipe, or unusual, that shows without weights and data."""

from __future__ import annotations

import re

from core.console import plural
from core.ctc_text import NORMALISATIONS
from model.artifact import FolderError, check_place, describe, trained_with
from model.losses import LOSSES
from model.pretrained import Source
from model.quantised import missing_package
from model.saved_modules import trained_tables
from recipe.config import Recipe, RecipeError
from recipe.stages import (
    check_train,
    check_trains_something,
    initial_folder,
    losses_of,
    stage_folder,
    stage_of,
)
from stream import augment
from train import deepspeed_config
from train.trackers import check_trackers
from train.validate import scores_of


def check(recipe: Recipe) -> None:
    """What can be known without weights or data. Errors: RecipeError."""
    losses_of(recipe)
    check_trains_something(recipe)
    check_train(recipe)
    check_validation(recipe)
    for name in ("model", "model-best", "model-plain"):
        try:
            check_place(stage_folder(recipe) / name)
        except FolderError as error:
            raise RecipeError(str(error)) from None
    check_trackers(recipe.log)
    config = deepspeed_config.resolve(recipe, hidden_size=1024)
    check_average(recipe, config)
    check_lora(recipe, config)
    check_quantization(recipe, config)
    augment.check(recipe.data)
    if recipe.data.ctc_text not in NORMALISATIONS:
        raise RecipeError(
            f"data.ctc_text: '{recipe.data.ctc_text}' is not one of {', '.join(NORMALISATIONS)}"
        )
    if not recipe.data.train:
        raise RecipeError(
            "data.train is empty: name at least one packed folder, e.g. data.train=[{shards: data/train}]"
        )


def check_validation(recipe: Recipe) -> None:
    """Errors: RecipeError for a score that this stage's validations do not have, a set's name that is none,
    and early stopping without validation."""
    scores = scores_of(recipe, stage_of(recipe))
    if recipe.checkpoint.best_by not in scores:
        raise RecipeError(
            f"checkpoint.best_by: '{recipe.checkpoint.best_by}' is not one of {', '.join(scores)}"
        )
    for place, corpus in enumerate(recipe.data.valid):
        if corpus.name is not None and not re.fullmatch(r"\w[\w.-]*", corpus.name):
            raise RecipeError(
                f"data.valid[{place}]: name is '{corpus.name}': use letters, digits, '_', '-' and '.'"
            )
    if recipe.optim.stop_after is not None and not recipe.data.valid:
        raise RecipeError("optim.stop_after needs validation, and data.valid is empty: name a packed folder")


def check_average(recipe: Recipe, config: dict) -> None:
    """Errors: RecipeError where the fp32 masters, which are averaged, are not in memory."""
    section = config["zero_optimization"]
    devices = [(section.get(f"offload_{part}") or {}).get("device") for part in ("optimizer", "param")]
    if recipe.optim.ema_decay is not None and "nvme" in devices:
        raise RecipeError(
            f"optim.ema_decay averages weights in memory, and {recipe.deepspeed} offloads them to NVMe: "
            "offload to cpu, or set optim.ema_decay=null"
        )


def check_lora(recipe: Recipe, config: dict) -> None:
    """Errors: RecipeError for whole layers without LoRA, and for DoRA under ZeRO-3: it reads the base weights
    outside their layer's forward, where they are not gathered."""
    llm = recipe.model.llm
    if llm.lora_modules_to_save and not llm.lora_r:
        raise RecipeError(
            "model.llm.lora_modules_to_save trains layers beside LoRA, and model.llm.lora_r is 0: give a "
            "rank, or set train.llm=all"
        )
    if llm.lora_dora and llm.lora_r and deepspeed_config.stage_number(config) == 3:
        raise RecipeError(
            f"model.llm.lora_dora needs whole base weights, and {recipe.deepspeed} is ZeRO-3: use "
            "deepspeed=ds_configs/zero2.json, or model.llm.lora_dora=false"
        )


def check_quantization(recipe: Recipe, config: dict) -> None:
    """Errors: RecipeError for what a quantised LLM cannot do, and for a package that is not installed."""
    kind, stage = recipe.model.llm.quantization, stage_of(recipe)
    if kind == "none" or not stage.needs_llm:
        return
    if deepspeed_config.stage_number(config) == 3:
        raise RecipeError(
            f"model.llm.quantization={kind}: {recipe.deepspeed} is ZeRO-3, which cannot shard quantised "
            "weights: use deepspeed=ds_configs/zero2.json, or model.llm.quantization=none"
        )
    if "llm" in stage.trains:
        raise RecipeError(
            f"train.llm is all, and quantised weights ({kind}) cannot be trained: set "
            "model.llm.quantization=none, or train.llm=lora"
        )
    if recipe.model.llm.lora_dora and recipe.model.llm.lora_r:
        raise RecipeError(
            f"model.llm.lora_dora needs whole base weights, and model.llm.quantization is {kind}: set one of "
            "the two to its default"
        )
    if problem := missing_package(kind):
        raise RecipeError(problem)


def check_teacher(recipe: Recipe, llm: Source) -> None:
    """Errors: RecipeError for a loss that compares with the LLM's own tables, of which the recipe trains
    copies; SourceError for layers that the LLM has not."""
    tables = trained_tables(recipe.model.llm, llm)
    losses = [name for name in losses_of(recipe) if LOSSES[name].needs_frozen_llm]
    if tables and losses:
        raise RecipeError(
            f"loss.weights: the loss '{losses[0]}' compares with the LLM's own embeddings, and "
            f"model.llm.lora_modules_to_save trains {tables[0]}: remove one of the two"
        )


def warnings_of(recipe: Recipe) -> list[str]:
    """What is legal and seldom meant."""
    optim, steps = recipe.optim, recipe.optim.total_steps
    lines = []
    if optim.warmup_steps >= steps and optim.warmup_steps:
        lines.append(
            f"optim.warmup_steps={optim.warmup_steps} is not below optim.steps={steps}: the learning rate "
            f"rises to {steps / optim.warmup_steps:.0%} of its peak in the last step and never falls; give "
            f"fewer, e.g. optim.warmup_steps={steps // 10}"
        )
    return lines + _spelling_warning(recipe)


def workers_warning(recipe: Recipe, cores: int) -> list[str]:
    """A line where a rank has fewer cores than reading processes."""
    if recipe.data.workers <= cores:
        return []
    return [
        f"data.workers={recipe.data.workers}, but a rank has {plural(cores, 'core')} here: give "
        f"data.workers={max(1, cores - 1)}"
    ]


def _spelling_warning(recipe: Recipe) -> list[str]:
    """A line where CTC targets are spelled otherwise than those that the start folder was trained with."""
    try:
        folder = initial_folder(recipe)
        then = trained_with(describe(folder)).get("ctc_text") if folder else None
    except (RecipeError, FolderError):  # reported where the folder is used
        return []
    now = recipe.data.ctc_text
    if then in (None, now) or "ctc" not in losses_of(recipe):
        return []
    return [
        f"data.ctc_text={now}, but {folder} was trained with {then}: give data.ctc_text={then}, or the CTC "
        "head learns another spelling"
    ]
