"""Arithmetic of a training step: what the network must compute, frozen parts counted as what they are.

A matrix of N numbers costs 2 N operations a position forward, 2 N for the gradient of its input, and 2 N for
its own gradient. Below the lowest trained part nothing flows back, so the frozen encoder costs its forward
pass alone; through the frozen LLM the gradient flows but its weights have none. Recomputation (activation
checkpointing, the fused op's second sweep) is not counted: these are model FLOPs, not hardware FLOPs
(Chowdhery et al., 2022, appendix B). Attention: 4 x length x width operations a position and layer forward
(scores and mixture), twice that backward. Left out, because they are small: norms, activations, the log-mel,
the look-back's scores, every second frame of Whisper's first convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.compressors import Compressor, compressor_of
from model.language_model import base_of
from model.stages import STAGES, Stage


def numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def sizes(model) -> dict[str, int]:
    """Parameters that are multiplied with, by part: encoder, alignment, ctc_head, shrinking, llm (without
    embeddings), embeddings, lora."""
    found = dict.fromkeys(("encoder", "alignment", "ctc_head", "shrinking", "llm", "embeddings", "lora"), 0)
    tables = set()
    if model.llm is not None:
        base = base_of(model.llm)
        tables = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) < 2 or name.endswith("embed_positions.weight"):  # added, not multiplied
            continue
        if id(parameter) in tables:
            part = "embeddings"
        elif "lora_" in name:
            part = "lora"
        found[part] += numel(parameter)
    return found


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

    @classmethod
    def of(cls, model) -> Flops:
        encoder = getattr(model.encoder, "layers", None)
        llm = None if model.llm is None else base_of(model.llm).config.get_text_config()
        rows, width = getattr(model.ctc_head.weight, "ds_shape", model.ctc_head.weight.shape)
        return cls(
            sizes(model),
            width,
            rows,
            0 if model.encoder is None else model.encoder.width,
            0 if encoder is None else len(encoder.layers) if hasattr(encoder, "layers") else len(encoder),
            0 if llm is None else llm.num_hidden_layers,
            model.config.alignment.stack_frames,
            len(model.alignment.layers),
            numel(model.alignment.projection.weight),
            STAGES[model.stage],
            "ctc_head" in STAGES[model.stage].trains and model.ctc_head.kind != "tied",
            compressor_of(model.config),
        )

    def step(
        self, frames: float, clips: float, llm_tokens: float, rows: float, targets: float, kept: float = 0.0
    ) -> dict[str, float]:
        """frames: adapter frames of all audio; clips: audios; llm_tokens: LLM positions in `rows`
        conversations; targets: target tokens of the cross-entropy; kept: frames that the shrinking adapter
        keeps. Attention is counted at mean lengths."""
        learns = "alignment" in self.stage.trains
        encoder_frames = frames * self.stack
        mean = encoder_frames / max(clips, 1.0)
        attention = 4 * self.adapter_layers * frames / max(clips, 1.0) * self.width
        out = {
            "encoder": encoder_frames
            * (2 * self.counts["encoder"] + 4 * self.encoder_layers * mean * self.encoder_width),
            # Below the adapter nothing flows back: its projection, which the encoder feeds, has no gradient
            # of its input.
            "alignment": frames
            * (
                (6 if learns else 2) * self.counts["alignment"]
                - 2 * learns * self.projection
                + (3 if learns else 1) * attention
            ),
            "ctc_head": frames
            * 2
            * self.width
            * self.vocabulary
            * ((2 if learns else 1) + self.head_is_trained),
        }
        if self.stage.needs_llm:
            passes = 3 if "shrinking" in self.stage.trains else 1
            out["shrinking"] = passes * self.compressor.flops(frames, kept, self.counts["shrinking"])
            mean = llm_tokens / max(rows, 1.0)
            out["llm"] = llm_tokens * (4 * self.counts["llm"] + 12 * self.llm_layers * mean * self.width)
            out["lora"] = llm_tokens * 6 * self.counts["lora"]
            out["lm_head"] = targets * 4 * self.width * self.vocabulary
        return out
