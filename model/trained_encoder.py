"""Train the encoder: which of its weights, LoRA on it, and its tensors for export.

It stays in eval mode: no dropout, no layers left out, no masked frames of its own. So its output does not
depend on how a step is cut into micro-batches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from model.config import EncoderConfig, OptionError
from model.encoder import Encoder, build_encoder
from model.pretrained import DTYPES, Source

#: Linear layers of the attention, as transformers names them: most families, Parakeet, w2v-BERT 2.0.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "o_proj"]
LORA_TARGETS += ["linear_q", "linear_k", "linear_v", "linear_out"]
#: Weights that are constants (Whisper's sinusoids), or not used (the embedding of masked frames).
_FIXED = ("embed_positions.", "masked_spec_embed")
_LORA = ".lora_"


def transformer_layers(encoder: Encoder) -> nn.ModuleList:
    """Return the encoder's Transformer layers, the lowest first."""
    inner: Any = getattr(encoder.layers, "encoder", encoder.layers)  # wav2vec 2.0's lie one level deeper
    return inner.layers


def add_lora(encoder: Encoder, config: EncoderConfig, family: str) -> None:
    """Put fresh LoRA (which starts as the identity) on the attention layers. Errors: OptionError."""
    if family == "wavlm":  # its attention reads the weights and never calls the layers
        raise OptionError(
            "model.encoder.lora_r: WavLM's attention does not call its linear layers, which LoRA is on: set "
            "it to 0, and train.encoder to last_N or all"
        )
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=LORA_TARGETS)
    inject_adapter_in_model(lora, encoder.layers)
    encoder.requires_grad_(False)


def trained_parameters(encoder: Encoder, last: int | None) -> list[nn.Parameter]:
    """Return the weights that `train.encoder` means: of the last so many layers, or (None) all. Errors:
    OptionError."""
    layers = transformer_layers(encoder)
    if last is None:
        chosen = dict(encoder.named_parameters())
    elif last > len(layers):
        raise OptionError(
            f"train.encoder is last_{last}, and the encoder has {len(layers)} layers: give "
            f"last_{len(layers)} at most, or all"
        )
    else:
        chosen = dict(layers[-last:].named_parameters())
    if any(_LORA in name for name in chosen):
        raise OptionError(
            "train.encoder trains the encoder's own weights, and it has LoRA (model.encoder.lora_r): set "
            "train.encoder=lora, or model.encoder.lora_r=0"
        )
    return [p for name, p in chosen.items() if not any(fixed in name for fixed in _FIXED)]


def lora_parameters(encoder: Encoder) -> list[nn.Parameter]:
    """Return LoRA's factors. Errors: OptionError where there are none."""
    factors = [p for name, p in encoder.named_parameters() if _LORA in name]
    if not factors:
        raise OptionError(
            "train.encoder is lora, and model.encoder.lora_r is 0: give a rank, e.g. model.encoder.lora_r=16"
        )
    return factors


def learning_layers(encoder: Encoder) -> list[nn.Module]:
    """Return the Transformer layers that gradients flow through: from the lowest trained one upwards."""
    layers = list(transformer_layers(encoder))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in encoder.parameters()):
        return layers
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return layers[trained.index(True) :] if any(trained) else []


def checkpoint_layers(encoder: Encoder) -> None:
    """Keep only the inputs of the layers that gradients flow through, and compute the rest again in
    backward."""
    for layer in learning_layers(encoder):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            for name in ("dropout", "activation_dropout"):  # Whisper's, numbers that its mode switches on
                if isinstance(getattr(layer, name, None), float):
                    setattr(layer, name, 0.0)
            function: Any = partial(checkpoint, use_reentrant=False)
            layer._gradient_checkpointing_func = function


def set_modes(encoder: Encoder, mode: bool) -> None:
    """Put all in eval mode but the layers that are computed again: transformers looks at their mode, and
    their dropout modules stay off."""
    encoder.eval()
    for layer in transformer_layers(encoder):
        layer.training = mode and getattr(layer, "gradient_checkpointing", False)


def require_input_gradient(encoder: Encoder) -> None:
    """Let the input of the lowest trained layer have a gradient, which ZeRO-3 waits for before it collects
    the layer's."""

    def require_gradient(_: nn.Module, arguments: tuple) -> None:
        if torch.is_grad_enabled() and not arguments[0].requires_grad:
            arguments[0].requires_grad_(True)

    for layer in learning_layers(encoder)[:1]:
        layer.register_forward_pre_hook(require_gradient)


def merged_tensors(config: EncoderConfig, source: Source, dtype: str, tuned: Path) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors with those of a model folder's file `tuned` (where it exists) in their
    place and LoRA merged, under the names of a plain `build_encoder`."""
    encoder = build_encoder(config, source, DTYPES[dtype], None)
    if config.lora_r:
        add_lora(encoder, config, source.config.model_type)
    if tuned.exists():
        ours = {canonical(name): p for name, p in encoder.named_parameters()}
        with torch.no_grad():
            for name, value in load_file(tuned).items():
                ours[name.removeprefix("encoder.")].copy_(value)
    for module in encoder.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {canonical(name): tensor for name, tensor in encoder.state_dict().items() if _LORA not in name}


def canonical(name: str) -> str:
    """Return a parameter's name as it is without LoRA around its layer or model."""
    return name.replace(".base_layer.", ".").replace("llm.base_model.model.", "llm.")
