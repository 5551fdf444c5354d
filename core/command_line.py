"""Command lines: a program's name in its own help and messages, and the form of its help."""

from __future__ import annotations

import argparse
import copy
from typing import Any, NoReturn

from core.console import printable_line
from core.near_names import did_you_mean, near_names
from core.repository import ROOT

_command: str | None = None


def set_command(command: str) -> None:
    """Record that the program was started as `soundwave COMMAND`."""
    global _command
    _command = command


def program_name(module_form: str) -> str:
    """Return the command as the user gave it: "soundwave compare", or `module_form` ("python -m ...")."""
    return _command or module_form


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of every argument that has one, with or without a help text."""

    def _format_action(self, action: argparse.Action) -> str:
        if has_default(action) and "default" not in (action.help or ""):
            action = copy.copy(action)
            shown = f"default: {default_words(action).replace('%', '%%')}"
            action.help = f"{action.help} ({shown})" if action.help else shown
        return super()._format_action(action)


def default_words(action: argparse.Action) -> str:
    """Return an argument's default as a user would write it: several values with blanks between."""
    values = action.default if isinstance(action.default, list | tuple) else [action.default]
    return " ".join(str(value).removeprefix(f"{ROOT}/") for value in values)


def has_default(action: argparse.Action) -> bool:
    """Return whether help has to show an argument's default: not for switches and what may be left out."""
    if action.help == argparse.SUPPRESS or action.nargs == 0:
        return False
    if action.default is None or isinstance(action.default, bool):
        return False
    return action.default not in ("", [], (), argparse.SUPPRESS)


def accept_old_name(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Accept an option's former name, too. Help and messages show the new name only."""
    parser._option_string_actions[old] = parser._option_string_actions[new]


def old_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return former name -> name of the options of a parser."""
    actions = parser._option_string_actions.items()
    return {name: action.option_strings[0] for name, action in actions if name not in action.option_strings}


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, as those of the commands themselves, and name the options that are near."""

    def error(self, message: str) -> NoReturn:
        option_names = [name for action in self._actions for name in action.option_strings]
        near = [
            other
            for word in message.split()
            if message.startswith("unrecognized arguments") and word.startswith("--")
            for other in near_names(word.partition("=")[0], option_names)
        ]
        hint = f"; {did_you_mean(near)}" if near else ""
        self.exit(2, f"error: {printable_line(message)}{hint} ({self.prog} --help lists the options)\n")


class CommandParser(OneLineParser):
    """The parser of a command. Its help shows defaults and an example.

    module_form: how the command is called without `soundwave`. example: the arguments of a typical call.
    """

    def __init__(self, module_form: str, description: str, *, example: str):
        prog = program_name(module_form)
        python = "" if prog.startswith(("python ", "soundwave ")) else "python "
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {python}{prog} {example}".rstrip(),
            formatter_class=HelpFormatter,
        )

    def add_subparsers(self, **options: Any) -> Any:
        options.setdefault("help", "what to do")
        return super().add_subparsers(parser_class=_Subcommand, **options)


class _Subcommand(OneLineParser):
    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, **options)
