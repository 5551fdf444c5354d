"""Settings of ZeRO-3 for a model. DeepSpeed 0.19.8, transformers 5.23.0.

Source: https://github.com/deepspeedai/DeepSpeed/tree/v0.19.8/deepspeed/runtime/zero and
https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from __future__ import annotations

import deepspeed
import torch

from model.language_model import base_of
from model.lora_init import starts
from model.soundwave import Soundwave
from model.trained_encoder import require_input_gradient
from train.gathers import layer_classes


def shard_while_loading(config: dict):
    """Return an object that makes `from_pretrained` shard what it loads, as long as it lives.

    https://huggingface.co/docs/transformers/deepspeed (HfDeepSpeedConfig)
    """
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def prepare_modules(model: Soundwave) -> None:
    """Register shared parameters, and gather a Transformer layer at once; before deepspeed.initialize."""
    for module, parameter in model.shared_parameters():
        owns = any(own is parameter for own in module.parameters(recurse=False))
        if not owns:  # else its own hooks gather it
            deepspeed.zero.register_external_parameter(module, parameter)
    layers = layer_classes(model)
    # Hooks on each Linear and LoRA matrix of a layer (some 30) cost more than they save.
    if layers:
        deepspeed.utils.set_z3_leaf_modules(model, layers)
    if model.encoder is not None and model.encoder.learns:
        require_input_gradient(model.encoder)
    if model.llm is not None:
        # DeepSpeed collects such a layer's gradients when the gradient of its input is there. In stage 3
        # the first layer's input would have none, and the hook would fire before the gradients of its LoRA
        # exist.
        base_of(model.llm).enable_input_require_grads()


def cast_new_parameters(model: torch.nn.Module) -> None:
    """Cast trained parameters that were not sharded while loading to bf16; before deepspeed.initialize.

    DeepSpeed casts a model to bf16, but not one that was sharded while it was loaded, as the LLM is here:
    what is new would compute in fp32, slower than needed and unlike ZeRO-2. The optimizer keeps fp32 masters
    of it.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(torch.bfloat16)
    for buffer in starts(model).values():
        buffer.data = buffer.data.to(torch.bfloat16)
