"""What a checkpoint and a finished stage belong to: base, tokenizer, recipe, data. A difference is an error
that names it.

The facts of a run, as state.json holds them:

    base       sha256 of the tensors of encoder and llm; start: of the weights of the model folder that the
               stage starts from
    settings   configurations, preprocessor, tokenizer with chat template, end tokens (model/identity.py)
    tokenizer  sha256 of the vocabulary
    recipe     keys that decide what is learnt (`recipe_facts`)
    index      fingerprint of the training data
    code       sha256 of the source: a difference is logged only
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from core.files import step_folders
from core.plugins import plugins_hash
from core.repository import code_hash
from model.stages import Stage, chosen
from recipe.config import Recipe, RecipeError, start_folder
from recipe.stages import STAGES, stage_folder

logger = logging.getLogger("soundwave")

# Keys that do not change what is computed: they may differ between a run and its continuation.
_FREE = (
    "plugins",  # what they add is compared by the keys that use it
    "output",
    "checkpoint.",
    "log.",
    "deepspeed",
    "data.valid",
    "data.workers",
    "data.prefetch",
    "data.try_largest",
    "data.max_rejected_share",
    "data.micro_batch_seconds",  # the global batches, hence the gradients, stay the same
    "optim.activation_checkpointing",
    "optim.stop_after",
    "optim.epochs",  # the steps that they make are compared
    "health.desync_every_steps",
    "health.timeout_minutes",
    "init_from",
    "init_accept",
    "data.cache_features",
    "model.encoder.name",
    "model.llm.name",
)  # names: the base's hash is compared instead
KINDS = ("base", "tokenizer", "recipe", "index")
_TARGETS = "model.llm.lora_targets"


def flat(node: Recipe | dict, prefix: str = "") -> dict[str, Any]:
    """A dataclass or dict as {"a.b": value}."""
    node = node if isinstance(node, dict) else dataclasses.asdict(node)
    out: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is listed, or in a section that is (with a dot at its end)."""
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in keys)


def without_defaults(corpus: dict) -> dict:
    """A corpus without a key that checkpoints made before there was one do not hold, where it changes
    nothing."""
    return {
        key: value
        for key, value in corpus.items()
        if (key, value) not in (("share_from", 0.0), ("name", None))
    }


def _choices(values: dict) -> dict[str, str | None]:
    """The `train` section of flat keys."""
    return {k.removeprefix("train."): value for k, value in values.items() if k.startswith("train.")}


def _is_default(stage: Stage, key: str, value: str | None) -> bool:
    """Whether a stage trains the same with this choice as without."""
    try:
        return chosen(stage, {key: value}) == chosen(stage, {})
    except ValueError:  # this choice alone would leave nothing
        return False


def _without_effect(values: dict) -> tuple[str, ...]:
    """Keys that change nothing of what the stage of flat keys trains."""
    stage = STAGES.get(values["stage"])
    return chosen(stage, _choices(values)).without_effect if stage else ()


def recipe_facts(recipe: Recipe | dict) -> dict[str, Any]:
    """What of a recipe, or of one that was recorded, decides what its stage learns: flat keys and values."""
    values = flat(recipe)
    choices = _choices(values)
    free = (*_FREE, *_without_effect(values))
    facts = {key: value for key, value in values.items() if not _is_one_of(key, free)}
    if stage := STAGES.get(values["stage"]):  # the stage's own choice, written out, is that choice
        facts |= {f"train.{key}": None for key in choices if _is_default(stage, key, choices[key])}
    # Where the shards lie may change; what they hold is the index's fingerprint.
    facts["data.train"] = [
        {k: v for k, v in without_defaults(corpus).items() if k != "shards"} for corpus in facts["data.train"]
    ]
    if isinstance(targets := facts.get(_TARGETS), list):
        facts[_TARGETS] = sorted(targets)
    return facts


