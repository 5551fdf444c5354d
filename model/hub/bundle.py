"""One file out of a module and of what it uses from this project, so that it runs without the project.

    bundle("model.hub.modeling", beside={"model.hub.configuration": "configuration_soundwave"}) -> text

All definitions of the module are taken, and from other modules of the project those that they need, text
unchanged. Annotations bring imports of other packages, but no definitions: every module has `from __future__
import annotations`. Two definitions
of one name, an alias, and an import inside a function are errors. `encode = Soundwave.encode` in a class
body takes that method alone.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("core", "model")


class BundleError(ValueError):
    """A module that cannot be bundled; one line: what, where."""


class Place(NamedTuple):
    module: str
    name: str


class Module:
    """The definitions and imports of a source file."""

    def __init__(self, name: str):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BundleError(f"there is no module {name}")
        self.name, path = name, Path(spec.origin)
        self.is_package = path.name == "__init__.py"
        self.source = path.read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.project: dict[str, Place] = {}  # local name -> what it is
        self.external: dict[str, str] = {}  # local name -> import statement
        for node in ast.parse(self.source).body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._read_import(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (
                one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)
            ):
                self.definitions[name] = node
        elif isinstance(node, ast.Try):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    for alias in inner.names:
                        self.definitions[alias.asname or alias.name] = node

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                self.external[local] = f"import {alias.name}" + (
                    f" as {alias.asname}" if alias.asname else ""
                )
            return
        source = node.module or ""
        if node.level:
            parts = self.name.split(".")
            parts = parts[: len(parts) - node.level + self.is_package]
            source = ".".join([*parts, *filter(None, [source])])
        for alias in node.names:
            local = alias.asname or alias.name
            if source.split(".")[0] in PACKAGES:
                self.project[local] = Place(source, alias.name)
            elif source != "__future__":
                renamed = f" as {alias.asname}" if alias.asname else ""
                self.external[local] = f"from {source} import {alias.name}{renamed}"

    def text(self, node: ast.stmt) -> tuple[str, int]:
        """A statement with its decorators and the comment before it; the line that it begins at, from 0."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(one.lineno for one in decorators)]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno]), first

    @cached_property
    def docstring(self) -> str:
        return ast.get_docstring(ast.parse(self.source)) or ""


