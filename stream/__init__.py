"""Shards to batches: plan (what), assign (who), reader and collate (how), stream (all of it), validation
(once each)."""

from stream.loader import StreamStalled
from stream.packed import StepBatches, Stream
from stream.plan import Plan
from stream.rejected import TooManyRejected
from stream.validation import EvalStream, validation_samples, validation_stream
from stream.worst_case import worst_case_batch

__all__ = [
    "EvalStream",
    "Plan",
    "StepBatches",
    "Stream",
    "StreamStalled",
    "TooManyRejected",
    "validation_samples",
    "validation_stream",
    "worst_case_batch",
]
