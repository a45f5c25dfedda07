"""Reads from the source code which module imports which."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
IMPORT_ROOTS = ("proto", "core", "client", "server")


class When(Enum):
    """When an import is executed."""

    AT_ONCE = "with the module"
    LAZILY = "inside a function"
    NEVER = "for type checkers only"


@dataclass(frozen=True)
class Import:
    """``module`` imports ``name``: dotted; for ``from a import b`` it is ``a.b``."""

    module: str
    name: str
    when: When

    def __str__(self) -> str:
        return f"{self.module} imports {self.name}" + ("" if self.when is When.AT_ONCE else f" ({self.when.value})")

    def by(self, *packages: str) -> bool:
        """Whether the importing module is one of these, or inside one."""
        return is_inside(self.module, packages)

    def of(self, *packages: str) -> bool:
        """Whether the imported name is one of these, or inside one."""
        return is_inside(self.name, packages)


def is_inside(name: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is one of the packages, or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def read_sources() -> dict[str, str]:
    """The source of every module that people wrote, by its dotted name; generated stubs are left out."""
    paths = {
        path: path.relative_to(REPOSITORY / root)
        for root in IMPORT_ROOTS
        for path in (REPOSITORY / root / "lovasz").rglob("*.py")
    }
    paths |= {path: path.relative_to(REPOSITORY) for path in (REPOSITORY / "benchmarks").rglob("*.py")}
    return {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for path, name in sorted(paths.items())
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    }


def read_imports(module: str, source: str) -> set[Import]:
    """The imports in the source of a module."""
    reader = _ImportReader(module)
    reader.visit(ast.parse(source))
    return reader.found


class _ImportReader(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.found: set[Import] = set()
        self._module = module
        self._when = When.AT_ONCE

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {Import(self._module, alias.name, self._when) for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self._module} has a relative import, which this reader does not follow"
        self.found |= {Import(self._module, f"{node.module}.{alias.name}", self._when) for alias in node.names}

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outside, self._when = self._when, When.LAZILY
        self.generic_visit(node)
        self._when = outside

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_If(self, node: ast.If) -> None:
        outside = self._when
        if "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", "")):
            self._when = When.NEVER
        for statement in node.body:
            self.visit(statement)
        self._when = outside
        for statement in node.orelse:
            self.visit(statement)


Graph = Mapping[str, Collection[str]]
"""Which names each name imports."""


def graph_of(imports: Iterable[Import], modules: Collection[str]) -> dict[str, set[str]]:
    """The modules that each module imports. Importing a module also executes the packages around it; that is left
    out, as the modules of a package import each other while the package itself is being imported."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports:
        imported = one.name
        while imported and imported not in modules:
            imported = imported.rpartition(".")[0]
        if imported and imported != one.module:
            graph[one.module].add(imported)
    return graph


def folders_of(graph: Graph, roots: Collection[str] = ()) -> dict[str, set[str]]:
    """The folders that each folder imports. Between a root and the folders inside it, imports do not count."""
    packages = {module.rpartition(".")[0] for module in graph}
    folder = {module: module if module in packages else module.rpartition(".")[0] for module in graph}
    folders: dict[str, set[str]] = {name: set() for name in folder.values()}
    for module, imported in graph.items():
        here = folder[module]
        folders[here] |= {
            there
            for there in (folder[name] for name in imported)
            if there != here and not (there in roots and is_inside(here, [there]))
            if not (here in roots and is_inside(there, [here]))
        }
    return folders


def circles(graph: Graph) -> list[list[str]]:
    """Every group of names that import each other in a circle, each in a sorted list."""
    reached = {name: _reached_from(name, graph) for name in graph}
    found = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in graph}
    return sorted(list(circle) for circle in found if circle)


def _reached_from(name: str, graph: Graph) -> set[str]:
    reached: set[str] = set()
    left = list(graph[name])
    while left:
        following = left.pop()
        if following not in reached:
            reached.add(following)
            left += graph[following]
    return reached
