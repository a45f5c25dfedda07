"""Numpy arrays and torch tensors: their form on the wire, writing them there, and reading gradients from there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lovasz import wire
from lovasz.spec import InvalidInput, WeightedSum
from lovasz.spec.arrays import PART_ELEMENTS, check_dense, is_torch, numpy_array, parts
from lovasz.spec.labels import FLOAT_TYPES, too_large, whole_numbers, wrong_type
from lovasz.spec.validity import masked

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = PART_ELEMENTS
"""So many labels are converted by NumPy as fast as by torch, and NumPy takes less time to begin."""

HOST = "cpu"
"""Torch's name for the host as a device."""
_LOGITS = {"float64": wire.dtype_named("float32"), **{name: wire.dtype_named(name) for name in wire.FLOATS}}
"""The type on the wire for the dtype of logits, by its name."""
_LABELS = tuple(
    (dtype, int(np.iinfo(dtype.name).min), int(np.iinfo(dtype.name).max)) for dtype in wire.DTYPES if not dtype.is_float
)
"""The types of labels on the wire with their least and their largest value, the smallest type first."""
_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NOT_OF_TORCH = ("uint16", "uint32", "uint64")
"""torch supports few operations on these."""

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
AnyArray: TypeAlias = Any
"""What callers pass: an ``Array``, or an array of another framework, read by ``__array__`` or DLPack."""


