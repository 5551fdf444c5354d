"""Read JSON that others wrote: an object, or a one-line error."""

from __future__ import annotations

import json
import stat
from pathlib import Path

LARGEST_BYTES = 1 << 28  # the index of a million shards has 175 MB


class JsonError(ValueError):
    """JSON that cannot be used; the message completes the sentence "FILE ...", in one line."""


def parse_object(text: bytes | str) -> dict:
    """Return the JSON object that `text` holds. Errors: JsonError."""
    try:
        value = json.loads(text)
    except UnicodeDecodeError:
        raise JsonError("is not UTF-8") from None
    except ValueError as error:
        raise JsonError(f"is not valid JSON ({error})") from None
    except RecursionError:
        raise JsonError("is not valid JSON (nested too deeply)") from None
    if not isinstance(value, dict):
        raise JsonError("does not hold a JSON object")
    return value


def read_object(path: Path) -> dict:
    """Return the JSON object in the file `path`. Errors: JsonError, also where the file cannot be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise JsonError("is not a regular file")
        if status.st_size > LARGEST_BYTES:
            raise JsonError(f"has {status.st_size} bytes, more than any such file needs")
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise JsonError("is missing") from None
    except OSError as error:
        raise JsonError(f"cannot be read ({error.strerror})") from None
