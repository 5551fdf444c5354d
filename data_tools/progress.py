"""How far a long command is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from core.console import duration

EVERY_SECONDS = 60.0  # between two lines of a log
_LOOK_EVERY = 64  # items between two looks at the clock
T = TypeVar("T")


class Progress:
    """Show how much of something is done. total: None where it is unknown; unit: of what is counted, with its
    blank in front."""

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = " samples",
        done: float = 0,
        decimals: int = 0,
    ):
        self.name, self.total, self.unit, self.done, self._decimals = name, total, unit, done, decimals
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._bar = None
        if sys.stderr.isatty():
            form = (
                None
                if not decimals
                else "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f}"
                + unit
                + (" [{elapsed}<{remaining}{postfix}]")
            )
            self._bar = tqdm(
                total=total,
                desc=name,
                unit=unit,
                initial=done,
                bar_format=form,
                mininterval=1.0,
                unit_scale=form is None,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, what: str) -> None:
        """Say in a log what has begun: the first line with numbers comes a minute later."""
        if self._bar is None:
            print(f"{self.name}: {what}", file=sys.stderr, flush=True)

    def to(self, done: float, more: str = "") -> None:
        """Show that so much is done. more: text to add."""
        if self._bar is not None:
            if self.total is not None:
                self._bar.total = self.total
            self._bar.set_postfix_str(more, refresh=False)
            self._bar.update(done - self.done)
        self.done = done
        if self._bar is None and time.monotonic() - self._last_line >= EVERY_SECONDS:
            self._last_line = time.monotonic()
            print(self.line(more), file=sys.stderr, flush=True)

    def line(self, more: str = "") -> str:
        """Done, rate, time left."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._first) / seconds
        of = f" of {self.total:,.{self._decimals}f}" if self.total is not None else ""
        left = ""
        if self.total is not None and rate > 0:
            left = f", about {duration(max(self.total - self.done, 0) / rate)} left"
        speed = (
            f"{rate:,.1f}{self.unit}/s" if not self._decimals else f"{rate * 3600:,.0f}{self.unit} an hour"
        )
        return f"{self.name}: {self.done:,.{self._decimals}f}{of}{self.unit}, {speed}{left}{f', {more}' if more else ''}"  # noqa: E501


def watched(items: Iterable[T], name: str, unit: str = " samples", total: int | None = None) -> Iterator[T]:
    """Yield the items, and show how many went by."""
    with Progress(name, total, unit) as progress:
        count = 0
        for item in items:
            yield item
            count += 1
            if not count % _LOOK_EVERY:
                progress.to(count)
        progress.to(count)
