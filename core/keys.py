"""Keys for whatever is drawn by a hash instead of a generator: order of data, augmentation, dropout."""

from __future__ import annotations

import hashlib


def key64(*parts: object) -> int:
    """An unsigned 64-bit key of a tuple of names and numbers: the same in every process and on every
    machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def signed_key64(*parts: object) -> int:
    """The same key as torch's int64 holds it."""
    return (key64(*parts) ^ (1 << 63)) - (1 << 63)
