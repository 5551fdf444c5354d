"""Named implementations of an extension point: losses, stages, compressors, metrics.

LOSSES: Registry[Loss] = Registry("loss")

@LOSSES.register("ctc")
class CTC(Loss): ...

LOSSES["ctcc"]   ->   UnknownName: loss 'ctcc' is not known; did you mean 'ctc'? Known: ce, ctc

A user's own module registers its implementations when the recipe's `plugins` imports it (core/plugins.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from core.console import OneLine
from core.near_names import did_you_mean, near_names

T = TypeVar("T")
Decorated = TypeVar("Decorated")


class UnknownName(OneLine, LookupError):
    """A name that nothing is registered under; one line: which, the nearest one, all that are known."""


class AlreadyRegistered(OneLine, ValueError):
    """A name that another implementation has."""


class Registry(Mapping[str, T]):
    """Map names to the implementations of one extension point, in the order of their registration."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Decorated], Decorated]:
        """Return a decorator that adds a class or function under `name`.

        Errors: AlreadyRegistered where `name` is taken. A module that is reloaded may register itself again.
        """

        def add(value: Decorated) -> Decorated:
            self.add(name, value)
            return value

        return add

    def add(self, name: str, value) -> None:
        """Add a value under `name`. Errors: AlreadyRegistered."""
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the {self.kind} {name!r} needs a name of letters, digits and underscores")
        before = self._entries.get(name)
        if before is not None and not _is_same(before, value):
            raise AlreadyRegistered(
                f"the {self.kind} '{name}' is registered already ({_origin(before)}): choose another name"
            )
        self._entries[name] = value

    def remove(self, name: str) -> None:
        """Remove an entry (tests, and notebooks)."""
        del self._entries[name]

    def describe_unknown(self, name: object) -> str:
        """Return the line about a name that is not registered."""
        near = near_names(str(name), self._entries, cutoff=0.4)
        guess = f"; {did_you_mean(near)}" if near else "."
        return (
            f"{self.kind} '{name}' is not known{guess} Known: {', '.join(self._entries)} "
            "(your own: name its module in `plugins`)"
        )

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise UnknownName(self.describe_unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def get(self, name, default=None):
        return self._entries.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _is_same(before: object, value: object) -> bool:
    """Whether a value is registered again: an equal one, or the same definition from a module that is
    reloaded."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # described by its fields
        return before == value
    return before == value or _origin(before) == _origin(value)


def _origin(value: object) -> str:
    """Return module and name of a definition; of an instance, those of its class."""
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{owner.__module__}.{owner.__qualname__}"
