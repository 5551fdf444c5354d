"""Check the documentation: `python -m docs.check`.

Lengths, links, commands, recipe keys, quoted messages, generated pages and banned phrases
(docs/contributing.md lists the rules). Prints one line for each problem; exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from core.repository import ROOT
from docs import command_lines, generate, prose

DOCS = ROOT / "docs"
README_LINES = 110
PAGE_WORDS = 1200
ALL_WORDS = 15_000
#: Not counted: written by programs.
GENERATED = ("reference/", "licences.md")
OTHER_READMES = ("examples/quickstart/README.md", "examples/less_is_more/README.md", "ds_configs/README.md")
#: Words that users search for.
FINDABLE = ("epoch", "fine-tune", "test-clean", "A100", "serve", "timestamps")
COMMAND = re.compile(r"(?:python|deepspeed|torchrun|make|sbatch|slurm/\w+\.sh|soundwave)\s")


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def written() -> list[Path]:
    """Return the pages that people write."""
    return [path for path in pages() if not str(path.relative_to(DOCS)).startswith(GENERATED)]


def documents() -> list[Path]:
    return [ROOT / "README.md", *(ROOT / name for name in OTHER_READMES), *written()]


def words(text: str) -> int:
    """Return the number of words of prose and tables: what holds a letter, code blocks not counted."""
    prose_only = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    return sum(1 for word in prose_only.split() if re.search("[A-Za-z]", word))


def lengths() -> Iterator[str]:
    lines = len((ROOT / "README.md").read_text().splitlines())
    if lines > README_LINES:
        yield f"README.md: {lines} lines, more than {README_LINES}"
    total = 0
    for path in written():
        count = words(path.read_text())
        total += count
        if count > PAGE_WORDS:
            yield f"{path.relative_to(ROOT)}: {count} words, more than {PAGE_WORDS}: split it"
    if total > ALL_WORDS:
        yield f"docs/: {total} words without generated pages, more than {ALL_WORDS}"


# ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    counts: dict[str, int] = {}
    for title in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        counts[name] = counts.get(name, 0) + 1
    return set(counts)


def links() -> Iterator[str]:
    for path in [*documents(), *(page for page in pages() if page not in written())]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
            if re.match(r"https?:|mailto:", target):
                continue
            name, _, anchor = target.partition("#")
            to = (path.parent / name).resolve() if name else path
            where = f"{path.relative_to(ROOT)}: link {target}"
            if not to.exists():
                yield f"{where}: there is no such file"
            elif DOCS in path.parents and DOCS not in to.parents:
                yield f"{where}: leads out of docs/, and the site has no such page"
            elif anchor and to.suffix == ".md" and anchor not in anchors(to.read_text()):
                yield f"{where}: the page has no such heading"


def navigation() -> Iterator[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"([\w/-]+\.md)\b", text))
    for path in pages():
        name = str(path.relative_to(DOCS))
        if name not in named:
            yield f"mkdocs.yml: {name} is not in the navigation"
    for name in named:
        if not (DOCS / name).exists():
            yield f"mkdocs.yml: {name} does not exist"


# ------------------------------------------------------------------------------------------------------------


def shell(text: str) -> list[tuple[str, bool]]:
    """Return the shell code of a page, and whether it is whole: code blocks are, code within text may leave
    required arguments out."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [code for code in re.findall(r"`([^`\n]+)`", rest) if COMMAND.match(code) and "..." not in code]
    return [(block, True) for block in blocks] + [(code.replace("\\|", "|"), False) for code in inline]


def commands() -> Iterator[str]:
    for path in documents():
        for block, whole in shell(path.read_text()):
            try:
                statements = command_lines.statements(block)
            except ValueError as error:
                yield f"{path.relative_to(ROOT)}: {block.strip().splitlines()[0]}: {error}"
                continue
            for statement in statements:
                try:
                    command_lines.check(statement)
                except command_lines.WrongCommand as error:
                    if not whole and re.search("are required|without a script", str(error)):
                        continue
                    yield f"{path.relative_to(ROOT)}: {' '.join(statement)[:120]}: {error}"


def keys() -> Iterator[str]:
    recipe_keys = command_lines.recipe_keys()
    sections = {key.partition(".")[0] for key in recipe_keys if "." in key}
    for path in documents():
        for code in re.findall(r"`([^`\n]+)`", path.read_text()):
            for key in re.findall(rf"^((?:{'|'.join(sections)})\.[a-z_.]+?)[._]?(?:\*|=.*|: .*)?$", code):
                inside = any(name.startswith((f"{key}.", f"{key}_")) for name in recipe_keys)
                code_name = (ROOT / key.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / key
                ).exists()
                if key not in recipe_keys and not inside and not code_name and not _attribute(key):
                    yield f"{path.relative_to(ROOT)}: `{code}` is no key of a recipe"
    described = yaml.safe_load((DOCS / "recipe_keys.yaml").read_text())
    for key in described.keys() - recipe_keys:
        yield f"docs/recipe_keys.yaml: {key} is no key of a recipe"
    for row in re.findall(
        r"^\| `([\w.]+)` \| .* \|  \|$", (generate.REFERENCE / "recipe.md").read_text(), re.MULTILINE
    ):
        yield f"docs/recipe_keys.yaml: {row} is not described"


def paths() -> Iterator[str]:
    """Files of the repository that a page names, and pages that the code names."""
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    pattern = re.compile(rf"(?:{folders})/[\w./-]+\.(?:py|sh|yaml|json|txt|md|csv|c|cpp|h)")
    for path in documents():
        for code in re.findall(r"`([^`\n]+)`", path.read_text()):
            if (
                pattern.fullmatch(code)
                and not code.startswith(("runs/", "data/"))
                and not (ROOT / code).exists()
            ):
                yield f"{path.relative_to(ROOT)}: there is no file {code}"
    for path in prose.code_files():
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()):
            if not (ROOT / page).exists():
                yield f"{path.relative_to(ROOT)}: there is no page {page}"


def _attribute(name: str) -> bool:
    """Whether a name such as model.generate is one of the model's methods."""
    first, _, rest = name.partition(".")
    return first == "model" and bool(
        re.search(rf"def {rest.partition('.')[0]}\(|\.{rest} =", _model_source())
    )


def _model_source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "model").rglob("*.py"))


