"""The model folder: what was trained, and which frozen parts it belongs to.

soundwave.json        SoundwaveConfig, stage, sha256 of the frozen parts and their settings
                      (model/identity.py), whatever the caller adds
adapters.safetensors  trained parts but LoRA, by their names in the model (of a tied CTC head: the blank's
                      row)
lora/                 LoRA in peft's own format
encoder.safetensors   trained tensors of the encoder, its LoRA included; they replace those of its own folder
llm.safetensors       trained tensors of the LLM itself (train.llm: all)
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from core.console import one_line
from core.ctc_text import NORMALISATIONS
from core.json_files import JsonError, read_object
from core.options import problems
from model import identity, lora_init
from model.config import SoundwaveConfig
from model.inheritance import find_base
from model.lora_start import rank_axis, starting_state
from model.pretrained import SourceError, write_tensors
from model.saved_modules import parameter_name
from model.soundwave import Soundwave
from model.stages import ALIGNMENT, PARTS, STAGES
from model.trained_encoder import canonical

logger = logging.getLogger("soundwave")
CONFIG, ADAPTERS, LORA = "soundwave.json", "adapters.safetensors", "lora"
TUNED = {"encoder": "encoder.safetensors", "llm": "llm.safetensors"}
# of the alignment adapter; more are a damaged or hostile file, and building them would take for ever
MOST_LAYERS = 1000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONFIG_TYPE = TypeAdapter(SoundwaveConfig)


class FolderError(SourceError):
    """A model folder of ours that cannot be used; one line: what, where, what to do."""


def trained_tensors(model: Soundwave) -> dict[str, torch.Tensor]:
    """Adapters and CTC head by name, without a tied head's embeddings."""
    skip = {"ctc_head.weight"} if model.ctc_head.kind == "tied" else set()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[0] in ("alignment", "ctc_head", "shrinking") and name not in skip
    }


