"""The model folder: what was trained, and which frozen parts it belongs to.

    soundwave.json        SoundwaveConfig, stage, sha256 of the frozen parts, whatever the caller adds
    adapters.safetensors  trained parts but LoRA, by their names in the model (of a tied CTC head: the blank's row)
    lora/                 LoRA in peft's own format
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from model.config import SoundwaveConfig
from model.pretrained import write_tensors
from model.soundwave import PARTS, Soundwave

CONFIG, ADAPTERS, LORA = "soundwave.json", "adapters.safetensors", "lora"


class FolderError(ValueError):
    """A model folder that cannot be used; one line: what, where, what to do."""


def trained_tensors(model: Soundwave) -> dict[str, torch.Tensor]:
    """Adapters and CTC head by name, without a tied head's embeddings."""
    skip = {"ctc_head.weight"} if model.ctc_head.kind == "tied" else set()
    return {name: parameter for name, parameter in model.named_parameters()
            if name.split(".")[0] in ("alignment", "ctc_head", "shrinking") and name not in skip}


def save(model: Soundwave, folder: str | Path, extra: dict | None = None) -> Path:
    """Write a model folder; complete, or not there. Under ZeRO-3 the caller gathers the parameters and calls it on one rank."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors({n: p.detach().cpu().contiguous() for n, p in trained_tensors(model).items()}, partial / ADAPTERS)
    if isinstance(model.llm, PeftModel):
        (partial / LORA).mkdir(exist_ok=True)
        state = {n: p.detach().cpu().contiguous() for n, p in get_peft_model_state_dict(model.llm).items()}
        write_tensors(state, partial / LORA / "adapter_model.safetensors")
        peft_config = model.llm.peft_config["default"]
        peft_config.base_model_name_or_path = model.config.llm.name
        peft_config.inference_mode = True
        peft_config.save_pretrained(partial / LORA)
    description = {"config": asdict(model.config), "stage": model.stage, "frozen": model.frozen_hash(), **(extra or {})}
    (partial / CONFIG).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    for path in [*partial.rglob("*"), partial]:  # a name that survives a power cut must not stand for files that did not
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


def describe(folder: str | Path) -> dict:
    """soundwave.json of a model folder. Errors: FolderError."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise FolderError(f"{folder} is not a model folder ({CONFIG} is missing): "
                          "give <output>/<stage>/model of a finished stage")
    return json.loads(path.read_text())


def read_config(folder: str | Path) -> SoundwaveConfig:
    stored = OmegaConf.merge(OmegaConf.structured(SoundwaveConfig), describe(folder)["config"])
    config = OmegaConf.to_object(stored)
    for part in (config.encoder, config.llm):  # frozen parts that stand inside the folder are named relative to it
        inside = Path(folder) / part.name
        if not Path(part.name).is_absolute() and inside.is_dir():
            part.name = str(inside)
    return config


def trained_with(description: dict) -> dict:
    """The recipe's `data` section of a model folder, as far as it was kept."""
    return (description.get("recipe") or {}).get("data") or {}


def check_base(model: Soundwave, folder: str | Path) -> None:
    """The frozen parts must be those that the folder was trained with. Errors: FolderError."""
    stored = describe(folder)["frozen"]
    for part, digest in model.frozen_hash().items():
        if part in stored and stored[part] != digest:
            raise FolderError(f"{folder} was trained with another {part}: its sha256 is {stored[part][:12]}..., that of "
                              f"{model.sources[part].folder} is {digest[:12]}...; set model.{part}.name to the right one")


