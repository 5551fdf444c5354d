"""File names that are read from files: whoever wrote the file must not choose a path outside its folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

LONGEST_NAME = 255  # bytes; the limit of Linux file systems


class UnsafeName(ValueError):
    """A name or a file that is refused; the message completes the sentence "NAME ...", in one line."""


def plain_name(name: object) -> str:
    """Return `name` if it may name a file directly inside a folder. Errors: UnsafeName.

    Refused: what is no text, separators, `.` and `..`, hidden names, control characters, and names that no
    file system takes.
    """
    if not isinstance(name, str) or not name:
        raise UnsafeName("is not a file name")
    if "/" in name or "\\" in name:
        raise UnsafeName("is a path, not a plain file name")
    if name.startswith("."):
        raise UnsafeName("begins with a dot")
    if not name.isprintable():
        raise UnsafeName("holds control characters")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise UnsafeName("is not valid text") from None
    if len(encoded) > LONGEST_NAME:
        raise UnsafeName(f"is longer than {LONGEST_NAME} bytes")
    return name


def file_size_inside(folder: Path, name: str) -> int:
    """Return the size of the regular file `folder`/`name`, which may be no link to a place outside `folder`.

    Errors: UnsafeName for another place and for folders, devices and pipes; FileNotFoundError and other
    OSErrors.
    """
    path = folder / name
    status = os.stat(path)
    if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder)):
        raise UnsafeName(f"is a link to {os.path.realpath(path)}, outside its folder")
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeName("is not a regular file")
    return status.st_size
