"""Find the phrases of docs/banned_phrases.txt in docs, docstrings, comments, strings and test names."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from core.repository import ROOT

PHRASES = ROOT / "docs" / "banned_phrases.txt"
SUFFIXES = (".py", ".sh", ".yaml")
SKIPPED = {"build", "runs", "site", "__pycache__"}


class Hit(NamedTuple):
    path: Path
    line: int
    phrase: str
    instead: str


def phrases() -> list[tuple[re.Pattern, str]]:
    lines = [line for line in PHRASES.read_text().splitlines() if line and not line.startswith("#")]
    rules = []
    for line in lines:
        pattern, _, instead = line.partition("\t")
        # A phrase may be broken over lines.
        rules.append((re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), instead))
    return rules


def hits(path: Path, rules: list[tuple[re.Pattern, str]]) -> Iterator[Hit]:
    for line, text in passages(path):
        for pattern, instead in rules:
            for match in pattern.finditer(text):
                yield Hit(
                    path, line + text.count("\n", 0, match.start()), " ".join(match[0].split()), instead
                )


def passages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of the prose in a file."""
    text = path.read_text()
    if path.suffix == ".md":
        yield 1, without_code(text)
    elif path.suffix == ".py":
        yield from _python(text)
    elif path.suffix == ".sh" or path.name == "Makefile":
        yield 1, text
    else:  # YAML: comments
        for number, line in enumerate(text.splitlines(), 1):
            if "#" in line:
                yield number, line[line.index("#") :]


def without_code(text: str) -> str:
    """Return Markdown with code blanked out, lines and columns unchanged."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"^```.*?^```", blank, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", blank, text)


def _python(text: str) -> Iterator[tuple[int, str]]:
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    comment: list[str] = []
    first_line = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:  # consecutive comment lines are one passage
            if comment and token.start[0] == last + 1:
                comment.append(token.string.lstrip("#"))
            else:
                if comment:
                    yield first_line, "\n".join(comment)
                comment, first_line = [token.string.lstrip("#")], token.start[0]
            last = token.start[0]
        elif token.type in kinds:
            yield token.start[0], token.string
        elif token.type == tokenize.NAME and token.string.startswith("test_"):
            yield token.start[0], token.string.replace("_", " ")
    if comment:
        yield first_line, "\n".join(comment)


def code_files() -> Iterator[Path]:
    """Yield the files of the code."""
    for folder in sorted(path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder.name in SKIPPED or folder.name == "docs":
            continue
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(ROOT)
            is_code = path.suffix in SUFFIXES and not SKIPPED & set(place.parts)
            if is_code and not place.is_relative_to("slurm/jobs"):
                yield path