# ------------------------------------------------------------------------------------------------------------


def strings_of_code() -> list[str]:
    """Return every string of the code, with `...` for what is filled in."""
    strings = []
    for package in (*generate.PACKAGES, "examples", "install"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    strings.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    strings.append(re.sub(r"%[-0-9.]*[sdfg]", "...", node.value))
    strings += [
        re.sub(r"\$\{?\w+[^}\"\s]*\}?", "...", path.read_text()) for path in (ROOT / "slurm").rglob("*.sh")
    ]
    return strings


def messages() -> Iterator[str]:
    strings = strings_of_code()
    for area, content in yaml.safe_load((DOCS / "messages.yaml").read_text()).items():
        if area == "slurm":  # filled-in examples, which the tests of the job scripts hold
            continue
        for row in content["rows"]:
            for quoted in re.findall(r"`([^`]+)`", row["see"]):
                pieces = [piece.strip().replace('\\"', '"') for piece in quoted.split("...")]
                pieces = [piece for piece in pieces if len(piece) > 3]
                if quoted != "fetch" and not any(all(piece in text for piece in pieces) for text in strings):
                    yield f"docs/messages.yaml: {area}: the code has no message `{quoted}`"


def generated() -> Iterator[str]:
    made = generate.pages()
    for path, text in made.items():
        if not path.exists() or path.read_text() != text:
            yield f"{path.relative_to(ROOT)} is not current: python -m docs.generate"
    for path in sorted(generate.REFERENCE.glob("*.md")):
        if path not in made:
            yield f"{path.relative_to(ROOT)} is not generated any more: remove it"


def phrases() -> Iterator[str]:
    rules = prose.phrases()
    for path in [*documents(), DOCS / "messages.yaml", DOCS / "recipe_keys.yaml", *sorted(DOCS.glob("*.py"))]:
        hits = prose.hits(path, rules) if path.suffix != ".yaml" else _yaml_hits(path, rules)
        for hit in hits:
            yield f"{path.relative_to(ROOT)}:{hit.line}: {hit.phrase!r}: write {hit.instead}"
    for path in prose.code_files():
        for hit in prose.hits(path, rules):
            yield f"{path.relative_to(ROOT)}:{hit.line}: {hit.phrase!r}: write {hit.instead}"


def _yaml_hits(path: Path, rules: list) -> Iterator[prose.Hit]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = "" if line.strip().startswith("- see:") else prose.without_code(line)
        for pattern, instead in rules:
            for match in pattern.finditer(text):
                yield prose.Hit(path, number, match[0], instead)


def findable() -> Iterator[str]:
    text = "\n".join(path.read_text() for path in written()).lower()
    for word in FINDABLE:
        if word.lower() not in text:
            yield f"docs/: {word!r} is not there: name it on the page that answers it"


CHECKS = (lengths, links, navigation, commands, keys, paths, messages, generated, phrases, findable)


def problems() -> Iterator[str]:
    for check in CHECKS:
        yield from check()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m docs.check",
        description="Check lengths, links, commands and words of the documentation.",
    )
    parser.parse_args(arguments)
    lines = list(problems())
    print("\n".join(lines) or "docs: no problems")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
