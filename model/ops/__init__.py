"""The fused op: CTC and run detection over an LLM's whole vocabulary without logits (docs/fused_op.md)."""

from .align import ctc_align, label_scores
from .dropout import keyed_dropout, mix64
from .linear_ctc import linear_argmax, linear_ctc
from .lookback import lookback_attention
from .runs import ctc_runs

__all__ = [
    "ctc_align",
    "ctc_runs",
    "keyed_dropout",
    "label_scores",
    "linear_argmax",
    "linear_ctc",
    "lookback_attention",
    "mix64",
]
