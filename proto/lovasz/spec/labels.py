"""Labels as data loaders give them: floats that are whole numbers become integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from lovasz.spec.errors import InvalidInput

FLOAT_TYPES = ("float32", "float16", "bfloat16", "float64")
"""The names of the float types that labels may have."""


def whole_numbers(labels: Any) -> Any:
    """Float labels as 64-bit integers. Waits for the device that they are on.

    Args:
        labels: an array of NumPy or a tensor of torch, float32 or float64; 16-bit labels are to be widened before.

    Raises:
        InvalidInput: a value is not a whole number, or does not fit.
    """
    if isinstance(labels, np.ndarray):
        with np.errstate(invalid="ignore"):  # NaN becomes some integer, which differs from it.
            integers: Any = labels.astype(np.int64)
    else:
        integers = labels.long()
    different = integers != labels
    if not different.any():
        return integers
    place = int(different.reshape(-1).nonzero()[0].reshape(-1)[0])  # as NumPy and torch have it
    index = [int(i) for i in np.unravel_index(place, tuple(labels.shape))]
    raise InvalidInput(
        "labels",
        f"got {float(labels.reshape(-1)[place])} at index {index}; expected whole numbers (for class probabilities "
        "labels.argmax(1), for a soft mask labels > 0.5; resize label maps with mode='nearest')",
    )


def wrong_type(name: str) -> InvalidInput:
    """The error for labels of an element type that is none of labels."""
    return InvalidInput("labels", f"got element type {name}; expected integers, bool, or floats that are whole numbers")


def too_large(value: int) -> InvalidInput:
    """The error for a label that is beyond 64 signed bits."""
    return InvalidInput("labels", f"got a value of {value}; expected 64-bit signed integers")
