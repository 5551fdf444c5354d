"""Former names of decoding modes, which commands and files of predictions may still hold."""

from __future__ import annotations

FORMER_DECODES = {"generate": "greedy"}


def decode_name(name: str) -> str:
    """Return a decoding mode's name of today; the type of the argument `--decode`."""
    return FORMER_DECODES.get(name, name)
