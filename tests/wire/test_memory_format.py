"""Copies between memory formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lovasz.autograd import with_gradient
from lovasz.client.tensors import encode_labels, encode_logits
from lovasz.memory_format import contiguous, in_format_of
from lovasz.spec.arrays import PART_ELEMENTS, parts
from lovasz.wire import dtype_named

SHAPES = [(2, 5, 3, 4), (2, 19, 41, 97), (1, 3, 7, 50, 60), (3, 40_000, 1, 2), (1, 19, 300, 1), (0, 3, 4, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def of_shape(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def classes_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the classes last in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_small_and_cover_each_element_once(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.int64)
    other = np.moveaxis(np.zeros((shape[0], *shape[2:], shape[1]), np.int64), -1, 1)
    pairs = list(parts(array, other))
    for one, same in pairs:
        assert one.shape == same.shape
        assert one.size <= max(PART_ELEMENTS, shape[1])
        assert np.shares_memory(one, array) is np.shares_memory(same, other) is bool(one.size)
        one += 1
        same += 1
    assert (array == 1).all()
    assert (other == 1).all()
    assert (len(pairs) > 1) is (array.size > PART_ELEMENTS and not other.flags.c_contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elements_stay_what_they_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = of_shape(shape, dtype)
    for other in (classes_last(tensor), tensor.transpose(-1, -2).contiguous().transpose(-1, -2), tensor):
        copy = contiguous(other)
        assert copy.is_contiguous()
        assert copy.dtype == dtype
        assert torch.equal(copy, tensor)
        reordered = in_format_of(other, tensor)
        assert reordered.dtype == dtype
        assert torch.equal(reordered, tensor)
    assert in_format_of(classes_last(tensor), tensor).movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_has_the_format_of_the_logits(dtype: torch.dtype) -> None:
    grad = of_shape((2, 19, 41, 97), torch.float64 if dtype == torch.float64 else torch.float32)
    last = classes_last(grad.to(dtype)).requires_grad_()
    first = grad.to(dtype).requires_grad_()
    for logits in (last, first):
        seen: list[torch.Tensor] = []
        node = logits.clone()
        node.register_hook(seen.append)
        (2 * with_gradient(node, 1.0, grad.clone())).backward()
        assert seen[0].stride() == logits.stride()
        assert torch.equal(seen[0], (2 * grad).to(dtype))


@pytest.mark.parametrize("wire_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_sent_alike_in_each_format(dtype: torch.dtype, wire_dtype: str) -> None:
    logits = of_shape((2, 19, 41, 97), dtype)
    sent = [encode_logits(each, dtype_named(wire_dtype)).array() for each in (logits, classes_last(logits))]
    assert sent[1].flags.c_contiguous
    assert sent[0].tobytes() == sent[1].tobytes()


def test_labels_are_sent_alike_in_each_format() -> None:
    labels = torch.randint(0, 300, (2, 150, 41, 97))
    sent = [encode_labels(each).array() for each in (labels, classes_last(labels))]
    assert sent[0].dtype == np.int16
    assert sent[0].tobytes() == sent[1].tobytes()
