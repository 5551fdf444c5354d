"""Find every argparse parser of the project, and check shell commands against the real command lines."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from core.command_line import OneLineParser, old_names
from core.repository import ROOT

#: Packages with commands, in the order of the reference.
PACKAGES = (
    "data_tools",
    "train",
    "stream",
    "evaluation",
    "soundwave",
    "serving",
    "model",
    "examples",
    "benchmarks",
)
#: Modules that are run as a script or under another name.
SPOKEN = {
    "data_tools.pack": "python data_tools/pack.py",
    "train.run": "python -m train.run",
    "stream.inspect_plan": "python -m stream",
}
#: Programs of others that code blocks may call.
OTHERS = {"cat", "cd", "cp", "curl", "git", "hf", "pip", "source", "ssh", "tar", "tensorboard"}
OTHER_MODULES = {"pytest", "mkdocs", "docs"}


class WrongCommand(ValueError):
    """A command that the real command line refuses; the message is the reason."""


class _ParserBuilt(BaseException):  # not an Exception: a command's own `except Exception` must not catch it
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def commands() -> dict[str, str]:
    """Return module -> the command that users type, for every module with a parser and an entry."""
    command_of = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if not re.search(r"(?:Argument|Command)Parser\(", text) or "def main(" not in text:
                continue
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            command_of[module] = SPOKEN.get(module, f"python -m {module.removesuffix('.__main__')}")
    return command_of


def names() -> dict[str, str]:
    """Return NAME -> module of the commands `soundwave NAME` (cli/__init__.py)."""
    if not (ROOT / "cli" / "__init__.py").exists():
        return {}
    return {name: command.module for name, command in importlib.import_module("cli").COMMANDS.items()}


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser that a module's `main` builds. Nothing of the command runs."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _ParserBuilt(parser)

    main = importlib.import_module(module).main
    names = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
    patches = [mock.patch.object(argparse.ArgumentParser, name, stop) for name in names]
    patches.append(mock.patch.dict(os.environ))  # some commands fill the environment first
    with mock.patch.object(sys, "argv", [module.replace(".", "/") + ".py"]):
        for patch in patches:
            patch.start()
        try:
            main([]) if inspect.signature(main).parameters else main()
        except _ParserBuilt as this:
            return this.parser
        finally:
            for patch in patches:
                patch.stop()
    raise LookupError(f"{module}: its main() parses no arguments")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


# ------------------------------------------------------------------------------------------------------------


def statements(block: str) -> list[list[str]]:
    """Return the commands of a shell block as words: continued lines joined, comments and loops removed."""
    lines = []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        line = re.sub(r"(^|\s\s)#\s.*", "", line)
        line = re.sub(r"\$\((\w[^)]*)\)", "VALUE", re.sub(r"\$\{?(\w+)\}?", r"1", line))
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words and words[0] == "do":
                    words = words[1:]
                if words and words[0] not in ("for", "done", "break"):
                    lines.append(words)
                words = []
            else:
                words.append(word)
    return lines


def check(words: list[str]) -> None:
    """Errors: WrongCommand."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value before the command
        words = words[1:]
    if not words or words[0] in OTHERS:
        return
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python" or program in ("deepspeed", "torchrun"):
        _check_python(program, rest)
    elif program == "make":
        _check_make(rest)
    elif program == "sbatch":
        _check_sbatch(rest)
    elif program == "slurm/chain.sh":
        _check_overrides([word for word in rest if re.match(r"[\w.]+=", word)])
    elif program == "slurm/pack.sh":
        _check_arguments("data_tools.pack", rest[rest.index("--") + 1 :] if "--" in rest else rest)
    elif program == "soundwave" and rest and rest[0] in names():
        _check_python("python", ["-m", names()[rest[0]], *rest[1:]])
    else:
        raise WrongCommand(
            f"{program} is no command of this project, and docs/command_lines.py does not list it"
        )


def _check_python(program: str, words: list[str]) -> None:
    while words and words[0].startswith("-") and words[0] != "-m":  # of the launcher
        words = words[1:] if "=" in words[0] or words[0] == "--standalone" else words[2:]
    if not words:
        raise WrongCommand(f"{program} without a script")
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module.partition(".")[0] in OTHER_MODULES:
            return
    else:
        if not (ROOT / words[0]).exists():
            raise WrongCommand(f"{words[0]} does not exist")
        module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
    module = {"stream": "stream.inspect_plan"}.get(module, module)
    if f"{module}.__main__" in commands():
        module = f"{module}.__main__"
    if module not in commands():
        path = ROOT / (module.replace(".", "/") + ".py")
        if not path.exists():
            raise WrongCommand(f"there is no module {module}")
        return  # without options of its own
    _check_arguments(module, rest)


def _check_arguments(module: str, words: list[str]) -> None:
    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise WrongCommand(message)

    if "--help" in words:
        return
    parser = _PARSERS.get(module) or _PARSERS.setdefault(module, parser_of(module))
    for part in (parser, *(sub for name, sub in subparsers(parser).items() if name in words)):
        for old, new in old_names(part).items():
            if any(word.partition("=")[0] == old for word in words):
                raise WrongCommand(f"{old} is a former name: write {new}")
    with (
        mock.patch.object(argparse.ArgumentParser, "error", refuse),
        mock.patch.object(OneLineParser, "error", refuse),
    ):
        parse = parser.parse_args if subparsers(parser) else parser.parse_intermixed_args
        options = parse(words)
    overrides = getattr(options, "overrides", None)
    _check_overrides(overrides if isinstance(overrides, list) else [])
    recipe = getattr(options, "recipe", None)
    if (
        isinstance(recipe, str)
        and recipe.startswith(("train/", "examples/"))
        and not (ROOT / recipe).exists()
    ):
        raise WrongCommand(f"recipe {recipe} does not exist")


_PARSERS: dict[str, argparse.ArgumentParser] = {}


def recipe_keys() -> set[str]:
    from recipe.config import known_keys

    return set(known_keys())


def _check_overrides(words: list[str]) -> None:
    from recipe.config import BY_NAME

    for word in words:
        key = word.partition("=")[0]
        if key not in recipe_keys() and key.rpartition(".")[0] not in BY_NAME:
            raise WrongCommand(f"a recipe has no key {key}")


def _check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    variables = set(re.findall(r"\$\((?:if \$\()?([A-Z_]+)", text)) | {"AUDIT_DB"}
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and name not in variables:
            raise WrongCommand(f"the Makefile uses no variable {name}")
        if not equals and word not in targets:
            raise WrongCommand(f"there is no make target {word}")


def _check_sbatch(words: list[str]) -> None:
    if "--wrap" in words:
        for inner in statements(words[words.index("--wrap") + 1]):
            check(inner)
        return
    scripts = [number for number, word in enumerate(words) if word.endswith(".sh")]
    if not scripts or not (ROOT / words[scripts[0]]).exists():
        raise WrongCommand(f"sbatch without a script of this project: {' '.join(words)}")
    script, rest = words[scripts[0]], words[scripts[0] + 1 :]
    if Path(script).name == "evaluate.sh":
        _check_arguments("evaluation.run", rest)
    else:
        _check_overrides([word for word in rest if re.match(r"[\w.]+=", word)])
