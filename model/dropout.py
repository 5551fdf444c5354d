"""Dropout of what is trained, keyed by (seed, step, utterance, place in the network, position): see
docs/internals/dropout.md.

    utterance's key, step's key -> Batch.at_step -> row keys [B] -> position_keys [B, T] -> KeyedDropout at
    each place

No generator has a state. The same utterance in the same step has the same masks on any number of ranks, in
any micro-batch and row, after a restart, and where a layer is computed again in backward (activation
checkpointing).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from core.keys import signed_key64
from model.ops import keyed_dropout, mix64
from model.pretrained import SourceError


def position_keys(rows: torch.Tensor, length: int) -> torch.Tensor:
    """rows [B] int64, one key an utterance -> [B, length], one for each of its positions."""
    return mix64(rows[:, None] ^ mix64(torch.arange(length, device=rows.device)))


class KeyedDropout(nn.Module):
    """nn.Dropout with the mask of `model.ops.keyed_dropout`. name: this place in the network, unlike any
    other's.

    Errors: ValueError for a rate outside 0 to 1, or without keys while training.
    """

    def __init__(self, p: float, name: str):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout of {name} is {p}: give a number from 0 to below 1")
        self.p, self.name, self.site = p, name, signed_key64("dropout", name)

    def extra_repr(self) -> str:
        return f"p={self.p}, {self.name}"

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """x [..., D], keys [...] -> [..., D]"""
        if not self.training or self.p == 0.0:
            return x
        if keys is None:
            raise ValueError(
                f"dropout of {self.name} needs its utterances' keys in training: set Batch.row_keys and "
                f"audio_keys"
            )
        return keyed_dropout(x, keys, self.site, self.p)


def dropped_frames(dropout: KeyedDropout, value: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """Attention's dropout: value [A, T, H, d], keys [A, T] -> the same with whole frames of a head dropped.

    Dropping the attention weight of frame t equals dropping its value for one query. One draw a (frame, head)
    serves all queries of the utterance: each query's result has the distribution that a draw of its own would
    give, any kernel can compute the attention (a mask inside of a fused one cannot be keyed), and no T x T
    mask exists.
    """
    if not dropout.training or dropout.p == 0.0:
        return value
    return value * dropout(value.new_ones(value.shape[:-1]), keys)[..., None]


class TokenKeys:
    """Keys of the tokens that the LLM is computing: its layers pass hidden states on, and nothing beside
    them."""

    def __init__(self):
        self.keys: torch.Tensor | None = None  # [B, L], or [1, N] of joined rows

    def use(self, keys: torch.Tensor | None) -> InUse:
        return InUse(self, keys)

    def for_checkpoint(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: what is computed again in backward has the keys of its
        forward."""
        return nullcontext(), self.use(self.keys)


class InUse(AbstractContextManager):
    """`tokens.keys` is `keys` within; may be entered again after it was left."""

    def __init__(self, tokens: TokenKeys, keys: torch.Tensor | None):
        self.tokens, self.keys = tokens, keys

    def __enter__(self) -> None:
        self.before, self.tokens.keys = self.tokens.keys, self.keys

    def __exit__(self, *_) -> None:
        self.tokens.keys = self.before


class LoraDropout(KeyedDropout):
    """LoRA's dropout, in the place where peft has nn.Dropout. Errors: SourceError in a layer that does not
    see tokens."""

    def __init__(self, p: float, name: str, tokens: TokenKeys):
        super().__init__(p, name)
        self.tokens = tokens

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """peft gives no keys: they are those of the tokens that the LLM computes."""
        keys = self.tokens.keys
        if self.training and self.p > 0.0 and keys is not None and keys.shape != x.shape[:-1]:
            if keys.numel() != x.shape[:-1].numel():
                raise SourceError(
                    f"model.llm.lora_dropout: the input of {self.name} is {tuple(x.shape)} where the tokens "
                    f"are "
                    f"{tuple(keys.shape)}, not one vector a token: take its layer out of "
                    f"model.llm.lora_targets, "
                    "or set model.llm.lora_dropout=0"
                )
            keys = keys.reshape(x.shape[:-1])
        return super().forward(x, keys)


def key_lora_dropout(llm: nn.Module) -> None:
    """Replace the dropout of peft's LoRA layers in place by keyed ones; `llm.token_keys` then holds the
    keys of the tokens that it computes."""
    tokens = TokenKeys()
    cast(Any, llm).token_keys = tokens  # no module: torch's own __setattr__ would not know its type
    for name, module in list(llm.named_modules()):
        dropouts = getattr(module, "lora_dropout", None)
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        for adapter, dropout in dropouts.items():
            if isinstance(dropout, nn.Dropout):
                dropouts[adapter] = LoraDropout(dropout.p, f"llm.{name}.{adapter}", tokens)
