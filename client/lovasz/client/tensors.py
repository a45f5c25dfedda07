"""Arrays of numpy and tensors of torch: what they are on the wire, their way into its memory, and gradients from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lovasz import wire
from lovasz.spec import InvalidInput

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 15

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"


def is_torch(value: object) -> bool:
    """Whether it is a tensor of torch, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


@dataclass(frozen=True)
class Outgoing:
    """A tensor on its way to the wire.

    Attributes:
        spec: what it is there.
        source: its elements as they came (bfloat16 of numpy as 16-bit words).
        dtype: the name of the type that these have.
    """

    spec: wire.TensorSpec
    source: Array
    dtype: str

    def in_place(self) -> npt.NDArray[Any] | None:
        """Its elements where they are, if they are on the host as the wire wants them."""
        if self.dtype != self.spec.dtype.name:
            return None
        array = self.source if isinstance(self.source, np.ndarray) else _on_host(self.source)
        return (
            array if array is not None and array.flags.c_contiguous and array.dtype == self.spec.dtype.numpy else None
        )

    def array(self) -> npt.NDArray[Any]:
        """Its elements as the wire wants them; a copy only where one is needed."""
        array = self.in_place()
        if array is None:
            array = np.empty(self.spec.shape, self.spec.dtype.numpy)
            self.write(array)
        return array

    def write(self, place: npt.NDArray[Any]) -> None:
        """Copies it to an array of the wire's element type and its shape."""
        source: Any = self.source
        if isinstance(source, np.ndarray):
            convert = self.dtype != self.spec.dtype.name and self.spec.dtype.is_float
            tensor = _as_torch(source, self.dtype) if convert else None
            if tensor is None:
                _write_with_numpy(source, self.dtype, place, self.spec.dtype)
                return
            source = tensor
        _copy(source, _as_torch(place, self.spec.dtype.name))


def encode_logits(logits: Array, wire_dtype: str | None = None) -> Outgoing:
    """float32, float16 and bfloat16 go as they are, float64 as float32, unless another element type is asked for.

    Raises:
        InvalidInput: another dtype, or no array.
    """
    source, name = _detached("logits", logits)
    if name not in (*wire.FLOATS, "float64"):
        raise InvalidInput("logits", f"got dtype {name}; expected one of {', '.join(wire.FLOATS)}, float64")
    dtype = wire.dtype_named(wire_dtype or ("float32" if name == "float64" else name))
    return Outgoing(wire.TensorSpec(dtype, tuple(source.shape)), source, name)


def encode_labels(labels: Array) -> Outgoing:
    """Integers of any type, and bool, go in the smallest type of the wire that holds their values.

    Raises:
        InvalidInput: another dtype, no array, or a value beyond 64 signed bits.
    """
    source, name = _detached("labels", labels)
    if name == "bool":
        source, name = source.view(np.uint8) if isinstance(source, np.ndarray) else source.byte(), "uint8"
    elif not name.removeprefix("u").removeprefix("int").isdecimal():
        raise InvalidInput("labels", f"got dtype {name}; expected integers or bool")
    elif name in ("uint16", "uint32", "uint64") and not isinstance(source, np.ndarray):
        source = source.cpu().numpy()  # torch itself does little with these.
    low, high = (0, 0) if name == "uint8" else _extremes(source)
    dtype = next((d for d in wire.DTYPES if not d.is_float and _holds(d, low, high)), None)
    if dtype is None:
        raise InvalidInput("labels", f"got a value of {high}; expected 64-bit signed integers")
    return Outgoing(wire.TensorSpec(dtype, tuple(source.shape)), source, name)


