"""Suggestions for a name that is not known: every known name that it may mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher

_MOST = 5
_AS_GOOD = 0.05  # names this much less similar than the best one are suggested, too


def near_names(
    name: str,
    names: Iterable[str],
    *,
    cutoff: float = 0.6,
    compared: Callable[[str], str] = lambda other: other,
) -> list[str]:
    """Return the known names that `name` may mean, the best first: the most similar, and longer ones.

    cutoff: least similarity; 0 for at least one name. compared: the part of a known name that is compared.
    """
    similarity = {other: SequenceMatcher(None, compared(other), name).ratio() for other in names}
    least = max(cutoff, max(similarity.values(), default=0.0) - _AS_GOOD)
    near = [
        other
        for other, ratio in similarity.items()
        if ratio >= least or compared(other).startswith((f"{name}_", f"{name}-"))
    ]
    return sorted(near, key=similarity.__getitem__, reverse=True)[:_MOST]


def either(names: list[str]) -> str:
    """Return "'a', 'b' or 'c'"."""
    quoted = [f"'{name}'" for name in names]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), *quoted[-1:])))


def did_you_mean(names: list[str]) -> str:
    """Return "did you mean 'a', 'b' or 'c'?"; without names nothing."""
    return f"did you mean {either(names)}?" if names else ""
