"""Cross-entropy of the language model's next token, over the target tokens."""

from __future__ import annotations

import torch

from model.batch import Batch
from model.language_model import target_loss
from model.losses.base import ForwardState, Loss, register_loss


@register_loss("ce")
class CrossEntropy(Loss):
    def numerator(self, state: ForwardState) -> torch.Tensor:
        return target_loss(state.llm, *state.llm_input, state.batch.row_keys, state.shared)

    def count(self, batch: Batch) -> int:
        return batch.ce_count
