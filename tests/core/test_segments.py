"""The closed form and the exact sums, on errors of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import norm_error
from torch import Tensor

from lovasz.core import reference
from lovasz.core.backends.torch.segments import Groups, exact_sum, lovasz_extension, power_of_two
from lovasz.core.backends.torch.softmax import sum_over_classes

no_deadline = settings(deadline=None)


def groups_of(sizes: Sequence[int], device: torch.device) -> Groups:
    return Groups.of_sizes(np.array(sizes), np.ones(len(sizes)), device)


def one_segment(errors: Tensor, foreground: Tensor) -> tuple[float, Tensor]:
    """Loss and g of a single class, all pixels valid."""
    groups = groups_of([len(errors)], errors.device)
    grad = torch.zeros(1, len(errors), dtype=errors.dtype, device=errors.device)
    counts = foreground.sum().reshape(1, 1)
    everywhere = torch.ones_like(foreground)
    weights = errors.new_ones(1, 1)
    rows = foreground.unsqueeze(0)
    loss = lovasz_extension(errors.unsqueeze(0), rows.__getitem__, everywhere, counts, groups, weights, grad)
    return loss.item(), grad[0]


def reference_segment(errors: Tensor, foreground: Tensor) -> tuple[float, Tensor]:
    errors = errors.double().cpu().requires_grad_()
    loss = reference.lovasz_extension(errors, foreground.cpu())
    (grad,) = torch.autograd.grad(loss, errors)
    return loss.item(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example_of_the_mathematics(dtype: torch.dtype, torch_device: torch.device) -> None:
    foreground = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0], device=torch_device) == 1
    errors = torch.tensor([0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=dtype, device=torch_device)
    loss, g = one_segment(errors, foreground)
    assert loss == pytest.approx(0.98 * 2 / 3, rel=1e-6)
    expected = torch.tensor([1 / 4, 1 / 4, 1 / 10, 1 / 5, 1 / 30, 1 / 6, 0, 0], dtype=dtype, device=torch_device)
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=0)


@no_deadline
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=40))
def test_ties_put_foreground_first_and_then_the_order_of_the_pixels(
    torch_device: torch.device, pixels: list[tuple[int, bool]]
) -> None:
    errors = torch.tensor([float(error) for error, _ in pixels], device=torch_device)
    foreground = torch.tensor([is_foreground for _, is_foreground in pixels], device=torch_device)
    expected_loss, expected = reference_segment(errors, foreground)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        loss, g = one_segment(errors.to(dtype), foreground)
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        torch.testing.assert_close(g.cpu().double(), expected, rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_errors_over_thirty_decades(share: float, torch_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    errors = (10 ** (-30 * torch.rand(50_000, generator=generator, dtype=torch.float64))).float()
    foreground = torch.rand(50_000, generator=generator) < share
    expected_loss, expected = reference_segment(errors, foreground)
    loss, g = one_segment(errors.to(torch_device), foreground.to(torch_device))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(g.cpu().double(), expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**120])
def test_extension_is_positively_homogeneous(scale: float, torch_device: torch.device) -> None:
    errors = torch.rand(1000, generator=torch.Generator().manual_seed(2)).to(torch_device)
    foreground = (torch.rand(1000, generator=torch.Generator().manual_seed(3)) < 0.3).to(torch_device)
    loss, g = one_segment(errors, foreground)
    scaled, scaled_g = one_segment(errors * scale, foreground)
    assert scaled == loss * scale
    assert torch.equal(scaled_g, g)


@no_deadline
@given(st.integers(-1022, 1023))
def test_power_of_two(exponent: int) -> None:
    assert power_of_two(torch.tensor([exponent])).item() == math.ldexp(1.0, exponent)


@no_deadline
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31), st.integers(-200, 200))
def test_exact_sum_of_each_group(torch_device: torch.device, sizes: list[int], seed: int, exponent: int) -> None:
    total = sum(sizes)
    values = torch.randn(2, total, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values *= 2.0**exponent
    groups = groups_of(sizes, torch_device)
    bound = torch.full((len(sizes),), exponent + 7, device=torch_device)  # 9 values of at most 10 standard deviations
    sums = exact_sum(values.to(torch_device), groups, bound).cpu()
    for row in range(2):
        for g, part in enumerate(values[row].split(sizes)):
            exact = math.fsum(part)
            # What the integers leave of each value, and the last bit of the sum where it becomes a float64 again.
            tolerance = 9 * 2.0 ** (exponent + 7 - 60) + math.ulp(exact)
            assert sums[row, g].item() == pytest.approx(exact, rel=0, abs=tolerance)


def test_exact_sum_depends_on_no_order(torch_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(1, 100_000, dtype=torch.float64, generator=generator).to(torch_device)
    groups, exponent = groups_of([100_000], torch_device), torch.tensor([17], device=torch_device)
    expected = exact_sum(values, groups, exponent)
    for _ in range(3):
        order = torch.randperm(100_000, generator=generator).to(torch_device)
        assert torch.equal(exact_sum(values[:, order], groups, exponent), expected)


@pytest.mark.parametrize("sizes", [[5], [3, 1, 4]])
def test_groups(sizes: list[int], torch_device: torch.device) -> None:
    groups = groups_of(sizes, torch_device)
    parts = torch.arange(sum(sizes)).split(sizes)
    numbers = [g for g, size in enumerate(sizes) for _ in range(size)]
    assert len(groups) == len(sizes)
    assert groups.of_pixel.tolist() == numbers
    assert groups.starts.tolist() == [int(part[0]) for part in parts]
    values = torch.arange(sum(sizes), device=torch_device)
    assert groups.sum(values.unsqueeze(0)).tolist() == [[int(part.sum()) for part in parts]]
    assert groups.max(values).tolist() == [int(part.max()) for part in parts]
    assert groups.max(-1.0 - values).tolist() == [0.0] * len(sizes)
    handed = groups.at_pixels(torch.arange(len(sizes), device=torch_device)).expand(sum(sizes))
    assert handed.tolist() == numbers


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 7, 8, 19, 21, 64, 151])
def test_sum_over_classes(classes: int, torch_device: torch.device) -> None:
    values = torch.randn(classes, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(classes))
    given_values = values.to(torch_device)
    sums = sum_over_classes(given_values)
    assert norm_error(sums, values.sum(0)) < 1e-13
    assert torch.equal(given_values.cpu(), values)
    for pixel in (0, 15, 32):
        assert torch.equal(sum_over_classes(given_values[:, pixel : pixel + 1]), sums[pixel : pixel + 1])
