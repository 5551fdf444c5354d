"""Audio files that lie beside those that a table names: counted, so that nothing of a corpus goes without a
word."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from core.audio import EXTENSIONS
from data_tools.corpora import Ignored

MAX_FOLDERS = 20_000  # more are not listed: that would take longer than the table
_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS)


class Beside:
    """Of the folders in which named files lie, how many more audio files they hold than were named.

    Rows of one file count once where they follow each other. A file named in several places hides another
    one.
    """

    def __init__(self):
        self._named: Counter[str] = Counter()
        self._last = ""

    def clear(self) -> None:
        self._named.clear()
        self._last = ""

    def name(self, audio: str) -> None:
        if audio != self._last and len(self._named) <= MAX_FOLDERS:
            self._last = audio
            self._named[os.path.dirname(audio)] += 1

    def left(self, table: str) -> Iterator[tuple[str, Ignored]]:
        """As records of a reader."""
        if len(self._named) <= MAX_FOLDERS:
            unlisted = sum(max(0, _audio_files(folder) - listed) for folder, listed in self._named.items())
            if unlisted:
                yield "", Ignored(f"audio files beside those of {table}", unlisted)


def _audio_files(folder: str) -> int:
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):  # each of its files is refused when it is opened
        return 0
    return sum(name[0] != "." and name.lower().endswith(_ENDINGS) for name in names)