def other_switches(config: SoundwaveConfig, folder: str | Path) -> list[str]:
    """Where this configuration uses what a folder trained in another way than it was trained, one line a switch.

    Sizes are not meant (`load_trained` refuses those), nor what matters in training alone (dropout). Errors: FolderError.
    """
    description, now, found = describe(folder), asdict(config), []
    shared = {"alignment": set(now["alignment"]), "encoder": {"pad_to_seconds"}}
    if description["stage"] != "alignment":
        shared |= {"shrinking": set(now["shrinking"]), "llm": {"lora_alpha"}}
    for part, keys in shared.items():
        then = description["config"].get(part, {})
        found += [f"model.{part}.{key} was {then[key]} when {folder} was trained, and is {now[part][key]} here"
                  for key in sorted(keys & then.keys()) if key != "dropout" and then[key] != now[part][key]]
    if description["stage"] != "alignment":
        found += [f"model.{key} was {description['config'][key]!r} when {folder} was trained, and is {now[key]!r} here"
                  for key in ("prompt", "system_prompt") if description["config"].get(key, now[key]) != now[key]]
    return found


def load_trained(model: Soundwave, folder: str | Path, *, verify: bool = True) -> list[str]:
    """Put a folder's trained parts into a built model, where both have them; returns the parts taken.

    A stage I folder has no shrinking adapter and no LoRA: the model's stay fresh. Errors: FolderError for another base
    (unless not `verify`), and for sizes that differ (the message names them).
    """
    folder = Path(folder)
    describe(folder)
    if verify:
        check_base(model, folder)
    stored = load_file(folder / ADAPTERS)
    parameters = trained_tensors(model)
    taken = []
    for part in ("alignment", "ctc_head", "shrinking"):
        names = {n for n in stored if n.split(".")[0] == part}
        own = {n for n in parameters if n.split(".")[0] == part}
        if not names or not own:
            continue
        differ = sorted(names ^ own) + [n for n in sorted(names & own) if _shape(parameters[n]) != tuple(stored[n].shape)]
        if differ:
            raise FolderError(f"{folder}: {part} does not fit model.{'alignment' if part == 'ctc_head' else part} of this recipe "
                              f"({', '.join(differ[:3])}): use the settings in {folder / CONFIG}")
        for name in names:
            _fill(parameters[name], stored[name])
        taken.append(part)
    if (folder / LORA).is_dir() and isinstance(model.llm, PeftModel):
        state = load_file(folder / LORA / "adapter_model.safetensors")
        own = get_peft_model_state_dict(model.llm)
        differ = sorted(state.keys() ^ own.keys())
        differ += [n for n in state.keys() & own.keys() if _shape(own[n]) != tuple(state[n].shape)]
        if differ:
            raise FolderError(f"{folder}: its LoRA does not fit model.llm of this recipe ({differ[0]}): "
                              f"use the lora_* settings in {folder / CONFIG}")
        if any(hasattr(p, "ds_id") for p in model.llm.parameters()):
            lora = dict(model.llm.named_parameters())
            for name, value in state.items():
                _fill(lora[name.replace(".weight", ".default.weight")], value)
        else:
            set_peft_model_state_dict(model.llm, state)
        taken.append("lora")
    return taken


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """A type as model.dtype has it; None for None and "auto"."""
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


def load(folder: str | Path, *, encoder: str | None = None, llm: str | None = None, device: torch.device | str | None = None,
         dtype: torch.dtype | str | None = None, verify: bool = True, with_llm: bool = True, attention: str | None = None
         ) -> Soundwave:
    """A model folder as a model in eval mode, with its frozen parts from where it names them, or from `encoder` and `llm`.

    dtype: of the frozen parts; None or "auto": the one that the folder names. attention: as model.attention_implementation.
    A stage I folder comes without the LLM; any other, too, if not `with_llm`, for its CTC head alone. Errors: FolderError,
    SourceError.
    """
    description, config = describe(folder), read_config(folder)
    config.encoder.name, config.llm.name = encoder or config.encoder.name, llm or config.llm.name
    config.dtype = dtype_name(dtype) or config.dtype
    config.attention_implementation = attention or config.attention_implementation
    stage = description["stage"] if with_llm else "alignment"
    parts = tuple(p for p in PARTS if p != "llm" or stage != "alignment")
    model = Soundwave.build(config, parts=parts)
    load_trained(model, folder, verify=verify)
    model.set_stage(stage)
    model.trained_seconds = trained_with(description).get("max_seconds")
    return (model if device is None else model.to(device)).eval()
