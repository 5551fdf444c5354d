"""Folders that only this user can write, in places that all users share.

    python -IS core/private_folder.py FOLDER ...        for shell scripts: exit code 2 and one line where one
                                                        is refused

What is read back from such a folder is trusted: compiled libraries are loaded from it, staged data is not
hashed again. In /tmp another user could have made it first, under a name that is easy to guess.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path


class NotPrivate(PermissionError):
    """A folder that others could fill; one line: which, why, what to do."""


def private_folder(path: str | Path) -> Path:
    """Create `path` with mode 700, or check the one that exists; return it as it was given. Missing parents
    are created.

    A folder of this user that others may read gets mode 700. Errors: NotPrivate (see check_private); other
    OSErrors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    check_private(path, set_mode=True)
    return path


def check_private(path: Path, *, set_mode: bool = False) -> None:
    """Errors: NotPrivate for a link, for another user's folder, and for one that others can write to.

    set_mode: give a folder that others can only read mode 700.
    """
    # The descriptor is checked and changed, not the name, which can be given to something else in between.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        what = "is a link" if path.is_symlink() else f"cannot be opened as a folder ({error.strerror})"
        raise NotPrivate(f"{path} {what}: remove it, or choose another place") from None
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid():
            raise NotPrivate(
                f"{path} belongs to another user (number {status.st_uid}), who could put anything into it: "
                "remove it, or choose another place"
            )
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotPrivate(
                f"{path} can be written by other users (mode {mode:o}): remove it, or choose another place"
            )
        if set_mode and mode != 0o700:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def user_cache() -> Path:
    """Return where this user's caches are: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


if __name__ == "__main__":
    try:
        for folder in sys.argv[1:]:
            private_folder(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
