"""Windows: of a segment that is counted on a CPU, the pixels that are sorted, since their order matters most."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels, reference_answer
from torch import Tensor

pytest.importorskip("numba")

from lovasz.core import CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax, compute
from lovasz.core.backends.numba import bins, extension, scanning, selecting, tables
from lovasz.core.backends.numba.keys import write_keys
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.core.word import REST_SUM_BITS
from lovasz.spec import LossLike, weighted_sum

Errors = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

VOID, IGNORED, TOP, FEW, MOST = 9, 2, bins.SOFTMAX_COARSER, 500, 3000

SMALL = extension.Thresholds(
    pixels=0,
    positive=0.0,
    whole=0,
    window=800,
    window_error=2e-5,
)
"""Groups of any size are counted, and have windows."""


# --- The window of a table ----------------------------------------------------------------------------------------


def segment(kind: str, pixels: int = 40_000) -> tuple[Errors, Codes]:
    dice = np.random.default_rng(1)
    shares = {"rare": [0.949, 0.001, 0.03, 0.02], "alone": [0.95, 0.0, 0.03, 0.02]}.get(kind, [0.6, 0.35, 0.03, 0.02])
    codes = dice.choice(np.array([0, 1, IGNORED, VOID], np.uint8), pixels, p=shares)
    errors = dice.random(pixels) ** 3
    if kind == "alone":
        codes[777] = 1
    if kind == "fresh":  # No background comes before the last foreground.
        errors = np.where(codes == 1, 0.9 + 0.1 * errors, 0.1 * errors)
    if kind == "equal":
        errors = np.full(pixels, 0.3)
    if kind == "crowd":
        errors = np.where(dice.random(pixels) < 0.5, 0.75, errors)
    return errors.astype(np.float32), codes


each_kind = pytest.mark.parametrize("kind", ["common", "rare", "alone", "fresh", "equal", "crowd"])


NOT_KEPT = np.empty(0, np.int32)


def counted(errors: Errors, codes: Codes) -> tuple[npt.NDArray[np.int64], int, int]:
    table = np.zeros(tables.WORDS, np.int64)
    pixels = tables.Pixels(errors, codes, 1, VOID, IGNORED, False, TOP, tables.ALL_DISTANCES)
    return table, *tables.count(pixels, table, NOT_KEPT)


def counts(table: npt.NDArray[np.int64], bins_: slice) -> tuple[int, int]:
    """(pixels, foreground) of some bins."""
    background, foreground = (
        int((half[bins_].view(np.uint64) >> np.uint64(REST_SUM_BITS)).sum())
        for half in (table[: bins.BINS], table[bins.BINS : 2 * bins.BINS])
    )
    return background + foreground, foreground


@each_kind
@pytest.mark.parametrize("is_weighed", [False, True])
def test_window_leaves_little_error_outside(kind: str, is_weighed: bool) -> None:
    errors, codes = segment(kind)
    table, lowest, highest = counted(errors, codes)
    foreground_count = int((codes == 1).sum())
    before, most_error = table.copy(), 1e-3
    window = scanning.window(table, lowest, highest, foreground_count, TOP, False, is_weighed, most_error, FEW, MOST)
    assert table.tobytes() == before.tobytes()
    own = slice(window.first, window.stop)
    assert (window.pixels, window.foreground) == counts(table, own)
    assert window.pixels <= MOST
    if window.pixels == 0:
        assert (window.before, window.foreground_before) == (0, 0)
    else:
        assert (window.before, window.foreground_before) == counts(table, slice(0, window.first))
    if not is_weighed and window.is_enough:
        whole = error_outside(table, foreground_count, slice(0))
        outside = error_outside(table, foreground_count, slice(window.first, window.stop))
        assert outside <= min(whole, most_error) * (1 + 1e-9)
    enough = {"common": True, "rare": True, "alone": True, "fresh": True, "equal": False, "crowd": False}
    assert window.is_enough == enough[kind]


def error_outside(table: npt.NDArray[np.int64], foreground_count: int, own: slice) -> float:
    """The estimated error of the gradient, relative to its norm, that the order inside all bins but some causes."""
    background, foreground = (
        (half.view(np.uint64) >> np.uint64(REST_SUM_BITS)).astype(float)
        for half in (table[: bins.BINS], table[bins.BINS : 2 * bins.BINS])
    )
    here = foreground_count - np.cumsum(foreground) + foreground
    x, y = 1 / (foreground_count + np.cumsum(background) - background), 1 / (foreground_count + np.cumsum(background))
    steep = background * (here - foreground / 2) * x
    unknown_mean = np.where(foreground * background > 0, (foreground**2 + background**2) / 4, 0)
    error = x**4 * (foreground * background + 2 * steep**2 + unknown_mean)
    norm = x * y * (foreground + steep * (here - foreground / 2) * y)
    error[own] = 0
    return float(np.sqrt(error.sum() / (3 * norm.sum())))


@each_kind
def test_few_pixels_before_the_last_foreground_are_the_window(kind: str) -> None:
    errors, codes = segment(kind)
    table, lowest, highest = counted(errors, codes)
    last = int(np.flatnonzero(table[bins.BINS : 2 * bins.BINS])[-1])
    pixels, foreground = counts(table, slice(0, last + 1))
    of = (table, lowest, highest, foreground, TOP, True, True, 1e-9)
    window = scanning.window(*of, pixels, 10)
    assert (window.stop, window.before, window.pixels, window.foreground) == (last + 1, 0, pixels, foreground)
    assert window.is_enough
    assert scanning.window(*of, pixels - 1, 10).pixels <= 10


# --- Selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [0, 1, 63, 64, 65, 130, 5000])
@pytest.mark.parametrize(("floor", "ceiling"), [(0.25, 0.75), (0.9, np.inf), (-1.0, 2.0), (0.5, 0.5)])
def test_selection_is_that_of_numpy(pixels: int, floor: float, ceiling: float) -> None:
    errors, codes = segment("common", pixels)
    errors[::7], errors[3::50] = 0.5, 0.0
    low, high = (int(np.float32(edge).view(np.int32)) for edge in (floor, ceiling))
    taken = (errors.view(np.int32) > low) & (errors.view(np.int32) <= high) & (codes < IGNORED)
    values, places = np.empty(pixels, np.float32), np.empty(pixels, np.int32)
    count = selecting.select_window(errors, codes, 1, VOID, IGNORED, low, high, 100, values, places)
    assert (places[:count] - 100).tolist() == np.flatnonzero(taken).tolist()
    assert np.abs(values[:count]).tolist() == errors[taken].tolist()
    assert np.signbit(values[:count]).tolist() == (codes[taken] == 1).tolist()
    keys = np.empty(count, np.uint64)
    write_keys(values[:count], keys)
    order = np.lexsort((np.arange(count), codes[taken] != 1, -errors[taken]))
    assert keys.argsort(kind="stable").tolist() == order.tolist()
    for room in (0, 1, count // 2):
        of_room = np.empty(room, np.float32), np.empty(room, np.int32)
        assert selecting.select_window(errors, codes, 1, VOID, IGNORED, low, high, 0, *of_room) == min(room, count)
        assert of_room[0][: min(room, count)].tobytes() == values[: min(room, count)].tobytes()
    above = int(((errors.view(np.int32) > low) & (codes < IGNORED)).sum())
    for few in (above - 1, above, above + 1):
        assert selecting.are_few(errors, codes, VOID, IGNORED, low, few) == (above <= few)


@pytest.mark.parametrize("top", [bins.FINE_TOP, bins.SOFTMAX_COARSER, 100, -50])
def test_floor_is_the_edge_of_the_bins_before(top: int) -> None:
    dice = np.random.default_rng(2)
    starts = bins.first_bins()
    for bin_ in [*starts[:-1], *(n - 1 for n in starts[1:]), *dice.integers(0, bins.BINS, 300)]:
        floor = tables.floor(int(bin_), top)
        largest, above = (float(np.array(n, np.int32).view(np.float32)) for n in (floor, floor + 1))
        table = np.zeros(tables.WORDS, np.int64)
        for error in (largest, above) if bin_ > 0 else (largest,):
            codes = np.zeros(1, np.uint8)
            errors = np.float32([error])
            pixels = tables.Pixels(errors, codes, 1, VOID, IGNORED, False, top, tables.ALL_DISTANCES)
            tables.count(pixels, table, NOT_KEPT)
        found = np.flatnonzero(table[: bins.BINS]).tolist()
        assert found == ([bin_] if bin_ == 0 else [bin_ - 1, bin_])


# --- Losses -------------------------------------------------------------------------------------------------------

LOSSES: dict[str, LossLike] = {
    "softmax": LovaszSoftmax(ignore_index=255),
    "mix": [(1.0, CrossEntropy(ignore_index=255)), (2.0, LovaszSoftmax("all", ignore_index=255))],
    "two terms": [(1.0, LovaszSoftmax(ignore_index=255)), (0.5, LovaszSoftmax([0, 3], ignore_index=255))],
    "per image": LovaszSoftmax(per_image=True, ignore_index=255),
    "probabilities": LovaszSoftmax(input="probabilities", ignore_index=255),
    "hinge": LovaszHinge(multilabel=True, ignore_index=255),
    "sigmoid": LovaszSigmoid(multilabel=True, ignore_index=255),
}


def request(loss: LossLike, seed: int, images: int = 2, pixels: int = 9000) -> tuple[Tensor, Tensor]:
    """A rare class, or label, and three that are not, half trained."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(images, pixels, values=3, seed=seed, void=255)
    labels[torch.rand(labels.shape, generator=generator) < 0.003] = 3
    logits = 1.5 * normal(images, 4, pixels, seed=seed, dtype=torch.float32)
    logits.scatter_add_(1, labels.long().clamp(max=3)[:, None], torch.full((images, 1, pixels), 2.0))
    if weighted_sum(loss).is_binary:
        is_own = labels[:, None] == torch.arange(4)[:, None]
        return logits - 1, torch.where(labels[:, None] == 255, 255, is_own.long())
    is_probabilities = getattr(loss, "input", None) == "probabilities"
    return (logits.softmax(1) if is_probabilities else logits), labels


