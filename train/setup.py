"""Set up one stage: from a recipe to a Trainer that is ready for its first step.

The order matters. What can be refused is refused before encoder features are computed and models are read;
the frozen base is verified before anything is restored; all ranks compare what they have read before the
engine is made.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from core.distributed import Ranks, from_main, gather
from model import artifact, identity
from model.config import SoundwaveConfig
from model.inheritance import differing_options, inherited_options
from model.language_model import resolved_targets
from model.lora_init import starts
from model.ops.linear_ctc import check_implementation
from model.pretrained import locate, text_config
from model.rows import longest_row
from model.soundwave import Soundwave
from recipe.config import Recipe, RecipeError, loadable
from recipe.stages import Stage, initial_folder, stage_folder, stage_of
from stream import Plan
from stream.cache import ensure_features
from stream.plan import load_index
from stream.unindexed import UnindexedPlan
from stream.validation import select
from train import deepspeed_config
from train.checkpoint import compatibility, universal
from train.checkpoint.errors import CheckpointError
from train.checkpoint.store import Checkpoints
from train.checkpoint.verification import find_good, read_state
from train.checks import check_teacher
from train.deepspeed_fixes.zero3 import shard_while_loading
from train.engine import Engine
from train.outcome import RunStatus
from train.preemption import Preemption
from train.trainer import Progress, Trainer, best_at
from train.validate import validation_set

logger = logging.getLogger("soundwave")


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run resumes from."""

    folder: Path
    state: dict


def set_up(
    recipe: Recipe, ranks: Ranks, status: RunStatus, preemption: Preemption, profile_steps: int
) -> Trainer:
    """Load everything that training one stage needs. Collective.

    Errors: RecipeError, SourceError, FolderError, OptionError, CheckpointError, ConversionError; Interrupted
    where a stop was asked for while encoder features were computed.
    """
    stage, folder = stage_of(recipe), stage_folder(recipe)
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, ranks)
    saved = find_checkpoint(recipe, checkpoints.folder, ranks)
    start_from = initial_folder(recipe)
    plan = open_data(recipe, stage)
    ds_config, row_limit = resolve_sizes(recipe, stage)
    topology = {"world_size": ranks.world_size, "zero_stage": deepspeed_config.stage_number(ds_config)}
    if saved and saved.state["step"] == 0 and saved.state["topology"] != topology:
        # Nothing is trained yet, and DeepSpeed cannot convert an optimizer that has made no step.
        if ranks.is_main:
            logger.info(
                "%s is of step 0, and of other ranks or another ZeRO stage: starting at the beginning",
                saved.folder,
            )
        checkpoints.delete_after(-1, None)
        saved = None
    if saved:
        check_before_loading(recipe, plan, saved, topology)
    if ranks.is_main:
        OmegaConf.save(OmegaConf.structured(loadable(recipe)), folder / "recipe.yaml")
    # Before ZeRO-3 shards what is loaded.
    ensure_features(
        recipe,
        rank=ranks.rank,
        world_size=ranks.world_size,
        stop_reason=lambda seconds: preemption.stop_reason(0.0, seconds),
    )
    sharding = shard_while_loading(ds_config) if topology["zero_stage"] == 3 else None
    model, base = build_model(recipe, stage, start_from, ranks, is_resumed=saved is not None)
    facts = {
        "base": base,
        "settings": model.frozen_settings(),
        "tokenizer": identity.vocabulary_hash(model.tokenizer),
        "recipe": compatibility.recipe_facts(recipe),
        "index": plan.fingerprint,
        "code": compatibility.code_fingerprint(recipe.plugins),
    }
    check_ranks_have_the_same(facts, ranks)
    if saved:
        accepted = recipe.checkpoint.accept_changes
        for note in compatibility.check(saved.state["facts"], facts, accepted, saved.folder):
            if ranks.is_main:
                logger.warning("%s", note)
    engine = Engine(model, recipe, stage, ds_config, ranks)
    progress = restore(recipe, saved, checkpoints, engine, topology, ranks) if saved else Progress()
    validation = validation_set(recipe, stage, model.tokenizer, ranks)
    log_start(recipe, stage, model, topology["zero_stage"], progress, ranks)
    return Trainer(
        recipe,
        ranks,
        plan=plan,
        row_limit=row_limit,
        engine=engine,
        checkpoints=checkpoints,
        validation=validation,
        topology=topology,
        facts=facts,
        progress=progress,
        status=status,
        preemption=preemption,
        profile_steps=profile_steps,
        sharding=sharding,
    )


