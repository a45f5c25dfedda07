"""Arrays of numpy and tensors of torch: their bytes for the wire, and gradients of the same kind from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lovasz import wire
from lovasz.spec import InvalidInput

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"


def is_torch(value: object) -> bool:
    """Whether it is a tensor of torch, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


@dataclass(frozen=True)
class HostTensor:
    """A tensor as it goes over the wire: what it is, and its elements in C order on the host."""

    spec: wire.TensorSpec
    array: npt.NDArray[Any]

    @property
    def data(self) -> memoryview:
        return wire.as_bytes(self.array)


def encode_logits(logits: Array) -> HostTensor:
    """float32, float16 and bfloat16 go as they are, float64 as float32.

    Raises:
        InvalidInput: another dtype, or no array.
    """
    array, name = _on_host("logits", logits)
    if name == "float64":
        array, name = array.astype(np.float32), "float32"
    if name not in wire.FLOATS:
        raise InvalidInput("logits", f"got dtype {name}; expected one of {', '.join(wire.FLOATS)}, float64")
    dtype = wire.dtype_named(name)
    return HostTensor(wire.TensorSpec(dtype, array.shape), np.ascontiguousarray(array.astype(dtype.numpy, copy=False)))


def encode_labels(labels: Array) -> HostTensor:
    """Integers of any type, and bool, go in the smallest type of the wire that holds their values.

    Raises:
        InvalidInput: another dtype, no array, or a value beyond 64 signed bits.
    """
    array, name = _on_host("labels", labels)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    elif array.dtype.kind not in "iu" or name == "bfloat16":  # whose bits are held as integers
        raise InvalidInput("labels", f"got dtype {name}; expected integers or bool")
    if array.dtype != np.uint8:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        dtype = next((d for d in wire.DTYPES if not d.is_float and _holds(d, low, high)), None)
        if dtype is None:
            raise InvalidInput("labels", f"got a value of {high}; expected 64-bit signed integers")
        array = array.astype(dtype.numpy)
    return HostTensor(wire.TensorSpec(wire.dtype_named(array.dtype.name), array.shape), np.ascontiguousarray(array))


def _holds(dtype: wire.DType, low: int, high: int) -> bool:
    limits = np.iinfo(dtype.name)
    return limits.min <= low and high <= limits.max


def _on_host(field: str, value: Array) -> tuple[npt.NDArray[Any], str]:
    """The elements as a numpy array (bfloat16 as 16-bit words), and the name of their dtype."""
    if isinstance(value, np.ndarray):
        if value.dtype.name == "bfloat16":  # as of the package ml_dtypes
            return value.view(np.uint16), "bfloat16"
        return value, value.dtype.name
    if is_torch(value):
        import torch

        tensor = value.detach().cpu()
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.contiguous().view(torch.int16)
        try:
            array: npt.NDArray[Any] = tensor.resolve_conj().resolve_neg().numpy()
        except TypeError as error:
            raise InvalidInput(field, f"got a tensor of {name} that numpy cannot take: {error}") from None
        return array.view(np.uint16) if name == "bfloat16" else array, name
    raise InvalidInput(field, f"got {type(value).__name__}; expected a numpy array or a torch tensor")


def decode_grad(received: npt.NDArray[Any], response: wire.Response, logits: Array) -> Any:
    """The true gradient, as the kind of array that the logits are and on their device.

    float32 for 16-bit logits (the values of a true gradient underflow in float16), else of the logits' dtype.
    """
    assert response.grad is not None
    if response.grad.dtype.name == "bfloat16":
        received = (received.astype(np.uint32) << 16).view(np.float32)
    elif response.grad.dtype.name == "float16":
        received = received.astype(np.float32)
        received *= 1 / response.grad_scale
    if not is_torch(logits):
        return received.astype(np.float64) if logits.dtype == np.float64 else received
    import torch

    grad = torch.from_numpy(received).to(logits.device)
    return grad.double() if logits.dtype == torch.float64 else grad
