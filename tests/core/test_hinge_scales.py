"""The hinge's errors have any scale: its gradient is right for every mix of them, on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import norm_error, reference_answer, shared_ties_answer
from support.ways import NUMBA_TABLES, SORTED_BELOW_PIXELS, Way
from torch import Tensor

from lovasz.core import LovaszHinge, LovaszSigmoid, compute
from lovasz.core.dispatch import Backend

TOLERANCE = 2e-5
SIDE = 512


def binary_problem(
    pixels: int, share: float, offset: float, deviation: float, foreground_deviation: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Background that is wrong by about ``offset``, and foreground near the margin.

    The errors 1 - s x are exact in float32: what their rounding would cost is no matter of ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(1, pixels, generator=generator) < share).to(torch.uint8)
    labels[0, 0] = 1
    noise = torch.randn(1, pixels, generator=generator)
    logits = torch.where(labels == 1, 0.5 + foreground_deviation * noise, offset + deviation * noise)
    return torch.where(labels == 1, 1 - (1 - logits), (1 + logits) - 1), labels


def assert_right(logits: Tensor, labels: Tensor, way: Way) -> None:
    result = compute(logits.to(way.device), labels.to(way.device), LovaszHinge())
    expected, expected_grad = reference_answer(logits, labels, LovaszHinge())
    assert result.loss == pytest.approx(expected, rel=1e-6)
    if norm_error(result.grad, expected_grad) >= TOLERANCE:  # where errors tie in float32, both gradients are right
        assert norm_error(result.grad, shared_ties_answer(logits, labels, LovaszHinge())[1]) < TOLERANCE


@pytest.mark.parametrize("offset", [0.0, 10.0, 30.0, 100.0, 255.0])
def test_background_that_is_wrong_by_much(offset: float, way: Way) -> None:
    if way == NUMBA_TABLES:
        pytest.skip("tables alone, which no hinge of mixed scales gets")
    way.require_speed(SIDE * SIDE)
    assert_right(*binary_problem(SIDE * SIDE, 0.3, offset, 1.0, 1.0, seed=41), way)


scales = st.sampled_from([1e-2, 0.1, 1.0, 30.0, 1e3])


@given(
    share=st.sampled_from([0.5, 0.1, 0.01]),
    offset=st.sampled_from([-1.0, 0.0, 3.0, 255.0, 1e4]),
    deviation=scales,
    foreground_deviation=scales,
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_scale_and_mix(
    way: Way, share: float, offset: float, deviation: float, foreground_deviation: float, seed: int
) -> None:
    if way == NUMBA_TABLES or way.backend is Backend.TORCH:
        pytest.skip("tables alone, or a sort")
    way.require_speed(SORTED_BELOW_PIXELS)
    pixels = SORTED_BELOW_PIXELS + 77
    assert_right(*binary_problem(pixels, share, offset, deviation, foreground_deviation, seed), way)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("kind", [LovaszHinge, LovaszSigmoid])
def test_a_term_without_background_has_a_scale_of_its_own(
    kind: type[LovaszHinge | LovaszSigmoid], per_image: bool, way: Way
) -> None:
    """Another term scores background whose errors are far larger."""
    way.require_speed(SIDE * SIDE)
    generator = torch.Generator().manual_seed(42)
    labels = torch.randint(0, 2, (2, SIDE * SIDE), generator=generator)
    logits = torch.randn(2, SIDE * SIDE, generator=generator) + (50 if kind is LovaszSigmoid else 0) * labels
    logits[labels == 0] = 5.0 if kind is LovaszSigmoid else 1e20
    logits, labels, own = logits.to(way.device), labels.to(way.device), kind(per_image=per_image, ignore_index=0)
    alone = compute(logits, labels, own, want_grad=False)
    beside = compute(logits, labels, [(0.5, kind()), (1.0, own)], want_grad=False)
    assert beside.terms[1].loss == pytest.approx(alone.loss, rel=1e-6, abs=0)
