"""What a recipe would do, from sizes alone: parameters, memory per rank, steps, hours, arithmetic, and what
is missing.

Nothing is read or fetched but configuration files; sizes of known models ship in model/presets/.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from core.console import one_line, plural
from core.object_store import is_store_url
from model import artifact
from model.config import SoundwaveConfig
from model.inheritance import differing_options, inherited_options
from model.language_model import described_targets, load_tokenizer
from model.lora_init import starts
from model.pretrained import SourceError, locate, presets, tensor_files
from model.quantised import saving
from model.saved_modules import MARK
from model.soundwave import Soundwave
from recipe.config import Recipe, RecipeError
from recipe.stages import NotThereYet, initial_folder, losses_of, stage_folder, stage_of
from stream.epochs import resolve_steps
from stream.inspect_plan import language_lines
from stream.plan import Plan, is_plain_stream, load_index
from train import deepspeed_config
from train.checkpoint import compatibility
from train.flops import numel
from train.gpus import GIB
from train.memory import activation_bytes, states_per_rank
from train.planner import Planner

RANKS = (1, 8, 16, 64)


def _size_name(name: str) -> str:
    """A folder that is not there yet, but is named like a known model, has that model's sizes."""
    return Path(name).name if not Path(name).exists() and Path(name).name in presets() else name


def meta_model(recipe: Recipe) -> Soundwave:
    """The network on the meta device, stage set. Errors: RecipeError for a model of unknown size."""
    config = replace(
        recipe.model,
        encoder=replace(recipe.model.encoder, name=_size_name(recipe.model.encoder.name)),
        llm=replace(recipe.model.llm, name=_size_name(recipe.model.llm.name)),
    )
    try:
        model = Soundwave.build(config, parts=stage_of(recipe).parts, meta=True)
        model.set_stage(stage_of(recipe))
    except (SourceError, ValueError) as error:
        raise RecipeError(str(error)) from None
    return model


def parameters_by_module(model: Soundwave) -> list[tuple[str, int, int]]:
    """(module, trained, frozen)"""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = "lora" if "lora_" in name else name.split(".")[0]
        part = "lora_modules_to_save" if MARK in name else part
        rows.setdefault(part, [0, 0])[0 if parameter.requires_grad else 1] += numel(parameter)
    if frozen_starts := starts(model):
        rows["lora"][1] += sum(start.numel() for start in frozen_starts.values())
    return [(name, trained, frozen) for name, (trained, frozen) in rows.items()]


def check_start(recipe: Recipe, model: Soundwave) -> list[str]:
    """What the start folder decides, one line each. Errors: RecipeError where it does not fit the model or
    the frozen parts."""
    try:
        folder = initial_folder(recipe)
    except NotThereYet:
        return []
    if folder is None:
        return []
    places = {part: Path(getattr(recipe.model, part).name) for part in ("encoder", "llm")}
    try:
        # The rows of a CTC head that is trained whole depend on the tokenizer, which is not read here.
        artifact.check_fit(
            model, folder, but=() if recipe.model.alignment.ctc_head == "tied" else ("ctc_head",)
        )
        settings = compatibility.settings_here(recipe)
        differences = artifact.identity_differences(folder, {}, settings, places) if settings else {}
    except artifact.FolderError as error:
        raise RecipeError(str(error)) from None
    for kind, text in differences.items():
        if kind not in recipe.checkpoint.accept_changes:
            raise RecipeError(f"{text}, or accept it with checkpoint.accept_changes=[{kind}]")
    defaults = SoundwaveConfig()
    taken = [
        f"model.{key}={value}"
        for key, value in inherited_options(folder).items()
        if operator.attrgetter(key)(recipe.model) == value != operator.attrgetter(key)(defaults)
    ]
    lines = [f"starts from {folder}" + (f", with its model options {', '.join(taken)}" if taken else "")]
    for key, (then, now) in differing_options(recipe.model, folder).items():
        lines.append(f"{key} was {then} when that was trained, and is {now} here (init_accept)")
    return [*lines, *differences.values()]