def _detached(field: str, value: Array) -> tuple[Array, str]:
    """The elements (numpy: bfloat16 as 16-bit words), and the name of their dtype."""
    if isinstance(value, np.ndarray):
        name = value.dtype.name  # "bfloat16" is that of the package ml_dtypes.
        return (value.view(np.uint16) if name == "bfloat16" else value), name
    if is_torch(value):
        if value.layout != sys.modules["torch"].strided:
            raise InvalidInput(field, f"got a tensor of layout {value.layout}; expected a dense one")
        return value.detach().resolve_conj().resolve_neg(), str(value.dtype).removeprefix("torch.")
    raise InvalidInput(field, f"got {type(value).__name__}; expected a numpy array or a torch tensor")


def _on_host(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """The same memory as an array (bfloat16 as 16-bit words); None if it is elsewhere, or not contiguous."""
    import torch

    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    words = tensor.dtype == torch.bfloat16
    array: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16) if words else tensor.numpy()
    return array


def _as_torch(array: npt.NDArray[Any], dtype: str) -> Any:
    """The same memory as a tensor; None where torch is not loaded, or cannot take the array."""
    torch = sys.modules.get("torch")
    if torch is None or not array.flags.writeable or not array.dtype.isnative or min(array.strides, default=0) < 0:
        return None
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _copy(source: torch.Tensor, target: torch.Tensor, factor: float = 1.0) -> None:
    """Converts elements to another type, in blocks so small that torch does them in this thread alone: its other
    threads would go on spinning for a while, on a processor that a server on this machine waits for."""
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
    if not dtype.is_float or name == dtype.name:
        np.copyto(place, source, casting="unsafe")
        return
    values = _widened(source) if name == "bfloat16" else source
    with np.errstate(over="ignore"):  # What float16 cannot hold becomes infinite, and so the loss NaN.
        if dtype.name != "bfloat16":
            np.copyto(place, values, casting="same_kind")
            return
        # To the nearest, ties to even, as torch does it.
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    np.copyto(place, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16, casting="unsafe")
    place[np.isnan(bits.view(np.float32))] = 0x7FC0


def _extremes(labels: Array) -> tuple[int, int]:
    if 0 in labels.shape:
        return 0, 0
    if not isinstance(labels, np.ndarray) and labels.device.type == "cpu":
        labels = labels.numpy()  # In this thread alone; see _copy.
    if isinstance(labels, np.ndarray):
        return int(labels.min()), int(labels.max())
    low, high = labels.aminmax()
    return int(low), int(high)


def _holds(dtype: wire.DType, low: int, high: int) -> bool:
    limits = np.iinfo(dtype.name)
    return limits.min <= low and high <= limits.max


def _widened(words: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 to float32: the missing bits are 0."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def decode_grad(
    sent: npt.NDArray[Any],
    response: wire.Response,
    logits: Array,
    room: Callable[[tuple[int, ...]], npt.NDArray[np.float32]] = lambda shape: np.empty(shape, np.float32),
) -> Any:
    """The true gradient, as the kind of array that the logits are and on their device.

    float32 for 16-bit logits (the values of a true gradient underflow in float16), else of the logits' dtype.

    Args:
        room: makes room for a gradient that was sent in 16 bits.
    """
    assert response.grad is not None
    if response.grad.dtype.name != "float32":
        place = room(response.grad.shape)
        _widen_grad(sent, response.grad.dtype.name, 1 / response.grad_scale, place)
        sent = place
    if isinstance(logits, np.ndarray):
        return sent.astype(np.float64) if logits.dtype == np.float64 else sent
    import torch

    grad = torch.from_numpy(sent).to(logits.device)
    return grad.double() if logits.dtype == torch.float64 else grad


def _widen_grad(sent: npt.NDArray[Any], dtype: str, factor: float, place: npt.NDArray[np.float32]) -> None:
    target = _as_torch(place, "float32")
    if target is not None:  # Its loops are several times as fast as numpy's.
        _copy(_as_torch(sent, dtype), target, factor)
        return
    np.copyto(place, _widened(sent) if dtype == "bfloat16" else sent)
    if factor != 1:
        place *= np.float32(factor)