def on_device(array: npt.NDArray[Any], device: str) -> torch.Tensor:
    """A copy of an array as a tensor on a device.

    Raises:
        ValueError: there is no such device, or no torch.
    """
    try:
        import torch

        return torch.from_numpy(array).to(device)
    except (ModuleNotFoundError, RuntimeError, AssertionError) as error:  # Of many kinds: no driver, no CUDA in torch.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {device!r}; expected one that torch has here ({reason})") from None


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be sent.

    Attributes:
        dtype: its element type on the wire.
        source: its elements: an array (numpy's bfloat16 and torch's as 16-bit words) if they are on the host, else a
            tensor.
        name: the name of their dtype there.
        original: what the caller passed, as an array or as a tensor without a graph.
    """

    dtype: wire.DType
    source: Array
    name: str
    original: Array

    @property
    def spec(self) -> wire.TensorSpec:
        """Its element type and shape on the wire."""
        return wire.TensorSpec(self.dtype, tuple(self.source.shape))

    def in_place(self) -> npt.NDArray[Any] | None:
        """The source itself, if it is on the host in the wire's form; None if not."""
        array = self.source
        if not isinstance(array, np.ndarray) or self.name != self.dtype.name:
            return None
        return array if array.flags.c_contiguous and array.dtype == self.dtype.numpy else None

    def array(self) -> npt.NDArray[Any]:
        """The elements in the wire's form; copied only if necessary."""
        array = self.in_place()
        if array is None:
            array = np.empty(self.source.shape, self.dtype.numpy)
            self.write(array)
        return array

    def write(self, place: npt.NDArray[Any]) -> None:
        """Copies the elements into an array that has the wire's dtype and the tensor's shape."""
        if isinstance(self.source, np.ndarray):
            for target, source in parts(place, self.source):
                self._write_part(target, source)
        else:
            _copy(self.source, _as_torch(place, self.dtype.name))

    def _write_part(self, place: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
        is_small = not self.dtype.is_float and source.size <= _BLOCK_ELEMENTS
        if is_small or self.name == self.dtype.name:
            place[...] = source
            return
        tensor = None if self.name in _NOT_OF_TORCH else _as_torch(source, self.name)
        if tensor is None:
            _write_with_numpy(source, self.name, place, self.dtype)
        else:
            _copy(tensor, _as_torch(place, self.dtype.name))

    def write_tensor(self, place: torch.Tensor) -> None:
        """Queues a copy of the elements into a tensor on any device, of the wire's dtype and the tensor's shape."""
        import torch

        source: Any = self.source
        if isinstance(source, np.ndarray):
            array = self.array()
            source = _as_torch(array, self.dtype.name)
            if source is None:
                source = torch.tensor(array)
        elif source.is_cuda:
            source = source.to(place.device)  # Another GPU's kernels cannot write to a region.
        place.copy_(source)


def encode_logits(logits: AnyArray, wire_dtype: wire.DType | None = None) -> Outgoing:
    """Logits to be sent: as ``wire_dtype``, or by default in their own dtype (float64 as float32).

    Raises:
        InvalidInput: they have another dtype, or are not an array.
    """
    original, name = _detached("logits", logits)
    dtype = _LOGITS.get(name)
    if dtype is None:
        raise InvalidInput("logits", f"got dtype {name}; expected one of {', '.join(wire.FLOATS)}, float64")
    return Outgoing(wire_dtype or dtype, _read(original, name), name, original)


def encode_labels(labels: AnyArray, *, narrow: bool = True) -> Outgoing:
    """Labels to be sent: integers, bool or whole numbers, in the smallest type of the wire that holds their values.

    Args:
        labels: an array, or a tensor on any device.
        narrow: False: in their own type, if it is one of the wire's: then their values are not looked at.

    Raises:
        InvalidInput: they have another dtype, are not an array, or a value is not whole or beyond 64 signed bits.
    """
    original, name = _detached("labels", labels)
    if name not in _INTEGERS and name != "bool" and name not in FLOAT_TYPES:
        raise wrong_type(name)
    source = _read(original, name)
    if name == "bool":
        source, name = source.view(np.uint8) if isinstance(source, np.ndarray) else source.byte(), "uint8"
    elif name in FLOAT_TYPES:
        source, name = whole_numbers(_as_float(source, name)), "int64"
    elif name in _NOT_OF_TORCH and not isinstance(source, np.ndarray):
        source = source.cpu().numpy()
    if not narrow and name in wire.INTEGERS:
        return Outgoing(wire.dtype_named(name), source, name, original)
    low, high = (0, 0) if name == "uint8" else _extremes(source)
    for dtype, least, most in _LABELS:
        if least <= low and high <= most:
            return Outgoing(dtype, source, name, original)
    raise too_large(high)


def with_mask(logits: AnyArray, labels: AnyArray, valid: AnyArray, loss: WeightedSum) -> tuple[Array, WeightedSum]:
    """Labels that are void where ``valid`` is false, and the loss that ignores them.

    Raises:
        InvalidInput: see :func:`lovasz.spec.validity.masked`.
    """
    scores = logits if is_torch(logits) else numpy_array("logits", logits)
    targets = labels if is_torch(labels) else numpy_array("labels", labels)
    return masked(scores.shape, targets, valid, loss)


def _detached(field: str, value: AnyArray) -> tuple[Array, str]:
    """The value as an array or as a tensor without a graph, and the name of its dtype."""
    if type(value) is not np.ndarray and is_torch(value):
        check_dense(field, value)
        return value.detach(), _name(value.dtype)
    array = numpy_array(field, value)
    return array, _name(array.dtype)


@lru_cache(maxsize=64)
def _name(dtype: np.dtype[Any] | torch.dtype) -> str:
    """The name of a dtype, which NumPy puts together each time. Its "bfloat16" comes from the package ml_dtypes."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _read(original: Array, name: str) -> Array:
    """The same memory as an array (bfloat16 as 16-bit words) if it is on the host; else the tensor itself.

    Conversions of arrays use the calling thread only; see _copy.
    """
    if isinstance(original, np.ndarray):
        return original.view(np.uint16) if name == "bfloat16" else original
    tensor = original.resolve_neg()
    if tensor.device.type != HOST:
        return tensor
    if name == "bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _as_float(values: Array, name: str) -> Array:
    """Values of a float type as float32 or float64."""
    if not isinstance(values, np.ndarray):
        return values.float() if name in ("float16", "bfloat16") else values
    if name == "bfloat16":
        return _widened(values)
    return values.astype(np.float32) if name == "float16" else values


def _as_torch(array: npt.NDArray[Any], dtype: str) -> Any:
    """The same memory as a tensor; None if torch is not loaded, or cannot take the array."""
    torch = sys.modules.get("torch")
    if torch is None or not array.flags.writeable or not array.dtype.isnative:
        return None
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):  # Reversed; or a field of records.
        return None
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _copy(source: torch.Tensor, target: torch.Tensor, factor: float = 1.0) -> None:
    """Copies and converts elements, times ``factor``.

    In small blocks, so that torch uses the calling thread only: its other threads would keep spinning afterwards, on
    cores that a server on this machine needs.
    """
    if source.device.type != "cpu" or not source.is_contiguous():
        target.copy_(source)
        return
    source, target = source.view(-1), target.view(-1)
    for start in range(0, len(source), _BLOCK_ELEMENTS):
        block = target[start : start + _BLOCK_ELEMENTS]
        block.copy_(source[start : start + _BLOCK_ELEMENTS])
        if factor != 1:
            block.mul_(factor)


def _write_with_numpy(source: npt.NDArray[Any], name: str, place: npt.NDArray[Any], dtype: wire.DType) -> None:
    if not dtype.is_float:
        place[...] = source
        return
    values = _widened(source) if name == "bfloat16" else source
    with np.errstate(over="ignore"):  # A value beyond float16 becomes infinite, and so the loss NaN.
        if dtype.name != "bfloat16":
            np.copyto(place, values, casting="same_kind")
            return
        # Rounds to nearest, ties to even, like torch.
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    np.copyto(place, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16, casting="unsafe")
    place[np.isnan(bits.view(np.float32))] = 0x7FC0


def _extremes(labels: Array) -> tuple[int, int]:
    if 0 in labels.shape:
        return 0, 0
    if isinstance(labels, np.ndarray):  # As labels.min() and labels.max(), which are slow to begin.
        return int(np.minimum.reduce(labels, axis=None)), int(np.maximum.reduce(labels, axis=None))
    low, high = labels.aminmax()
    return int(low), int(high)


def _widened(words: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 words as float32: the lower 16 bits are 0."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def decode_grad(
    sent: Array,
    response: wire.Response,
    logits: Array,
    float32_array: Callable[[tuple[int, ...]], npt.NDArray[np.float32]] = lambda shape: np.empty(shape, np.float32),
) -> Any:
    """The true gradient, a tensor on the device of the logits if they are one, else an array of NumPy.

    In the logits' dtype; float32 for 16-bit logits, as the values of a true gradient underflow in float16.

    Args:
        sent: the gradient as the server sent it; a tensor if it is in device memory.
        response: the response that came with it.
        logits: the logits, as ``Outgoing.original`` has them.
        float32_array: allocates the array into which a gradient of 16 bits is converted.
    """
    assert response.grad is not None
    if not isinstance(sent, np.ndarray):
        grad = sent if response.grad.dtype.name == "float32" else sent.float().mul_(1 / response.grad_scale)
        return grad.double() if logits.dtype == sys.modules["torch"].float64 else grad
    if response.grad.dtype.name != "float32":
        place = float32_array(response.grad.shape)
        _widen_grad(sent, response.grad.dtype.name, 1 / response.grad_scale, place)
        sent = place
    if isinstance(logits, np.ndarray):
        return sent.astype(np.float64) if logits.dtype == np.float64 else sent
    import torch

    grad = torch.from_numpy(sent).to(logits.device)
    return grad.double() if logits.dtype == torch.float64 else grad


def _widen_grad(sent: npt.NDArray[Any], dtype: str, factor: float, place: npt.NDArray[np.float32]) -> None:
    target = _as_torch(place, "float32")
    if target is not None:  # torch is several times faster at this than numpy.
        _copy(_as_torch(sent, dtype), target, factor)
        return
    np.copyto(place, _widened(sent) if dtype == "bfloat16" else sent)
    if factor != 1:
        place *= np.float32(factor)
