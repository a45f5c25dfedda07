"""Numbers on the command line ``lovasz``: what argparse calls with the text of an option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole_number(most: int | None = None) -> Callable[[str], int]:
    """Takes whole numbers from 1 up to ``most``; None: any."""
    expected = "a whole number >= 1" if most is None else f"a whole number in [1, {most}]"

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= (most or math.inf)):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Takes seconds from 0 on, but not ``inf``."""
    return _checked(text, lambda number: 0 <= number < math.inf, "seconds >= 0")


def seconds_or_forever(text: str) -> float:
    """As :func:`seconds`, and ``inf``."""
    return _checked(text, lambda number: number >= 0, "seconds >= 0")


def seconds_above_zero(text: str) -> float:
    """Takes seconds above 0, but not ``inf``."""
    return _checked(text, lambda number: 0 < number < math.inf, "seconds > 0")


def _checked(text: str, is_right: Callable[[float], bool], expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not is_right(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
    return number
