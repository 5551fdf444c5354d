"""Import users' own modules, which register losses, stages, compressors and metrics (core/registry.py).

A recipe names them (`plugins: [my_package.my_module]`); commands that read no recipe take `--plugins`. The
names come from the user alone: a model folder records the plugins it was trained with, and nothing imports
those.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import re
import sys
import traceback
from pathlib import Path

from core.console import OneLine, one_line, shown

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class PluginError(OneLine, ValueError):
    """A plugin that cannot be imported; one line: which, why, what to do."""


def load_plugins(names: list[str]) -> None:
    """Import each module once. The working folder is searched last: its files hide no installed module.

    Errors: PluginError.
    """
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(
                f"plugins: {shown(name)} is not the name of a module: write my_package.my_module for "
                "my_package/my_module.py"
            )
        folder = os.getcwd()
        if folder not in sys.path and "" not in sys.path:
            sys.path.append(folder)
            importlib.invalidate_caches()
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise PluginError(_missing(name, error, folder)) from None
        except (Exception, SystemExit) as error:  # whatever the module's own code raises
            place = _place(error)
            raise PluginError(
                f"plugins: {name} cannot be imported: {type(error).__name__}: {one_line(error)}{place}"
            ) from None


def plugins_hash(names: list[str]) -> str | None:
    """Return the sha256 (hex) over the source of loaded plugins; None without any."""
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        digest.update(name.encode() + b"\0" + (Path(file).read_bytes() if file else b""))
    return digest.hexdigest()


def add_plugins_option(parser: argparse.ArgumentParser) -> None:
    """Add `--plugins`, which takes module names with commas between them."""
    parser.add_argument(
        "--plugins",
        type=_split,
        default=[],
        metavar="MODULES",
        help="your own modules with losses, stages, compressors or metrics, e.g. my_package.my_metric,other",
    )


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _missing(name: str, error: ModuleNotFoundError, folder: str) -> str:
    absent = error.name or name
    if name == absent or name.startswith(f"{absent}."):
        return (
            f"plugins: there is no module {name}: start in the folder that holds it (this is {folder}), or "
            "set PYTHONPATH"
        )
    return f"plugins: {name} imports {absent}, which is not installed{_place(error)}"


def _place(error: BaseException) -> str:
    """Return " (FILE, line N)" of the innermost frame outside the import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
