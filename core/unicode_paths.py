"""Find files whose names have another Unicode form on the disk: an accented letter as one character or as two
(macOS)."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache


def find_path(path: str) -> str | None:
    """Return `path` as the file system spells it; None where there is no such file or folder."""
    try:
        if os.path.lexists(path):
            return path
        if path.isascii():
            return None
        parent, name = os.path.split(path)
        if not name or parent == path:
            return None
        folder = find_path(parent) if parent else "."
        return (
            None
            if folder is None or (same := _names(folder).get(_form(name))) is None
            else os.path.join(folder, same)
        )
    except (OSError, ValueError):  # a null byte, a name that is too long, a folder that may not be listed
        return None


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


@lru_cache(maxsize=64)
def _names(folder: str) -> dict[str, str]:
    """Names in a folder by their composed form, those alone that are not ASCII."""
    return {_form(name): name for name in os.listdir(folder) if not name.isascii()}
