"""Stacked projector: n neighbouring frames become one vector through a linear layer (a baseline)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.alignment import ScaledLayerNorm
from model.compressors.base import (
    Compressed,
    Compressor,
    CTCView,
    frame_rate,
    options_of,
    register_compressor,
)
from model.config import OptionError, SoundwaveConfig


def stack_of(config: SoundwaveConfig) -> int:
    stack = options_of(Stacked, config)["stack"]
    if stack != int(stack):
        raise OptionError(f"model.compressor_options.stack is {stack}: give a whole number")
    return int(stack)


@register_compressor("stacked")
class Stacked(Compressor):
    options = {"stack": 5}  # frames that become one: 25 a second to 5

    def __init__(self, config: SoundwaveConfig, width: int, llm_heads: int, gain: float):
        super().__init__(config, width, llm_heads, gain)
        self.stack = stack_of(config)
        self.projection = nn.Linear(self.stack * width, width)
        self.norm = ScaledLayerNorm(width, gain)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor, ctc: CTCView) -> Compressed:
        stacked = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.stack)).unflatten(1, (-1, self.stack))
        lengths = torch.div(lengths + self.stack - 1, self.stack, rounding_mode="floor")
        places = torch.arange(stacked.shape[1], device=hidden.device)
        frames = self.norm(self.projection(stacked.flatten(2)))
        frames = frames.masked_fill((places >= lengths[:, None])[..., None], 0.0)
        return frames, lengths, {}, (places * self.stack).expand(len(lengths), -1)

    @classmethod
    def expected_length(
        cls, config: SoundwaveConfig, tokens: np.ndarray, seconds: np.ndarray, has_text: np.ndarray
    ) -> np.ndarray:
        return np.ceil(seconds * frame_rate(config) / stack_of(config))

    @staticmethod
    def flops(frames: float, kept: float, parameters: int) -> float:
        return 2.0 * kept * parameters
