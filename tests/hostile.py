"""Files as a stranger might write them: JSON documents and bytes with a few odd places, and a watch on what
is opened."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**32,
    2**63,
    2**64,
    -(2**63),
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    ".",
    "..",
    "../outside",
    "../../outside/file",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "-",
    "nul\0",
    "\x1b[31m",
    "line\nbreak",
    "\ud800",
    "0" * 64,
    "g" * 64,
    "0" * 63,
    "x" * 300,
    "${oc.env:HOME}",
    "${",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    ["x"],
    [[[[[]]]]],
]


def _places(value: object, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


@st.composite
def json_documents(draw, document: dict) -> object:
    """`document` with one to three values replaced, keys removed or renamed, or entries doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(document, (dict, list)):
            break
        *parents, last = draw(st.sampled_from(_places(document)[1:] or [(None,)]))
        if last is None:
            break
        parent = document
        for key in parents:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "double"]))
        if action == "replace":
            parent[last] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif action == "remove" or (action == "rename" and isinstance(parent, list)):
            del parent[last]
        elif action == "rename":
            parent[str(last) + "x"] = parent.pop(last)
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
    return draw(st.sampled_from([document] * 9 + ODD_VALUES[:1] + [[document]]))


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """`content` cut, with some bytes replaced, or with something before or after it."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["set", "set", "ones", "cut", "insert", "append"]))
        if action == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "ones":
            data[at : at + 8] = b"\xff" * 8
        elif action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        else:
            data += draw(st.sampled_from([b"\0", b"{}", b"[" * 3000]))
    return bytes(data)


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


_watched: list[list[str] | None] = [None]


def _note(event: str, arguments: tuple) -> None:
    noted = _watched[0]
    if noted is not None and event in (
        "open",
        "os.mkdir",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.remove",
        "os.truncate",
    ):
        names = arguments[:1] if event == "open" else arguments[:2]  # open's second is its mode
        noted.extend(os.path.abspath(os.fsdecode(name)) for name in names if isinstance(name, (str, bytes)))


@contextlib.contextmanager
def only_inside(*folders: Path) -> Iterator[None]:
    """Fail where a file outside `folders` (and outside Python's own) is opened, made, moved or removed
    meanwhile."""
    if not getattr(sys, "_soundwave_audit", False):  # a hook cannot be removed: one for all tests
        sys.addaudithook(_note)
        sys._soundwave_audit = True
    _watched[0] = noted = []
    try:
        yield
    finally:
        _watched[0] = None
    allowed = tuple(
        os.path.abspath(folder) + os.sep
        for folder in (*folders, sys.prefix, sys.base_prefix, "/proc", "/sys")
    )
    outside = [name for name in noted if not (name + os.sep).startswith(allowed) and name != os.devnull]
    assert outside == [], f"opened outside {', '.join(map(str, folders))}: {outside}"


def is_one_line(error: BaseException) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and "\x1b" not in text and "Traceback" not in text