def code_fingerprint(plugins: list[str]) -> str:
    """Return the sha256 over the source that decides training's numbers, loaded plugins included. A
    difference is only logged: code may change between two starts."""
    own, theirs = code_hash(("core", "model", "recipe", "stream", "train")), plugins_hash(plugins)
    return own if theirs is None else hashlib.sha256(f"{own} {theirs}".encode()).hexdigest()


def differences(saved: dict, now: dict) -> dict[str, list[str]]:
    """Kind -> "key: saved -> now" lines, for the kinds that differ."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for part in ("encoder", "llm", "start"):
        then, here = saved["base"].get(part), now["base"].get(part)
        if then != here:
            name = {"start": "weights of the model folder that the stage starts from"}.get(part, part)
            by_kind["base"].append(f"{name}: {_hash(then)} -> {_hash(here)}")
    if "settings" in saved:
        from model.identity import changes  # transformers, for those who ask

        for part, lines in changes(saved["settings"], now["settings"]).items():
            by_kind["tokenizer" if part == "tokenizer" else "base"] += [f"{part}: {line}" for line in lines]
    if saved["tokenizer"] != now["tokenizer"] and not by_kind["tokenizer"]:
        by_kind["tokenizer"].append(
            f"tokenizer: vocabulary: {_hash(saved['tokenizer'])} -> {_hash(now['tokenizer'])}"
        )
    by_kind["recipe"] = recipe_differences(saved["recipe"], now["recipe"])
    if saved["index"] != now["index"]:
        by_kind["index"].append(f"index: {_hash(saved['index'])} -> {_hash(now['index'])}")
    return {kind: lines for kind, lines in by_kind.items() if lines}


def recipe_differences(saved: dict, now: dict) -> list[str]:
    """Lines for the keys of two sets of facts that differ. A key that the saved ones do not know, because it
    was made later, differs where its value is not the default; one that has become free since, or has no
    effect on the stage, does not."""
    free = (*_FREE, *_without_effect(now))
    defaults = flat(Recipe())
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        then, here = saved.get(key, defaults.get(key)), now.get(key)
        if key == _TARGETS and isinstance(then, list):
            then = sorted(then)
        if then != here and not _is_one_of(key, free) and not (key not in now and then == defaults.get(key)):
            lines.append(f"{key}: {then} -> {here}")
    return lines


def _hash(value: str | None) -> str:
    return "none" if value is None else f"sha256 {value[:12]}..."


def check(saved: dict, now: dict, accepted: list[str], where: Path) -> list[str]:
    """Lines about accepted differences. Errors: RecipeError naming what differs and the switch that accepts
    it."""
    notes = accepted_differences(
        saved, now, accepted, where, "give the old one back, choose another output folder"
    )
    if saved["code"] != now["code"]:
        notes.append("the code of core/, model/ or train/ has changed since the checkpoint was made")
    if "settings" not in saved:
        notes.append(
            f"{where} does not record the configurations, the chat template and the end tokens of its frozen "
            f"base (an "
            "earlier version made it): only tensors, vocabulary, recipe and data were compared"
        )
    return notes


def accepted_differences(
    saved: dict, now: dict, accepted: list[str], where: Path, ways_out: str
) -> list[str]:
    """A line for each kind that differs and is accepted. Errors: RecipeError for one that is not."""
    for kind in accepted:
        if kind not in KINDS:
            raise RecipeError(f"checkpoint.accept_changes: '{kind}' is not one of {', '.join(KINDS)}")
    notes = []
    for kind, lines in differences(saved, now).items():
        text = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        if kind not in accepted:
            raise RecipeError(
                f"{where} was made with another {kind} ({text}): {ways_out}, or accept it with "
                f"checkpoint.accept_changes=[{','.join([*accepted, kind])}]"
            )
        notes.append(f"{kind} has changed and is accepted: {text}")
    return notes


def check_steps(recipe: Recipe, step: int, where: Path) -> None:
    """Errors: RecipeError where the recipe ends before a checkpoint's or model's step."""
    if recipe.optim.total_steps < step:
        raise RecipeError(
            f"optim.steps is {recipe.optim.total_steps}, and {where} is at step {step} already: give at "
            f"least {step}, choose "
            f"another output, or remove what was saved after step {recipe.optim.total_steps}"
        )


def weights_hash(folder: Path) -> str:
    """sha256 over a model folder's weights: which earlier stage another one started from."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- before any


