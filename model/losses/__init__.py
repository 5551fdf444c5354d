"""Terms of the training loss: sum over what a term counts / its number in the whole global batch.

A term gives a numerator (a sum over one micro-batch, inside the model's forward pass) and a count (of one
micro-batch, from the batch alone). Training, validation and metrics iterate over the stage's terms. A new one
is a class in a file of its own and a recipe line, `loss.weights: {name: 0.5}` (docs/extending.md).

    ce    cross-entropy over target tokens
    ctc   CTC loss / target length over transcribed utterances
"""

from model.losses.base import LOSSES, ForwardState, Loss, register_loss
from model.losses.cross_entropy import CrossEntropy
from model.losses.ctc import CTC

__all__ = ["CTC", "LOSSES", "CrossEntropy", "ForwardState", "Loss", "register_loss"]