def find_checkpoint(recipe: Recipe, folder: Path, ranks: Ranks) -> Saved | None:
    """Return the newest sound checkpoint, here or in the second folder. Errors: RecipeError."""
    copies = [Path(recipe.checkpoint.copy_to)] if recipe.checkpoint.copy_to else []
    source = find_good([folder, *copies], ranks)
    if source is None:
        return None
    state = read_state(source)
    compatibility.check_steps(recipe, state["step"], source)
    return Saved(source, state)


def open_data(recipe: Recipe, stage: Stage) -> Plan | UnindexedPlan:
    """Open the plan of data.train, and look into data.valid. Errors: RecipeError."""
    plan = Plan.open(recipe.data, stage.name, recipe.optim.total_steps, recipe.model)
    for corpus in recipe.data.valid:
        select(load_index(corpus.shards), 0, stage.name, corpus, recipe.log.validate_utterances)
    return plan


def resolve_sizes(recipe: Recipe, stage: Stage) -> tuple[dict, int | None]:
    """Return DeepSpeed's configuration and the longest row, from the LLM's sizes; its LoRA targets are set in
    the recipe as what they are. Errors: RecipeError, SourceError."""
    llm = locate(recipe.model.llm.name, sizes_only=True)
    sizes = text_config(llm.config)
    config = deepspeed_config.resolve(recipe, sizes.hidden_size)
    limit = longest_row(sizes)
    if "lora" in stage.trains:
        recipe.model.llm.lora_targets = resolved_targets(recipe.model.llm, llm)
        check_teacher(recipe, llm)
    return config, limit


def check_before_loading(recipe: Recipe, plan: Plan | UnindexedPlan, saved: Saved, topology: dict) -> None:
    """Compare what is known of the recipe with a checkpoint. Errors: RecipeError."""
    then = saved.state["facts"]
    now = {**then, "recipe": compatibility.recipe_facts(recipe), "index": plan.fingerprint}
    if "settings" in now:
        now["settings"] = compatibility.settings_here(recipe) or now["settings"]
    compatibility.check(then, now, recipe.checkpoint.accept_changes, saved.folder)
    converts = universal.needed(saved.state["topology"], topology, saved.folder)
    if converts and recipe.optim.ema_decay is not None:
        ranks = saved.state["topology"]["world_size"]
        raise RecipeError(
            f"optim.ema_decay: the averaged weights of {saved.folder} are of {ranks} ranks, and this run "
            f"has {topology['world_size']}: start {ranks} ranks, or train on without the average "
            "(optim.ema_decay=null checkpoint.accept_changes=[recipe])"
        )


def build_model(
    recipe: Recipe, stage: Stage, start_from: Path | None, ranks: Ranks, *, is_resumed: bool = False
) -> tuple[Soundwave, dict[str, str | None]]:
    """Build the model with the start folder's weights, its stage set; return it and the hashes of its base.

    A checkpoint holds what this stage trains, and where its LoRA started; what earlier stages trained comes
    from their folder, on resume too.
    Errors: RecipeError, SourceError, FolderError, OptionError.
    """
    torch.manual_seed(recipe.seed)  # the same new adapters on every rank
    parts = tuple(part for part in stage.parts if part != "encoder" or not recipe.data.cache_features)
    try:
        check_implementation(recipe.model.ops.implementation, ranks.device.partition(":")[0])
    except ValueError as error:
        raise RecipeError(f"model.ops.implementation: {error}") from None
    model = Soundwave.build(recipe.model, parts=parts, starts_lora=False)
    hashes: dict[str, Any] = {}
    taken: list[str] = []
    if ranks.is_main:  # reads every byte of the frozen parts: once per cluster, not once per rank
        start = compatibility.weights_hash(start_from) if start_from else None
        hashes = {"base": model.frozen_hash(), "start": start}
    hashes = from_main(hashes)
    model._hashes = hashes["base"]
    if start_from is not None:
        notes = check_base(recipe, model, start_from)
        taken = artifact.load_trained(model, start_from, verify=False)
        if ranks.is_main:
            log_inherited_options(recipe, start_from)
            for line in [*notes, *accepted_options(recipe, start_from)]:
                logger.warning("%s", line)
    if "lora" not in taken and not is_resumed:
        model.start_lora(ranks.device)
    model.set_stage(stage)
    return model, {**hashes["base"], "start": hashes["start"]}