def finished(recipe: Recipe) -> bool:
    """Whether the stage is done: its model folder is there, and this recipe, its data, its start folder and
    its base made it.

    What cannot be found here (data, base) is not compared where the recipe still names the same place. Frozen
    tensors are hashed only where the recipe names another base than before. Errors: RecipeError for a model
    that another recipe made.
    """
    folder = stage_folder(recipe) / "model"
    described = _read(folder / "soundwave.json")
    status = _read(folder.parent / "run.json") or {}
    if described is None or status.get("status") != "done":
        return False
    if "recipe" not in described:  # not written by training
        return status.get("steps") == recipe.optim.total_steps
    recorded = described["recipe"]
    check_steps(recipe, described["step"], folder)
    is_stopped = described.get("stopped_after") is not None
    is_stopped &= described.get("stopped_after") == recipe.optim.stop_after
    further = recipe.optim.total_steps > described["step"] and not is_stopped
    ways_out = (
        f"give the old one back, choose another output, or remove {folder.parent} to train the stage again; "
        f"to "
        f"{'continue from its last checkpoint' if further else 'keep the model as it is'}"
    )

    def compare(saved: dict, now: dict) -> None:
        for note in accepted_differences(saved, now, recipe.checkpoint.accept_changes, folder, ways_out):
            logger.warning("%s: %s", folder, note)

    start = start_folder(recipe)
    start_is_gone = start is not None and not (start / "soundwave.json").exists()
    saved: dict[str, Any] = {"base": {}, "tokenizer": None, "recipe": recipe_facts(recorded), "index": None}
    now = {**saved, "recipe": recipe_facts(recipe)}
    if start_is_gone:  # what was inherited from it is not known any more
        for key in [key for key in now["recipe"] if key.startswith("model.")]:
            now["recipe"][key] = saved["recipe"].get(key)
    else:
        others = recipe_differences({**saved["recipe"], _TARGETS: None}, {**now["recipe"], _TARGETS: None})
        _resolve_targets(recipe, saved["recipe"], now["recipe"], read_llm=not others)
    compare(saved, now)  # first, where possible without loading any library of models
    same_recipe = not recipe_differences(saved["recipe"], now["recipe"])
    saved["recipe"] = now["recipe"]
    then = described["start"] if "start" in described else _start_of_checkpoint(recipe)
    if not start_is_gone and then is not _UNKNOWN:
        saved["base"], now["base"] = {"start": then}, {"start": weights_hash(start) if start else None}
    if "index" in described and same_recipe:
        saved["index"], now["index"] = described["index"], _index(recipe, recorded, described["index"])
    _compare_base(recipe, recorded, described, saved, now)
    compare(saved, now)
    if further and not step_folders(stage_folder(recipe) / "checkpoints"):
        raise RecipeError(
            f"optim.steps is {recipe.optim.total_steps}, and {folder} was trained for "
            f"{described['step']}: no checkpoint is left to continue from; choose another output with "
            f"init_from={folder}"
        )
    return not further


def check_checkpoint(recipe: Recipe) -> None:
    """Compare the recipe with the newest checkpoint of an unfinished stage. Errors: RecipeError."""
    for folder in step_folders(stage_folder(recipe) / "checkpoints"):
        state = _read(folder / "state.json")
        if state is None:  # damaged: training takes the one before it
            continue
        check_steps(recipe, state["step"], folder)
        saved, now = dict(state["facts"]), {**state["facts"], "recipe": recipe_facts(recipe)}
        _resolve_targets(recipe, saved["recipe"], now["recipe"])
        if "settings" in saved:
            now["settings"] = settings_here(recipe) or saved["settings"]
        check(saved, now, recipe.checkpoint.accept_changes, folder)
        return


