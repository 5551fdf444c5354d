"""A table by key on the disk, for joining files that may have millions of lines in any order: memory does not
grow with it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

_PAGES = -32_000  # kB of memory for pages


class DiskTable:
    """Values by key, and which were asked for. It lives in a temporary file that goes with the
    object."""

    def __init__(self):
        self._table = sqlite3.connect("", isolation_level=None)
        for statement in (
            "pragma journal_mode = off",
            "pragma synchronous = off",
            f"pragma cache_size = {_PAGES}",
            "create table entries (key text primary key, value text, taker text) without rowid",
            "begin",
        ):
            self._table.execute(statement)

    def add(self, key: str, value: str) -> bool:
        """Returns False for a key that is there already; its value stays. Errors: UnicodeEncodeError."""
        return (
            self._table.execute("insert or ignore into entries values (?, ?, null)", (key, value)).rowcount
            == 1
        )

    def take(self, key: str, taker: str = "") -> tuple[str, str | None] | None:
        """Return the value and who took it before (None: not taken), and note the taker; None for an unknown
        key."""
        row = self._table.execute("select value, taker from entries where key = ?", (key,)).fetchone()
        if row is not None and row[1] is None:
            self._table.execute("update entries set taker = ? where key = ?", (taker, key))
        return row

    def left_over(self) -> Iterator[tuple[str, str]]:
        """(key, value) of those that were not taken, in the order of their keys."""
        yield from self._table.execute("select key, value from entries where taker is null order by key")