def missing(recipe: Recipe) -> list[str]:
    """What has to be there before this recipe can run, and is not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    lines = []
    for part in ("encoder", "llm"):
        name = getattr(recipe.model, part).name
        if Path(name).is_dir():
            try:
                tensor_files(Path(name))
                if part == "llm":
                    load_tokenizer(locate(name), recipe.model.audio_token)
            except SourceError as error:
                lines.append(f"model.{part}.name: {error}")
            continue
        if name.startswith((".", "/", "~")):
            lines.append(f"model.{part}.name: folder {name} does not exist")
            continue
        repository = presets()[name]["names"][0] if name in presets() else name
        try:  # it also finds what holds config.json alone
            folder = Path(
                snapshot_download(repository, allow_patterns=["*.safetensors"], local_files_only=True)
            )
            has_weights = bool(tensor_files(folder))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            has_weights = False
        if not has_weights:
            lines.append(
                f"model.{part}.name: {repository} is not in the hub cache; on a machine with network: "
                f"hf download {repository}"
            )
    lines += _missing_shards(recipe)
    try:
        initial_folder(recipe)
    except NotThereYet as error:
        lines.append(str(error))
    return lines


def _missing_shards(recipe: Recipe) -> list[str]:
    lines = []
    for kind in ("train", "valid"):
        for corpus in getattr(recipe.data, kind):
            if kind == "train" and is_plain_stream(corpus.shards):
                continue
            if not is_store_url(corpus.shards) and not (Path(corpus.shards) / "index.json").exists():
                lines.append(f"data.{kind}: {corpus.shards} {_not_packed(Path(corpus.shards))}")
                continue
            try:
                load_index(corpus.shards)
            except RecipeError as error:
                lines.append(str(error))
    if not recipe.data.train:
        lines.append("data.train: names no packed folder")
    return lines


def _not_packed(folder: Path) -> str:
    """Why a folder gives no samples, and what to do."""
    if not folder.exists():
        return "does not exist; pack it with data_tools/pack.py"
    packed = sorted(index.parent.name for index in folder.glob("*/index.json"))
    if packed:
        return f"has no index.json; give one of its packed folders: {', '.join(packed)}"
    return "has no index.json; pack it with data_tools/pack.py"


def _epochs(recipe: Recipe, ready: bool, data_hours: float | None) -> tuple[dict[str, float], list[str]]:
    """Epochs of each source if the data is packed, else over the hours that are given; and, with
    data.mixture.language_alpha, the table of languages."""
    steps = recipe.optim.total_steps
    if ready:
        plan = Plan.open(recipe.data, recipe.stage, steps)
        return plan.passes(steps), language_lines(plan, steps)
    if data_hours is not None:
        return {f"{data_hours:g} h": steps * recipe.data.batch_seconds / 3600 / data_hours}, []
    return {}, []


def _activation_line(recipe: Recipe, model: Soundwave, zero_stage: int) -> str:
    """Memory of the recipe's own micro-batch, beside the states."""
    data = recipe.data
    tokens = data.micro_batch_tokens if stage_of(recipe).needs_llm else 0
    size = activation_bytes(
        model,
        recipe,
        micro_batch_seconds=data.micro_batch_seconds,
        tokens=tokens,
        zero_stage=zero_stage,
    )
    what = f"data.micro_batch_seconds={data.micro_batch_seconds:g}"
    if tokens:
        on = "on" if recipe.optim.activation_checkpointing else "off"
        what += f", data.micro_batch_tokens={tokens}, optim.activation_checkpointing {on}"
    return f"Activations come on top: {size / GIB:.1f} GiB ({what})"


def _number(value: float) -> str:
    return f"{value / 1e6:,.1f}M" if value >= 1e5 else f"{value:,.0f}"


