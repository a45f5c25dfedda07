"""What travels: every description and tensor survives the way, what does not fit is refused; and who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lovasz import spec, wire
from lovasz.spec import CrossEntropy, InvalidInput, LovaszHinge, LovaszSoftmax, WeightedSum, weighted_sum
from lovasz.v1 import loss_pb2 as pb

untimed = settings(deadline=None)

# --- Descriptions of losses ---------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
class_weights = st.none() | st.lists(st.floats(0, 1e300), min_size=1, max_size=4)
ignore_index = st.none() | st.integers(-(2**63), 2**63 - 1)
listed_classes = st.lists(st.integers(0, spec.MAX_CLASSES - 1), min_size=1, max_size=5, unique=True)


def lovasz_softmax(input_kind: spec.Input) -> st.SearchStrategy[LovaszSoftmax]:
    classes = st.sampled_from(["present", "all"]) | listed_classes
    return st.builds(LovaszSoftmax, classes, class_weights, st.booleans(), ignore_index, st.just(input_kind))


cross_entropy = st.builds(CrossEntropy, class_weights, ignore_index, st.floats(0, 1))


def hinge(multilabel: bool) -> st.SearchStrategy[LovaszHinge]:
    return st.builds(LovaszHinge, st.booleans(), ignore_index, st.just(multilabel))


losses = st.one_of(
    st.lists(st.tuples(finite, terms), min_size=1, max_size=spec.MAX_TERMS).map(weighted_sum)
    for terms in (
        lovasz_softmax("logits") | cross_entropy,
        lovasz_softmax("probabilities"),
        hinge(multilabel=False),
        hinge(multilabel=True),
    )
)


@untimed
@given(losses)
def test_every_loss_survives_protobuf(loss: WeightedSum) -> None:
    sent = wire.loss_to_proto(loss).SerializeToString()
    assert wire.loss_from_proto(pb.Loss.FromString(sent)) == loss


@pytest.mark.parametrize("loss", [LovaszSoftmax(), LovaszHinge(), CrossEntropy()], ids=lambda loss: loss.kind)
@pytest.mark.parametrize("value", [None, 0], ids=["none", "zero"])
def test_no_ignore_index_is_not_label_0(loss: spec.Loss, value: int | None) -> None:
    described = weighted_sum(replace(loss, ignore_index=value))
    sent = wire.loss_to_proto(described).SerializeToString()
    ((_, received),) = wire.loss_from_proto(pb.Loss.FromString(sent)).terms
    assert received.ignore_index == value


def softmax_term(**changes: Any) -> pb.Loss:
    fields = {"class_selection": pb.CLASS_SELECTION_PRESENT, "input": pb.INPUT_KIND_LOGITS, **changes}
    return pb.Loss(terms=[pb.Term(weight=1, lovasz_softmax=pb.LovaszSoftmax(**fields))])


def test_the_message_that_the_refusals_start_from_is_good() -> None:
    assert wire.loss_from_proto(softmax_term()) == weighted_sum(LovaszSoftmax())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Loss(), "loss.terms: got 0 terms; expected 1 to 16"),
        (pb.Loss(terms=[pb.Term(weight=1)] * 17), "loss.terms: got 17 terms; expected 1 to 16"),
        (pb.Loss(terms=[pb.Term(weight=1)]), "loss.terms[0].loss: is not set, or is of a kind"),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_UNSPECIFIED),
            "lovasz_softmax.class_selection: got CLASS_SELECTION_UNSPECIFIED; expected CLASS_SELECTION_PRESENT",
        ),
        (softmax_term(class_selection=99), "lovasz_softmax.class_selection: got 99; expected"),
        (
            softmax_term(input=pb.INPUT_KIND_UNSPECIFIED),
            "lovasz_softmax.input: got INPUT_KIND_UNSPECIFIED; expected INPUT_KIND_LOGITS or",
        ),
        (softmax_term(input=99), "lovasz_softmax.input: got 99; expected"),
        (
            softmax_term(listed_classes=[1, 2]),
            "lovasz_softmax.listed_classes: got [1, 2] beside CLASS_SELECTION_PRESENT; expected none",
        ),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_ALL, listed_classes=[0]),
            "lovasz_softmax.listed_classes: got [0] beside CLASS_SELECTION_ALL; expected none",
        ),
        (softmax_term(class_selection=pb.CLASS_SELECTION_LISTED), "classes: got an empty list"),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_LISTED, listed_classes=[3, 3]),
            "classes: got [3, 3]; expected each class once",
        ),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_LISTED, listed_classes=[-1]),
            "classes: got -1; expected class numbers >= 0",
        ),
        (softmax_term(class_weights=[1, -1]), "class_weights[1]: got -1.0; expected a number >= 0"),
        (softmax_term(class_weights=[float("inf")]), "class_weights[0]: got inf; expected a finite number"),
        (
            pb.Loss(terms=[pb.Term(weight=float("nan"), lovasz_hinge=pb.LovaszHinge())]),
            "got nan; expected a finite number",
        ),
        (
            pb.Loss(terms=[pb.Term(weight=1, cross_entropy=pb.CrossEntropy(label_smoothing=1.5))]),
            "label_smoothing: got 1.5; expected a number in [0, 1]",
        ),
        (
            pb.Loss(
                terms=[
                    pb.Term(weight=1, lovasz_hinge=pb.LovaszHinge()),
                    pb.Term(weight=1, cross_entropy=pb.CrossEntropy()),
                ]
            ),
            "loss: LovaszHinge stands beside a softmax loss",
        ),
    ],
)
def test_a_loss_that_cannot_be_is_refused(message: pb.Loss, text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        wire.loss_from_proto(pb.Loss.FromString(message.SerializeToString()))
    assert text in str(refused.value)


# --- Element types ------------------------------------------------------------------------------------------------


def test_the_table_of_element_types() -> None:
    table = {dtype.name: (dtype.number, dtype.itemsize, dtype.is_float) for dtype in wire.DTYPES}
    assert table == {
        "float32": (pb.DATA_TYPE_FLOAT32, 4, True),
        "float16": (pb.DATA_TYPE_FLOAT16, 2, True),
        "bfloat16": (pb.DATA_TYPE_BFLOAT16, 2, True),
        "uint8": (pb.DATA_TYPE_UINT8, 1, False),
        "int16": (pb.DATA_TYPE_INT16, 2, False),
        "int32": (pb.DATA_TYPE_INT32, 4, False),
        "int64": (pb.DATA_TYPE_INT64, 8, False),
    }
    assert {dtype.number for dtype in wire.DTYPES} == set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}


@pytest.mark.parametrize("dtype", wire.DTYPES, ids=lambda dtype: dtype.name)
def test_elements_are_little_endian_and_found_by_name(dtype: wire.DType) -> None:
    assert wire.dtype_named(dtype.name) is dtype
    assert dtype.numpy == dtype.numpy.newbyteorder("<")
    if dtype.name != "bfloat16":  # which numpy does not know
        assert dtype.numpy == np.dtype(dtype.name)


def test_float64_is_no_element_type_of_the_wire() -> None:
    with pytest.raises(KeyError):
        wire.dtype_named("float64")


# --- Headers of requests ------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> wire.TensorSpec:
    return wire.TensorSpec(wire.dtype_named(dtype), shape)


def received(request: wire.Request) -> wire.Request:
    return wire.Request.from_proto(pb.RequestHeader.FromString(request.to_proto().SerializeToString()))


@untimed
@given(
    st.sampled_from(wire.FLOATS),
    st.sampled_from(wire.INTEGERS),
    st.lists(st.integers(1, 2**20), min_size=1, max_size=6),
    st.integers(2, spec.MAX_CLASSES),
    st.booleans(),
)
def test_every_header_survives_protobuf(
    float_type: str, integer_type: str, sizes: list[int], classes: int, want_grad: bool
) -> None:
    logits, labels = tensor(float_type, sizes[0], classes, *sizes[1:]), tensor(integer_type, *sizes)
    request = wire.Request.checked(weighted_sum(CrossEntropy()), logits, labels, want_grad)
    assert received(request) == request


def header(loss: spec.Loss | None = None, **changes: pb.TensorInfo) -> pb.RequestHeader:
    """A good header for logits (2, 3, 4), with other tensors in it."""
    fields = {"logits": tensor("float32", 2, 3, 4).to_proto(), "labels": tensor("uint8", 2, 4).to_proto(), **changes}
    return pb.RequestHeader(loss=wire.loss_to_proto(weighted_sum(loss or LovaszSoftmax())), **fields)


def test_the_header_that_the_refusals_start_from_is_good() -> None:
    assert wire.Request.from_proto(header()).layout == spec.Layout(2, 3, 4, label_values=3)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.RequestHeader(), "loss.terms: got 0 terms"),
        (header(logits=pb.TensorInfo()), "logits.data_type: got DATA_TYPE_UNSPECIFIED; expected a type"),
        (header(labels=pb.TensorInfo()), "labels.data_type: got DATA_TYPE_UNSPECIFIED; expected a type"),
        (header(logits=pb.TensorInfo(data_type=99, shape=[2, 3, 4])), "logits.data_type: got 99; expected a type"),
        (header(logits=tensor("int32", 2, 3, 4).to_proto()), "logits: got element type int32; expected one of float32"),
        (header(labels=tensor("float16", 2, 4).to_proto()), "labels: got element type float16; expected one of uint8"),
        (header(labels=tensor("uint8", 2, 5).to_proto()), "labels: got shape (2, 5) for logits (2, 3, 4); expected"),
        (header(logits=tensor("float32", 2, -3, 4).to_proto()), "logits: got shape (2, -3, 4); expected sizes >= 1"),
        (header(logits=tensor("float32").to_proto()), "logits: got shape (); expected (N, C, *spatial)"),
        (
            header(logits=tensor("float32", 0, 3, 4).to_proto(), labels=tensor("uint8", 0, 4).to_proto()),
            "logits: got shape (0, 3, 4), which holds no element",
        ),
        (
            header(logits=tensor("float32", *[1] * 17).to_proto(), labels=tensor("uint8", *[1] * 16).to_proto()),
            "logits: got 17 axes; expected at most 16",
        ),
        (
            header(logits=tensor("float32", 1, 65_537).to_proto(), labels=tensor("uint8", 1).to_proto()),
            "logits: got 65537 channels; expected at most 65536",
        ),
        (header(LovaszSoftmax(classes=[3])), "classes: got class 3; expected class numbers in [0, 3)"),
        (header(CrossEntropy(class_weights=[1.0])), "class_weights: got 1 numbers; expected 3, one a class"),
        (header(LovaszHinge()), "labels: got shape (2, 4) for hinge logits (2, 3, 4); expected (2, 3, 4)"),
    ],
)
def test_a_header_that_cannot_be_is_refused(message: pb.RequestHeader, text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        wire.Request.from_proto(pb.RequestHeader.FromString(message.SerializeToString()))
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("size", "elements"), [(2**29, 2**60), (2**62, 2**126)], ids=["2^60 elements", "2^126 elements"]
)
def test_absurd_sizes_are_counted_exactly_and_allocate_nothing(size: int, elements: int) -> None:
    shape = (size, 4, size)
    message = header(logits=tensor("float32", *shape).to_proto(), labels=tensor("int64", size, size).to_proto())
    tracemalloc.start()
    try:
        request = wire.Request.from_proto(message)
        assert request.layout.elements == elements
        assert request.payload_bytes == 4 * elements + 8 * elements // 4
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --- Payloads -----------------------------------------------------------------------------------------------------

buffers_of_bytes = st.lists(st.binary(max_size=50), max_size=5)


@untimed
@given(buffers_of_bytes, st.integers(1, 60))
def test_chunks_are_all_the_bytes_in_order_and_none_is_too_long(buffers: list[bytes], chunk_bytes: int) -> None:
    chunks = list(wire.chunks([memoryview(buffer) for buffer in buffers], chunk_bytes))
    assert b"".join(chunks) == b"".join(buffers)
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)


@untimed
@given(buffers_of_bytes, st.lists(st.integers(0, 250), max_size=8))
def test_a_payload_cut_anywhere_comes_together(buffers: list[bytes], cuts: list[int]) -> None:
    payload = b"".join(buffers)
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    places = [bytearray(len(buffer)) for buffer in buffers]
    assembly = wire.Assembly([memoryview(place) for place in places])
    assembly.add_all(payload[start:stop] for start, stop in pairwise(edges))
    assert [bytes(place) for place in places] == buffers
    assert assembly.received == assembly.expected == len(payload)


@untimed
@given(st.binary(min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 7))
def test_a_payload_that_is_too_short_is_refused(payload: bytes, length: int, chunk_bytes: int) -> None:
    short = payload[: min(length, len(payload) - 1)]
    assembly = wire.Assembly([memoryview(bytearray(len(payload)))])
    with pytest.raises(InvalidInput, match=f"payload: got {len(short)} bytes; expected {len(payload)} as declared"):
        assembly.add_all(wire.chunks([memoryview(short)], chunk_bytes))


@untimed
@given(st.binary(max_size=20), st.binary(min_size=1, max_size=20), st.integers(1, 7))
def test_a_payload_that_is_too_long_is_refused_and_nothing_written_beyond(
    payload: bytes, more: bytes, chunk_bytes: int
) -> None:
    memory = bytearray(b"\xaa" * 100)
    assembly = wire.Assembly([memoryview(memory)[: len(payload)]])
    with pytest.raises(InvalidInput, match=rf"payload: got at least \d+ bytes; expected {len(payload)} as declared"):
        assembly.add_all(wire.chunks([memoryview(payload + more)], chunk_bytes))
    assert memory[len(payload) :] == b"\xaa" * (100 - len(payload))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_bytes_of_an_array_are_its_own_memory(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    data = wire.as_bytes(array)
    assert (data.format, data.nbytes) == ("B", array.nbytes)
    data[3] = 0x3F
    assert array.reshape(-1)[0] == 0.5


# --- Headers of answers -------------------------------------------------------------------------------------------

REQUEST = wire.Request.checked(
    weighted_sum([(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]),
    tensor("float16", 2, 3, 4),
    tensor("uint8", 2, 4),
    want_grad=True,
)


def answer(request: wire.Request = REQUEST) -> wire.Response:
    terms = (
        spec.TermResult("cross_entropy", 0.5, np.empty(0)),
        spec.TermResult("lovasz_softmax", 0.25, np.array([0.125, np.nan, 0.375])),
    )
    grad = request.logits if request.want_grad else None
    timing = spec.Timing(0.5, 0.25, 0.125, 3, 2.0, 0.0625)
    return wire.Response(0.75, terms, np.array([1, 0, 2**40]), np.array([2, 0, 2**41]), grad, 2.0**20, timing)


@pytest.mark.parametrize("want_grad", [True, False])
def test_an_answer_survives_protobuf(want_grad: bool) -> None:
    request = replace(REQUEST, want_grad=want_grad)
    sent = answer(request)
    message = pb.ResponseHeader.FromString(sent.to_proto().SerializeToString())
    got = wire.Response.from_proto(message, request)
    assert (got.loss, got.grad, got.grad_scale, got.timing) == (sent.loss, sent.grad, sent.grad_scale, sent.timing)
    for mine, theirs in zip(got.terms, sent.terms, strict=True):
        assert (mine.kind, mine.loss) == (theirs.kind, theirs.loss)
        np.testing.assert_array_equal(mine.per_class_loss, theirs.per_class_loss, strict=True)
    np.testing.assert_array_equal(got.intersection, sent.intersection, strict=True)
    np.testing.assert_array_equal(got.union, sent.union, strict=True)


def without_terms(message: pb.ResponseHeader) -> None:
    del message.terms[:]


def with_a_class_less(message: pb.ResponseHeader) -> None:
    message.terms[1].per_class_loss.pop()


def with_classes_of_cross_entropy(message: pb.ResponseHeader) -> None:
    message.terms[0].per_class_loss.extend([1.0, 1.0, 1.0])


def without_grad(message: pb.ResponseHeader) -> None:
    message.ClearField("grad")


def with_another_shape(message: pb.ResponseHeader) -> None:
    message.grad.shape[:] = [2, 4, 3]


def with_another_type(message: pb.ResponseHeader) -> None:
    message.grad.data_type = pb.DATA_TYPE_FLOAT32


def with_no_type(message: pb.ResponseHeader) -> None:
    message.grad.data_type = pb.DATA_TYPE_UNSPECIFIED


def with_scale(scale: float) -> Callable[[pb.ResponseHeader], None]:
    def change(message: pb.ResponseHeader) -> None:
        message.grad_scale = scale

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_terms, "response.terms: got 0; expected 2"),
        (with_a_class_less, "response.per_class_loss: got 2 for lovasz_softmax; expected 3"),
        (with_classes_of_cross_entropy, "response.per_class_loss: got 3 for cross_entropy; expected 0"),
        (lambda message: message.intersection.pop(), "response.intersection: got 2 counts; expected 3"),
        (lambda message: message.union.append(1), "response.union: got 4 counts; expected 3"),
        (without_grad, "response.grad: got None; expected type and shape of the logits"),
        (with_another_shape, "response.grad: got "),
        (with_another_type, "response.grad: got "),
        (with_no_type, "response.grad.data_type: got DATA_TYPE_UNSPECIFIED"),
        *((with_scale(scale), f"response.grad_scale: got {scale}; expected a power of two")
          for scale in (0.0, -2.0, 3.0, float("inf"), float("nan"))),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_refused(change: Callable[[pb.ResponseHeader], None], text: str) -> None:
    message = answer().to_proto()
    change(message)
    with pytest.raises(InvalidInput) as refused:
        wire.Response.from_proto(message, REQUEST)
    assert text in str(refused.value)


def test_a_gradient_that_was_not_wanted_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"response\.grad: got "):
        wire.Response.from_proto(answer().to_proto(), replace(REQUEST, want_grad=False))


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


def a_request(**options: Any) -> wire.Request:
    specs = wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 2)), wire.TensorSpec(wire.dtype_named("uint8"), (1, 2))
    return wire.Request.checked(spec.weighted_sum(spec.LovaszSoftmax()), *specs, want_grad=True, **options)


@pytest.mark.parametrize(
    "joint", [wire.Joint("a run", 0, 0, 1), wire.Joint("ü" * 200, (1 << 63) - 1, 65_535, 65_536, bytes(64))]
)
def test_a_joint_request_comes_out_as_it_went_in(joint: wire.Joint) -> None:
    request = a_request(joint=joint, run="its name")
    assert wire.Request.from_proto(pb.RequestHeader.FromString(request.to_proto().SerializeToString())) == request
    assert wire.Request.from_proto(a_request().to_proto()).joint is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"run": ""}, "joint.run: got ''; expected 1 to 200 characters"),
        ({"run": "x" * 201}, "expected 1 to 200 characters"),
        ({"world_size": 0}, r"joint.world_size: got 0; expected 1 to 65536"),
        ({"world_size": 65_537}, r"joint.world_size: got 65537; expected 1 to 65536"),
        ({"rank": 4}, r"joint.rank: got 4; expected a rank in \[0, 4\)"),
        ({"rank": -1}, r"joint.rank: got -1; expected a rank in \[0, 4\)"),
        ({"step": -1}, "joint.step: got -1; expected a 64-bit number >= 0"),
        ({"step": True}, "joint.step: got True; expected an integer"),
        ({"call": bytes(65)}, "joint.call: got 65 bytes; expected at most 64"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(spec.InvalidInput, match=said):
        wire.Joint(**{"run": "r", "step": 0, "rank": 0, "world_size": 4, **values})


def test_the_name_of_a_run_is_bounded() -> None:
    with pytest.raises(spec.InvalidInput, match="run: got 201 characters; expected at most 200"):
        a_request(run="x" * 201)


def test_only_the_transport_of_the_server_imports_grpc() -> None:
    modules = importers(*GRPC, of=("lovasz.server",))
    assert modules
    assert {module.rpartition(".")[0] for module in modules} == {"lovasz.server.transport"}


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
