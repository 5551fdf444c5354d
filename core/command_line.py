"""The name of the running program in its own help and messages."""

from __future__ import annotations

_command: str | None = None


def set_command(command: str) -> None:
    """Record that the program was started as `soundwave COMMAND`."""
    global _command
    _command = command


def program_name(module_form: str) -> str:
    """Return the command as the user gave it: "soundwave compare", or `module_form` ("python -m ...")."""
    return _command or module_form
