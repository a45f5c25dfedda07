"""Loops over the rows of a block of pixels, against plain loops over pixels and rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lovasz.core.backends.numba import rows

Rows = npt.NDArray[np.float32]

START, PIXELS, BEHIND = 3, 200, 5
"""The columns of a block, and some before and behind it."""

OWN = slice(START, START + PIXELS)
each_number = pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8, 19])


def some_rows(number: int, seed: int = 0) -> Rows:
    """Values with ties."""
    values = np.random.default_rng(seed).integers(-9, 9, (number, START + PIXELS + BEHIND))
    return (values / 7).astype(np.float32)


def out() -> Rows:
    return np.full(PIXELS, np.nan, np.float32)


def find_largest(values: Rows) -> tuple[Rows, npt.NDArray[np.int32], bool]:
    largest, place = out(), np.full(PIXELS, -1, np.int32)
    is_finite = rows.find_largest(values, START, largest, place)
    return largest, place, is_finite


@each_number
def test_the_first_row_with_the_largest_value(number: int) -> None:
    values = some_rows(number)
    largest, place, is_finite = find_largest(values)
    assert largest.tobytes() == values[:, OWN].max(0).tobytes()
    assert place.tolist() == values[:, OWN].argmax(0).tolist()
    assert is_finite


@each_number
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_a_value_that_is_not_finite_is_found_in_any_row(number: int, value: float) -> None:
    for row in range(number):
        for column in (START, START + 77, START + PIXELS - 1):
            values = some_rows(number)
            values[row, column] = value
            assert not find_largest(values)[2]
    values = some_rows(number)
    values[:, [START - 1, START + PIXELS]] = value
    values[0, START] = -np.finfo(np.float32).max
    assert find_largest(values)[2], "only the block counts, and the largest float is finite"


def test_a_masked_class_is_not_the_largest_nor_marked() -> None:
    values = some_rows(5)
    values[0], values[3, START + 1], values[4, START + 2] = -np.inf, np.inf, np.nan
    largest, place, _ = find_largest(values)
    assert place.min() > 0
    assert largest[1] == np.inf
    marks = np.zeros(PIXELS, np.float32)
    rows.mark_infinite(values, START, marks)
    assert np.flatnonzero(marks).tolist() == [1, 2]


@each_number
def test_sums_are_in_the_order_of_the_rows(number: int) -> None:
    values, factors = some_rows(number), some_rows(number, seed=1)
    total, of_products = np.zeros((2, PIXELS), np.float32)
    for k in range(number):
        total += values[k, OWN]
        of_products += values[k, OWN] * factors[k, 1 : 1 + PIXELS]
    sums, products = out(), out()
    rows.add_rows(values, START, sums)
    rows.add_products(values, START, factors, 1, products)
    assert sums.tobytes() == total.tobytes()
    assert products.tobytes() == of_products.tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@each_number
def test_values_of_the_labels_rows(number: int, dtype: type[np.generic]) -> None:
    values = some_rows(number)
    void = number
    codes = np.random.default_rng(2).integers(0, number + 1, PIXELS).astype(dtype)
    before, labelled, pixels = values.copy(), codes != void, np.arange(PIXELS)
    gathered, taken = out(), out()
    rows.gather(values, START, codes, gathered)
    assert values.tobytes() == before.tobytes()
    rows.take(values, START, codes, taken)
    own = codes[labelled], START + pixels[labelled]
    assert gathered[labelled].tobytes() == before[own].tobytes()
    assert taken.tobytes() == gathered.tobytes()
    assert not values[own].any()
    rows.put(taken, codes, void, values, START)
    changed = np.argwhere(values != before)
    assert not np.isin(changed[:, 1] - START, pixels[labelled]).any(), "only void pixels"
