"""Checks of a loss's options: each returns the value as one Python type, or raises InvalidInput naming the field."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lovasz.spec.errors import InvalidInput


def integer(name: str, value: object) -> int:
    """A Python or numpy integer; True and False are not accepted."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise InvalidInput(name, f"got {value!r}; expected an integer")


def number(name: str, value: object) -> float:
    """A finite Python or numpy number; True and False are not accepted."""
    if (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    raise InvalidInput(name, f"got {value!r}; expected a finite number")


def flag(name: str, value: object) -> bool:
    """True or False, of Python or numpy."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidInput(name, f"got {value!r}; expected True or False")


def class_weights(value: Sequence[float] | None) -> tuple[float, ...] | None:
    """Numbers >= 0, at least one; or None."""
    if value is None:
        return None
    weights = tuple(number(f"class_weights[{i}]", w) for i, w in enumerate(value))
    if not weights:
        raise InvalidInput("class_weights", "got an empty list; expected one number a class, or None")
    for i, weight in enumerate(weights):
        if weight < 0:
            raise InvalidInput(f"class_weights[{i}]", f"got {weight}; expected a number >= 0")
    return weights


def ignore_index(value: int | None) -> int | None:
    """A 64-bit signed integer, or None."""
    if value is None:
        return None
    index = integer("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise InvalidInput("ignore_index", f"got {index}; expected a 64-bit signed integer")
    return index
