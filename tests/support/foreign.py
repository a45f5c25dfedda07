"""Arrays of frameworks that are not installed here: JAX and TensorFlow hand their elements over in these two ways."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt


class WithArray:
    """Is read by ``__array__``, as NumPy does."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        read_only = self._values.astype(self._values.dtype if dtype is None else dtype)
        read_only.flags.writeable = False  # as JAX has it
        return read_only


class WithDlpack:
    """Is read by DLPack."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()


class Unreadable:
    """Is an array, but refuses to be read: under a trace, or on a GPU."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        raise TypeError("it is only traced")


FOREIGN = (WithArray, WithDlpack)