def dry_run(
    recipe: Recipe, gpus: int | None = None, gpu: str | None = None, data_hours: float | None = None
) -> int:
    """Print the whole; returns the exit code 0. gpus, gpu: also a plan for that many of that kind.
    data_hours: size of data that is not packed yet. Errors: RecipeError for a wrong recipe."""
    from train.checks import check, check_teacher, warnings_of

    check(recipe)
    resolve_steps(recipe)
    is_finished = compatibility.finished(recipe)
    if not is_finished:
        compatibility.check_checkpoint(recipe)
    stage, model = stage_of(recipe), meta_model(recipe)
    if model.llm is not None:
        check_teacher(recipe, model.sources["llm"])
    notes = [] if is_finished else check_start(recipe, model)
    rows = parameters_by_module(model)
    trained, frozen = sum(r[1] for r in rows), sum(r[2] for r in rows)
    weight_bytes = 2 if recipe.model.dtype == "bfloat16" else 4
    quantised = saving(model.llm, recipe.model.llm.quantization, weight_bytes)
    config = deepspeed_config.resolve(recipe, model.ctc_head.weight.shape[1])
    print(
        f"stage {stage.number} ({stage.name}): losses {' + '.join(losses_of(recipe))}, weights in "
        f"{recipe.model.dtype}, "
        f"{recipe.deepspeed} (ZeRO-{deepspeed_config.stage_number(config)}) -> {stage_folder(recipe)}\n"
    )
    print(
        tabulate(
            [(n, _number(t), _number(f)) for n, t, f in rows] + [("all", _number(trained), _number(frozen))],
            headers=("parameters", "trained", "frozen"),
            colalign=("left", "right", "right"),
        )
    )
    if model.llm is not None and recipe.model.llm.lora_r:
        print(f"LoRA on {described_targets(model.llm)}")
    if quantised.saved:
        print(
            f"the LLM's linear layers in {recipe.model.llm.quantization}: {quantised.quantised / GIB:.2f} "
            f"GiB on every rank in place of {quantised.plain / GIB:.2f}"
        )
    for line in [*notes, *(f"warning: {line}" for line in warnings_of(recipe))]:
        print(line)
    print("\nModel states per rank in GiB (weights, fp32 gradients of what is trained, AdamW)")
    states = [
        (
            f"ZeRO-{z}",
            *((states_per_rank(trained, frozen, r, z, weight_bytes) - quantised.saved) / GIB for r in RANKS),
        )
        for z in ((1, 2) if quantised.saved else (1, 2, 3))
    ]
    print(tabulate(states, headers=("ranks", *map(str, RANKS)), floatfmt=".2f"))
    try:
        print(_activation_line(recipe, model, deepspeed_config.stage_number(config)))
        plan = Planner(recipe, model, gpus or 1, gpu or "h100")
        if gpu is not None:
            plan.choices()
    except Exception as error:  # code of any LLM, encoder or plugin may fail on the meta device
        print(
            f"activations are not computed, and no plan: the model fails on sizes alone ({one_line(error)})"
        )
        gpu, plan = None, Planner(recipe, model, 1, "h100")
    print()
    absent = missing(recipe)
    steps, seconds = recipe.optim.total_steps, recipe.data.batch_seconds
    epochs = f" (optim.epochs={recipe.optim.epochs:g})" if recipe.optim.epochs else ""
    print(f"{plural(steps, 'step')}{epochs} x {seconds:g} s of audio = {steps * seconds / 3600:,.1f} hours")
    ready = not any(line.startswith("data") for line in absent)
    passes, languages = _epochs(recipe, ready, data_hours)
    for line in [*plan.lines(passes, brief=gpu is None), *languages]:
        print(line)
    if is_finished:
        print(
            f"\nstage {stage.number} is finished: {stage_folder(recipe) / 'model'}; nothing would be trained"
        )
        return 0
    print(
        "\nmissing: nothing" if not absent else "\nmissing:\n" + "\n".join(f"  - {line}" for line in absent)
    )
    return 0
