"""The contract of a term of the training loss, and the registry of terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from core.registry import Registry
from model.batch import Batch

if TYPE_CHECKING:
    from model.language_model import LLM
    from model.soundwave import Audio, Soundwave


@dataclass
class ForwardState:
    """What a forward pass has computed; the language model's input is computed when a loss asks for it.

    Under ZeRO-3 all ranks must run the same modules in the same order, so a loss must run the same modules
    for every batch, and multiply what does not count by 0.
    """

    model: Soundwave
    batch: Batch
    audio: Audio
    shared: dict = field(default_factory=dict)  # what one loss has computed for others

    @property
    def llm(self) -> LLM:
        """Return the language model. Errors: ValueError for a model without it."""
        if self.model.llm is None:
            raise ValueError("this loss needs the language model")
        return self.model.llm

    @cached_property
    def llm_input(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, L, D], mask [B, L] and labels [B, L] (-100: no target), audio included."""
        return self.model.embeddings(self.batch, self.audio)

    @property
    def llm_tokens(self) -> torch.Tensor:
        """Positions that the language model has seen."""
        if "llm_input" not in self.__dict__:
            return self.audio.lengths.new_zeros(())
        return self.llm_input[1].sum()


class Loss(ABC):
    """One term of the training loss.

    weight_key: the recipe key that holds its weight; None: `loss.weights.NAME`. A stage's first term has
    weight 1.
    needs_llm: the stage must load the language model.
    uses_ctc: `state.audio.ctc` must hold the CTC loss.
    needs_frozen_llm: it compares with the LLM's own weights.
    """

    weight_key: str | None = None
    needs_llm: bool = True
    uses_ctc: bool = False
    needs_frozen_llm: bool = False

    @abstractmethod
    def numerator(self, state: ForwardState) -> torch.Tensor:
        """Return the sum over this micro-batch, a scalar with a gradient; 0 (of the same graph) for
        dummies."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Return how many things this micro-batch adds to the denominator."""


#: Name -> an instance, which has no state.
LOSSES: Registry[Loss] = Registry("loss")


def register_loss(name: str):
    """Return a class decorator that adds an instance of a Loss under `name`. Errors: AlreadyRegistered."""

    def add(kind: type[Loss]) -> type[Loss]:
        LOSSES.add(name, kind())
        return kind

    return add
