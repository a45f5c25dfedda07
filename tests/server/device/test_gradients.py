"""Gradients on their way to the host: the scale that keeps float16 from underflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lovasz.server.device.gradients import wire_scale, write_scaled


@pytest.mark.parametrize("largest", [1.0, 3e-7, 1e-30, 2.0**20])
def test_float16_gradients_neither_underflow_nor_overflow(largest: float) -> None:
    grad = torch.tensor([1.0, -0.5, 1e-3, 0.0]) * largest
    half = torch.empty_like(grad, dtype=torch.float16)
    scale = wire_scale([grad], half.dtype)
    write_scaled(grad.clone(), scale, half)
    assert np.log2(scale) == int(np.log2(scale))
    assert torch.isfinite(half).all()
    assert torch.allclose(half.double() / scale, grad.double(), rtol=2**-11, atol=0)


def test_gradients_that_are_zero_or_not_finite_keep_the_scale_of_one() -> None:
    for value in (0.0, float("nan"), float("inf")):
        half = torch.zeros(3, dtype=torch.float16)
        grad = torch.full((3,), value)
        assert wire_scale([grad], half.dtype) == 1.0
        write_scaled(grad, 1.0, half)
        assert np.array_equal(half.float().numpy(), np.full(3, value, np.float32), equal_nan=True)
