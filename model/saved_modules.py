"""Layers of the LLM that are trained whole beside LoRA (`model.llm.lora_modules_to_save`): copies, by peft's
modules_to_save. The LLM's own layers stay as they are: without LoRA it is the original, and the CTC head's
targets are its original output embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from core.console import shown
from core.near_names import either, near_names
from model.config import LLMConfig
from model.pretrained import Source, SourceError, causal_lm_class, embedding_names, read_json

#: In the names of the copies' parameters.
MARK = ".modules_to_save.default."


def original_of(module: nn.Module) -> nn.Module:
    """Return the LLM's own layer, which a trained copy may replace."""
    return cast(nn.Module, getattr(module, "original_module", module))


def saved_modules(llm: PreTrainedModel, config: LLMConfig, name: str) -> list[str]:
    """Return the whole names of the layers that are trained whole. llm: without LoRA, on any device.

    Errors: SourceError for a name that is no layer with weights, and for a table that the LLM ties to
    another.
    """
    layers = {
        key: module
        for key, module in llm.named_modules()
        if key and not list(module.children()) and list(module.parameters(recurse=False))
    }
    whole: list[str] = []
    for asked in config.lora_modules_to_save:
        found = [key for key in layers if key == asked or key.endswith(f".{asked}")]
        if not found:
            ends = list(dict.fromkeys(key.rpartition(".")[2] for key in layers))
            raise SourceError(
                f"model.llm.lora_modules_to_save: {name} has no layer '{asked}' with weights of its "
                f"own; did you mean {either(near_names(asked, ends, cutoff=0.0))}? Its layers: "
                f"{', '.join(ends)}"
            )
        whole += [key for key in found if key not in whole]
    tables = {key: module for key, module in layers.items() if key in whole and module in _tables(llm)}
    if tables and llm.config.get_text_config().tie_word_embeddings:
        raise SourceError(
            f"model.llm.lora_modules_to_save is {shown(config.lora_modules_to_save)}, and {name} ties its "
            f"input and output embeddings, of which a trained '{next(iter(tables))}' would be another: take "
            "it out, or choose an LLM that does not tie them"
        )
    return whole


def _tables(llm: PreTrainedModel) -> tuple[nn.Module, ...]:
    return cast(Any, (llm.get_input_embeddings(), llm.get_output_embeddings()))


def check_no_lora_inside(names: list[str], with_lora: list[str]) -> None:
    """Errors: SourceError for a layer that has LoRA, too."""
    if both := [name for name in names if name in with_lora]:
        raise SourceError(
            f"model.llm.lora_modules_to_save: '{both[0]}' has LoRA already: take it out, or out of "
            "model.llm.lora_targets"
        )


def trained_tables(config: LLMConfig, source: Source) -> list[str]:
    """Return the embedding tables of which copies are trained, from config.json alone. Errors:
    SourceError."""
    if not config.lora_modules_to_save:
        return []
    with torch.device("meta"):
        llm = causal_lm_class(source.config)(source.config)
    names = set(saved_modules(llm, config, source.name))
    return [key for key, module in llm.named_modules() if key in names and module in _tables(llm)]


def parameter_name(name: str) -> str:
    """Return a copy's parameter of a peft file by its name in the model."""
    path, _, kind = name.rpartition(".")
    return f"{path}{MARK}{kind}"


def replaces_output_table(folder: Path, llm: Source) -> bool:
    """Whether a model folder's trained copies include the LLM's output embeddings."""
    settings = folder / "lora" / "adapter_config.json"
    names = (read_json(settings).get("modules_to_save") or []) if settings.exists() else []
    return bool(names) and embedding_names(llm.config)[1] in [f"{name}.weight" for name in names]
