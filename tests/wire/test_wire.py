"""The stubs, and who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# --- What is imported ---------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    """What it prints, in a new process where every warning is an error."""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_stubs_import_without_a_warning_and_carry_the_contract() -> None:
    code = (
        "from lovasz.v1 import loss_pb2, loss_pb2_grpc\n"
        "service = loss_pb2.DESCRIPTOR.services_by_name['LossService']\n"
        "print(service.full_name, *sorted(method.name for method in service.methods))\n"
        "assert all(hasattr(loss_pb2_grpc.LossServiceServicer, method.name) for method in service.methods)"
    )
    assert run_python(code) == "lovasz.v1.LossService Compute ComputeStream GetServerInfo"


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("lovasz.spec", {"torch", "google.protobuf", "grpc"}),
        ("lovasz.wire", {"torch", "grpc"}),
        ("lovasz.client", {"torch", "lovasz.core", "lovasz.server"}),
        ("lovasz.client.cli", {"torch", "lovasz.core", "lovasz.server"}),
    ],
)
def test_importing_a_module_does_not_load_what_it_can_do_without(imported: str, absent: set[str]) -> None:
    loaded = set(run_python(f"import {imported}, sys; print(*sys.modules)").split())
    assert imported in loaded
    assert loaded.isdisjoint(absent)


@dataclass(frozen=True)
class Import:
    """``module`` imports ``name`` (dotted; of ``from a import b`` it is a.b); ``lazily``: inside a function."""

    module: str
    name: str
    lazily: bool

    def of(self, *packages: str) -> bool:
        """Whether what is imported is one of these, or inside one."""
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)

    def by(self, *packages: str) -> bool:
        return any(self.module == package or self.module.startswith(f"{package}.") for package in packages)


class ImportReader(ast.NodeVisitor):
    """Collects the imports of a module, but not those for type checkers alone."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.found: set[Import] = set()
        self._depth = 0

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {Import(self.module, alias.name, self._depth > 0) for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.module} imports relatively, which this reader does not follow"
        self.found |= {Import(self.module, f"{node.module}.{alias.name}", self._depth > 0) for alias in node.names}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)


def read_imports(module: str, source: str) -> set[Import]:
    reader = ImportReader(module)
    reader.visit(ast.parse(source))
    return reader.found


def sources() -> Iterator[tuple[str, str]]:
    """Every module under proto, client and server that people write, by its dotted name."""
    repository = Path(__file__).parents[2]
    for root in ("proto", "client", "server"):
        for path in sorted((repository / root / "lovasz").rglob("*.py")):
            parts = path.relative_to(repository / root).with_suffix("").parts
            if "v1" not in parts:
                yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")


SOURCES = dict(sources())
IMPORTS = {found for module, source in SOURCES.items() for found in read_imports(module, source)}
GRPC = ("grpc", "grpc_health", "grpc_reflection", "lovasz.v1.loss_pb2_grpc")
PROTOBUF = ("google", "lovasz.v1")


def test_the_reader_of_imports_reads_all_kinds() -> None:
    source = (
        "import a.b, c\nfrom d import e as f\nif TYPE_CHECKING:\n    import g\nif h:\n    import i\n"
        "class J:\n    def k(self):\n        from l import m\n"
    )
    found = {(one.name, one.lazily) for one in read_imports("x", source)}
    assert found == {("a.b", False), ("c", False), ("d.e", False), ("i", False), ("l.m", True)}
    assert {"lovasz.spec", "lovasz.client", "lovasz.client.torch", "lovasz.core", "lovasz.server.__main__"} <= set(
        SOURCES
    )


def importers(*packages: str, of: tuple[str, ...] = ("lovasz",), lazily: bool | None = None) -> set[str]:
    """Modules inside ``of`` that import one of the packages; only at their top or only lazily if that is asked."""
    return {
        one.module for one in IMPORTS if one.of(*packages) and one.by(*of) and (lazily is None or one.lazily == lazily)
    }


def test_client_and_server_never_import_each_other() -> None:
    assert importers("lovasz.server", of=("lovasz.client", "lovasz.core")) == set()
    assert importers("lovasz.client", of=("lovasz.server", "lovasz.core")) == set()
    assert importers("lovasz.core", of=("lovasz.client",)) == {"lovasz.client.inprocess"}
    assert importers("lovasz.client.inprocess", lazily=False) == set()
    assert importers("lovasz.client.inprocess") == {"lovasz.client.client"}


def test_what_both_sides_share_imports_neither() -> None:
    shared = ("lovasz.spec", "lovasz.framing", "lovasz.wire", "lovasz.autograd", "lovasz.version")
    assert importers("lovasz.client", "lovasz.core", "lovasz.server", of=shared) == set()


def test_the_core_knows_no_wire() -> None:
    assert importers(*GRPC, *PROTOBUF, "lovasz.wire", of=("lovasz.core",)) == set()


def test_spec_needs_neither_torch_nor_protobuf_and_wire_no_torch() -> None:
    assert importers("torch", "lovasz.autograd", *GRPC, *PROTOBUF, "lovasz.wire", of=("lovasz.spec",)) == set()
    assert importers("torch", "lovasz.autograd", *GRPC, of=("lovasz.framing", "lovasz.wire")) == set()


def test_the_client_is_thin() -> None:
    thin = ("lovasz.client", "lovasz.autograd", "lovasz.spec", "lovasz.framing", "lovasz.wire", "lovasz.version")
    assert importers("torch", of=thin, lazily=False) == {
        "lovasz.autograd",
        "lovasz.client.inprocess",
        "lovasz.client.torch",
    }
    assert importers("torch", of=thin, lazily=True) == {"lovasz.client.joint", "lovasz.client.tensors"}
    assert importers("lovasz.client.torch") == set()


def test_only_service_modules_of_the_server_import_grpc() -> None:
    modules = importers(*GRPC, of=("lovasz.server",))
    assert modules == {"lovasz.server.health", "lovasz.server.server", "lovasz.server.service"}


def test_only_main_reads_the_environment() -> None:
    reads = {"environ", "environb", "getenv", "getenvb"}
    readers = {
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in reads)
        or (isinstance(node, ast.alias) and node.name in reads)
    }
    assert readers == {"lovasz.server.__main__"}
