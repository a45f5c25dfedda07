"""The table of element types: each with its name, its number on the wire and its numpy dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lovasz.v1 import loss_pb2 as pb


@dataclass(frozen=True, eq=False)
class DType:
    """An element type. There is one object of each, those of ``DTYPES``; so two are equal if they are the same object.

    Attributes:
        name: torch's and numpy's name for it.
        number: its value in the protobuf enum ``DataType``.
        numpy: the numpy dtype that holds its bits, little-endian.
        is_float: whether it is a floating-point type.
    """

    name: str
    number: pb.DataType
    numpy: np.dtype[np.generic]
    is_float: bool

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return dtype_named, (self.name,)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize


DTYPES: tuple[DType, ...] = (
    DType("float32", pb.DATA_TYPE_FLOAT32, np.dtype("<f4"), is_float=True),
    DType("float16", pb.DATA_TYPE_FLOAT16, np.dtype("<f2"), is_float=True),
    # numpy has no bfloat16: its bits are held as 16-bit words.
    DType("bfloat16", pb.DATA_TYPE_BFLOAT16, np.dtype("<u2"), is_float=True),
    DType("uint8", pb.DATA_TYPE_UINT8, np.dtype("u1"), is_float=False),
    DType("int16", pb.DATA_TYPE_INT16, np.dtype("<i2"), is_float=False),
    DType("int32", pb.DATA_TYPE_INT32, np.dtype("<i4"), is_float=False),
    DType("int64", pb.DATA_TYPE_INT64, np.dtype("<i8"), is_float=False),
)
FLOATS = tuple(dtype.name for dtype in DTYPES if dtype.is_float)
INTEGERS = tuple(dtype.name for dtype in DTYPES if not dtype.is_float)

_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_NUMBER: dict[int, DType] = {dtype.number: dtype for dtype in DTYPES}


def dtype_named(name: str) -> DType:
    """The element type with this name; KeyError if the wire has none."""
    return _BY_NAME[name]


def dtype_numbered(number: int) -> DType | None:
    """The element type with this number in the protobuf enum; None if this version knows none."""
    return _BY_NUMBER.get(number)