class Names(ast.NodeVisitor):
    """The names that a statement reads; those of annotations and `module.attribute` apart."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.annotations: set[str] = set()
        self.attributes: list[tuple[str, ast.Attribute]] = []  # the name before the dot

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self.attributes.append((node.value.id, node))
        self.generic_visit(node)

    def _annotation(self, node: ast.expr | None) -> None:
        for one in ast.walk(node) if node is not None else ():
            if isinstance(one, ast.Name):
                self.annotations.add(one.id)

    def visit_arg(self, node: ast.arg) -> None:
        self._annotation(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotation(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def _function(self, node: ast.FunctionDef) -> None:
        self._annotation(node.returns)
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)

    visit_FunctionDef = _function

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] in PACKAGES:
            raise BundleError(f"line {node.lineno} imports within a function: import at the top")


class Bundler:
    def __init__(self, beside: Mapping[str, str], instead: Mapping[Place, Place]):
        self.beside, self.instead = beside, instead
        self.modules: dict[str, Module] = {}
        self.done: dict[str, Place] = {}  # name in the bundle -> what it is
        self.imports: dict[str, str] = {}
        self.texts: list[str] = []
        self.taken: set[tuple[str, int]] = set()

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def resolve(self, place: Place) -> Place | str | None:
        """A definition's own place; the name of a module; None for what is external or unknown."""
        place = self.instead.get(place, place)
        module = self.module(place.module)
        if place.name in module.definitions or place.module in self.beside:
            return place
        if place.name in module.project:
            target = module.project[place.name]
            inner = f"{target.module}.{target.name}"
            if self.module(target.module).is_package and importlib.util.find_spec(inner) is not None:
                return inner
            target_place = self.resolve(target)
            if isinstance(target_place, Place) and target_place.name != place.name:
                raise BundleError(
                    f"{place.module} imports {target_place.name} as {place.name}: use its own name"
                )
            return target_place
        return None

    def take(self, place: Place) -> None:
        """Add a definition and what it needs."""
        if place.module in self.beside:
            self._import(place.name, f"from .{self.beside[place.module]} import {place.name}", place)
            return
        if self.done.setdefault(place.name, place) != place:
            other = self.done[place.name].module
            raise BundleError(f"{place.module} and {other} both define {place.name}: rename one")
        module = self.module(place.module)
        node = module.definitions[place.name]
        if (place.module, node.lineno) in self.taken:
            return
        self.taken.add((place.module, node.lineno))
        text, first = module.text(node)
        text = self._used(module, node, text, first)
        self.texts.append(text)

    def _import(self, name: str, statement: str, place: object) -> None:
        if self.imports.setdefault(name, statement) != statement:
            raise BundleError(f"{place}: {name} is imported in two ways: {self.imports[name]}, {statement}")

    def _used(self, module: Module, node: ast.stmt, text: str, first: int) -> str:
        """Take what a statement needs; return its text with `module.name` as `name`, methods put in."""
        methods = list(self._methods(module, node))
        names = Names()
        if isinstance(node, ast.ClassDef):
            borrowed = {id(statement) for statement, _, _ in methods}
            for part in (*node.decorator_list, *node.bases, *node.body):
                if id(part) not in borrowed:
                    names.visit(part)
        else:
            names.visit(node)
        lines = text.splitlines()
        edits: list[tuple[int, int, int, str]] = []
        modules = {
            name: full
            for name in names.names
            if isinstance(full := self.resolve(Place(module.name, name)), str)
        }
        for local, attribute in names.attributes:
            if local in modules:
                definition = self.resolve(Place(modules[local], attribute.attr))
                if not isinstance(definition, Place):
                    raise BundleError(
                        f"{module.name}: {local}.{attribute.attr} is not defined in the project"
                    )
                self.take(definition)
                row = attribute.lineno - 1 - first
                begin = attribute.col_offset
                edits.append((row, begin, begin + len(f"{local}.{attribute.attr}"), attribute.attr))
        for row, begin, end, new in sorted(edits, reverse=True):
            raw = lines[row].encode()
            lines[row] = (raw[:begin] + new.encode() + raw[end:]).decode()
        for name in sorted(names.names - modules.keys()):
            definition = self.resolve(Place(module.name, name))
            if isinstance(definition, Place):
                if self.done.get(name) != definition:
                    self.take(definition)
            elif name in module.external:
                self._import(name, module.external[name], module.name)
        for name in sorted(names.annotations & module.external.keys()):
            self._import(name, module.external[name], module.name)
        for statement, owner, method in sorted(methods, key=lambda one: -one[0].lineno):
            decorators = [one.lineno for one in method.decorator_list]
            begin = min([method.lineno, *decorators]) - 1
            body = "\n".join(owner.lines[begin : method.end_lineno])
            body = self._used(owner, method, body, begin)
            last = statement.end_lineno or statement.lineno
            lines[statement.lineno - 1 - first : last - first] = ["", *body.splitlines()]
        return "\n".join(lines)

    def _methods(
        self, module: Module, node: ast.stmt
    ) -> Iterator[tuple[ast.Assign, Module, ast.FunctionDef]]:
        """The statements `name = Class.name` of a class body, with the method that each names."""
        for statement in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Attribute):
                continue
            value = statement.value
            owner_place = isinstance(value.value, ast.Name) and self.resolve(
                Place(module.name, value.value.id)
            )
            if not isinstance(owner_place, Place):
                continue
            owner = self.module(owner_place.module)
            body = getattr(owner.definitions[owner_place.name], "body", [])
            for method in body:
                if isinstance(method, ast.FunctionDef) and method.name == value.attr:
                    yield statement, owner, method


def bundle(
    root: str, *, beside: Mapping[str, str] | None = None, instead: Mapping[Place, Place] | None = None
) -> str:
    """Return the text of one file.

    beside: module -> file (without .py) that will be in the same folder. instead: definitions that take
    the place of others of the same name. Errors: BundleError.
    """
    bundler = Bundler(beside or {}, instead or {})
    module = bundler.module(root)
    for name in module.definitions:
        bundler.take(Place(root, name))
    imports = sorted(set(bundler.imports.values()), key=lambda line: (line.startswith("from ."), line))
    head = [
        f'"""{module.docstring}\n\nGenerated by `python -m model.export --hub-layout` from the training '
        'system; Apache-2.0.\n"""',
        "",
        "from __future__ import annotations",
        "",
        *imports,
    ]
    return "\n".join(head) + "\n\n\n" + "\n\n\n".join(bundler.texts) + "\n"
