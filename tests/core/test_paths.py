"""Which way a request is computed, and what is said where a faster one is missing."""

from __future__ import annotations

import logging

import pytest
import torch
from core.comparison import bits, normal, random_labels

from lovasz.core import CrossEntropy, LovaszHinge, LovaszSoftmax, paths
from lovasz.core.batch import launch
from lovasz.core.bins import MAX_PIXELS, SORTED_BELOW_PIXELS
from lovasz.core.paths import Path, choose
from lovasz.core.ragged import Request
from lovasz.spec import InvalidInput, LossLike, Result, weighted_sum

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIDE = int(SORTED_BELOW_PIXELS**0.5)
PER_IMAGE = LovaszSoftmax(per_image=True)


def a_request(loss: LossLike, images: int, side: int, dtype: torch.dtype = torch.float32) -> Request:
    """Tensors of one element's memory."""
    logits = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(images, 2, side, side)
    return Request.checked(logits, torch.zeros(1, 1, 1).int().expand(images, side, side), weighted_sum(loss))


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "installed", lambda package: True)
    monkeypatch.setattr(paths, "triton_works", lambda device: True)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("loss", "images", "side", "dtype", "device", "expected"),
    [
        (LovaszSoftmax(), 1, 8, torch.float32, CPU, Path.NUMBA),
        (LovaszSoftmax(), 1, SIDE, torch.bfloat16, CPU, Path.NUMBA),
        (LovaszSoftmax(), 1, 8, torch.float64, CPU, Path.TORCH),
        (LovaszSoftmax(), 1, SIDE, torch.float64, CUDA, Path.TORCH),
        (LovaszSoftmax(), 1, 1, torch.float32, CUDA, Path.TRITON),
        (LovaszSoftmax(), 4, SIDE // 2, torch.float16, CUDA, Path.TRITON),
        (LovaszSoftmax(), MAX_PIXELS // SIDE**2, SIDE, torch.float32, CUDA, Path.TORCH),
        (PER_IMAGE, 4, SIDE, torch.float32, CUDA, Path.TRITON),
        (PER_IMAGE, paths.TRITON_SEGMENTS, 1, torch.float32, CUDA, Path.TORCH),
        ([(1.0, LovaszSoftmax()), (1.0, PER_IMAGE)], 4, SIDE // 2, torch.float32, CUDA, Path.TRITON),
        (CrossEntropy(), 4, SIDE, torch.float32, CUDA, Path.TRITON),
        (LovaszSoftmax(), 40, 2**10, torch.float32, CUDA, Path.TRITON),
    ],
)
def test_a_request_takes_the_fastest_way_that_is_exact_enough(
    loss: LossLike, images: int, side: int, dtype: torch.dtype, device: torch.device, expected: Path
) -> None:
    assert choose([a_request(loss, images, side, dtype)], weighted_sum(loss), device) is expected


@pytest.mark.usefixtures("everything_installed")
def test_labels_of_more_pixels_than_31_bits_can_number_are_left_to_torch() -> None:
    loss = weighted_sum(LovaszHinge(multilabel=True))
    few, many = (
        Request.checked(
            torch.zeros(1).expand(1, channels, 2**13, 2**12),
            torch.zeros(1).int().expand(1, channels, 2**13, 2**12),
            loss,
        )
        for channels in (63, 64)
    )
    assert choose([few], loss, CUDA) is Path.TRITON
    assert choose([many], loss, CUDA) is Path.TORCH
    assert choose([few, few], loss, CUDA) is Path.TORCH


@pytest.mark.usefixtures("everything_installed")
def test_nothing_to_advise_where_all_is_there() -> None:
    assert paths.advice(CPU) is None
    assert paths.advice(CUDA) is None


def test_without_the_compilers_torch_computes_and_something_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "installed", lambda package: False)
    paths.triton_works.cache_clear()
    for device, word in ((CPU, "lovasz[cpu]"), (CUDA, "triton")):
        assert choose([a_request(LovaszSoftmax(), 1, SIDE)], weighted_sum(LovaszSoftmax()), device) is Path.TORCH
        assert word in str(paths.advice(device))
    paths.warm_up(CPU)
    paths.triton_works.cache_clear()


def test_a_triton_that_cannot_compile_is_tried_once_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(paths, "installed", lambda package: True)
    monkeypatch.setattr(paths, "_compute_small", fail)
    paths.triton_works.cache_clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            request = a_request(LovaszSoftmax(), 1, SIDE)
            assert choose([request], weighted_sum(LovaszSoftmax()), CUDA) is Path.TORCH
    paths.triton_works.cache_clear()
    assert len(tried) == 1
    assert "Failed to find C compiler" in caplog.text


def test_a_batch_whose_members_take_different_ways_is_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Path.NUMBA_SORTED, Path.TORCH, Path.NUMBA_TABLES, Path.TORCH]
    total = weighted_sum(LovaszHinge())
    requests = [
        Request.checked(normal(1, 30, seed=i, dtype=torch.float32), random_labels(1, 30, values=2, seed=i), total)
        for i in range(len(taken))
    ]
    alone = [
        launch([request], total, CPU, path=path).collect()[0] for request, path in zip(requests, taken, strict=True)
    ]
    way = {id(request): path for request, path in zip(requests, taken, strict=True)}
    monkeypatch.setattr("lovasz.core.batch.choose", lambda joint, loss, device: way[id(joint[0])])
    together = launch(requests, total, CPU).collect()
    for answer, expected in zip(together, alone, strict=True):
        assert isinstance(answer, Result)
        assert isinstance(expected, Result)
        assert bits(answer) == bits(expected)


