"""Text of files and of strangers on the console: one line, no control sequences."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with characters that move the cursor, colour or end the line written as escapes (\\x1b, \\n)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def plural(count: int, noun: str) -> str:
    """Return a count and its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a length of time with three digits or so and its unit: 4.2 s, 12.5 min, 3.40 h, 1,250 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.2f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"
