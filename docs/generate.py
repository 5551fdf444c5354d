"""Write the generated pages of docs/reference/: `python -m docs.generate`.

    recipe.md          every key of a recipe: dataclasses, docs/recipe_keys.yaml
    cli.md             every command: argparse
    modules.md         every module: first paragraph of its docstring
    roofline.md        lower bounds of a micro-batch's time: the planner
    families.md        families of models that were tested: benchmarks/results/families.json
    messages-AREA.md   messages and what to do: docs/messages.yaml

README.md and docs/results.md get their tables and figures from benchmarks/results/ (docs/results_page.py).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from unittest import mock

import yaml
from omegaconf import OmegaConf

from cli import COMMANDS
from core.command_line import default_words, has_default
from core.files import write_atomically
from core.repository import ROOT
from docs import command_lines, results_page, roofline_page

REFERENCE = ROOT / "docs" / "reference"
HEAD = "<!-- Written by `python -m docs.generate`; do not edit. -->\n\n"
PACKAGES = ("core", "model", "data_tools", "recipe", "stream", "evaluation", "serving", "soundwave", "train")


_CORES = 987_654_321  # replaces this machine's cores, so that the page is the same on every machine


def cell(text: object) -> str:
    """Return text as the content of a table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    from recipe.config import BY_NAME, Recipe, known_keys
    from train.checkpoint.compatibility import recipe_facts

    meanings = yaml.safe_load((ROOT / "docs" / "recipe_keys.yaml").read_text())
    defaults = OmegaConf.structured(Recipe)
    fixed = recipe_facts(Recipe())
    sections: dict[str, list[list[str]]] = {}
    for key in known_keys():
        value = OmegaConf.select(defaults, key)
        if OmegaConf.is_dict(value) and key not in BY_NAME:
            continue
        section = key.rpartition(".")[0] or "the stage"
        decides = any(name == key or name.startswith(f"{key}.") for name in fixed)
        row = [f"`{key}`", f"`{shown(value)}`", "no" if decides else "yes", meanings.get(key, "")]
        sections.setdefault(section, []).append(row)
    text = (
        f"# Recipe reference\n\n{HEAD}Defaults are in YAML's notation. *May change*: whether the key may "
        "change between a run and its continuation; other changes need "
        "`checkpoint.accept_changes=[recipe]`. Keys without effect on a stage may always change. How recipes "
        "work: [recipes](../recipes.md).\n"
    )
    for section, rows in sections.items():
        title = f"`{section}`" if section != "the stage" else "The stage"
        text += f"\n## {title}\n\n{table(['key', 'default', 'may change', 'meaning'], rows)}"
    return text


