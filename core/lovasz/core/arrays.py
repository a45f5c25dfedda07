"""Arrays of NumPy and of other frameworks as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lovasz.spec import InvalidInput
from lovasz.spec.arrays import check_dense, numpy_array


def as_tensor(field: str, value: Any) -> Tensor:
    """A tensor as it is; an array of NumPy, JAX, TensorFlow and others as a tensor, without a copy if possible.

    Raises:
        InvalidInput: the value is not an array, has an element type that torch cannot take, or is a tensor without
            values in memory (``check_dense``).
    """
    if isinstance(value, Tensor):
        check_dense(field, value)
        return value
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        try:
            return from_dlpack(value)
        except Exception:  # Each framework raises its own; the array may have another way to be read.
            pass
    array = numpy_array(field, value)
    is_bfloat16 = array.dtype.name == "bfloat16"  # of the package ml_dtypes
    if is_bfloat16:
        array = array.view(np.int16)
    try:
        # torch refuses negative strides and foreign byte orders, and warns about read-only memory.
        tensor = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        raise InvalidInput(field, f"got element type {array.dtype.name}, which torch cannot take: {error}") from None
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