def test_warm_up_compiles_everything_that_a_request_needs(threads: None) -> None:
    """After it no request compiles anything; what is compiled is counted by Numba itself."""
    pytest.importorskip("numba")
    from lovasz.core.numba_kernels import cross_entropy, hinge, segments, softmax

    loops = [
        softmax.prepare,
        softmax.prepare_probabilities,
        softmax.finish,
        cross_entropy.add_losses,
        hinge.prepare,
        segments.score,
    ]
    paths.warm_up(CPU)
    before = [len(loop.signatures) for loop in loops]  # type: ignore[attr-defined]
    assert all(before)
    for loss in (
        LovaszSoftmax(per_image=True, ignore_index=255, class_weights=[1.0, 2.0]),
        [(1.0, CrossEntropy(ignore_index=1)), (0.5, LovaszSoftmax(classes="all"))],
        LovaszSoftmax(input="probabilities"),
        LovaszHinge(multilabel=True),
    ):
        total = weighted_sum(loss)
        for dtype in (torch.float32, torch.float16):
            for label_dtype in (torch.uint8, torch.int64, torch.bool):
                logits = normal(2, 2, 5, 6, seed=1, dtype=dtype).abs().clamp(max=1)
                shape = logits.shape if total.is_hinge else (2, 5, 6)
                labels = random_labels(*shape, values=2, seed=2).to(label_dtype)
                for path in (Path.NUMBA, Path.NUMBA_TABLES):
                    (answer,) = launch([Request.checked(logits, labels, total)], total, CPU, path=path).collect()
                    assert isinstance(answer, Result)
    assert [len(loop.signatures) for loop in loops] == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "dtype", "device", "problem"),
    [
        ("numba", torch.float32, CPU, "got 'numba'; expected None or one of lovasz.core.paths.Path"),
        (Path.NUMBA, torch.float64, CPU, "got Path.NUMBA for logits of float64; expected None or Path.TORCH"),
        (Path.NUMBA_TABLES, torch.float32, CUDA, "got Path.NUMBA_TABLES for logits on cuda; expected"),
        (Path.TRITON, torch.float32, CPU, "got Path.TRITON, but triton is not installed; expected"),
    ],
)
def test_a_way_that_cannot_be_taken_is_refused(
    path: Path, dtype: torch.dtype, device: torch.device, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "installed", lambda package: package == "numba")
    total = weighted_sum(LovaszSoftmax())
    with pytest.raises(InvalidInput) as caught:
        launch([a_request(total, 1, 8, dtype)], total, device, path=path)
    assert caught.value.field == "path"
    assert caught.value.problem.startswith(problem)