def shown(value: object) -> str:
    """Return a default in YAML's notation."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(value, str):
        return value
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


# ------------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    text = (
        f"# CLI reference\n\n{HEAD}Every command and its options, from the parsers themselves. Job scripts "
        "print their help with `--help`: `slurm/chain.sh`, `slurm/pack.sh`, `slurm/stage1.sh`, "
        "`slurm/evaluate.sh`.\n"
    )
    package = ""
    short = {command.module: name for name, command in COMMANDS.items()}
    for module, command in command_lines.commands().items():
        if module.partition(".")[0] != package:
            package = module.partition(".")[0]
            text += f"\n## {package}\n"
        with mock.patch("os.cpu_count", lambda: _CORES), mock.patch("torch.cuda.is_available", lambda: False):
            parser = command_lines.parser_of(module)
        also = f"In short: `soundwave {short[module]}`. " if module in short else ""
        text += f"\n### {command}\n\n{also}{described(parser)}"
        for name, sub in command_lines.subparsers(parser).items():
            text += f"\n#### {command} {name}\n\n{described(sub)}"
    return text


def described(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        hidden = action.help is argparse.SUPPRESS or isinstance(
            action, argparse._HelpAction | argparse._SubParsersAction
        )
        if hidden:
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = ""
        if action.option_strings and action.nargs != 0:
            value = action.metavar or (
                "\\|".join(map(str, action.choices)) if action.choices else action.dest.upper()
            )
            value = value if isinstance(value, str) else " ".join(value)
        default = default_words(action).replace(str(_CORES), "number of cores")
        meaning = parser._get_formatter()._expand_help(action) if action.help else ""
        rows.append(
            [
                f"`{' '.join(filter(None, (names, value)))}`",
                f"`{default}`" if has_default(action) else "",
                cell(meaning),
            ]
        )
    about = cell(first_paragraph(parser.description))
    return (f"{about}\n\n" if about else "") + (table(["option", "default", "meaning"], rows) if rows else "")


def first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


# ------------------------------------------------------------------------------------------------------------


def modules_page() -> str:
    text = f"# Modules\n\n{HEAD}What each module is for. The packages: [architecture](../architecture.md).\n"
    for package in PACKAGES:
        paths = sorted((ROOT / package).rglob("*.py"))
        rows = []
        for path in paths:
            doc = first_paragraph(ast.get_docstring(ast.parse(path.read_text())))
            if path.stem.startswith("__") and not doc:
                continue
            rows.append([f"`{path.relative_to(ROOT / package)}`", cell(doc)])
        if rows:
            text += f"\n## `{package}/`\n\n{table(['module', 'purpose'], rows)}"
    return text


def message_pages() -> dict[str, str]:
    pages = {}
    for area, content in yaml.safe_load((ROOT / "docs" / "messages.yaml").read_text()).items():
        rows = [[row["see"], linked(row["cause"]), linked(row["fix"])] for row in content["rows"]]
        text = (
            f"# Messages: {content['title']}\n\n{HEAD}`...` replaces names and numbers. Other areas and exit "
        )
        text += (
            f"codes: [troubleshooting](../troubleshooting.md).\n\n{table(['message', 'cause', 'fix'], rows)}"
        )
        pages[f"messages-{area}.md"] = text
    return pages


def linked(text: str) -> str:
    """Return text whose links, relative to docs/, are relative to docs/reference/."""
    return re.sub(
        r"\]\((?!http)(?:reference/)?", lambda match: "](" + ("" if "reference/" in match[0] else "../"), text
    )


# ------------------------------------------------------------------------------------------------------------


def families_page() -> str:
    content = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    tested, refused = [], []
    for row in content["rows"]:
        if "refused" in row:
            refused.append([row["kind"], cell(row["family"]), cell(row["refused"])])
        else:
            how = f"ZeRO-{row['zero']}, {row['ranks']} rank{'' if row['ranks'] == 1 else 's'}"
            versions = row["versions"]
            named = f"{versions['transformers']}, {versions['deepspeed']}, {versions['peft']}"
            passed = ", ".join(row["passed"])
            tested.append([row["kind"], cell(row["family"]), passed, how, row["rows"] or "", named])
    return (
        f"# Model families\n\n{HEAD}Random models with two layers, the whole way: train two steps, stop, "
        "resume, generate, export (`tests/train/test_families.py`). Other models: [Models](../models.md).\n\n"
        + table(
            ["part", "family", "passed", "on", "rows of the LLM", "transformers, deepspeed, peft"], tested
        )
        + "\n## Refused, with one line\n\n"
        + table(["part", "family", "message"], refused)
    )


def pages() -> dict[Path, str]:
    """Return path -> content of every generated page."""
    made = {
        "recipe.md": recipe_page(),
        "families.md": families_page(),
        "cli.md": cli_page(),
        "modules.md": modules_page(),
        "roofline.md": roofline_page.page(HEAD, table),
        **message_pages(),
    }
    filled = {path: results_page.filled(path) for path in results_page.PARTS}
    return {**{REFERENCE / name: text for name, text in made.items()}, **filled}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m docs.generate", description="Write the generated pages of docs/reference/."
    )
    parser.parse_args(arguments)
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)
            print(path.relative_to(ROOT))
    results_page.write_figures()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
