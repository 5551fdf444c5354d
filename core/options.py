"""Allowed values of a configuration's fields, stated where each field is declared and checked in one place.

@dataclass
class Config:
    keep: str = choice("peak", "peak", "first")
    steps: int = number(4000, least=1)
    output: str = location("runs")

problems(Config(keep="last"))   ->   [("keep", "is 'last': give peak or first")]
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from core.console import OneLine, shown


class RecipeError(OneLine, ValueError):
    """A recipe that cannot be run; the message is one line: what, where, what to do."""


def choice(default: str | None, *values: str):
    """Return a dataclass field for a string with these values."""
    return dataclasses.field(default=default, metadata={"choices": values})


def number(
    default: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    why: str = "",
):
    """Return a dataclass field for a finite number within bounds. why: the reason for them, added to the
    message."""
    return dataclasses.field(
        default=default, metadata={"least": least, "above": above, "most": most, "below": below, "why": why}
    )


def numbers(
    *default: float,
    counts: tuple[int, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
):
    """Return a dataclass field for a list of finite numbers within bounds. counts: the lengths that it may
    have."""
    return dataclasses.field(
        default_factory=lambda: list(default),
        metadata={"counts": counts, "least": least, "above": above, "most": most, "below": below},
    )


def text(default: str):
    """Return a dataclass field for a string that is not empty."""
    return dataclasses.field(default=default, metadata={"text": True})


def matching(default: str, pattern: str, words: str):
    """Return a dataclass field for a string that a regular expression matches whole; words: what it may
    be."""
    return dataclasses.field(default=default, metadata={"pattern": pattern, "words": words})


def names_or_pattern():
    """Return a dataclass field, by default None, for a list of names or one string: a keyword or a regular
    expression."""
    return dataclasses.field(default=None, metadata={"names": True})


def location(default: str | None):
    """Return a dataclass field for the name of a file or folder; `expand_paths` expands a leading ~ and
    $VARIABLES in it."""
    return dataclasses.field(default=default, metadata={"path": True})


def problems(config: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for each field of a dataclass, and of those in it, whose value is not
    allowed."""
    for field, key, value in _fields(config, prefix):
        rules = field.metadata
        if not _finite(value):
            yield key, f"is {shown(value)}: give finite numbers"
        elif value is None:
            continue
        elif isinstance(value, dict) and not all(isinstance(one, (int, float)) for one in value.values()):
            yield key, f"is {shown(value)}: give numbers by name"
        elif elements := _wrong_elements(field, value):
            yield key, f"is {shown(value)}: give a list of {elements}"
        elif "choices" in rules and value not in rules["choices"]:
            quoted = (
                " (in quotes, or YAML takes it for a boolean)"
                if str(value).lower() in rules["choices"]
                else ""
            )
            yield key, f"is {shown(value)}: give {_alternatives(rules['choices'])}{quoted}"
        elif rules.get("pattern") and not re.fullmatch(rules["pattern"], str(value)):
            yield key, f"is {shown(value)}: give {rules['words']}"
        elif rules.get("counts") and len(cast(list, value)) not in rules["counts"]:
            yield (
                key,
                f"is {shown(value)}: give {_alternatives([str(count) for count in rules['counts']])} numbers",
            )
        elif (rules.get("path") or rules.get("text")) and not is_name(str(value)):
            yield key, f"is {shown(value)}: give a name"
        elif rules.get("names"):
            if wrong := _no_names(value):
                yield key, f"is {shown(value)}: {wrong}"
        else:
            for one in value if isinstance(value, list) else [value]:
                if limit := _exceeded(one, rules):
                    yield (
                        key,
                        f"is {shown(value)}: must be "
                        f"{limit}{': ' + rules['why'] if rules.get('why') else ''}",
                    )
                    break


def expand_paths(config: object) -> None:
    """Expand a leading ~ and $VARIABLES in every path of a dataclass and of those in it, in place.

    Commands and URLs (`pipe:...`, `s3://...`) stay as they are. Errors: ValueError, starting with the field's
    key, for a variable that is not set and for ~user without such a user.
    """
    for field, key, value in list(_fields(config, "")):
        if (
            not field.metadata.get("path")
            or not isinstance(value, str)
            or value.startswith("pipe:")
            or "://" in value
        ):
            continue
        expanded = os.path.expanduser(os.path.expandvars(value))
        unset = re.search(r"\$(\w+|\{\w+\})", expanded)
        if unset:
            raise ValueError(f"{key} is '{value}': the environment has no {unset[0].strip('${}')}")
        if expanded.startswith("~"):
            raise ValueError(f"{key} is '{value}': there is no such user's home folder")
        *sections, name = re.findall(r"\w+", key)
        owner: Any = config
        for section in sections:
            owner = owner[int(section)] if section.isdigit() else getattr(owner, section)
        setattr(owner, name, expanded)


def _fields(config: object, prefix: str) -> Iterator[tuple[dataclasses.Field, str, object]]:
    for field in dataclasses.fields(cast(Any, config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and value and all(dataclasses.is_dataclass(one) for one in value):
            for place, one in enumerate(value):
                yield from _fields(one, f"{prefix}{field.name}[{place}].")
        else:
            yield field, f"{prefix}{field.name}", value


def is_name(value: str) -> bool:
    """Return whether the system takes it for the name of a file: not empty, printable, no part of more than
    255 bytes."""
    if value.startswith("pipe:") or "://" in value:
        return True
    size = len(value.encode(errors="replace"))
    return (
        bool(value.strip())
        and value.isprintable()
        and size < 4096
        and all(len(part) <= 255 for part in value.split("/"))
    )


def _no_names(value: object) -> str | None:
    """Return what is wrong with a list of names or a regular expression."""
    if isinstance(value, list) and value and all(isinstance(one, str) and one.strip() for one in value):
        return None
    if not isinstance(value, str) or not value.strip():
        return "give a list of names, or one string: a keyword or a regular expression"
    try:
        re.compile(value)
    except re.error as error:
        return f"no regular expression ({error})"
    return None


def _wrong_elements(field: dataclasses.Field, value: object) -> str | None:
    """Return what a list must hold, if one of its elements has another type; the recipe's parser does not
    check the elements of lists."""
    declared = re.match(r"list\[(float|int|str)\]", str(field.type))
    if not declared or not isinstance(value, list):
        return None
    if declared[1] == "str":
        return None if all(isinstance(one, str) for one in value) else "names"
    numbers = [one for one in value if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return None if len(numbers) == len(value) else "numbers"


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _exceeded(value: object, rules: Mapping[str, Any]) -> str | None:
    """Return the bounds in words where `value` exceeds one."""
    bounds = (
        ("least", "at least", lambda x, y: x >= y),
        ("above", "above", lambda x, y: x > y),
        ("most", "at most", lambda x, y: x <= y),
        ("below", "below", lambda x, y: x < y),
    )
    limits = [(words, rules[name], holds) for name, words, holds in bounds if rules.get(name) is not None]
    if all(holds(value, limit) for _, limit, holds in limits):
        return None
    return " and ".join(f"{words} {limit}" for words, limit, _ in limits)


def _alternatives(values: list[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last
