"""The fused op: CTC and runs over an LLM's vocabulary without logits (docs/internals/fused-op.md)."""

from .dropout import keyed_dropout, mix64
from .linear_ctc import linear_argmax, linear_ctc
from .lookback import lookback_attention
from .runs import ctc_runs

__all__ = ["ctc_runs", "keyed_dropout", "linear_argmax", "linear_ctc", "lookback_attention", "mix64"]