def answer(loss: LossLike, requests: list[tuple[Tensor, Tensor]], want_grad: bool = True) -> list[Any]:
    total = weighted_sum(loss)
    checked = [Request.checked(logits, labels, total) for logits, labels in requests]
    return submit(checked, total, torch.device("cpu"), want_grad=want_grad).collect()


WAYS: dict[str, Callable[[], tuple[int, extension.Thresholds]]] = {
    "one thread": lambda: (1, SMALL),
    "three threads": lambda: (3, SMALL),
    "in parts": lambda: (2, SMALL._replace(divided=1)),
    "in three parts": lambda: (3, SMALL._replace(divided=1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_windows_depend_on_neither_threads_nor_parts_nor_strangers(
    name: str, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LOSSES[name]
    own = request(loss, 3)
    strangers = [request(loss, 4, 1, 5000), own, request(loss, 5, 1, 700)]
    found = set()
    for number, thresholds in (way() for way in WAYS.values()):
        torch.set_num_threads(number)
        monkeypatch.setattr(extension, "THRESHOLDS", thresholds)
        for requests, place in (([own], 0), (strangers, 1)):
            with_grad = answer(loss, requests)[place]
            assert answer(loss, requests, want_grad=False)[place].loss == with_grad.loss
            found.add(bits(with_grad))
    assert len(found) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_windows_are_as_exact_as_sorting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LOSSES[name]
    logits, labels = request(loss, 6)
    expected, expected_grad = reference_answer(logits, labels, loss)
    errors = {}
    for way, window in (("windows", SMALL.window), ("tables alone", 0)):
        monkeypatch.setattr(extension, "THRESHOLDS", SMALL._replace(window=window))
        result = compute(logits, labels, loss, backend=Backend.NUMBA)
        assert result.loss == pytest.approx(expected, rel=1e-6)
        errors[way] = norm_error(result.grad, expected_grad)
    assert errors["windows"] < 1e-4
    assert errors["windows"] < 0.2 * errors["tables alone"]


STATES = {"fresh": (0.0, 1.0), "half trained": (2.0, 1.5), "trained": (6.0, 2.0)}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("foreground", [1, 30, 300, 3000, 10_000])
@pytest.mark.parametrize("pixels", [extension.SORTED_BELOW_PIXELS, extension.LARGE_PIXELS], ids=["middle", "large"])
def test_rare_class_in_a_group_that_may_be_counted(pixels: int, foreground: int, state: str) -> None:
    """As exact as if it were sorted, but for 1.5e-5."""
    margin, scale = STATES[state]
    generator = torch.Generator().manual_seed(foreground)
    labels = 1 + random_labels(1, pixels, values=3, seed=7)
    labels[0, torch.randperm(pixels, generator=generator)[:foreground]] = 0
    logits = scale * normal(1, 4, pixels, seed=8, dtype=torch.float32)
    logits.scatter_add_(1, labels[:, None].long(), torch.full((1, 1, pixels), margin * scale))
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax())
    result = compute(logits, labels, LovaszSoftmax(), backend=Backend.NUMBA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "THRESHOLDS", extension.SORT_ALL)
        in_order = compute(logits, labels, LovaszSoftmax(), backend=Backend.NUMBA)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < norm_error(in_order.grad, expected_grad) + 1.5e-5


def test_a_crowd_in_few_bins_is_counted_in_finer_ones(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two classes and nearly equal logits, all errors are near one half: more pixels matter than are sorted."""
    labels, logits = random_labels(1, 60_000, values=2, seed=9), 0.01 * normal(1, 2, 60_000, seed=10).float()
    _, expected = reference_answer(logits, labels, LovaszSoftmax())
    found, errors = set(), []
    for number, divided in product((1, 3), (1, 1 << 30)):
        torch.set_num_threads(number)
        monkeypatch.setattr(extension, "THRESHOLDS", SMALL._replace(divided=divided))
        result = compute(logits, labels, LovaszSoftmax(), backend=Backend.NUMBA)
        found.add(bits(result))
        errors.append(norm_error(result.grad, expected))
    assert len(found) == 1
    monkeypatch.setattr(extension, "FINE_TOP", bins.SOFTMAX_COARSER)
    monkeypatch.setattr(extension, "THRESHOLDS", SMALL._replace(window=0))
    coarse = compute(logits, labels, LovaszSoftmax(), backend=Backend.NUMBA)
    assert errors[0] < 0.6 * norm_error(coarse.grad, expected)


@pytest.mark.parametrize("spread", [0.1, 0.5, 4.0], ids=["foreground", "fewer than half", "most"])
def test_few_pixels_that_matter_have_the_bits_of_a_sort_as_a_whole(
    spread: float, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one thread as a whole or as a window, and by several threads in parts."""
    shape = (3, 5, 61, 67)
    labels = random_labels(3, 61, 67, values=5, seed=11, void=IGNORED)
    logits = spread * normal(*shape, seed=12, dtype=torch.float32)
    logits.scatter_add_(1, labels[:, None].long(), torch.full((3, 1, 61, 67), 3.0 * spread))
    pixels = labels.numel()
    loss = LovaszSoftmax(ignore_index=IGNORED)
    whole, window = (SMALL._replace(large=1 << 30, window=size) for size in (pixels // 2 + 1, pixels // 2 - 1))
    answers = []
    for thresholds, number, divided in (
        (extension.SORT_ALL, 1, 1),
        (whole, 1, 1 << 30),
        (window, 1, 1 << 30),
        (whole, 3, 1),
    ):
        torch.set_num_threads(number)
        monkeypatch.setattr(extension, "THRESHOLDS", thresholds._replace(divided=divided))
        answers.append(bits(compute(logits, labels, loss, backend=Backend.NUMBA)))
    assert answers[1] == answers[3]
    assert (answers[0] == answers[1]) == (spread < 4)
    assert (answers[0] == answers[2]) == (spread < 4)
