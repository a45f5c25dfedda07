"""The source tree keeps its rules: who imports whom, who reads the environment, how long a file is, what is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable
from importlib.metadata import distribution

import pytest
from support.imports import (
    REPOSITORY,
    Import,
    When,
    circles,
    folders_of,
    graph_of,
    is_inside,
    read_imports,
    read_sources,
)
from support.processes import run_python

SOURCES = read_sources()
IMPORTS = {found for module, source in SOURCES.items() for found in read_imports(module, source)}

AREAS: dict[str, tuple[set[str], set[str]]] = {
    "lovasz.version": (set(), set()),
    "lovasz.spec": (set(), {"numpy", "torch"}),
    "lovasz.wire": ({"lovasz.spec", "lovasz.v1.loss_pb2"}, {"numpy", "google"}),
    "lovasz.device_memory": (set(), {"torch", "cuda"}),
    "lovasz.memory_format": ({"lovasz.spec"}, {"numpy", "torch"}),
    "lovasz.autograd": ({"lovasz.spec", "lovasz.memory_format"}, {"numpy", "torch"}),
    "lovasz.core": (
        {"lovasz.spec", "lovasz.memory_format", "lovasz.autograd", "lovasz.version"},
        {"numpy", "torch", "numba", "llvmlite", "triton"},
    ),
    "lovasz.client": (
        {"lovasz.spec", "lovasz.wire", "lovasz.device_memory", "lovasz.autograd", "lovasz.version", "lovasz.v1"},
        {"numpy", "grpc", "google", "torch", "matplotlib", "opentelemetry"},
    ),
    "lovasz.server": (
        {"lovasz.core", "lovasz.spec", "lovasz.wire", "lovasz.device_memory", "lovasz.version", "lovasz.v1"},
        {
            "numpy",
            "grpc",
            "grpc_health",
            "grpc_reflection",
            "google",
            "opentelemetry",
            "prometheus_client",
            "torch",
        },
    ),
}
"""The areas of the package, lowest first: which other areas each may import, and which packages that are installed."""

LAZY_EXCEPTIONS = {
    ("lovasz.client.inprocess", "lovasz.core"): "computes without a server; imported only where a caller asks for it",
}
"""Imports between areas that the table does not allow, each with its reason. The importing module is itself imported
inside functions only."""

SERVER_LAYERS = (
    ("addresses", "errors", "housekeeping", "launch", "settings"),
    ("access_settings",),
    ("config",),
    ("access",),
    ("observe",),
    ("memory",),
    ("schedule",),
    ("device",),
    ("transport", "web"),
    ("server",),
    ("__main__",),
)
"""The modules and folders of the server, lowest first. Each imports only from itself and from lower layers."""

BACKENDS = ("lovasz.core.backends.torch", "lovasz.core.backends.numba", "lovasz.core.backends.triton")
ABOVE_BACKENDS = ("dispatch", "answers", "distributed", "functional", "modules")
"""Modules of the core that use the backends."""

GRPC = ("grpc", "grpc_health", "grpc_reflection", "lovasz.v1.loss_pb2_grpc")

MAX_LINES = 400


def importers(*packages: str, of: str = "lovasz", when: When | None = None) -> set[str]:
    """The modules inside ``of`` that import one of the packages; if ``when`` is given, only those that do so then."""
    return {one.module for one in IMPORTS if one.of(*packages) and one.by(of) and when in (None, one.when)}


def area_of(name: str) -> str | None:
    return next((area for area in AREAS if is_inside(name, [area])), None)


def described(imports: Iterable[Import]) -> list[str]:
    return sorted(map(str, imports))


# --- The reader of imports ----------------------------------------------------------------------------------------


def test_the_reader_of_imports_reads_all_kinds() -> None:
    source = (
        "import a.b, c\nfrom d import e as f\n"
        "if TYPE_CHECKING:\n    import g\nelse:\n    import h\nif i:\n    import j\n"
        "class K:\n    def l(self):\n        from m import n\n    async def o(self):\n        import p\n"
    )
    found = {(one.name, one.when) for one in read_imports("x", source)}
    assert found == {
        *((name, When.AT_ONCE) for name in ("a.b", "c", "d.e", "h", "j")),
        *((name, When.LAZILY) for name in ("m.n", "p")),
        ("g", When.NEVER),
    }
    read = {"lovasz.spec", "lovasz.client", "lovasz.client.torch", "lovasz.core", "lovasz.server.__main__"}
    assert read <= set(SOURCES)


def test_circles_are_found_between_modules_and_between_folders() -> None:
    modules = {"p", "p.a", "p.b", "q", "q.c", "q.d"}
    imports = {
        Import("p.a", "p.b.name", When.AT_ONCE),
        Import("p.a", "q.c", When.AT_ONCE),
        Import("q.d", "p.b", When.LAZILY),
        Import("p", "p.a", When.AT_ONCE),
    }
    graph = graph_of(imports, modules)
    assert graph["p.a"] == {"p.b", "q.c"}
    assert circles(graph) == []
    assert circles(folders_of(graph)) == [["p", "q"]]
    closed = graph_of({*imports, Import("p.b", "p.a", When.AT_ONCE)}, modules)
    assert circles(closed) == [["p.a", "p.b"]]


def test_circles_are_found_between_a_folder_and_one_inside_it() -> None:
    modules = {"p", "p.a", "p.b", "p.r", "p.r.c", "p.r.d"}
    imports = {Import("p.a", "p.r.c", When.AT_ONCE), Import("p.r.d", "p.b", When.AT_ONCE)}
    nested = graph_of(imports, modules)
    assert circles(nested) == circles(folders_of(nested, roots={"p"})) == []
    assert circles(folders_of(nested)) == [["p", "p.r"]]


# --- Who imports whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("area", AREAS)
def test_an_area_imports_only_what_it_may(area: str) -> None:
    areas, packages = AREAS[area]
    allowed = {area, *areas, *packages, *sys.stdlib_module_names}
    forbidden = (one for one in IMPORTS if one.by(area) and not one.of(*allowed))
    assert described(one for one in forbidden if not any(one.by(a) and one.of(b) for a, b in LAZY_EXCEPTIONS)) == []


def test_every_module_belongs_to_an_area() -> None:
    assert [module for module in SOURCES if is_inside(module, ["lovasz"]) and area_of(module) is None] == []


def test_areas_import_only_lower_areas() -> None:
    """So client and server never import each other, and what they share imports neither."""
    order = list(AREAS)
    for area, (areas, _) in AREAS.items():
        assert {name for name in areas if name in order[order.index(area) :]} == set(), area
    assert "lovasz.client" not in AREAS["lovasz.server"][0]


def test_a_module_with_an_exception_is_imported_lazily() -> None:
    for module, _ in LAZY_EXCEPTIONS:
        assert {one.when for one in IMPORTS if one.of(module) and not one.by(module)} == {When.LAZILY}, module


def test_nothing_that_is_installed_imports_what_is_not() -> None:
    assert importers("benchmarks", "examples", "tests", "support", "deploy") == set()


def test_in_the_server_only_transport_and_main_know_grpc() -> None:
    knowing, may = importers(*GRPC, of="lovasz.server"), ("lovasz.server.transport", "lovasz.server.__main__")
    assert knowing
    assert [module for module in knowing if not is_inside(module, may)] == []


def test_a_module_of_the_server_imports_only_lower_layers() -> None:
    layer = {f"lovasz.server.{name}": place for place, names in enumerate(SERVER_LAYERS) for name in names}

    def entry(name: str) -> str:
        return ".".join(name.split(".")[:3])

    modules = {entry(module) for module in SOURCES if module.startswith("lovasz.server.")}
    assert modules == set(layer), "SERVER_LAYERS names every module and folder of the server"
    inside = {one for one in IMPORTS if one.by(*modules) and one.of(*modules)}
    assert inside
    between = (one for one in inside if entry(one.module) != entry(one.name))
    assert described(one for one in between if layer[entry(one.module)] <= layer[entry(one.name)]) == []


def test_backends_know_neither_each_other_nor_what_uses_them() -> None:
    users = [f"lovasz.core.{name}" for name in ABOVE_BACKENDS]
    for backend in BACKENDS:
        assert backend in SOURCES
        others = [other for other in BACKENDS if other != backend]
        assert described(one for one in IMPORTS if one.by(backend) and one.of(*others, *users)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    at_once = {one for one in IMPORTS if one.when is When.AT_ONCE}
    assert circles(graph_of(at_once, SOURCES)) == []


def test_imports_inside_functions_close_no_circle() -> None:
    assert circles(graph_of(IMPORTS, SOURCES)) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    assert circles(folders_of(graph_of(IMPORTS, SOURCES), roots=AREAS)) == []


def test_the_client_needs_torch_only_where_torch_is_asked_for() -> None:
    assert importers("torch", of="lovasz.client", when=When.AT_ONCE) == {
        "lovasz.client.adapters",
        "lovasz.client.device_memory",
        "lovasz.client.inprocess",
        "lovasz.client.torch",
    }
    assert importers("torch", of="lovasz.client", when=When.LAZILY) == {
        "lovasz.client.joint",
        "lovasz.client.tensors",
    }
    assert importers("lovasz.client.adapters", "lovasz.client.torch") == set()


def test_device_memory_is_loaded_only_where_it_is_used() -> None:
    assert importers("cuda") == importers("cuda", when=When.LAZILY) == {"lovasz.device_memory.cuda"}
    assert importers("lovasz.client.device_memory", when=When.AT_ONCE) == set()
    assert importers("lovasz.client.device_memory", when=When.LAZILY) == {"lovasz.client.devices"}
    assert importers("torch", of="lovasz.device_memory", when=When.AT_ONCE) == set()


def test_spec_needs_torch_only_to_add_over_ranks() -> None:
    assert importers("torch", of="lovasz.spec") == importers("torch", of="lovasz.spec", when=When.LAZILY)
    assert importers("torch", of="lovasz.spec") == {"lovasz.spec.iou"}


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


# --- What a module does -------------------------------------------------------------------------------------------


def test_only_commands_and_the_clients_proxy_read_the_environment() -> None:
    reads = {"environ", "environb", "getenv", "getenvb"}
    readers = {
        module
        for module, source in SOURCES.items()
        if is_inside(module, ["lovasz"])
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in reads)
        or (isinstance(node, ast.alias) and node.name in reads)
    }
    assert readers == {"lovasz.server.__main__", "lovasz.client.cli", "lovasz.client.proxy"}


def test_no_file_is_long() -> None:
    folders = ("proto", "core", "client", "server", "benchmarks", "examples", "deploy", "docs")
    lines = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    }
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


# --- What is public -----------------------------------------------------------------------------------------------

PUBLIC = {
    "lovasz.core": {
        "BinaryCrossEntropy",
        "CrossEntropy",
        "DatasetIoU",
        "InvalidInput",
        "LocalLoss",
        "LovaszHinge",
        "LovaszHingeLoss",
        "LovaszSigmoidLoss",
        "LovaszSigmoid",
        "LovaszSoftmax",
        "LovaszSoftmaxLoss",
        "Result",
        "TermResult",
        "compute",
        "lovasz_hinge",
        "lovasz_sigmoid",
        "lovasz_softmax",
    },
    "lovasz.client": {
        "AuthenticationError",
        "CallAbortedError",
        "CallCancelledError",
        "BinaryCrossEntropy",
        "CrossEntropy",
        "DatasetIoU",
        "DeadlineExceededError",
        "Device",
        "IncompatibleServerError",
        "InvalidInputError",
        "Joint",
        "JointMismatchError",
        "LossClient",
        "LossError",
        "LovaszHinge",
        "LovaszSigmoid",
        "LovaszSoftmax",
        "Result",
        "ServerFaultError",
        "ServerInfo",
        "ServerOverloadedError",
        "ServerUnavailableError",
        "TLS",
        "TLSError",
        "TermResult",
        "Timing",
    },
    "lovasz.client.adapters": {"MMSegLoss"},
    "lovasz.client.torch": {"RemoteLoss"},
    "lovasz.spec": {
        "LOSS_KINDS",
        "MAX_AXES",
        "MAX_CLASSES",
        "MAX_IMAGE_LOSSES",
        "MAX_TERMS",
        "BinaryCrossEntropy",
        "CrossEntropy",
        "DatasetIoU",
        "InvalidInput",
        "Layout",
        "Loss",
        "LossLike",
        "LovaszHinge",
        "LovaszSigmoid",
        "LovaszSoftmax",
        "Result",
        "TermResult",
        "Timing",
        "WeightedSum",
        "weighted_sum",
    },
}


@pytest.mark.parametrize("module", PUBLIC)
def test_these_names_are_public(module: str) -> None:
    public = importlib.import_module(module)
    assert set(public.__all__) == PUBLIC[module]
    assert PUBLIC[module] <= set(dir(public))


def test_what_both_sides_export_is_the_same_thing() -> None:
    core, client, spec = (importlib.import_module(f"lovasz.{name}") for name in ("core", "client", "spec"))
    shared = PUBLIC["lovasz.client"] & PUBLIC["lovasz.spec"]
    assert all(getattr(client, name) is getattr(spec, name) for name in shared)
    assert all(getattr(core, name) is getattr(spec, name) for name in PUBLIC["lovasz.core"] & PUBLIC["lovasz.spec"])


def test_a_server_can_be_launched_from_python() -> None:
    from lovasz.server.launch import ServerProcess

    assert list(inspect.signature(ServerProcess).parameters) == ["arguments"]
    assert {"target", "targets", "metrics_url", "pid", "log"} <= set(vars(ServerProcess()))
    assert callable(ServerProcess.stop)


def test_two_commands_are_installed() -> None:
    commands = {point.name: point for point in distribution("lovasz").entry_points if point.group == "console_scripts"}
    assert {name: point.value for name, point in commands.items()} == {
        "lovasz": "lovasz.client.cli:main",
        "lovasz-server": "lovasz.server.__main__:main",
    }
    assert all(callable(point.load()) for point in commands.values())
