"""Checks of a loss's options: each returns the value as one Python type, or raises InvalidInput naming the field.

Options may be tensors or arrays of any framework; those of one element without an axis count as numbers.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np

from lovasz.spec.errors import InvalidInput

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def shown(value: Any) -> str:
    """A value as errors show it; of an array only the type and the shape."""
    if getattr(value, "ndim", 0):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return _REPR.repr(value)


def integer(name: str, value: object) -> int:
    """An integer; True and False are not accepted."""
    plain = _plain(value)
    if isinstance(plain, int) and not isinstance(plain, bool):
        return int(plain)
    raise InvalidInput(name, f"got {shown(value)}; expected an integer")


def number(name: str, value: object) -> float:
    """A finite number; True and False are not accepted."""
    plain = _plain(value)
    if isinstance(plain, int | float) and not isinstance(plain, bool) and math.isfinite(plain):
        return float(plain)
    raise InvalidInput(name, f"got {shown(value)}; expected a finite number")


def weight(name: str, value: object) -> float:
    """The weight of a term: a finite number, and no parameter of torch that is to be learned."""
    if getattr(value, "requires_grad", False) is True:
        raise InvalidInput(
            name,
            f"got a {type(value).__name__} that requires a gradient, which it would not get; expected a constant (a "
            "weight that is learned multiplies a loss of its own: weight * criterion(logits, labels))",
        )
    return number(name, value)


def numbers(name: str, values: Sequence[object]) -> tuple[float, ...]:
    """Finite numbers. The name of each is made only where it is needed, as there may be many."""
    return tuple(
        value if type(value) is float and math.isfinite(value) else number(f"{name}[{i}]", value)
        for i, value in enumerate(values)
    )


def integers(name: str, values: Sequence[object]) -> tuple[int, ...]:
    """Integers; their names as in :func:`numbers`."""
    return tuple(value if type(value) is int else integer(f"{name}[{i}]", value) for i, value in enumerate(values))


def flag(name: str, value: object) -> bool:
    """True or False."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return plain
    cure = " (a mask of pixels is given by name: valid=...)" if getattr(value, "ndim", 0) > 0 else ""
    raise InvalidInput(name, f"got {shown(value)}; expected True or False{cure}")


def elements(name: str, value: Any, expected: str) -> Sequence[object]:
    """The elements of a sequence, or of an array with one axis."""
    if getattr(value, "ndim", 1) > 1:
        raise InvalidInput(name, f"got an array of shape {tuple(value.shape)}; expected {expected}")
    plain = _plain(value)
    if not isinstance(plain, Sequence) and hasattr(plain, "__iter__") and not isinstance(plain, Mapping | Set):
        plain = tuple(plain)
    if isinstance(plain, Sequence) and not isinstance(plain, str | bytes):
        return plain
    raise InvalidInput(name, f"got {value!r}; expected {expected}")


def _plain(value: Any) -> Any:
    """An array as Python numbers in lists, or as one number if it has no axis; another value as it is."""
    if isinstance(value, int | float | str | Sequence):
        return value
    if hasattr(value, "tolist"):  # NumPy, torch (also on a GPU) and JAX
        return value.tolist()
    return np.asarray(value).tolist() if hasattr(value, "__array__") else value


def class_weights(value: Sequence[float] | None) -> tuple[float, ...] | None:
    """Numbers >= 0, at least one; or None."""
    if value is None:
        return None
    expected = "one number per class, such as [0.5, 1.0], or None"
    if isinstance(value, bool):
        expected += " (per_image comes after class_weights; give it by name)"
    weights = numbers("class_weights", elements("class_weights", value, expected))
    if not weights:
        raise InvalidInput("class_weights", "got an empty list; expected one number per class, or None")
    for i, weight in enumerate(weights):
        if weight < 0:
            raise InvalidInput(f"class_weights[{i}]", f"got {weight}; expected a number >= 0")
    return weights


def reduction(value: Any) -> Literal["mean", "none"]:
    """``"mean"`` or ``"none"``."""
    if value not in ("mean", "none"):
        raise InvalidInput("reduction", f"got {value!r}; expected 'mean', or 'none' for one loss per image")
    return "mean" if value == "mean" else "none"


def gradient_reduction(value: Any) -> Literal["mean", "active_mean", "sum"]:
    """``"mean"``, ``"active_mean"`` or ``"sum"``."""
    for choice in ("mean", "active_mean", "sum"):
        if value == choice:
            return choice
    raise InvalidInput("gradient_reduction", f"got {value!r}; expected 'mean', 'active_mean' or 'sum'")


def pos_weight(value: Any) -> float | tuple[float, ...] | None:
    """A number >= 0, a sequence of such numbers (one alone counts as a number), or None."""
    if value is None:
        return None
    expected = "a number >= 0, one number per label, or None"
    plain = _plain(value)
    is_one = isinstance(plain, int | float) or not hasattr(plain, "__iter__")
    if is_one:
        weights: tuple[float, ...] = (number("pos_weight", value),)
    else:
        weights = numbers("pos_weight", elements("pos_weight", value, expected))
    if not weights or min(weights) < 0:
        raise InvalidInput("pos_weight", f"got {reprlib.repr(list(weights))}; expected {expected}")
    return weights[0] if len(weights) == 1 else weights


def ignore_index(value: int | None) -> int | None:
    """A 64-bit signed integer, or None."""
    if value is None:
        return None
    index = integer("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise InvalidInput("ignore_index", f"got {index}; expected a 64-bit signed integer")
    return index
