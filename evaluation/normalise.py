"""The text normaliser of scores is in core/text.py, where training and data tools use it, too."""

from core.text import describe, normalise

__all__ = ["describe", "normalise"]