def tuned_tensors(model: Soundwave) -> dict[str, dict[str, torch.Tensor]]:
    """Return, by part, the tensors of encoder and LLM that differ from those of their own folders."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part, plain = name.partition(".")[0], canonical(name)
        if part in TUNED and plain in model.tuned:
            tensors.setdefault(part, {})[plain] = parameter
    return tensors


def check_place(folder: str | Path) -> None:
    """Check that a model folder may be written here: an existing folder, which is replaced, is one too.

    Errors: FolderError.
    """
    folder = Path(folder)
    written = {ADAPTERS, CONFIG, LORA, *TUNED.values()}
    for suffix in ("", ".previous", ".partial"):
        place = folder.with_name(folder.name + suffix)
        names = {path.name for path in place.iterdir()} if place.is_dir() else set()
        if suffix != ".partial" and CONFIG in names:
            continue
        if strange := sorted(names - written if suffix == ".partial" else names):
            raise FolderError(
                f"{place} holds {strange[0]} and is no model folder: it would be replaced by one; "
                "move its files, or write elsewhere"
            )


def save(
    model: Soundwave,
    folder: str | Path,
    extra: dict | None = None,
    tuned: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a model folder; complete, or not there. Under ZeRO-3 the caller gathers the parameters and calls
    it on one rank. tuned: what `tuned_tensors` gives, gathered. Errors: FolderError where the folder holds
    other files."""
    folder = Path(folder)
    check_place(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(
        {n: p.detach().cpu().contiguous() for n, p in trained_tensors(model).items()}, partial / ADAPTERS
    )
    tuned = tuned_tensors(model) if tuned is None else tuned
    for part, tensors in tuned.items():
        write_tensors({n: p.detach().cpu().contiguous() for n, p in tensors.items()}, partial / TUNED[part])
    if isinstance(model.llm, PeftModel):
        (partial / LORA).mkdir(exist_ok=True)
        state = {n: p.detach().cpu().contiguous() for n, p in lora_init.file_state(model.llm).items()}
        write_tensors(state, partial / LORA / "adapter_model.safetensors")
        peft_config = lora_init.file_config(model.llm)
        peft_config.base_model_name_or_path = model.config.llm.name
        peft_config.inference_mode = True
        peft_config.save_pretrained(str(partial / LORA))
    description = {
        "config": asdict(model.config),
        "stage": model.stage,
        "frozen": model.frozen_hash(),
        "settings": model.frozen_settings(),
        **({"tuned": sorted(tuned)} if tuned else {}),
        **(extra or {}),
    }
    (partial / CONFIG).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    for path in [
        *partial.rglob("*"),
        partial,
    ]:  # a name that survives a power cut must not name files that did not
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    previous = folder.with_name(folder.name + ".previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)  # of a replacement that was interrupted
        os.rename(folder, previous)
    os.rename(partial, folder)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def tuned_parts(folder: str | Path) -> list[str]:
    """Return which of encoder and LLM a model folder holds trained tensors of. Errors: FolderError."""
    return describe(folder).get("tuned", [])


def describe(folder: str | Path) -> dict:
    """Return soundwave.json of a model folder, its parts of the right types. Errors: FolderError."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise FolderError(
            f"{folder} is not a model folder ({CONFIG} is missing): "
            "give <output>/<stage>/model of a finished stage"
        )
    try:
        description = read_object(path)
    except JsonError as error:
        raise FolderError(f"{path} {error}: copy the folder again") from None
    if isinstance(stage := description.get("stage"), str) and stage not in STAGES:
        raise FolderError(f"{path}: {STAGES.describe_unknown(stage)}")
    recipe, frozen, settings = (
        description.get("recipe") or {},
        description.get("frozen"),
        description.get("settings", {}),
    )
    right = {
        "config": isinstance(description.get("config"), dict),
        "stage": stage in STAGES,
        "frozen": isinstance(frozen, dict)
        and all(isinstance(one, str) and _SHA256.fullmatch(one) for one in frozen.values()),
        "settings": isinstance(settings, dict)
        and all(isinstance(settings.get(part, {}), dict) for part in identity.PARTS),
        "recipe": isinstance(recipe, dict) and _is_data(recipe.get("data", {})),
        "step": type(description.get("step", 0)) is int,
        "tuned": isinstance(tuned := description.get("tuned", []), list)
        and all(part in TUNED for part in tuned),
    }
    wrong = [key for key, sound in right.items() if not sound]
    if wrong:
        raise FolderError(
            f"{path}: '{wrong[0]}' is missing or not as training writes it: copy the folder again"
        )
    for part in description.get("tuned", []):
        if not (path.parent / TUNED[part]).exists():
            raise FolderError(
                f"{folder} was made with a trained {part}, and {TUNED[part]} is missing: copy it again"
            )
    return description


def _is_data(data: object) -> bool:
    """Whether it is a recipe's `data`, as far as others than the trainer read it."""
    return (
        isinstance(data, dict)
        and isinstance(corpora := data.get("train", []), list)
        and all(isinstance(corpus, dict) and isinstance(corpus.get("shards"), str) for corpus in corpora)
        and data.get("ctc_text", NORMALISATIONS[0]) in NORMALISATIONS
    )


def read_config(folder: str | Path) -> SoundwaveConfig:
    """Return the configuration of a model folder. Its texts are text: nothing in them is looked up. Errors:
    FolderError."""
    path = Path(folder) / CONFIG
    try:
        config = _CONFIG_TYPE.validate_python(describe(folder)["config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        raise FolderError(
            f"{path}: {key}: {first['msg']} ({ascii(first['input'])[:60]}): copy the folder again"
        ) from None
    for key, problem in problems(config):
        raise FolderError(f"{path}: {key} {problem}")
    if config.alignment.layers > MOST_LAYERS:
        raise FolderError(
            f"{path}: alignment.layers is {config.alignment.layers}: give at most {MOST_LAYERS}"
        )
    for part in (config.encoder, config.llm):
        part.name = find_base(folder, part.name)
    return config


def trained_with(description: dict) -> dict:
    """The recipe's `data` section of a model folder, as far as it was kept."""
    return (description.get("recipe") or {}).get("data") or {}


def check_base(model: Soundwave, folder: str | Path) -> None:
    """The frozen parts must be those that the folder was trained with. Errors: FolderError."""
    for text in base_differences(model, folder).values():
        raise FolderError(text)


def base_differences(model: Soundwave, folder: str | Path) -> dict[str, str]:
    """What `identity_differences` gives for a built model."""
    places = {part: source.folder for part, source in model.sources.items()}
    return identity_differences(folder, model.frozen_hash(), model.frozen_settings(), places)


def identity_differences(
    folder: str | Path, frozen: dict[str, str], settings: dict, places: dict[str, Path]
) -> dict[str, str]:
    """Return "base" and "tokenizer" -> one line, where the frozen parts are not those that the folder was
    trained with.

    frozen, settings: of the parts in `places`. Where the folder was made before settings were recorded, a
    warning replaces their check. Errors: FolderError.
    """
    description = describe(folder)
    problems: dict[str, str] = {}
    stored = description["frozen"]
    for part, digest in frozen.items():
        if part in stored and stored[part] != digest:
            problems.setdefault(
                "base",
                f"{folder} was trained with another {part}: its sha256 is {stored[part][:12]}..., that of "
                f"{places[part]} is {digest[:12]}...; set model.{part}.name to the right one, "
                f"{getattr(read_config(folder), part).name} at that time",
            )
    if "settings" not in description:
        logger.warning(
            "%s does not record the configurations, the preprocessor, the tokenizer and the end tokens of "
            "its frozen "
            "parts (an earlier version made it): only their tensors were compared",
            folder,
        )
        return problems
    for part, lines in identity.changes(description["settings"], settings).items():
        key = "llm" if part == "tokenizer" else part
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        problems.setdefault(
            "tokenizer" if part == "tokenizer" else "base",
            f"{folder} was trained with another {part} ({'; '.join(lines[:5])}{more}): give {places[key]} "
            f"its old "
            f"files back, or set model.{key}.name to a folder that has them",
        )
    return problems


def check_fit(
    model: Soundwave, folder: str | Path, *, but: tuple[str, ...] = (), is_own: bool = False
) -> list[str]:
    """Return the trained parts that a folder and a model both have, `but` some. The model may be on the meta
    device. is_own: the model is built by the folder itself; else its LoRA may have a higher rank.

    Errors: FolderError for tensors that one side lacks and for sizes that differ.
    """
    folder = Path(folder)
    stored, parameters, fitting = _shapes(folder / ADAPTERS), trained_tensors(model), []
    for part in ("alignment", "ctc_head", "shrinking"):
        names = {n for n in stored if n.split(".")[0] == part}
        own = {n for n in parameters if n.split(".")[0] == part}
        if not names or not own or part in but:
            continue
        differ = sorted(names ^ own) + [n for n in sorted(names & own) if _shape(parameters[n]) != stored[n]]
        if differ:
            raise FolderError(
                f"{folder}: {part} does not fit model.{'alignment' if part == 'ctc_head' else part} of this "
                f"recipe "
                f"({', '.join(differ[:3])}): use the settings in {folder / CONFIG}"
            )
        fitting.append(part)
    for part in tuned_parts(folder):
        if getattr(model, part) is not None:
            fitting.append(_check_tuned_fit(model, folder, part))
    if (folder / LORA).is_dir() and isinstance(model.llm, PeftModel):
        _check_lora_kind(model, folder)
        stored = _shapes(folder / LORA / "adapter_model.safetensors")
        own_shapes = lora_init.file_shapes(model.llm)
        has_starts = bool(lora_init.starts(model.llm))
        # Layers that are trained whole from now on start as the LLM's own.
        new = {name for name in own_shapes if ".lora_" not in name}
        differ = sorted((stored.keys() ^ own_shapes.keys()) - (new - stored.keys()))
        for name in sorted(stored.keys() & own_shapes.keys()):
            sizes, axis = list(own_shapes[name]), rank_axis(name)
            if axis is not None and has_starts and sizes[axis] != stored[name][axis]:
                raise FolderError(
                    f"{folder}: its LoRA has rank {stored[name][axis] // 2} ({name}), and this recipe asks "
                    f"for {sizes[axis] // 2}, which model.llm.lora_init={model.config.llm.lora_init} cannot "
                    f"change: give the same rank, or merge it (python -m model.export {folder} --merge "
                    "--with-encoder --out DIR) and start there"
                )
            if axis is not None and not is_own and sizes[axis] < stored[name][axis]:
                raise FolderError(
                    f"{folder}: its LoRA has rank {stored[name][axis]} ({name}), and this recipe asks for "
                    f"{sizes[axis]}, which would change what it computes: give at least that rank, or merge "
                    f"it (python -m model.export {folder} --merge --with-encoder --out DIR) and start there"
                )
            if axis is not None and not is_own:
                sizes[axis] = stored[name][axis]
            if tuple(sizes) != stored[name]:
                differ.append(name)
        if differ:
            raise FolderError(
                f"{folder}: its LoRA does not fit model.llm of this recipe ({differ[0]}): "
                f"use the lora_* settings in {folder / CONFIG}"
            )
        fitting.append("lora")
    return fitting


def _check_lora_kind(model: Soundwave, folder: Path) -> None:
    """Errors: FolderError where the model's LoRA has a start at the LLM's components, and the folder's has
    none."""
    now, then = model.config.llm.lora_init, read_config(folder).llm.lora_init
    if lora_init.takes_components(now) and not lora_init.takes_components(then):
        raise FolderError(
            f"{folder}: its LoRA was trained with model.llm.lora_init={then}, and cannot start again as "
            f"{now}: set model.llm.lora_init={then}, or merge it (python -m model.export {folder} --merge "
            "--with-encoder --out DIR) and start there"
        )


def _check_tuned_fit(model: Soundwave, folder: Path, part: str) -> str:
    """Return the part. Errors: FolderError for trained tensors of it that the model has not, or of other
    sizes."""
    own = _base_parameters(model, part)
    for name, shape in _shapes(folder / TUNED[part]).items():
        if name not in own or _shape(own[name]) != shape:
            raise FolderError(
                f"{folder}: its trained {part} does not fit model.{part} of this recipe ({name}): use the "
                f"settings in {folder / CONFIG}"
            )
    return part


def _base_parameters(model: Soundwave, part: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of encoder or LLM by the names that model folders have."""
    return {canonical(name): p for name, p in model.named_parameters() if name.startswith(f"{part}.")}


def load_trained(model: Soundwave, folder: str | Path, *, verify: bool = True) -> list[str]:
    """Put a folder's trained parts into a built model, where both have them; returns the parts taken.

    A stage 1 folder has no shrinking adapter and no LoRA: the model's stay fresh. Errors: FolderError for
    another base (unless not `verify`), and for sizes that differ (the message names them).
    """
    folder = Path(folder)
    describe(folder)
    if verify:
        check_base(model, folder)
    taken = check_fit(model, folder)
    for part in TUNED:
        if part in taken:
            base = _base_parameters(model, part)
            for name, value in load_file(folder / TUNED[part]).items():
                _fill(base[name], value)
                model.tuned.add(name)
    parameters = trained_tensors(model)
    for name, value in load_file(folder / ADAPTERS).items():
        if name.split(".")[0] in taken:
            _fill(parameters[name], value)
    if "lora" in taken and isinstance(model.llm, PeftModel):
        state = lora_init.take_starts(model.llm, starting_state(model.llm, folder / LORA))
        if any(hasattr(p, "ds_id") for p in model.llm.parameters()):
            lora = dict(model.llm.named_parameters())
            for name, value in state.items():
                is_copy = ".lora_" not in name
                own = parameter_name(name) if is_copy else name.replace(".weight", ".default.weight")
                _fill(lora[own], value)
        else:
            own_copies = {n: v for n, v in lora_init.file_state(model.llm).items() if ".lora_" not in n}
            set_peft_model_state_dict(model.llm, {**own_copies, **state})
    return taken


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file, from its header. Errors: FolderError."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{file} cannot be read ({one_line(error)}): copy the folder again") from None


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        with torch.no_grad():
            parameter.copy_(value)
        return
    import deepspeed  # sharded while it was loaded

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value)


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """A type as model.dtype has it; None for None and "auto"."""
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


def load(
    folder: str | Path,
    *,
    encoder: str | None = None,
    llm: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    with_llm: bool = True,
    attention: str | None = None,
) -> Soundwave:
    """A model folder as a model in eval mode, with its frozen parts from where it names them, or from
    `encoder` and `llm`.

    dtype: of the frozen parts; None or "auto": the one that the folder names. attention: as
    model.attention_implementation. A stage 1 folder comes without the LLM; any other, too, if not `with_llm`,
    for its CTC head alone. Errors: FolderError, SourceError.
    """
    description, config = describe(folder), read_config(folder)
    config.encoder.name, config.llm.name = encoder or config.encoder.name, llm or config.llm.name
    config.dtype = dtype_name(dtype) or config.dtype
    config.attention_implementation = attention or config.attention_implementation
    stage = description["stage"] if with_llm else ALIGNMENT.name
    parts = tuple(p for p in PARTS if p != "llm" or STAGES[stage].needs_llm)
    try:
        # Sizes first, before memory is asked for; the CTC head's depend on the tokenizer, which is not read
        # yet.
        on_meta = Soundwave.build(config, parts=parts, meta=True)
        check_fit(on_meta, folder, but=("ctc_head",), is_own=True)
        model = Soundwave.build(config, parts=parts, starts_lora=False)
        load_trained(model, folder, verify=verify)
        model.set_stage(stage)
    except SourceError:
        raise
    except Exception as error:  # sizes that do not go together, or no memory for them
        raise FolderError(
            f"{folder} cannot be built as its {CONFIG} says ({one_line(error)}): "
            f"copy the "
            "folder and its frozen parts again"
        ) from error
    data = trained_with(description)
    model.trained_seconds = data.get("max_seconds")
    model.ctc_text = data.get("ctc_text", model.ctc_text)
    return (model if device is None else model.to(device)).eval()
