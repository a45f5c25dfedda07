"""Where the tensors of a request are in a block of memory."""

from __future__ import annotations

import pytest

from lovasz import wire
from lovasz.spec import LovaszSoftmax, weighted_sum


@pytest.mark.parametrize("want_grad", [True, False])
def test_tensors_have_places_of_their_own_in_a_block(want_grad: bool) -> None:
    request = wire.Request.checked(
        weighted_sum(LovaszSoftmax()),
        wire.TensorSpec(wire.dtype_named("float16"), (1, 3, 11)),
        wire.TensorSpec(wire.dtype_named("int64"), (1, 11)),
        want_grad,
    )
    logits, labels, grad, nbytes = request.places
    assert (logits % 64, labels % 64, grad % 64) == (0, 0, 0)
    assert logits + request.logits.nbytes <= labels
    assert labels + request.labels.nbytes <= grad
    assert grad + request.grad_bytes <= nbytes