def settings_here(recipe: Recipe) -> dict | None:
    """Configurations, preprocessor, tokenizer and end tokens of the recipe's base; None where it is not on
    this machine. Errors: RecipeError."""
    from model import identity
    from model.language_model import load_tokenizer
    from model.pretrained import SourceError, locate

    try:
        sources = {part: locate(getattr(recipe.model, part).name, fetch=False) for part in ("encoder", "llm")}
    except SourceError:
        return None
    try:
        return identity.settings(sources, load_tokenizer(sources["llm"], recipe.model.audio_token))
    except SourceError as error:
        raise RecipeError(str(error)) from None


_UNKNOWN = object()


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _start_of_checkpoint(recipe: Recipe) -> object:
    """The start folder's hash in the newest checkpoint: model folders of earlier versions do not hold it."""
    for folder in step_folders(stage_folder(recipe) / "checkpoints"):
        if state := _read(folder / "state.json"):
            return state["facts"]["base"].get("start")
    return _UNKNOWN


def _resolve_targets(recipe: Recipe, saved: dict, now: dict, read_llm: bool = True) -> None:
    """Recorded LoRA targets are the resolved ones. Where the recipe's cannot be resolved here, or not `look`,
    they are not compared."""
    if now.get(_TARGETS) is not None or saved.get(_TARGETS) is None:
        return
    if not read_llm:
        now[_TARGETS] = saved[_TARGETS]
        return
    from model.language_model import resolved_targets
    from model.pretrained import SourceError, locate

    try:
        targets = resolved_targets(
            recipe.model.llm, locate(recipe.model.llm.name, sizes_only=True, fetch=False)
        )
    except SourceError:
        targets = saved.get(_TARGETS)
    now[_TARGETS] = sorted(targets) if isinstance(targets, list) else targets


def _index(recipe: Recipe, recorded: dict, fingerprint: str) -> str:
    """Fingerprint of the recipe's data; the recorded one where the recipe names the same places as then and
    the data is gone."""
    from stream.plan import Plan

    try:
        return Plan.open(recipe.data, recipe.stage, recipe.optim.total_steps).fingerprint
    except RecipeError:
        if [corpus.shards for corpus in recipe.data.train] == [
            corpus["shards"] for corpus in recorded["data"]["train"]
        ]:
            return fingerprint
        raise


def _compare_base(recipe: Recipe, recorded: dict, described: dict, saved: dict, now: dict) -> None:
    """Fill in what is known of the frozen parts, then and now."""
    from model.encoder import tensor_prefix
    from model.pretrained import SourceError, fingerprint, locate

    sources = {}
    for part in ("encoder", "llm"):
        name, then = getattr(recipe.model, part).name, recorded["model"][part]["name"]
        try:
            sources[part] = locate(name, fetch=False)
        except SourceError as error:
            if name != then:
                raise RecipeError(
                    f"model.{part}.name was {then} when {stage_folder(recipe) / 'model'} was trained, and is "
                    f"{name} here, "
                    f"which cannot be compared: {error}"
                ) from None
    described_settings, here = described.get("settings"), settings_here(recipe)
    if described_settings and here:
        saved["settings"], now["settings"] = described_settings, here
    try:
        for part, source in sources.items():
            if source.name != recorded["model"][part]["name"]:
                saved["base"] = {**saved["base"], part: described["frozen"].get(part)}
                now["base"] = {
                    **now["base"],
                    part: fingerprint(source.files, tensor_prefix(source) if part == "encoder" else ""),
                }
    except SourceError as error:
        raise RecipeError(str(error)) from None
