"""The compiled pieces of the CPU's path, each held by itself to what its docstring says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.comparison import bits, normal, random_labels, slow_bin
from support.counted_server import is_own
from support.ways import rank_on_cpu
from torch import Tensor

from lovasz.core import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax, compute, reference
from lovasz.core.backends.numba import (
    bins,
    elementary,
    extension,
    joint_tables,
    planes,
    ranges,
    scanning,
    scratch,
    selecting,
    sorting,
    tables,
)
from lovasz.core.backends.numba import compute as numba_compute
from lovasz.core.backends.numba.outline import KEPT_TYPES, Outline
from lovasz.core.backends.numba.parts import Parts
from lovasz.core.backends.numba.scratch import KEPT_KINDS, SCRATCH, ScratchPool
from lovasz.core.backends.numba.workers import Workers
from lovasz.core.batch import Batch, Request
from lovasz.core.dispatch import Backend
from lovasz.core.plan import KEPT_IMAGES, Plan
from lovasz.core.word import MAX_PIXELS, REST_BITS, REST_SUM_BITS
from lovasz.spec import LossLike, weighted_sum

Floats = npt.NDArray[np.float32]


# --- Exponential and logarithm ------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def exp_of(x: Floats, out: Floats) -> None:
    for i in range(len(x)):
        out[i] = elementary.exp(x[i])


@numba.njit(error_model="numpy")
def log_of(x: Floats, out: Floats) -> None:
    for i in range(len(x)):
        out[i] = elementary.log(x[i])


@numba.njit(error_model="numpy")
def log1p_of(x: Floats, out: Floats) -> None:
    for i in range(len(x)):
        out[i] = elementary.log1p(x[i])


def values(low: float, high: float, count: int = 300_000) -> Floats:
    return np.random.default_rng(1).uniform(low, high, count).astype(np.float32)


def normal_floats() -> Floats:
    """Of all exponents, and densely around 1."""
    words = np.random.default_rng(2).integers(0x00800000, 0x7F800000, 300_000, dtype=np.uint32)
    around_1 = np.arange(0x3F800000 - 5000, 0x3F800000 + 5000, dtype=np.uint32)
    return np.concatenate([words, around_1]).view(np.float32)


FUNCTIONS = {
    "exp": (exp_of, np.exp, np.append(values(-87, 0), np.float32([-87, -1e-30, -0.0, 0]))),
    "log": (log_of, np.log, normal_floats()),
    "log1p": (log1p_of, np.log1p, np.concatenate([values(0, 1), 10 ** values(-37, 0), np.float32([0, 1])])),
}
RELATIVE_ERRORS = {"exp": 1.2e-7, "log": 1.2e-7, "log1p": 1.3e-7}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
def test_relative_error_of_elementary_functions(name: str) -> None:
    function, exact, x = FUNCTIONS[name]
    out = np.empty_like(x)
    function(x, out)
    expected = exact(x.astype(np.float64))
    assert (np.abs(out - expected) <= RELATIVE_ERRORS[name] * np.abs(expected)).all()


def test_exp_of_what_would_not_be_a_normal_number_is_zero() -> None:
    x = np.float32([-87.34, -88, -104, -1e30, -np.inf])
    out = np.ones_like(x)
    exp_of(x, out)
    assert out.tobytes() == bytes(out.nbytes)


@each_function
def test_elementary_functions_give_the_same_bits_at_every_place(name: str) -> None:
    """In the body of a loop, in its vectors and in what is left behind them."""
    function, _, x = FUNCTIONS[name]
    x = x[:64].copy()
    alone = np.concatenate([apply(function, x[i : i + 1]) for i in range(len(x))])
    for first in range(17):
        for last in range(first + 1, len(x) + 1):
            assert apply(function, x[first:last]).tobytes() == alone[first:last].tobytes()


def apply(function: Callable[[Floats, Floats], None], x: Floats) -> Floats:
    out = np.empty_like(x)
    function(x, out)
    return out


# --- 16-bit floats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [(planes.FLOAT16, torch.float16), (planes.BFLOAT16, torch.bfloat16)])
@pytest.mark.parametrize("first", [0, 3])
def test_widening_is_exact_for_all_words(kind: int, dtype: torch.dtype, first: int) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    expected = words.view(dtype).float().numpy()[first:]
    out = np.empty_like(expected)
    planes.widen(kind, np.uint64(words.data_ptr()), first, out)
    is_nan = np.isnan(expected)
    assert (np.isnan(out) == is_nan).all()
    assert out[~is_nan].tobytes() == expected[~is_nan].tobytes()


# --- Point clouds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 7, 8, 13, 64, 75])
@pytest.mark.parametrize("count", [1, 8, 61, 200])
def test_points_are_transposed_and_nothing_else_is_written(channels: int, count: int) -> None:
    points, first, start = np.random.default_rng(13).random((count + 5, channels), np.float32), 2, 3
    rows, around = np.full((2, channels, count + 7), np.float32(-1))
    planes.read_points(np.uint64(points.ctypes.data), first, rows, start, count)
    around[:, start : start + count] = points[first : first + count].T
    assert rows.tobytes() == around.tobytes()
    written, expected = np.full((2, *points.shape), np.float32(-1))
    expected[start : start + count] = rows[:, start : start + count].T
    planes.write_points(np.uint64(written.ctypes.data), start, rows, count)
    assert written.tobytes() == expected.tobytes()


CLOUD_LOSSES: list[LossLike] = [
    [(1.0, CrossEntropy(None, 255, 0.1)), (1.0, LovaszSoftmax(ignore_index=255)), (0.5, LovaszSoftmax([1, 4]))],
    LovaszSoftmax(classes=[0, 2], ignore_index=255),
    LovaszSoftmax(input="probabilities", ignore_index=255),
]


@pytest.mark.parametrize("loss", CLOUD_LOSSES, ids=["terms", "listed", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("number", "classes"), [(1, 5), (2, 21)])
def test_a_point_cloud_has_the_bits_of_an_image_of_its_points(
    loss: LossLike, dtype: torch.dtype, number: int, classes: int, threads: None
) -> None:
    torch.set_num_threads(number)
    points = 3 * normal(17_003, classes, seed=11, dtype=torch.float32)
    points = (points.softmax(1) if weighted_sum(loss).probabilities else points).to(dtype)
    labels = random_labels(17_003, values=classes, seed=12, void=None if isinstance(loss, list) else 255)
    cloud = compute(points, labels, loss, backend=Backend.NUMBA)
    image = compute(points.T[None], labels[None], loss, backend=Backend.NUMBA)
    assert cloud.grad is not None
    assert image.grad is not None
    assert torch.equal(cloud.grad, image.grad[0].T)
    assert cloud.grad.is_contiguous()
    assert bits(replace(cloud, grad=None)) == bits(replace(image, grad=None))
    assert compute(points, labels, loss, want_grad=False, backend=Backend.NUMBA).loss == cloud.loss


# --- Bins ---------------------------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def place(errors: Floats, top: int, found: npt.NDArray[np.int64], rests: npt.NDArray[np.int64]) -> None:
    for i in range(len(errors)):
        distance = tables._distance(errors[i], tables._top_bits(top))
        found[i], rests[i] = divmod(tables._position(distance), 1 << REST_BITS)


def placed(errors: Floats, top: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    found, rests = np.empty((2, len(errors)), np.int64)
    place(errors, top, found, rests)
    return found, rests


def floats_below(top: int) -> Floats:
    """Random floats of 70 octaves, the edges of all octaves and of many bins, and the neighbours of all, ascending."""
    exponents = np.arange(top - 69, top + 1)
    edges = [np.ldexp(1.0, exponents)]
    rng = np.random.default_rng(3)
    for octave in range(bins.OCTAVES):
        width = 2.0 ** (top - octave - bins.bits_of(octave))
        number = rng.integers(0, 1 << bins.bits_of(octave), 200)
        edges.append(2.0 ** (top - octave) + number * width)
    edges.append(np.ldexp(rng.uniform(1, 2, 20_000), rng.choice(exponents, 20_000)))
    floats = np.concatenate(edges).astype(np.float32)
    around = [np.nextafter(floats, np.float32(side)) for side in (0, np.inf)]
    return np.unique(np.concatenate([floats, *around]))


@pytest.mark.parametrize("top", [bins.FINE_TOP, 7, 100, -50])
def test_bins_are_those_that_the_docstring_describes(top: int) -> None:
    errors = floats_below(top)
    found, rests = placed(errors, top)
    exact = errors.astype(np.float64)
    assert found.tolist() == slow_bin(exact, top).tolist()
    assert (np.diff(found) <= 0).all()
    octave = top - (np.frexp(exact)[1].astype(np.int64) - 1)
    own = octave < bins.OCTAVES
    width = np.array([2.0 ** (top - o - bins.bits_of(o)) for o in octave])
    lower = 2.0 ** (top - octave)
    largest = (
        2 * lower - (found - np.array(bins.first_bins())[np.minimum(octave, bins.OCTAVES)]) * width - lower / 2**23
    )
    expected = np.floor((largest - exact) / (width / (1 << REST_BITS)))
    assert rests[own].tolist() == expected[own].tolist()
    assert (rests[~own] == 0).all()


def test_zero_and_not_a_number_have_a_bin() -> None:
    for top in (bins.FINE_TOP, bins.LOWEST_TOP):
        found, rests = placed(np.float32([0.0, 1e-45, np.nan, np.inf]), top)
        assert found[:2].tolist() == [bins.BINS - 1] * 2
        assert (found >= 0).all()
        assert (found < bins.BINS).all()
        assert rests[0] == 0


def test_rests_of_the_largest_group_do_not_spill_into_the_count() -> None:
    largest_sum = ((1 << REST_BITS) - 1) * (MAX_PIXELS - 1)
    assert largest_sum < 1 << REST_SUM_BITS
    assert (MAX_PIXELS - 1) << REST_SUM_BITS < 1 << 64


# --- Tables -------------------------------------------------------------------------------------------------------

VOID, IGNORED = 9, 2


def segment(kind: str, pixels: int = 50_000) -> tuple[Floats, npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(4)
    codes = rng.choice(np.array([0, 1, IGNORED, VOID], np.uint8), pixels, p=[0.6, 0.3, 0.05, 0.05])
    errors = {
        "uniform": rng.random(pixels),
        "decades": 10 ** (-30 * rng.random(pixels)),
        "two bins": rng.choice([0.0, 1.0], pixels),
        "all equal": np.full(pixels, 0.3),
        "all zero": np.zeros(pixels),
        "tiny": 1e-25 * rng.random(pixels),
    }[kind]
    return errors.astype(np.float32), codes


each_kind = pytest.mark.parametrize("kind", ["uniform", "decades", "two bins", "all equal", "all zero", "tiny"])


def new_table() -> npt.NDArray[np.int64]:
    return np.zeros(tables.WORDS, np.int64)


NOT_KEPT = np.empty(0, np.int32)


def count(
    errors: Floats,
    codes: npt.NDArray[np.uint8],
    table: npt.NDArray[np.int64],
    last: int = tables.ALL_DISTANCES,
    kept: npt.NDArray[np.int32] = NOT_KEPT,
) -> tuple[int, int]:
    pixels = tables.Pixels(errors, codes, 1, VOID, IGNORED, False, bins.FINE_TOP, last)
    return tables.count(pixels, table, kept)


def scan(table: npt.NDArray[np.int64], lowest: int, highest: int, foreground: int) -> float:
    return scanning.scan(table, lowest, highest, foreground, foreground, bins.FINE_TOP, 0.7, -0.3)


@each_kind
def test_table_counts_every_pixel_once(kind: str) -> None:
    errors, codes = segment(kind)
    table = new_table()
    lowest, highest = count(errors, codes, table)
    counts = table.view(np.uint64) >> np.uint64(REST_SUM_BITS)
    for code, first in ((0, 0), (1, bins.BINS)):
        expected = np.bincount(slow_bin(errors[codes == code].astype(np.float64), 0), minlength=bins.BINS)
        assert counts[first : first + bins.BINS].tolist() == expected.tolist()
        assert lowest <= expected.nonzero()[0].min()
        assert highest >= expected.nonzero()[0].max()
    loss = scan(table, lowest, highest, int((codes == 1).sum()))
    taking_part = codes < IGNORED
    exact = reference.lovasz_extension(
        torch.from_numpy(errors[taking_part]).double(), torch.from_numpy(codes[taking_part] == 1)
    )
    assert loss == pytest.approx(exact.item(), rel=1e-6, abs=2.0**-bins.OCTAVES)


@each_kind
@pytest.mark.parametrize("shards", [2, 5])
def test_tables_of_shards_add(kind: str, shards: int) -> None:
    """Whichever pixels a shard holds: the sum of the tables is the table of all, and so is what it is turned into."""
    errors, codes = segment(kind)
    whole, foreground = new_table(), int((codes == 1).sum())
    lowest, highest = count(errors, codes, whole)
    owner = np.random.default_rng(5).integers(0, shards, len(errors))
    added, ranges = new_table(), []
    for shard in range(shards):
        table = new_table()
        ranges.append(count(errors[owner == shard], codes[owner == shard], table))
        added += table
    in_bins = slice(2 * bins.BINS)  # Which of the other words counts a void pixel depends on its place.
    assert added[in_bins].tobytes() == whole[in_bins].tobytes()
    assert added[2 * bins.BINS :].sum() == whole[2 * bins.BINS :].sum()
    assert (min(low for low, _ in ranges), max(high for _, high in ranges)) == (lowest, highest)
    loss = scan(whole, lowest, highest, foreground)
    assert scan(added, 0, bins.BINS - 1, foreground) == loss  # also where nobody knows the range
    in_use = slice(lowest, highest + 1)
    assert added[in_use].tobytes() == whole[in_use].tobytes()
    assert added[bins.BINS :][in_use].tobytes() == whole[bins.BINS :][in_use].tobytes()


MOST_PIXELS = {3: 0, 6: 1, 9: 170, 12: 171, 15: 40_000}
"""Of a bin, from each of these octaves on."""


def test_tables_of_ranks_add_in_words_of_both_lengths() -> None:
    """Three ranks with at most 170 pixels in a bin have sums below 512, which fit into a short word, and no more do."""
    ranks, dice = 3, np.random.default_rng(0)
    starts = bins.first_bins()
    own = np.zeros((ranks, 1, 2 * bins.BINS + 1), np.int64)
    for octave in range(3, 20):
        most = MOST_PIXELS[max(first for first in MOST_PIXELS if first <= octave)]
        for half in (0, bins.BINS) if octave < 18 else (0,):
            place = slice(half + starts[octave], half + starts[octave + 1])
            rests = most * ((1 << REST_BITS) - 1)  # The largest sum.
            own[:, 0, place] = ((most << REST_SUM_BITS) + rests) * dice.integers(0, 2, own[:, 0, place].shape)
    lowest, highest = starts[4], starts[20] - 1  # Of all ranks; foreground ends in octave 17.
    one, surveys = np.zeros(1, np.int64), []
    for table in own:
        parts = Parts(*(np.array([n]) for n in (0, 0, 1, lowest, highest)))
        bounds, most_of_rank = np.empty((1, 2), np.int64), np.empty((1, 2, bins.SPANS), np.int64)
        joint_tables.survey(one.copy(), one, parts, False, table, bounds, most_of_rank)
        surveys.append((bounds, most_of_rank))
    bounds, most_of_all = (np.max(column, axis=0) for column in zip(*surveys, strict=True))
    low, stop = -bounds[:, 0], bounds[:, 1] + 1
    sent, short_count, long_count = joint_tables.chosen(low, stop, most_of_all, ranks)
    short, long = np.zeros((ranks, short_count), np.int32), np.zeros((ranks, long_count), np.int64)
    for table, *words in zip(own, short, long, strict=True):
        joint_tables.pack(one.copy(), one, sent, table, *words)
    assert (low, stop.max() - 1) == (lowest, np.flatnonzero(own[:, 0, bins.BINS : -1].sum(0))[-1])
    places = sent.stop - sent.first
    assert (places[0, :, [4, 5]] == 0).all()  # Where no rank has pixels, nothing is sent.
    assert sent.is_short[0, :, 6:12].all()
    assert not sent.is_short[0, :, 12:18].any()
    assert (short_count, long_count) == (places[0, :, 6:12].sum(), places[0, :, 12:18].sum())
    expected, received = own.sum(0), own[0].copy()
    joint_tables.unpack(one.copy(), one, sent, received, short.sum(0, dtype=np.int32), long.sum(0))
    for half in (0, bins.BINS):
        np.testing.assert_array_equal(
            received[:, half + low[0] : half + stop[0]], expected[:, half + low[0] : half + stop[0]]
        )


@each_kind
def test_background_after_the_last_foreground_bin_need_not_be_counted(kind: str) -> None:
    errors, codes = segment(kind)
    errors[codes == 1] = np.maximum(errors[codes == 1], np.median(errors))
    last = int(slow_bin(errors[codes == 1].astype(np.float64), 0).max())
    whole, pruned, foreground = new_table(), new_table(), int((codes == 1).sum())
    lowest, highest = count(errors, codes, whole)
    smallest = selecting.smallest_foreground(errors, codes, 1)
    range_of_pruned = count(errors, codes, pruned, tables.last_distance(smallest, bins.FINE_TOP))
    assert lowest <= range_of_pruned[0]
    assert range_of_pruned[1] == last
    assert scan(pruned, *range_of_pruned, foreground) == scan(whole, lowest, highest, foreground)
    in_use = [slice(lowest, last + 1), slice(bins.BINS + lowest, bins.BINS + last + 1)]
    assert all(pruned[some].tobytes() == whole[some].tobytes() for some in in_use)
    assert not whole[last + 1 : highest + 1].any()


@each_kind
def test_table_is_all_zero_after_use(kind: str) -> None:
    errors, codes = segment(kind)
    table = new_table()
    lowest, highest = count(errors, codes, table)
    assert table.any()
    scan(table, lowest, highest, int((codes == 1).sum()))
    tables.clear(table, lowest, highest)
    assert not table.any()


@each_kind
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_positions_that_were_kept_give_the_bits_of_those_worked_out_again(kind: str, cut: bool, share: float) -> None:
    errors, codes = segment(kind)
    errors[: len(errors) // 2] *= np.float32(share)  # If all are 0, whole blocks are left out.
    codes[: len(errors) // 2] = np.minimum(codes[: len(errors) // 2], 1) if share else 0
    smallest, foreground = selecting.smallest_foreground(errors, codes, 1), int((codes == 1).sum())
    last, table, kept = tables.last_distance(smallest, bins.FINE_TOP), new_table(), np.full(len(errors), -1, np.int32)
    pixels = tables.Pixels(errors, codes, 1, VOID, IGNORED, cut, bins.FINE_TOP, last)
    lowest, highest = tables.count(pixels, table, kept)
    scan(table, lowest, highest, foreground)
    again, added = np.full_like(errors, np.nan), np.ones_like(errors)
    tables.look_up_again(pixels, table, False, again)
    tables.look_up_again(pixels, table, True, added)
    grads = kept.view(np.float32)
    tables.look_up(kept, table, grads)
    assert grads.tobytes() == again.tobytes()
    assert added.tobytes() == (np.float32(1) + again).tobytes()
    assert not grads[codes >= IGNORED].any()


def test_positions_that_another_process_has_changed_stay_inside_the_table() -> None:
    table = new_table()
    entries = table.view(np.float32)
    entries[:] = np.arange(len(entries), dtype=np.float32)  # g = a, and s = a + 1 times the rest, which is 0 here.
    entries[2 * (2 * bins.BINS) :] = 0.0
    edges = np.array([0, 1, bins.BINS, 2 * bins.BINS - 1, tables.WORDS - 1], np.int64) << REST_BITS
    kept = np.concatenate([edges, edges | 1 << 31]).astype(np.uint32).view(np.int32)
    grads = np.full(len(kept), np.nan, np.float32)
    tables.look_up(kept, table, grads)
    expected = [0.0, 2.0, 2.0 * bins.BINS, 2.0 * (2 * bins.BINS - 1), 0.0]
    assert grads.tolist() == 2 * expected
    anything = np.random.default_rng(3).integers(-(1 << 31), 1 << 31, 100_000).astype(np.int32)
    grads = np.full(len(anything), np.nan, np.float32)
    tables.look_up(anything, table, grads)
    assert np.isfinite(grads).all()


CALLS: list[LossLike] = [
    [(1.0, CrossEntropy(ignore_index=255)), (1.0, LovaszSoftmax(classes="all", ignore_index=255))],
    [(1.0, LovaszSoftmax(per_image=True, ignore_index=255)), (1.0, LovaszSoftmax([1], ignore_index=255))],
    LovaszHinge(multilabel=True, ignore_index=255),
    LovaszHinge(multilabel=True, per_image=True, ignore_index=255),
    [(1.0, LovaszSigmoid(multilabel=True, ignore_index=255)), (1.0, BinaryCrossEntropy(None, 255, True))],
]


def call(loss: LossLike, side: int = 60) -> tuple[object, ...]:
    logits = 3 * normal(2, 3, side, side, seed=6, dtype=torch.float32)
    logits[0, 1] = 1.0  # an error of 0 for the hinge
    shape = logits.shape if weighted_sum(loss).is_binary else (2, side, side)
    return bits(compute(logits, random_labels(*shape, values=2, seed=7, void=255), loss, backend=Backend.NUMBA))


@pytest.mark.parametrize("number", [1, 3])
def test_tables_in_scratch_are_all_zero_between_calls(
    number: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(number)
    rank_on_cpu("in tables", monkeypatch)
    for loss in (*CALLS, CALLS[0]):
        for side in (20, 90):
            call(loss, side)
            assert_tables_are_zero()


@pytest.mark.parametrize("want_grad", [False, True])
def test_tables_of_parts_in_scratch_are_all_zero_between_calls(want_grad: bool, threads: None) -> None:
    logits, labels = normal(1, 900, 900, seed=8, dtype=torch.float32), random_labels(1, 900, 900, values=2, seed=9)
    torch.set_num_threads(3)
    compute(logits, labels, LovaszHinge(ignore_index=255), want_grad=want_grad, backend=Backend.NUMBA)
    assert assert_tables_are_zero() > 1


def test_a_small_batch_computed_as_a_large_one_may_have_fewer_pixels_than_threads(threads: None) -> None:
    """The warm-up has few pixels, and a machine may have hundreds of threads."""
    loss = weighted_sum(LovaszSoftmax())
    logits = normal(1, 20_000, 4, seed=3, dtype=torch.float32)
    batch = Batch.of([Request.checked(logits, torch.zeros(1, 4, dtype=torch.int64), loss)])
    torch.set_num_threads(3)
    (as_large,), (alone,) = (
        numba_compute.compute(Plan.of(batch, loss, logits.device), batch, want_grad=True, thresholds=of).grads or ()
        for of in (extension.AS_LARGE, extension.THRESHOLDS)
    )
    torch.testing.assert_close(as_large, alone)


def assert_tables_are_zero() -> int:
    """Returns how many tables there are."""
    borrowed = SCRATCH.take()
    buffer = borrowed._buffers["tables"]
    SCRATCH.give_back(borrowed)
    assert not buffer.any()
    return buffer.nbytes // new_table().nbytes


# --- Sorting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["_insert", "sort"])
@pytest.mark.parametrize("distinct", [1, 3, 1 << 33])
@pytest.mark.parametrize("size", [1, 2, 47, 48, 49, 1000, 30_000])
def test_sorter_is_numpys_stable_sort(sort: str, distinct: int, size: int) -> None:
    if sort == "_insert" and size > 1000:
        pytest.skip("for few keys")
    above = np.random.default_rng(10).integers(0, distinct, size, dtype=np.uint64)
    keys = (above << np.uint64(31)) | np.arange(size, dtype=np.uint64)
    expected = keys[np.argsort(above, kind="stable")]
    given = keys.copy()
    if sort == "_insert":
        assert sorting._insert(given, size * size)
        assert given.tolist() == expected.tolist()
    else:
        assert sorting.sort(given, np.empty_like(given))[0].tolist() == expected.tolist()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1023, 1024, 1025, 5000])
def test_keys_of_pixels_that_matter(size: int, share: float, cut: bool) -> None:
    rng = np.random.default_rng(12)
    errors = np.where(rng.random(size) < share, rng.random(size), 0.25 * rng.integers(0, 2, size)).astype(np.float32)
    codes = rng.choice(np.array([0, 1, 3, IGNORED, VOID], np.uint8), size)
    smallest = int(np.float32(0.25).view(np.int32))
    keys = np.full(size, 77, np.uint64)
    kept = selecting.select(errors, codes, 1, VOID, IGNORED, smallest, cut, keys)
    is_foreground, floor = codes == 1, 0.0 if cut else -1.0
    matters = np.where(is_foreground, errors > floor, (errors > 0.25) & (codes != VOID) & (codes != IGNORED))
    inverted = (0x7FFFFFFF - errors.view(np.int32).astype(np.int64)) << 32
    expected = (inverted + (~is_foreground * (1 << 31)) + np.arange(size))[matters]
    assert keys[:kept].tolist() == expected.tolist()
    assert (keys[kept:] == 77).all()
    low, high = np.sort(expected)[[kept // 4, 3 * kept // 4]].astype(np.uint64) if kept else np.uint64([0, 0])
    found = np.empty_like(keys)
    count = selecting.select_range(keys[:kept], low, high, found)
    assert found[:count].tolist() == [key for key in expected.tolist() if low <= key < high]


@pytest.mark.parametrize("size", [1, 2, 47, 48, 49, 50, 400])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_sorted_segment_is_the_reference(size: int, distinct: int, share: float) -> None:
    rng = np.random.default_rng(11)
    errors = (rng.integers(0, distinct, size) / np.float32(8)).astype(np.float32)
    codes = np.where(rng.random(size) < share, 1, 0).astype(np.uint8)
    codes[0] = 1
    keys, other = np.empty((2, size), np.uint64)
    g = np.full(size, np.nan, np.float32)
    smallest, foreground = selecting.smallest_foreground(errors, codes, 1), int((codes == 1).sum())
    loss = sorting.extension(errors, codes, 1, VOID, VOID, smallest, foreground, 1.0, 1.0, False, keys, other, g)
    exact = torch.from_numpy(errors).double().requires_grad_()
    expected = reference.lovasz_extension(exact, torch.from_numpy(codes == 1))
    (expected_g,) = torch.autograd.grad(expected, exact)
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    np.testing.assert_allclose(g, expected_g.numpy(), rtol=1e-6, atol=1e-15)


SORTED_IN_RANGES = extension.Thresholds(pixels=0, positive=1.0, whole=0)
RANGE_LOSSES: list[LossLike] = [
    LovaszHinge(ignore_index=255),
    LovaszHinge(per_image=True, ignore_index=255),
    LovaszHinge(multilabel=True, ignore_index=255),
    [(1.0, LovaszHinge(ignore_index=255)), (0.5, LovaszHinge(per_image=True)), (2.0, BinaryCrossEntropy())],
]


@pytest.mark.parametrize("loss", RANGE_LOSSES, ids=["batch", "images", "labels", "terms"])
@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("number", [1, 3])
def test_a_sort_in_ranges_has_the_bits_of_a_sort_as_a_whole(
    loss: LossLike, margin: float, number: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (3, 2, 151, 133) if loss == RANGE_LOSSES[2] else (3, 151, 133)  # Planes that end within a strip.
    void = None if isinstance(loss, list) else 255
    labels = random_labels(*shape, values=2, seed=14, void=void)
    labels[2, ..., :80, :] = 0
    logits = normal(*shape, seed=15, dtype=torch.float32) + margin * (2.0 * (labels == 1) - 1)
    logits[0] = (4 * logits[0]).round() / 4  # ties
    torch.set_num_threads(number)
    monkeypatch.setattr(ranges, "RANGE_KEYS", 5000)
    answers = []
    for thresholds in (extension.SORT_ALL, SORTED_IN_RANGES):
        monkeypatch.setattr(extension, "THRESHOLDS", thresholds)
        answers.append(compute(logits, labels, loss, backend=Backend.NUMBA))
        assert compute(logits, labels, loss, want_grad=False, backend=Backend.NUMBA).loss == answers[-1].loss
    assert bits(answers[0]) == bits(answers[1])


def test_background_after_the_last_foreground_changes_no_bit_of_a_sort_in_ranges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = random_labels(60, 9, 31, values=2, seed=17)
    logits = normal(60, 9, 31, seed=18, dtype=torch.float32)
    logits[labels == 1] -= 2.0  # A fifth of the background comes after all foreground.
    losses = []
    for thresholds in (extension.SORT_ALL, SORTED_IN_RANGES):
        monkeypatch.setattr(extension, "THRESHOLDS", thresholds)
        losses.append(compute(logits, labels, LovaszHinge(per_image=True), backend=Backend.NUMBA).terms[0])
    assert losses[0].per_image_loss.tobytes() == losses[1].per_image_loss.tobytes()


@pytest.mark.parametrize(("per_image", "most_strips"), [(True, 6), (False, 0)], ids=["segments", "one large segment"])
def test_few_pixels_are_sorted_in_ranges_at_a_time(
    per_image: bool, most_strips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ScratchPool()
    monkeypatch.setattr(numba_compute, "SCRATCH", pool)
    monkeypatch.setattr(ranges, "MOST_PIXELS", 3 * ranges.STRIP_PIXELS)
    labels = random_labels(9, 2, 100, 100, values=2, seed=19)
    logits, loss = (
        normal(*labels.shape, seed=20, dtype=torch.float32),
        LovaszHinge(multilabel=True, per_image=per_image),
    )
    answers = []
    for thresholds in (extension.SORT_ALL, SORTED_IN_RANGES):
        monkeypatch.setattr(extension, "THRESHOLDS", thresholds)
        answers.append(compute(logits, labels, loss, backend=Backend.NUMBA))
    assert answers[1].loss == pytest.approx(answers[0].loss, rel=1e-6)
    buffers = {name: buffer.nbytes for name, buffer in pool.take()._buffers.items()}
    assert ("keys of strips" in buffers) == per_image
    assert buffers.get("keys of strips", 0) <= most_strips * 8 * ranges.STRIP_PIXELS
    assert (bits(answers[0]) == bits(answers[1])) == per_image


def test_no_error_above_zero_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "THRESHOLDS", SORTED_IN_RANGES)
    labels = random_labels(1, 200, 200, values=2, seed=16)
    result = compute(9.0 * (2 * labels - 1), labels, LovaszHinge(), backend=Backend.NUMBA)
    assert result.loss == 0
    assert result.grad is not None
    assert not result.grad.any()


# --- Scratch ------------------------------------------------------------------------------------------------------


def test_scratch_is_kept_for_the_next_call() -> None:
    pool = ScratchPool()
    first = pool.take()
    array = first.array("rows", (3, 5), np.float32)
    array[:] = 7
    pool.give_back(first)
    second = pool.take()
    assert second is first
    assert (second.array("rows", (2, 5), np.float32) == 7).all()
    assert second.array("rows", (30, 5), np.float32).shape == (30, 5)
    assert not second.array("tables", (100,), np.int64, zero=True).any()
    assert second.nbytes == 30 * 5 * 4 + 100 * 8


def test_scratch_of_calls_at_the_same_time_is_apart() -> None:
    pool = ScratchPool()
    one, other = pool.take(), pool.take()
    assert one is not other
    for used in (one, other):
        pool.give_back(used)
    assert pool.take() is other
    assert pool.take() is not one


def test_scratch_is_not_kept_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    pool = ScratchPool()
    kept = pool.take()
    pool.give_back(kept)
    monkeypatch.setattr(numba_compute, "SCRATCH", pool)
    with monkeypatch.context() as broken:
        broken.setattr(numba_compute, "_terms", fail)
        with pytest.raises(ZeroDivisionError):
            call(CALLS[0])
    call(CALLS[0])
    assert pool.take() is not kept


def test_views_are_kept_for_few_keys_until_a_buffer_is_replaced() -> None:
    used = ScratchPool().take()

    def views(key: object, elements: int = 5) -> npt.NDArray[np.float32]:
        return used.kept("views", (key, elements), lambda: used.array("rows", (elements,), np.float32)[1:])

    first, other = views("a"), views("b")
    assert other is not first
    for number in range(KEPT_KINDS - 2):
        views(number)
    assert views("a") is first  # The others are as many as are kept; "b" has not been used for longest.
    views("one more")
    assert views("a") is first
    assert views("b") is not other
    used.array("other rows", (7,), np.float32)  # A new buffer.
    assert views("a") is not first
    large = views("a", 50)
    large[:] = 3.0
    assert (views("a") == 3.0).all()


def test_arrays_are_kept_for_few_shapes_until_their_buffer_is_replaced() -> None:
    used = ScratchPool().take()

    def array(columns: int) -> npt.NDArray[np.float32]:
        return used.array("rows", (2, columns), np.float32)

    largest = array(50)
    some = [array(columns) for columns in range(1, KEPT_KINDS)]
    assert array(50) is largest
    assert array(KEPT_KINDS).base is not None
    assert array(50) is largest
    assert array(1) is not some[0]
    assert used.array("rows", (2, 50), np.int32).dtype == np.int32
    grown = array(51)
    grown[:] = 3.0
    assert (array(50) == 3.0).all()


def test_calls_of_two_kinds_in_turn_are_as_cheap_as_calls_of_one() -> None:
    loss = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]
    kinds = [(torch.zeros(2, 3, side, side), torch.zeros(2, side, side, dtype=torch.int64)) for side in (8, 9)]

    def functions(calls: Sequence[tuple[Tensor, Tensor]]) -> int:
        count = 0

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal count
            count += event in ("call", "c_call") and is_own(frame)

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            for logits, labels in calls:
                compute(logits, labels, loss, backend=Backend.NUMBA)
        finally:
            sys.setprofile(before)
        return count

    functions(kinds * 4)
    alone = sum(functions([kind] * 5) - functions([kind]) for kind in kinds)
    functions(kinds)
    assert functions(kinds * 4) == alone > 0


def test_nothing_is_kept_of_calls_whose_plan_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ScratchPool()
    monkeypatch.setattr(numba_compute, "SCRATCH", pool)
    for images, kept in ((KEPT_IMAGES + 1, 0), (KEPT_IMAGES, 1)):
        logits, labels = torch.zeros(images, 3, 4), torch.zeros(images, 4, dtype=torch.uint8)
        for _ in range(3):
            compute(logits, labels, LovaszSoftmax(per_image=True), backend=Backend.NUMBA)
        used = pool.take()
        assert {name: len(made) for name, made in used._made.items()} == ({"call": 1, "whole": 1} if kept else {})
        pool.give_back(used)


def test_what_is_kept_for_calls_of_one_kind_does_not_change_calls_of_another(threads: None) -> None:
    """The calls in turn, in one scratch: each is of another kind than the one before."""
    torch.set_num_threads(1)
    expected = [call(loss) for loss in CALLS]
    for loss, alone in zip(CALLS, expected, strict=True):
        assert [call(loss), call(loss)] == [alone, alone]
    for loss, alone in zip(reversed(CALLS), reversed(expected), strict=True):
        assert call(loss) == alone


def test_few_combinations_of_element_types_are_kept_with_a_plan() -> None:
    loss = weighted_sum(LovaszSoftmax())
    requests = [Request.checked(torch.zeros(2, 3, 100), torch.zeros(2, 100, dtype=torch.uint8), loss)] * 3
    outline = Outline(Plan.of(Batch.of(requests), loss, torch.device("cpu")))
    combinations = list(itertools.product(range(3), range(5), range(5), range(5)))[: KEPT_TYPES + 5]
    for kinds in combinations:
        made = outline.of_types(kinds)
        assert made.label_kind.tolist() == [kinds[1], kinds[1], kinds[2], kinds[2], kinds[3], kinds[3]]
        assert outline.of_types(kinds) is made
        assert len(outline._of_types) <= KEPT_TYPES


def test_large_scratch_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1000)
    pool = ScratchPool()
    large = pool.take()
    large.array("rows", (1001,), np.uint8)
    pool.give_back(large)
    next_one = pool.take()
    assert next_one is not large
    next_one.array("rows", (1000,), np.uint8)
    pool.give_back(next_one)
    assert pool.take() is next_one


# --- Threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 5])
def test_each_thread_has_its_own(number: int) -> None:
    workers, seen = Workers(), []

    def loop(tasks: npt.NDArray[np.int64], given: str, own: int) -> None:
        seen.append((given, own))

    workers.run(loop, number, given="given", own=lambda thread: {"own": thread})
    assert ("given", 0) in seen
    assert set(seen) <= {("given", thread) for thread in range(number)}
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("failing", [0, 1])
def test_error_in_a_thread_comes_out_and_leaves_the_workers_usable(failing: int) -> None:
    workers, started = Workers(), []

    def loop(tasks: npt.NDArray[np.int64], own: int) -> None:
        started.append(own)
        while failing not in started:  # A helper that has not started when the caller ends is called off.
            pass
        if own == failing:
            raise ZeroDivisionError

    for _ in range(3):
        started.clear()
        with pytest.raises(ZeroDivisionError):
            workers.run(loop, 2, own=lambda thread: {"own": thread})
    done: list[int] = []
    workers.run(lambda tasks, own: done.append(own), 2, own=lambda thread: {"own": thread})
    assert 0 in done


@pytest.mark.parametrize("ranks", ["in tables", "by sorting"])
def test_calls_from_several_threads_at_once(ranks: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    rank_on_cpu(ranks, monkeypatch)
    expected = [call(loss) for loss in CALLS]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            assert list(pool.map(call, CALLS)) == expected


AFTER_FORK = """
import os, signal
import torch
from lovasz.core import LovaszSoftmax, compute
from lovasz.core.backends.numba.workers import WORKERS
from lovasz.core.dispatch import Backend

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(1)
logits, labels = torch.randn(1, 3, 600, 1000, generator=generator), torch.zeros(1, 600, 1000, dtype=torch.uint8)
labels[0, ::2] = 1

