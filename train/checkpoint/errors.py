"""Errors of checkpoints."""

from __future__ import annotations

from core.console import OneLine


class CheckpointError(OneLine, RuntimeError):
    """A checkpoint that cannot be written or used; one line: what, where, what to do."""
