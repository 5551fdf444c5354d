"""CTC peaks, the method's shrinking adapter: one frame for each run of equal CTC tokens, with look-back.

    argmax [A, T] -> runs -> CTC peaks [A, K] -> x = hidden[kept] -> LayerNorm(x + look-back attention of x
    over the frames)

The result replaces `<audio_patch>` in the LLM's input. The last LayerNorm's gain starts at the
RMS of the LLM's input embeddings (0.136 for SmolLM2-135M; a plain LayerNorm's output has 1), and the
look-back's output projection starts at zero: the LLM first sees the CTC peaks themselves, on the scale that
it knows.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from model import ops
from model.alignment import ScaledLayerNorm
from model.compressors.base import Compressed, Compressor, CTCView, frame_rate, register_compressor
from model.config import OptionError, ShrinkingConfig, SoundwaveConfig
from model.dropout import KeyedDropout, dropped_frames, position_keys


class ZeroLinear(nn.Linear):
    """Linear that starts at zero: a residual branch that adds nothing yet."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def kept_frames(
    config: ShrinkingConfig,
    argmax: torch.Tensor,
    peak: torch.Tensor,
    blank_logprob: torch.Tensor,
    lengths: torch.Tensor,
    blank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax, peak, blank_logprob [A, T], lengths [A] -> kept [A, K] frame positions padded with 0,
    kept_lengths [A] >= 1."""
    return ops.ctc_runs(
        argmax,
        peak,
        lengths,
        blank,
        keep=config.keep,
        keep_blank_runs=config.keep_blank_runs,
        blank_logprob=blank_logprob,
    )


@register_compressor("ctc_peaks")
class CTCPeaks(Compressor):
    selects_peaks: ClassVar[bool] = True  # else every frame

    def __init__(self, whole: SoundwaveConfig, width: int, llm_heads: int, gain: float):
        super().__init__(whole, width, llm_heads, gain)
        self.whole, self.config = whole, whole.shrinking
        config = self.config
        self.heads = config.heads or llm_heads
        if width % self.heads:
            raise OptionError(
                f"model.shrinking.heads = {self.heads} does not divide the LLM's width {width}: "
                "set it in the recipe"
            )
        self.looks_back = self.selects_peaks and config.lookback != "none"
        self.drop_frames = KeyedDropout(config.dropout, "shrinking.lookback")
        if self.looks_back:
            self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.out = ZeroLinear(width, width)
        self.norm = ScaledLayerNorm(width, gain)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor, ctc: CTCView) -> Compressed:
        kept, kept_lengths = self.select(self.whole, lengths, ctc)
        return self.compress(hidden, lengths, kept, kept_lengths, ctc.keys), kept_lengths, {}, kept

    @classmethod
    def select(
        cls, config: SoundwaveConfig, lengths: torch.Tensor, ctc: CTCView
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not cls.selects_peaks:
            return super().select(config, lengths, ctc)
        return kept_frames(config.shrinking, ctc.argmax, ctc.peak, ctc.blank_logprob, lengths, ctc.blank)

    @staticmethod
    def flops(frames: float, kept: float, parameters: int) -> float:
        """Key and value for every frame, query and output for the kept ones: half of the matrices each."""
        return (frames + kept) * parameters

    def compress(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor,
        kept: torch.Tensor,
        kept_lengths: torch.Tensor,
        keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden [A, T, D], lengths [A], kept [A, K] frame positions, kept_lengths [A] -> [A, K, D], zero
        after kept_lengths. keys [A]: the utterances' keys of dropout, needed in training."""
        frames = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
        if self.looks_back:
            over, over_lengths = (
                (hidden, lengths) if self.config.lookback == "all" else (frames, kept_lengths)
            )
            query = self.query(frames).unflatten(-1, (self.heads, -1))
            key, value = self.key_value(over).unflatten(-1, (2, self.heads, -1)).unbind(2)
            if keys is not None:
                keys = position_keys(keys, hidden.shape[1])
                keys = keys if self.config.lookback == "all" else keys.gather(1, kept)
            value = dropped_frames(self.drop_frames, value, keys)
            mixed = ops.lookback_attention(query, key, value, kept_lengths, over_lengths)
            frames = frames + self.out(mixed.flatten(2))
        valid = torch.arange(kept.shape[1], device=kept.device) < kept_lengths[:, None]
        return self.norm(frames).masked_fill(~valid[..., None], 0.0)


@register_compressor("all_frames")
class AllFrames(CTCPeaks):
    """Every frame goes to the LLM, after a LayerNorm (a baseline)."""

    selects_peaks = False

    @classmethod
    def expected_length(
        cls, config: SoundwaveConfig, tokens: np.ndarray, seconds: np.ndarray, has_text: np.ndarray
    ) -> np.ndarray:
        return np.ceil(seconds * frame_rate(config))
