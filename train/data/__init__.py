"""Shards to batches: plan (what), assign (who), reader and collate (how), stream (all of it), validation (once each)."""

from train.data.loader import StreamStalled
from train.data.plan import Plan
from train.data.rejected import TooManyRejected
from train.data.stream import StepBatches, Stream
from train.data.validation import EvalStream, validation_batches
from train.data.worst_case import worst_case_batch

__all__ = ["EvalStream", "Plan", "StepBatches", "Stream", "StreamStalled", "TooManyRejected", "validation_batches",
           "worst_case_batch"]
