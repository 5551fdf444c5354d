"""Auxiliary losses that a compressor computes for each clip, as terms of the training loss."""

from __future__ import annotations

import torch

from model.batch import Batch
from model.losses.base import ForwardState, Loss, register_loss


class CompressorLoss(Loss):
    """Mean over transcribed utterances of the compressor's auxiliary loss `name`."""

    name: str

    def numerator(self, state: ForwardState) -> torch.Tensor:
        values = state.audio.losses[self.name]
        return torch.where(state.batch.has_transcript, values, 0.0 * values).sum()

    def count(self, batch: Batch) -> int:
        return batch.ctc_count


@register_loss("quantity")
class Quantity(CompressorLoss):
    """|sum of CIF's weights - target tokens| (model/compressors/cif.py)."""

    name = "quantity"
