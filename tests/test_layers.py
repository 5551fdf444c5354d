"""Imports point down the layers, and no modules import each other in a circle."""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import pytest

from core.repository import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
#: From the bottom. A package imports those of earlier rows only: never its own row's others.
LAYERS = (
    ("core",),
    ("model", "data_tools"),
    ("recipe",),
    ("stream",),
    ("soundwave",),
    ("evaluation", "serving"),
    ("train",),
)
#: Rows that may use everything, and that nothing above may import.
OUTSIDE = ("cli", "examples", "benchmarks", "tests", "install")


def graph_of(root: Path, packages: tuple[str, ...], monkeypatch) -> grimp.ImportGraph:
    """Return the graph of all imports, those inside functions included, TYPE_CHECKING ones excluded."""
    monkeypatch.syspath_prepend(root)
    return grimp.build_graph(
        *packages, exclude_type_checking_imports=True, include_external_packages=True, cache_dir=None
    )


def upward(graph: grimp.ImportGraph, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Return "IMPORTER -> IMPORTED" for imports of the same row's other packages and of later rows."""
    rank = {package: row for row, packages in enumerate(layers) for package in packages}
    rank |= dict.fromkeys(OUTSIDE, len(layers))
    imports = []
    for importer in graph.modules:
        own = importer.partition(".")[0]
        for imported in graph.find_modules_directly_imported_by(importer) if own in rank else ():
            other = imported.partition(".")[0]
            if other in rank and other != own and rank[other] >= rank[own]:
                imports.append(f"{importer} -> {imported}")
    return sorted(imports)


def cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for imported in graph.find_modules_directly_imported_by(module):
            if imported not in number:
                visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], number[imported])
        if lowest[module] == number[module]:
            place = stack.index(module)
            group, stack[place:] = sorted(stack[place:]), []
            if len(group) > 1:
                groups.append(group)

    for module in sorted(graph.modules):
        if module not in number:
            visit(module)
    return groups


@pytest.fixture(scope="module")
def graph():
    with pytest.MonkeyPatch.context() as monkeypatch:
        packages = tuple(name for row in LAYERS for name in row if (ROOT / name / "__init__.py").exists())
        assert set(packages) == set(
            PACKAGES
        )  # a new package has its place in LAYERS, and jobs get a copy of it
        yield graph_of(ROOT, packages, monkeypatch)


def test_imports_point_down(graph):
    assert upward(graph, LAYERS) == []


def test_no_modules_import_each_other_in_a_circle(graph):
    assert cycles(graph) == []


def test_both_checks_find_what_is_wrong(tmp_path, monkeypatch):
    """Upward imports and circles are found in functions too, and not where only a type checker looks."""
    files = {
        "lower_toy/__init__.py": "",
        "lower_toy/first.py": "def use():\n    from upper_toy import third\n",
        "lower_toy/second.py": "from lower_toy import fourth\n",
        "lower_toy/fourth.py": "def use():\n    import lower_toy.second\n",
        "lower_toy/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from upper_toy import third\n",
        "lower_toy/outside.py": "def use():\n    import tests.anything\n",
        "upper_toy/__init__.py": "",
        "upper_toy/third.py": "from lower_toy import second\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    toy = graph_of(tmp_path, ("lower_toy", "upper_toy"), monkeypatch)
    assert upward(toy, (("lower_toy",), ("upper_toy",))) == [
        "lower_toy.first -> upper_toy.third",
        "lower_toy.outside -> tests",
    ]
    assert cycles(toy) == [["lower_toy.fourth", "lower_toy.second"]]


def test_no_program_s_folder_holds_a_module_of_the_standard_library_s_name():
    """`python data_tools/pack.py` puts data_tools/ first on the search path: a copy.py there would be every
    library's `import copy`."""
    programs = {path.parent for path in python_files() if '__name__ == "__main__"' in path.read_text()}
    assert ROOT / "data_tools" in programs
    assert [
        str(path.relative_to(ROOT))
        for folder in programs
        for path in folder.glob("*.py")
        if path.stem in sys.stdlib_module_names
    ] == []


def python_files() -> list[Path]:
    return [
        path
        for folder in (*PACKAGES, "slurm", "install", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
