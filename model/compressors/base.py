"""The contract of a compressor, which turns an utterance's frames into the few that the LLM reads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from core.registry import Registry
from model.config import OptionError, SoundwaveConfig

ENCODER_RATE = 50.0  # Whisper's frames a second, for estimates without a model
EXPECTED_RATE = 3.0  # frames a second of audio without a transcript, where a frame is about a token


@dataclass
class CTCView:
    """What the CTC head says about a batch's frames. No gradient flows through it."""

    argmax: torch.Tensor  # [A, T] token ids
    peak: torch.Tensor  # [A, T] log-probability of the argmax
    blank_logprob: torch.Tensor  # [A, T]
    blank: int  # id of the blank
    target_lengths: torch.Tensor | None = None  # [A] tokens of the transcript; 0: none
    keys: torch.Tensor | None = None  # [A] keys of dropout, in training


#: frames [A, K, D], zero after their lengths; lengths [A], at least 1; auxiliary losses by name, each [A],
#: which a Loss of the same name adds; positions [A, K]: the adapter frame of each one, for pictures.
Compressed = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]


class Compressor(nn.Module, ABC):
    """One way to shorten an utterance. Its weights are the section `shrinking.*` of a model.

    options: the keys of `model.compressor_options` that it reads, with their defaults.
    auxiliary: its auxiliary losses with their default weights; `loss.weights` overrides them.
    """

    options: ClassVar[dict[str, float]] = {}
    auxiliary: ClassVar[dict[str, float]] = {}

    def __init__(self, config: SoundwaveConfig, width: int, llm_heads: int, gain: float):
        """width: of frames and of the LLM; gain: the scale of the LLM's input embeddings."""
        super().__init__()

    @abstractmethod
    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor, ctc: CTCView) -> Compressed:
        """hidden [A, T, D], lengths [A] -> Compressed. All ranks run the same modules for every batch."""

    @classmethod
    def select(
        cls, config: SoundwaveConfig, lengths: torch.Tensor, ctc: CTCView
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions [A, K] and lengths [A] of the frames that stage 1, which has no weights of the
        compressor, reports as kept."""
        return torch.arange(ctc.argmax.shape[1], device=lengths.device).expand_as(ctc.argmax), lengths

    @classmethod
    def expected_length(
        cls, config: SoundwaveConfig, tokens: np.ndarray, seconds: np.ndarray, has_text: np.ndarray
    ) -> np.ndarray:
        """Return about how many frames the LLM reads of clips [N]; tokens: of their transcripts."""
        return np.where(has_text, tokens, seconds * EXPECTED_RATE)

    @staticmethod
    def flops(frames: float, kept: float, parameters: int) -> float:
        """Return the FLOPs of one forward pass; parameters: of its matrices."""
        return 2.0 * frames * parameters


COMPRESSORS: Registry[type[Compressor]] = Registry("compressor")


def register_compressor(name: str):
    """Return a class decorator that adds a Compressor under `name`. Errors: AlreadyRegistered."""
    return COMPRESSORS.register(name)


def compressor_of(config: SoundwaveConfig) -> type[Compressor]:
    """Return the compressor that a configuration names. Errors: OptionError."""
    name = config.compressor
    if name == "ctc_peaks" and not config.shrinking.enabled:  # the key before there were compressors
        name = "all_frames"
    if name not in COMPRESSORS:
        raise OptionError(f"model.compressor: {COMPRESSORS.describe_unknown(name)}")
    kind = COMPRESSORS[name]
    for key, value in config.compressor_options.items():
        if key not in kind.options:
            options = f"it reads {', '.join(kind.options)}" if kind.options else "it has none"
            raise OptionError(f"model.compressor_options.{key}: no option of compressor '{name}'; {options}")
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise OptionError(f"model.compressor_options.{key} is {value}: give a number above 0")
    return kind


def options_of(kind: type[Compressor], config: SoundwaveConfig) -> dict[str, float]:
    return {**kind.options, **config.compressor_options}


def frame_rate(config: SoundwaveConfig) -> float:
    """Return the adapter's frames a second."""
    return ENCODER_RATE / config.alignment.stack_frames
