"""Continuous integrate-and-fire (Dong and Xu 2020, arXiv 1905.11235): frames are added up by weight.

    alpha_t = sigmoid(w . ReLU(conv(hidden))_t)      weight of a frame, 0 to 1
    C_t = alpha_1 + ... + alpha_t                    integrated weight; a unit is full at each multiple of the
                                                     threshold 1 ("firing")
    unit_k = sum_t overlap([C_(t-1), C_t], [k, k + 1]) hidden_t

A frame in which a unit fires gives the rest of its weight to the next unit; as an overlap of two intervals
this needs no loop over frames. In training the weights of transcribed clips are scaled to add up to the
number of target tokens, which then is the number of units. The loss `quantity`, |sum alpha - target tokens|
of the unscaled weights, teaches the number for inference. There a last unit of half a unit's weight or more
is kept.
"""

from __future__ import annotations

import torch
from torch import nn

from model.alignment import ScaledLayerNorm
from model.compressors.base import Compressed, Compressor, CTCView, options_of, register_compressor
from model.config import OptionError, SoundwaveConfig


def integrate_and_fire(
    hidden: torch.Tensor, alpha: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [A, T, D], alpha [A, T] (zero in padding), counts [A] -> units [A, K, D], positions [A, K].

    Positions: the frame in which a unit fires. The overlaps take A x K x T numbers: 0.6 MB in fp32 for 30 s
    at 25 frames and 7 tokens a second.
    """
    after = alpha.cumsum(1)  # C_t
    before = after - alpha
    unit = torch.arange(int(counts.max()), device=hidden.device)[None, :, None]
    overlap = (torch.minimum(after[:, None], unit + 1) - torch.maximum(before[:, None], unit)).clamp(min=0)
    units = torch.einsum("akt,atd->akd", overlap, hidden.to(overlap.dtype))
    valid = unit[..., 0] < counts[:, None]
    full = (unit[..., 0] + (1.0 - 1e-4)).to(after.dtype).expand(valid.shape).contiguous()
    fired = torch.searchsorted(after.detach(), full)
    last = (alpha > 0).sum(1, keepdim=True).clamp(min=1) - 1
    positions = torch.minimum(fired, last).masked_fill(~valid, 0)
    return units.masked_fill(~valid[..., None], 0.0), positions


@register_compressor("cif")
class CIF(Compressor):
    options = {"kernel": 3}  # frames that a weight is computed from, an odd number
    auxiliary = {"quantity": 1.0}

    def __init__(self, config: SoundwaveConfig, width: int, llm_heads: int, gain: float):
        super().__init__(config, width, llm_heads, gain)
        kernel = options_of(CIF, config)["kernel"]
        if kernel % 2 != 1:
            raise OptionError(f"model.compressor_options.kernel is {kernel}: give an odd whole number")
        self.conv = nn.Conv1d(width, width, int(kernel), padding=int(kernel) // 2)
        self.weight = nn.Linear(width, 1)
        # 25 frames a second and about 3 tokens: weights start near 1 / 8.
        nn.init.constant_(self.weight.bias, -2.0)
        self.norm = ScaledLayerNorm(width, gain)

    def alpha(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the frames' weights [A, T] in fp32 (fp64 of fp64), zero in padding."""
        score = self.weight(torch.relu(self.conv(hidden.transpose(1, 2))).transpose(1, 2))[..., 0]
        alpha = torch.sigmoid(score.float() if score.dtype != torch.float64 else score)
        places = torch.arange(alpha.shape[1], device=alpha.device)
        return alpha.masked_fill(places >= lengths[:, None], 0.0)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor, ctc: CTCView) -> Compressed:
        alpha = self.alpha(hidden.to(self.conv.weight.dtype), lengths)
        total = alpha.sum(1)
        targets = torch.zeros_like(lengths) if ctc.target_lengths is None else ctc.target_lengths
        has_targets = targets > 0
        quantity = torch.where(has_targets, (total - targets).abs(), 0.0 * total)
        counts = (total.detach() + 0.5).floor().long()
        if self.training:
            scale = torch.where(has_targets, targets / total.clamp(min=1e-6), torch.ones_like(total))
            alpha = alpha * scale[:, None]
            counts = torch.where(has_targets, targets, counts)
        counts = counts.clamp(min=1)
        units, positions = integrate_and_fire(hidden, alpha, counts)
        frames = self.norm(units.to(self.norm.weight.dtype))
        valid = torch.arange(frames.shape[1], device=frames.device) < counts[:, None]
        return frames.masked_fill(~valid[..., None], 0.0), counts, {"quantity": quantity}, positions
