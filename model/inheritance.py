"""What a stage inherits from the model folder that it starts from, read from files alone: no tensor library
is loaded here."""

from __future__ import annotations

import operator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from core.console import OneLine, one_line
from core.json_files import read_object
from model.config import SoundwaveConfig
from model.stages import STAGES

#: Options that say how a model is computed here, not what it is; they are never inherited.
_OF_THE_MACHINE = ("dtype", "attention_implementation", "encoder.max_seconds")
#: Options that matter in training alone, inherited but free to differ, and the frozen parts' names: their
# content is compared.
_FREE = ("alignment.dropout", "shrinking.dropout", "llm.lora_dropout", "encoder.name", "llm.name")


class StartError(OneLine, ValueError):
    """A start folder that cannot be read; one line: what, where, what to do."""


def inherited_options(folder: str | Path) -> dict[str, object]:
    """Return the options of the parts that a folder holds, e.g. {"alignment.layers": 1, "shrinking.keep":
    "first"}.

    A stage that starts from the folder computes these parts as they were trained. A stage 1 folder decides
    nothing about the shrinking adapter and the prompt, and one without LoRA nothing about LoRA. Options that
    were added later have their defaults.
    Errors: StartError.
    """
    folder = Path(folder)
    try:
        described = read_object(folder / "soundwave.json")
        stage, stored = described["stage"], described["config"]
        sections = {name: value for name, value in stored.items() if isinstance(value, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(
            f"{folder / 'soundwave.json'} is not as training writes it ({one_line(error)}): "
            "copy the folder again"
        ) from None
    inherited = ["encoder", "alignment", "audio_token", "llm.name"]
    if stage not in STAGES or STAGES[stage].needs_llm:
        inherited += ["compressor", "compressor_options", "shrinking", "prompt", "system_prompt"]
        inherited.append("llm.quantization")
    if (folder / "lora").is_dir():
        inherited.append("llm")
    encoder_lora = bool(sections.get("encoder", {}).get("lora_r"))
    options: dict[str, Any] = {}
    for name, default in asdict(SoundwaveConfig()).items():
        if isinstance(default, dict) and default:  # a section; a table of numbers is one option
            options |= {
                f"{name}.{key}": sections.get(name, {}).get(key, value) for key, value in default.items()
            }
        else:
            options[name] = stored.get(name, default)
    options = {
        key: value
        for key, value in options.items()
        if (encoder_lora or not key.startswith("encoder.lora_"))
        and key not in _OF_THE_MACHINE
        and (key in inherited or key.partition(".")[0] in inherited)
    }
    for key in {"encoder.name", "llm.name"} & options.keys():
        options[key] = find_base(folder, str(options[key]))
    return options


def find_base(folder: str | Path, name: str) -> str:
    """Return the name of a frozen part for the working folder.

    A relative path is looked up in the model folder, in the working folder, and in the folders above the
    model folder: training names it relative to where it ran. Hub names and other paths are returned as
    they are.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return name
    if (Path(folder) / path).is_dir():
        return str(Path(folder) / path)
    if path.is_dir():
        return name
    above = (parent / path for parent in Path(folder).absolute().parents)
    return next((str(place) for place in above if (place / "config.json").is_file()), name)


def differing_options(config: SoundwaveConfig, folder: str | Path) -> dict[str, tuple[object, object]]:
    """Return {"model.alignment.layers": (in the folder, in this configuration)} for options by which a part
    would be computed in another way than it was trained. Which layers have LoRA shows in the tensors
    (`folder.check_fit`). Errors: StartError."""
    differ = {}
    for key, then in inherited_options(folder).items():
        now = operator.attrgetter(key)(config)
        if now != then and key not in (*_FREE, "llm.lora_targets"):
            differ[f"model.{key}"] = (then, now)
    return differ


def held_parts(folder: str | Path) -> set[str]:
    """Return which of alignment, ctc_head and shrinking a folder holds. Errors: StartError."""
    file = Path(folder) / "adapters.safetensors"
    try:
        with safe_open(file, "np") as opened:
            return {name.split(".")[0] for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StartError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): copy the folder again"
        ) from None


def tuned_parts(folder: str | Path) -> list[str]:
    """Return which of encoder and LLM a folder holds trained tensors of; [] where there is no folder yet."""
    try:
        parts = read_object(Path(folder) / "soundwave.json").get("tuned", [])
    except (OSError, ValueError):
        return []
    return parts if isinstance(parts, list) else []
