"""What takes the place of this project's compiled and training-only parts in the Hub's model."""

from __future__ import annotations

import torch
from torch import nn

from model.ops.reference import sweep


@torch.no_grad()
def linear_argmax(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    input_lengths: torch.Tensor,
    *,
    blank: int,
    extra_row: torch.Tensor | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return argmax [B, T], lse, largest logit and the blank's logit [B, T] of hidden x weight^T."""
    batch, length, _ = hidden.shape
    input_lengths = input_lengths.to(hidden.device)
    valid = torch.arange(length, device=hidden.device)[None] < input_lengths[:, None]
    frames = hidden[valid]
    tokens = torch.full((len(frames), 1), blank, dtype=torch.long, device=hidden.device)
    lse, largest, argmax, _, blank_logit = sweep(frames, weight, extra_row, tokens)

    def spread(values: torch.Tensor, fill: float) -> torch.Tensor:
        return values.new_full((batch, length), fill).masked_scatter(valid, values)

    return spread(argmax, blank), spread(lse, 0.0), spread(largest, 0.0), spread(blank_logit, 0.0)


def linear_ctc(*arguments, **options):
    """The loss of training."""
    raise NotImplementedError("this model is for inference: train with the training system")


def label_scores(*arguments, **options):
    """Word times."""
    raise NotImplementedError("this model has no word times: align with the training system")


def compressor_of(config: object):
    """Only models without a compressor, which stage 1 trains, need one here."""
    raise NotImplementedError("this model has no compressor: train stage 2 with the training system")


def register_compressor(name: str):
    """Return a decorator that leaves the class as it is: there is no registry here."""
    return lambda kind: kind


class KeyedDropout(nn.Module):
    """No dropout: the model is for inference."""

    def __init__(self, p: float, name: str):
        super().__init__()
        self.p = 0.0

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        return x


def preprocessor_settings(folder: object) -> dict:
    """The hub's configuration holds what the encoder needs of it."""
    return {}


def base_of(llm: nn.Module) -> nn.Module:
    """The LLM; LoRA is merged into it."""
    return llm