def answer():
    result = compute(logits, labels, LovaszSoftmax(), backend=Backend.NUMBA)
    return result.loss, result.grad.numpy().tobytes()

before = answer()
assert WORKERS.size > 0
child = os.fork()
if child == 0:
    signal.alarm(60)  # seconds: the child ends whatever happens
    forgotten = WORKERS.size == 0
    os._exit(0 if forgotten and answer() == before else 1)
assert os.waitpid(child, 0)[1] == 0
assert answer() == before
"""


def test_forked_process_computes() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER_FORK], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


MOVED = """
import pickle, sys, types
module = types.ModuleType("a_module_that_moved")
class Moved: pass
Moved.__module__, module.Moved = module.__name__, Moved
sys.modules[module.__name__] = module
from lovasz.core.backends.numba import tables
index = tables.clear._cache._cache_file._index_path
with open(index, "wb") as file:
    pickle.dump(sys.argv[1], file)
    file.write(pickle.dumps(("a stamp", {Moved: "a file"})))
"""

CLEAR = """
import numpy as np
from lovasz.core.backends.numba.tables import WORDS, clear
clear(np.zeros(WORDS, np.int64), 0, 1)
"""


def test_an_index_of_the_cache_that_names_a_moved_class_is_passed_over(tmp_path: Path) -> None:
    """As an older version leaves it behind: compiled code is found by the folder of its source, which stays."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=100, check=False, env=environment)
    stale = run([sys.executable, "-c", MOVED, numba.__version__])
    assert stale.returncode == 0, stale.stderr
    for _ in range(2):  # the second time from the index that the first one wrote
        done = run([sys.executable, "-c", CLEAR])
        assert done.returncode == 0, done.stderr
