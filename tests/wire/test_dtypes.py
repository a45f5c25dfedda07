"""The table of element types."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from lovasz import wire
from lovasz.v1 import loss_pb2 as pb


def test_the_table_of_element_types() -> None:
    table = {dtype.name: (dtype.number, dtype.itemsize, dtype.is_float) for dtype in wire.DTYPES}
    assert table == {
        "float32": (pb.DATA_TYPE_FLOAT32, 4, True),
        "float16": (pb.DATA_TYPE_FLOAT16, 2, True),
        "bfloat16": (pb.DATA_TYPE_BFLOAT16, 2, True),
        "uint8": (pb.DATA_TYPE_UINT8, 1, False),
        "int16": (pb.DATA_TYPE_INT16, 2, False),
        "int32": (pb.DATA_TYPE_INT32, 4, False),
        "int64": (pb.DATA_TYPE_INT64, 8, False),
    }
    assert {dtype.number for dtype in wire.DTYPES} == set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}


@pytest.mark.parametrize("dtype", wire.DTYPES, ids=lambda dtype: dtype.name)
def test_elements_are_little_endian_and_found_by_name(dtype: wire.DType) -> None:
    assert wire.dtype_named(dtype.name) is dtype
    assert dtype.numpy == dtype.numpy.newbyteorder("<")
    if dtype.name != "bfloat16":  # which numpy does not know
        assert dtype.numpy == np.dtype(dtype.name)


@pytest.mark.parametrize("dtype", wire.DTYPES, ids=lambda dtype: dtype.name)
def test_there_is_one_object_of_each(dtype: wire.DType) -> None:
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype


def test_float64_is_no_element_type_of_the_wire() -> None:
    with pytest.raises(KeyError):
        wire.dtype_named("float64")
