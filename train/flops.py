"""Arithmetic of a training step: what the network must compute, frozen parts counted as what they are.

A matrix of N numbers costs 2 N operations a position forward, 2 N for the gradient of its input, and 2 N for
its own gradient. Below the lowest trained part nothing flows back, so a frozen encoder costs its forward
pass alone; through the frozen LLM the gradient flows but its weights have none. Recomputation (activation
checkpointing, the fused op's second sweep) is not counted: these are model FLOPs, not hardware FLOPs
(Chowdhery et al., 2022, appendix B). Attention: 4 x length x width operations a position and layer forward
(scores and mixture), twice that backward. Left out, because they are small: norms, activations, the log-mel,
the look-back's scores, every second frame of Whisper's first convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from model.compressors import Compressor, compressor_of
from model.language_model import base_of
from model.lora_init import starts
from model.quantised import QuantisedLinear
from model.saved_modules import original_of
from model.stages import Stage
from model.trained_encoder import learning_layers, transformer_layers


def numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def sizes(model) -> dict[str, int]:
    """Parameters that are multiplied with, by part: encoder (with its LoRA), alignment, ctc_head, shrinking,
    llm (without embeddings), embeddings, lora, lora_starts."""
    counts = dict.fromkeys(("encoder", "alignment", "ctc_head", "shrinking", "llm", "embeddings", "lora"), 0)
    tables = set()
    if model.llm is not None:
        base = base_of(model.llm)
        both: Any = (base.get_input_embeddings(), base.get_output_embeddings())
        tables = {id(table.weight) for one in both for table in (one, original_of(one))}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) < 2 or name.endswith("embed_positions.weight"):  # added, not multiplied
            continue
        if id(parameter) in tables:
            part = "embeddings"
        elif part == "llm" and "lora_" in name:
            part = "lora"
        counts[part] += numel(parameter)
    quantised = (m for m in model.modules() if isinstance(m, QuantisedLinear))
    counts["llm"] += sum(layer.in_features * layer.out_features for layer in quantised)
    counts["lora_starts"] = sum(start.numel() for start in starts(model).values())
    return counts


@dataclass(frozen=True)
class EncoderGradient:
    """What of the encoder has gradients: parameters that are trained, parameters and layers that gradients
    flow through."""

    trained: int = 0
    passed: int = 0
    layers: int = 0

    @classmethod
    def of(cls, encoder) -> EncoderGradient:
        if encoder is None or not encoder.learns:
            return cls()
        matrices = [
            p
            for name, p in encoder.named_parameters()
            if len(getattr(p, "ds_shape", p.shape)) > 1 and not name.endswith("embed_positions.weight")
        ]
        layers = learning_layers(encoder)
        passed = {id(p) for layer in layers for p in layer.parameters()}
        if len(layers) == len(transformer_layers(encoder)) and any(
            p.requires_grad and id(p) not in passed for p in matrices
        ):  # what is below the layers, too
            passed = {id(p) for p in matrices}
        return cls(
            sum(numel(p) for p in matrices if p.requires_grad),
            sum(numel(p) for p in matrices if id(p) in passed),
            len(layers),
        )


@dataclass
class Flops:
    """Model FLOPs of global batches, by part. Built from a model on any device, ZeRO-3 partitions and meta
    included."""

    counts: dict[str, int]
    width: int
    vocabulary: int
    encoder_width: int
    encoder_layers: int
    llm_layers: int
    stack: int
    adapter_layers: int
    projection: int
    stage: Stage
    head_is_trained: bool
    compressor: type[Compressor]
    encoder_gradient: EncoderGradient

    @classmethod
    def of(cls, model) -> Flops:
        llm = None if model.llm is None else base_of(model.llm).config.get_text_config()
        rows, width = getattr(model.ctc_head.weight, "ds_shape", model.ctc_head.weight.shape)
        return cls(
            sizes(model),
            width,
            rows,
            0 if model.encoder is None else model.encoder.width,
            0 if model.encoder is None else len(transformer_layers(model.encoder)),
            0 if llm is None else llm.num_hidden_layers,
            model.config.alignment.stack_frames,
            len(model.alignment.layers),
            numel(model.alignment.projection.weight),
            model.choice,
            "ctc_head" in model.choice.trains and model.ctc_head.kind != "tied",
            compressor_of(model.config),
            EncoderGradient.of(model.encoder),
        )

    def step(
        self, frames: float, clips: float, llm_tokens: float, rows: float, targets: float, kept: float = 0.0
    ) -> dict[str, float]:
        """frames: adapter frames of all audio; clips: audios; llm_tokens: LLM positions in `rows`
        conversations; targets: target tokens of the cross-entropy; kept: frames that the shrinking adapter
        keeps. Attention is counted at mean lengths."""
        learns, gradient = "alignment" in self.stage.trains, self.encoder_gradient
        # Gradients flow to the frames, be it through an adapter that is not trained.
        flows = learns or gradient.layers > 0
        encoder_frames = frames * self.stack
        mean = encoder_frames / max(clips, 1.0)
        attention = 4 * self.adapter_layers * frames / max(clips, 1.0) * self.width
        out = {
            "encoder": encoder_frames
            * (
                2 * (self.counts["encoder"] + gradient.passed + gradient.trained)
                + 4 * (self.encoder_layers + 2 * gradient.layers) * mean * self.encoder_width
            ),
            # Where the encoder is frozen nothing flows back below the adapter: its projection, which the
            # encoder feeds, has no gradient of its input.
            "alignment": frames
            * (
                2 * (1 + learns + flows) * self.counts["alignment"]
                - 2 * (flows and not gradient.layers) * self.projection
                + (3 if flows else 1) * attention
            ),
            "ctc_head": frames
            * 2
            * self.width
            * self.vocabulary
            * ((2 if flows else 1) + self.head_is_trained),
        }
        if self.stage.needs_llm:
            passes = 3 if "shrinking" in self.stage.trains else 1 + flows
            out["shrinking"] = passes * self.compressor.flops(frames, kept, self.counts["shrinking"])
            mean = llm_tokens / max(rows, 1.0)
            products = 6 if "llm" in self.stage.trains else 4
            out["llm"] = llm_tokens * (
                products * self.counts["llm"] + 12 * self.llm_layers * mean * self.width
            )
            out["lora"] = llm_tokens * (6 if "lora" in self.stage.trains else 4) * self.counts["lora"]
            out["lora"] += llm_tokens * 4 * self.counts["lora_starts"]
            out["lm_head"] = targets * 4 * self.width * self.vocabulary
        return out
