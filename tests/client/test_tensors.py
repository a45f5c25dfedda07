"""Arrays of numpy and torch: what goes over the wire is their values, without a copy where none is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign import FOREIGN

from lovasz import spec, wire
from lovasz.client.tensors import Outgoing, decode_grad, encode_labels, encode_logits
from lovasz.spec import InvalidInput
from lovasz.spec.arrays import is_torch

Numpy = npt.NDArray[Any]


def on_the_wire(host: Outgoing) -> Numpy:
    """The elements as a server reads them."""
    array = host.array()
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (host.spec.dtype.numpy, host.spec.shape, True)
    return array


def normal(dtype: npt.DTypeLike = np.float32) -> Numpy:
    return np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(dtype)


def in_records(array: Numpy) -> Numpy:
    """The same values, not aligned, as a field of packed records."""
    records = np.zeros(array.shape, [("before", np.uint8), ("value", array.dtype)])
    records["value"] = array
    return records["value"]


LAYOUTS: dict[str, Callable[[Numpy], Numpy]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(3, 1, 0, 2),
    "negative strides": lambda x: x[::-1, :, ::-1],
    "every second": lambda x: x[:, :, ::2, 1::2],
    "broadcast": lambda x: np.broadcast_to(x, (7, *x.shape)),
    "fortran": np.asfortranarray,
    "field of records": lambda x: in_records(x),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}
each_layout = pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())


# --- Logits -------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize(
    ("dtype", "wire_dtype"), [("float32", "float32"), ("float16", "float16"), ("float64", "float32")]
)
def test_numpy_logits_keep_their_values(lay_out: Callable[[Numpy], Numpy], dtype: str, wire_dtype: str) -> None:
    logits = lay_out(normal(dtype))
    before = logits.copy()
    host = encode_logits(logits)
    assert (host.spec.dtype.name, host.spec.shape) == (wire_dtype, logits.shape)
    np.testing.assert_array_equal(on_the_wire(host), logits.astype(wire_dtype))
    np.testing.assert_array_equal(logits, before, strict=True)


@pytest.mark.parametrize("lay_out", [lay_out for name, lay_out in LAYOUTS.items() if name != "big-endian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_torch_logits_keep_their_values(lay_out: Callable[[Numpy], Numpy], dtype: torch.dtype) -> None:
    positions = lay_out(np.arange(normal().size).reshape(normal().shape))
    logits = torch.from_numpy(normal()).to(dtype).flatten()[torch.from_numpy(positions.copy())]
    logits = logits.transpose(0, -1).contiguous().transpose(0, -1)
    assert not logits.is_contiguous()
    host = encode_logits(logits.requires_grad_())
    received = on_the_wire(host)
    if dtype == torch.bfloat16:
        received = (received.astype(np.uint32) << 16).view(np.float32)
    assert host.spec.shape == logits.shape
    assert host.spec.dtype.name == ("float32" if dtype == torch.float64 else str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(received, logits.detach().float().numpy())


def test_bfloat16_of_numpy_keeps_its_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = normal().astype(ml_dtypes.bfloat16)[:, :, ::-1]
    host = encode_logits(logits)
    assert host.spec.dtype.name == "bfloat16"
    np.testing.assert_array_equal(on_the_wire(host), np.ascontiguousarray(logits).view(np.uint16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("writeable", [True, False], ids=["writeable", "read-only"])
def test_contiguous_numpy_logits_are_not_copied(dtype: str, writeable: bool) -> None:
    logits = normal(dtype)
    logits.flags.writeable = writeable
    host = encode_logits(logits)
    assert np.shares_memory(on_the_wire(host), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_contiguous_torch_logits_are_not_copied(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    assert np.shares_memory(on_the_wire(encode_logits(logits)), logits.detach().view(torch.uint8).numpy())


def test_a_sign_that_torch_has_put_off_is_there() -> None:
    logits = torch.tensor([[1 + 2j, 3 - 4j]]).conj().imag
    assert logits.is_neg()
    assert on_the_wire(encode_logits(logits)).tolist() == [[-2, 4]]


# --- Labels -------------------------------------------------------------------------------------------------------

EDGES = [
    0,
    1,
    -1,
    -100,
    127,
    -128,
    255,
    256,
    2**15 - 1,
    2**15,
    -(2**15),
    2**31 - 1,
    2**31,
    -(2**31),
    2**63 - 1,
    -(2**63),
]
label_values = st.lists(st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)
INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def fits(values: list[int], dtype: str) -> bool:
    return np.iinfo(dtype).min <= min(values) and max(values) <= np.iinfo(dtype).max


@settings(deadline=None)
@given(label_values, st.booleans())
def test_labels_are_narrowed_to_the_smallest_type_and_keep_their_values(values: list[int], as_torch: bool) -> None:
    labels = torch.tensor(values) if as_torch else np.array(values, np.int64)
    host = encode_labels(labels)
    assert on_the_wire(host).tolist() == values
    assert host.spec.dtype.name == next(name for name in wire.INTEGERS if fits(values, name))


@settings(deadline=None)
@given(st.sampled_from(INTEGER_TYPES), st.data(), st.sampled_from(["<", ">"]))
def test_every_integer_type_keeps_its_values(dtype: str, data: st.DataObject, order: str) -> None:
    limits = np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(limits.min, min(limits.max, 2**63 - 1)), min_size=1, max_size=5))
    labels = np.array(values, np.dtype(dtype).newbyteorder(order))
    assert on_the_wire(encode_labels(labels)).tolist() == values


@each_layout
@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool"])
def test_labels_of_any_layout_keep_their_values(lay_out: Callable[[Numpy], Numpy], dtype: str) -> None:
    labels = lay_out((normal() > 0).astype(dtype))
    host = encode_labels(labels)
    assert (host.spec.dtype.name, host.spec.shape) == ("uint8", labels.shape)
    np.testing.assert_array_equal(on_the_wire(host), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_torch_labels_of_every_type_keep_their_values(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype).t()
    host = encode_labels(labels)
    assert host.spec == wire.TensorSpec(wire.dtype_named("uint8"), (3, 2))
    assert on_the_wire(host).tolist() == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
@each_layout
def test_float_labels_become_integers(lay_out: Callable[[Numpy], Numpy], dtype: str) -> None:
    labels = lay_out(np.round(normal() * 100).astype(dtype))
    for same in (labels, torch.tensor(labels.astype(labels.dtype.newbyteorder("=")))):
        host = encode_labels(same)
        assert (host.spec.dtype.name, host.spec.shape) == ("int16", labels.shape)
        np.testing.assert_array_equal(on_the_wire(host), labels)


def test_bfloat16_labels_are_read_by_their_values() -> None:
    labels = torch.tensor([[0.0, 1.0, 255.0, -100.0]], dtype=torch.bfloat16)
    assert on_the_wire(encode_labels(labels)).tolist() == [[0, 1, 255, -100]]


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint32", ">i4"])
@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
def test_many_labels_keep_their_values(dtype: str, as_torch: bool) -> None:
    labels: Any = (np.arange(2 * 40_000).reshape(2, 40_000) % 200).astype(dtype)[:, ::-1]
    host = encode_labels(torch.from_numpy(labels.astype(labels.dtype.newbyteorder("="))) if as_torch else labels)
    assert host.spec.dtype.name == "uint8"
    np.testing.assert_array_equal(on_the_wire(host), labels)


@pytest.mark.parametrize("framework", FOREIGN)
def test_arrays_of_other_frameworks_keep_their_values(framework: type) -> None:
    logits, labels = normal(), (normal() > 0).astype(np.int32)
    np.testing.assert_array_equal(on_the_wire(encode_logits(framework(logits))), logits)
    np.testing.assert_array_equal(on_the_wire(encode_labels(framework(labels))), labels)


@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_labels_of_a_byte_are_not_copied(dtype: str) -> None:
    labels = np.zeros((2, 3), dtype)
    labels.flags.writeable = False
    assert np.shares_memory(on_the_wire(encode_labels(labels)), labels)


def test_a_label_beyond_64_signed_bits_is_refused() -> None:
    with pytest.raises(InvalidInput, match=f"labels: got a value of {2**63}; expected 64-bit signed integers"):
        encode_labels(np.array([0, 2**63], np.uint64))


# --- Wrong kinds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [encode_logits, encode_labels])
@pytest.mark.parametrize("value", [[[1.0, 2.0]], None, 3.0, "text", memoryview(b"1234"), np.float32(1)], ids=type)
def test_what_is_no_array_is_refused(encode: Callable[[Any], Outgoing], value: object) -> None:
    with pytest.raises(
        InvalidInput, match=f"got {type(value).__name__}; expected a numpy array, a torch tensor, or an"
    ):
        encode(value)


@pytest.mark.parametrize(
    ("logits", "name"),
    [
        (np.zeros((1, 2), np.int64), "int64"),
        (np.zeros((1, 2), bool), "bool"),
        (np.zeros((1, 2), np.complex64), "complex64"),
        (np.zeros((1, 2), object), "object"),
        (np.zeros((1, 2), np.uint16), "uint16"),
        (torch.zeros(1, 2, dtype=torch.int16), "int16"),
        (torch.zeros(1, 2, dtype=torch.complex64), "complex64"),
        (torch.zeros(1, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_logits_that_are_no_floats_of_the_wire_are_refused(logits: Any, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"logits: got .*{name}"):
        encode_logits(logits)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (np.zeros((1, 2), np.complex64), "complex64"),
        (np.zeros((1, 2), np.longdouble), np.dtype(np.longdouble).name),
        (np.zeros((1, 2), object), "object"),
        (np.array([["a"]]), "str"),
        (np.zeros((1, 2), "datetime64[s]"), "datetime64"),
        (torch.zeros(1, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_labels_that_are_no_integers_are_refused(labels: Any, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"labels: got element type {name}.*; expected integers, bool, or floats"):
        encode_labels(labels)


def test_tensors_without_values_in_memory_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"logits: got a tensor of layout torch\.sparse_coo; expected a dense one"):
        encode_logits(torch.eye(2).to_sparse())
    with pytest.raises(InvalidInput, match="labels: got a tensor on the device meta, which has no values"):
        encode_labels(torch.zeros(1, 2, device="meta"))


def test_tensors_are_told_from_arrays() -> None:
    assert is_torch(torch.zeros(1))
    assert is_torch(torch.nn.Parameter(torch.zeros(1)))
    assert not is_torch(np.zeros(1))
    assert not is_torch([0.0])


# --- Gradients ----------------------------------------------------------------------------------------------------


def response(dtype: str, shape: tuple[int, ...], grad_scale: float = 1.0) -> wire.Response:
    grad = wire.TensorSpec(wire.dtype_named(dtype), shape)
    return wire.Response(0.5, (), np.empty(0), np.empty(0), grad, grad_scale, spec.Timing(0.0, 0.0, 0.0, 1))


TRUE_GRAD = np.array([[1.5, -(2.0**-30), 0.0]])


def sent(dtype: str, scale: float) -> Numpy:
    scaled = TRUE_GRAD * scale
    return (scaled.astype("<f4").view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else scaled.astype(dtype)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1.0), ("bfloat16", 1.0), ("float16", 2.0**12)])
@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
def test_gradients_come_back_true_and_in_float32(dtype: str, scale: float, as_torch: bool) -> None:
    logits: Any = torch.zeros(1, 3, dtype=getattr(torch, dtype)) if as_torch else np.zeros((1, 3), np.float32)
    grad = decode_grad(sent(dtype, scale), response(dtype, (1, 3), scale), logits)
    assert type(grad) is type(logits)
    assert grad.dtype == (torch.float32 if as_torch else np.float32)
    assert grad.tolist() == TRUE_GRAD.tolist()


def test_gradients_of_float64_logits_are_float64() -> None:
    received = sent("float32", 1.0)
    of_numpy = decode_grad(received, response("float32", (1, 3)), np.zeros((1, 3)))
    of_torch = decode_grad(received, response("float32", (1, 3)), torch.zeros(1, 3, dtype=torch.float64))
    assert of_numpy.dtype == np.float64
    assert of_torch.dtype == torch.float64
    assert of_numpy.tolist() == of_torch.tolist() == TRUE_GRAD.tolist()


def test_float32_gradients_are_not_copied_and_may_be_written_to() -> None:
    received = sent("float32", 1.0)
    assert np.shares_memory(decode_grad(received, response("float32", (1, 3)), np.zeros((1, 3), np.float32)), received)
    of_torch = decode_grad(received, response("float32", (1, 3)), torch.zeros(1, 3))
    assert np.shares_memory(of_torch.numpy(), received)
    of_torch.mul_(2)
    assert received[0, 0] == 3
