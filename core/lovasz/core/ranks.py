"""What a backend needs of other processes that hold a part of its joint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Ranks(Protocol):
    """The processes that compute one joint together; each holds its own images and has the gradient of these.

    Every method is a collective call: all ranks make the same calls in the same order.

    Attributes:
        rank: this process's place among them.
        images: the number of images of each rank, as terms with ``per_image`` count them.
        pixels: the number of pixels of each rank.
    """

    rank: int
    images: tuple[int, ...]
    pixels: tuple[int, ...]

    def add(self, arrays: Sequence[npt.NDArray[np.integer[Any]]]) -> None:
        """Replaces each array by its sum over the ranks; the arrays are contiguous, and may be large or empty."""
        ...

    def reduce(self, sums: Sequence[npt.NDArray[np.int64]], maxima: Sequence[npt.NDArray[np.int64]]) -> None:
        """Replaces small arrays by their sum, and others by their maximum over the ranks, in one exchange."""
        ...

    def gather(self, own: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The arrays of all ranks: one axis, the same element type, any number of elements."""
        ...
