"""Average the trained weights of model folders: `python -m model.average FOLDER FOLDER ... --out DIR`.

    python -m model.average runs/a/sft/model runs/a/sft/model-best --out runs/a/averaged
    python -m model.average runs/seed-*/sft/model --out runs/averaged

The folders have the same base, stage and model options, and should descend from one start: weights that
moved far apart have no useful mean. LoRA's two factors are averaged each. The result is a model folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from core.command_line import CommandParser
from core.console import one_line, print_error
from model.artifact import ADAPTERS, CONFIG, LORA, TUNED, FolderError, check_place, describe
from model.lora_init import takes_components
from model.lora_start import rank_axis
from model.pretrained import write_tensors

LORA_FILE = f"{LORA}/adapter_model.safetensors"
#: What is computed in the same way whatever these say.
_FREE = {"dtype", "attention_implementation", "ops"}


def average(folders: list[Path], out: Path) -> Path:
    """Write the mean of the folders' trained tensors as a model folder. Errors: FolderError."""
    if len(folders) < 2:
        raise FolderError("give at least two model folders to average")
    descriptions = [describe(folder) for folder in folders]
    for folder, description in zip(folders[1:], descriptions[1:], strict=True):
        _check_same(folders[0], descriptions[0], folder, description)
    check_place(out)
    files = [ADAPTERS, *([LORA_FILE] if (folders[0] / LORA).is_dir() else [])]
    files += [TUNED[part] for part in descriptions[0].get("tuned", [])]
    if takes_components(descriptions[0]["config"].get("llm", {}).get("lora_init", "default")):
        _check_same_start(folders)
    means = {file: _mean([folder / file for folder in folders]) for file in files}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if (folders[0] / LORA).is_dir():
        shutil.copytree(folders[0] / LORA, partial / LORA)
    for file, tensors in means.items():
        write_tensors(tensors, partial / file)
    description = dict(descriptions[0])
    description["config"] = _with_absolute_names(folders[0], description["config"])
    for key in ("best", "step", "stopped_after"):
        description.pop(key, None)
    description["averaged"] = [str(folder) for folder in folders]
    (partial / CONFIG).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(out, ignore_errors=True)  # a model folder: check_place
    partial.rename(out)
    return out


def _check_same(first: Path, one: dict, folder: Path, other: dict) -> None:
    """Errors: FolderError for another stage, base, or model option."""
    if one["stage"] != other["stage"]:
        raise FolderError(f"{first} is of stage {one['stage']}, {folder} of stage {other['stage']}")
    if (parts := one.get("tuned", [])) != (others := other.get("tuned", [])):
        raise FolderError(
            f"{first} has trained tensors of {' and '.join(parts) or 'no base model'}, {folder} of "
            f"{' and '.join(others) or 'none'}: average folders that train the same"
        )
    for part, digest in one["frozen"].items():
        if other["frozen"].get(part) != digest:
            raise FolderError(
                f"{first} and {folder} were trained on different {part}s: their mean is no model"
            )
    ours, theirs = (_flat(description["config"]) for description in (one, other))
    for key in sorted(ours.keys() | theirs.keys()):
        if key.partition(".")[0] in _FREE or key in ("encoder.name", "llm.name") or "dropout" in key:
            continue
        if ours.get(key) != theirs.get(key):
            raise FolderError(
                f"model.{key} is {ours.get(key)} in {first} and {theirs.get(key)} in {folder}: average "
                "folders of the same model options"
            )
    if (first / LORA).is_dir() != (folder / LORA).is_dir():
        raise FolderError(f"only one of {first} and {folder} has LoRA: average folders of the same stage")


def _check_same_start(folders: list[Path]) -> None:
    """Errors: FolderError for LoRA that started at other components (model/lora_init.py): the second halves
    of its factors."""
    first, *others = (load_file(folder / LORA_FILE) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        for name, tensor in first.items():
            axis = rank_axis(name)
            if axis is not None and not tensor.chunk(2, axis)[1].equal(other[name].chunk(2, axis)[1]):
                raise FolderError(
                    f"the LoRA of {folders[0]} and {folder} started at other components ('{name}'): average "
                    "folders that descend from one start"
                )


def _mean(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of the tensors of safetensors files, computed in fp64. Errors: FolderError."""
    sums: dict[str, torch.Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for number, file in enumerate(files):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise FolderError(f"{file} cannot be read ({one_line(error)}): copy the folder again") from None
        if number and tensors.keys() != sums.keys():
            name = sorted(tensors.keys() ^ sums.keys())[0]
            raise FolderError(f"{files[0]} and {file} differ: '{name}' is in one only")
        for name, tensor in tensors.items():
            if number and tensor.shape != sums[name].shape:
                raise FolderError(
                    f"{files[0]} and {file}: '{name}' has the sizes {list(sums[name].shape)} and "
                    f"{list(tensor.shape)}"
                )
            if not tensor.isfinite().all():
                raise FolderError(f"{file}: '{name}' holds values that are not finite")
            types.setdefault(name, tensor.dtype)
            sums[name] = sums[name] + tensor.double() if number else tensor.double()
    return {name: (total / len(files)).to(types[name]) for name, total in sums.items()}


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = sorted(value) if isinstance(value, list) else value
    return flat


def _with_absolute_names(folder: Path, config: dict) -> dict:
    """Return a configuration whose frozen parts inside its folder are found from any other."""
    config = dict(config)
    for part in ("encoder", "llm"):
        name = config[part]["name"]
        if not Path(name).is_absolute() and (folder / name).is_dir():
            config[part] = {**config[part], "name": str((folder / name).resolve())}
    return config


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m model.average",
        "Average the trained weights of model folders.",
        example="runs/a/sft/model runs/a/sft/model-best --out runs/a/averaged",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="model folder of one stage")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write the mean")
    options = parser.parse_args(arguments)
    try:
        average(options.folders, options.out)
    except (FolderError, OSError) as error:
        print_error(f"error: {error}")
        return 2
    print(f"{options.out}: the mean of {len(options.folders)} model folders")
    return 0


if __name__ == "__main__":
    sys.exit(main())