def check_base(recipe: Recipe, model: Soundwave, folder: Path) -> list[str]:
    """Compare the frozen parts with those of the start folder: lines about accepted differences. Errors:
    RecipeError."""
    accepted, notes = recipe.checkpoint.accept_changes, []
    for kind, text in artifact.base_differences(model, folder).items():
        if kind not in accepted:
            raise RecipeError(
                f"{text}, or accept it with checkpoint.accept_changes=[{','.join([*accepted, kind])}]"
            )
        notes.append(f"{kind} has changed and is accepted: {text}")
    return notes


def log_inherited_options(recipe: Recipe, folder: Path) -> None:
    """Log the model options that are the start folder's and not the defaults."""
    taken = {
        f"model.{key}": value
        for key, value in inherited_options(folder).items()
        if operator.attrgetter(key)(recipe.model) == value != operator.attrgetter(key)(SoundwaveConfig())
    }
    logger.info("starting from %s%s", folder, "".join(f", {key}={value}" for key, value in taken.items()))


def accepted_options(recipe: Recipe, folder: Path) -> list[str]:
    """Return lines about model options that differ from the start folder's."""
    return [
        f"{key} was {then} when {folder} was trained, and is {now} here (init_accept)"
        for key, (then, now) in differing_options(recipe.model, folder).items()
    ]


def check_ranks_have_the_same(facts: dict, ranks: Ranks) -> None:
    """Errors: RecipeError where nodes read different files: code, recipe, tokenizer or index."""
    facts_by_rank = gather(facts)
    for rank, theirs in enumerate(facts_by_rank):
        kinds = [kind for kind in theirs if theirs[kind] != facts_by_rank[0][kind]]
        if kinds:
            raise RecipeError(
                f"rank {rank} and rank 0 have different {' and '.join(kinds)}: all nodes must see the same "
                "files; bring them up to date and start again"
            )


def restore(
    recipe: Recipe, saved: Saved, checkpoints: Checkpoints, engine: Engine, topology: dict, ranks: Ranks
) -> Progress:
    """Load a checkpoint into the engine; return where it stood. Errors: CheckpointError, ConversionError."""
    state = saved.state
    checkpoints.load(engine.deepspeed, saved.folder, state["topology"], topology)
    if not all(bool(start.any()) for start in starts(engine.model).values()):
        raise CheckpointError(
            f"checkpoint {saved.folder} does not hold where its LoRA started "
            f"(model.llm.lora_init={recipe.model.llm.lora_init}): remove it to resume from the one before it"
        )
    checkpoints.load_average(engine.average, saved.folder)
    engine.health.load(state["health"])
    if ranks.is_main:
        logger.info("resuming at step %d from %s", state["step"], saved.folder)
    best = best_at(state, recipe.checkpoint.best_by)
    without_better = state.get("without_better", 0) if best else 0
    return Progress(state["step"], state["data_offset"], best, without_better)


def log_start(
    recipe: Recipe, stage: Stage, model: Soundwave, zero_stage: int, progress: Progress, ranks: Ranks
) -> None:
    if not ranks.is_main:
        return
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    logger.info(
        "stage %s (%s): %.1fM parameters trained, ZeRO-%d, %d rank(s), %d thread(s) each, steps %d to %d",
        stage.number,
        stage.name,
        trained / 1e6,
        zero_stage,
        ranks.world_size,
        torch.get_num_threads(),
        progress.step,
        recipe.optim.total_steps,
    )
