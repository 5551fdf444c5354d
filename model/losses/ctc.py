"""CTC over the language model's vocabulary: loss / target length, over transcribed utterances."""

from __future__ import annotations

import torch

from model.batch import Batch
from model.losses.base import ForwardState, Loss, register_loss


@register_loss("ctc")
class CTC(Loss):
    weight_key = "loss.ctc_weight"
    needs_llm = False
    uses_ctc = True

    def numerator(self, state: ForwardState) -> torch.Tensor:
        ctc = state.audio.ctc
        return torch.where(state.batch.has_transcript, ctc, 0.0 * ctc).sum()

    def count(self, batch: Batch) -> int:
        return batch.ctc_count
