"""Which way a request is computed, and what is said where a faster one is missing."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import bits, normal, random_labels
from support.imports import REPOSITORY
from support.ways import SORTED_BELOW_PIXELS

from lovasz.core import CrossEntropy, LovaszHinge, LovaszSoftmax, dispatch
from lovasz.core.backends.triton import limits
from lovasz.core.batch import Batch, Request
from lovasz.core.dispatch import Backend, choose, compute, submit
from lovasz.core.plan import Plan
from lovasz.core.word import MAX_PIXELS
from lovasz.spec import InvalidInput, LossLike, Result, WeightedSum, weighted_sum

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIDE = int(SORTED_BELOW_PIXELS**0.5)
PER_IMAGE = LovaszSoftmax(per_image=True)


def a_request(loss: LossLike, images: int, side: int, dtype: torch.dtype = torch.float32) -> Request:
    """Tensors of one element's memory."""
    logits = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(images, 2, side, side)
    return Request.checked(logits, torch.zeros(1, 1, 1).int().expand(images, side, side), weighted_sum(loss))


def terms(lovasz: int) -> LossLike:
    """A sum of this many Lovász terms, and cross-entropies."""
    return [(1.0, LovaszSoftmax(ignore_index=i)) for i in range(lovasz)] + [
        (1.0, CrossEntropy(ignore_index=i)) for i in range(8)
    ]


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "triton_works", lambda device: True)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("loss", "images", "side", "dtype", "device", "expected"),
    [
        (LovaszSoftmax(), 1, 8, torch.float32, CPU, Backend.NUMBA),
        (LovaszSoftmax(), 1, SIDE, torch.bfloat16, CPU, Backend.NUMBA),
        (LovaszSoftmax(), 1, 8, torch.float64, CPU, Backend.TORCH),
        (LovaszSoftmax(), 1, SIDE, torch.float64, CUDA, Backend.TORCH),
        (LovaszSoftmax(), 1, 1, torch.float32, CUDA, Backend.TRITON),
        (LovaszSoftmax(), 4, SIDE // 2, torch.float16, CUDA, Backend.TRITON),
        (LovaszSoftmax(), MAX_PIXELS // SIDE**2, SIDE, torch.float32, CUDA, Backend.TORCH),
        (PER_IMAGE, 4, SIDE, torch.float32, CUDA, Backend.TRITON),
        (PER_IMAGE, limits.SEGMENTS, 1, torch.float32, CUDA, Backend.TORCH),
        ([(1.0, LovaszSoftmax()), (1.0, PER_IMAGE)], 4, SIDE // 2, torch.float32, CUDA, Backend.TRITON),
        (CrossEntropy(), 4, SIDE, torch.float32, CUDA, Backend.TRITON),
        (LovaszSoftmax(), 40, 2**10, torch.float32, CUDA, Backend.TRITON),
        (PER_IMAGE, 10_000, 65, torch.float32, CUDA, Backend.TRITON),
        (PER_IMAGE, 14_000, 65, torch.float32, CUDA, Backend.TORCH),
        (LovaszSoftmax(), 14_000, 65, torch.float32, CUDA, Backend.TRITON),
        (terms(limits.LOVASZ_TERMS), 1, 8, torch.float32, CUDA, Backend.TRITON),
        (terms(limits.LOVASZ_TERMS + 1), 1, 8, torch.float32, CUDA, Backend.TORCH),
        (terms(limits.LOVASZ_TERMS + 1), 1, 8, torch.float32, CPU, Backend.NUMBA),
    ],
)
def test_a_request_takes_the_fastest_way_that_is_exact_enough(
    loss: LossLike, images: int, side: int, dtype: torch.dtype, device: torch.device, expected: Backend
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
    assert choose([few], loss, CUDA) is Backend.TRITON
    assert choose([many], loss, CUDA) is Backend.TORCH
    assert choose([few, few], loss, CUDA) is Backend.TORCH


@pytest.mark.usefixtures("everything_installed")
def test_joints_whose_tables_are_too_large_together_are_computed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each joint takes the way that it takes alone."""
    monkeypatch.setattr(limits, "EXCESS_BYTES", 1 << 22)
    loss = weighted_sum(PER_IMAGE)
    medium, large = a_request(loss, 6, 65), a_request(loss, 14, 65)
    assert limits.excess_bytes([medium], loss) == pytest.approx(1.9e6, rel=0.1)
    divided = dispatch._divide(Batch.of([medium, large, medium, medium]), loss, CUDA, None)
    assert divided == [(Backend.TRITON, [0, 2]), (Backend.TORCH, [1]), (Backend.TRITON, [3])]
    assert dispatch._divide(Batch.of([medium] * 2), loss, CUDA, None) == [(Backend.TRITON, range(2))]
    # As one joint without per_image they would have one table for each class.
    without, joints = weighted_sum(LovaszSoftmax()), [a_request(loss, 1, 65) for _ in range(20)]
    divided = dispatch._divide(Batch.of(joints), without, CUDA, None)
    assert [(backend, len(numbers)) for backend, numbers in divided] == [(Backend.TRITON, 13), (Backend.TRITON, 7)]


@pytest.mark.usefixtures("everything_installed")
def test_nothing_to_advise_where_all_is_there() -> None:
    assert dispatch.advice(CPU) is None
    assert dispatch.advice(CUDA) is None


def test_without_the_compilers_torch_computes_and_something_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: False)
    dispatch.triton_works.cache_clear()
    for device, word in ((CPU, "lovasz[cpu]"), (CUDA, "triton")):
        assert choose([a_request(LovaszSoftmax(), 1, SIDE)], weighted_sum(LovaszSoftmax()), device) is Backend.TORCH
        assert word in str(dispatch.advice(device))
    dispatch.warm_up(CPU)
    dispatch.triton_works.cache_clear()


@pytest.mark.parametrize(
    ("version", "usable"), [("0.58.1", False), ("0.59.0rc1", True), ("0.100", True), ("1.0", True)]
)
def test_a_numba_that_is_too_old_is_left_and_named(
    version: str, usable: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    monkeypatch.setattr("importlib.import_module", lambda name: None)
    dispatch.installed.cache_clear()
    try:
        assert [dispatch.installed("numba") for _ in range(2)] == [usable] * 2
    finally:
        dispatch.installed.cache_clear()
    said = f"numba: got version {version}; expected 0.59 or newer: pip install 'lovasz[cpu]'"
    assert [record.getMessage() for record in caplog.records] == ([] if usable else [said])


def test_a_numba_that_refuses_this_numpy_is_left_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 1.26 or less")

    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.59.1")
    monkeypatch.setattr("importlib.import_module", refuse)
    dispatch.installed.cache_clear()
    try:
        assert [dispatch.installed("numba") for _ in range(2)] == [False] * 2
    finally:
        dispatch.installed.cache_clear()
    (record,) = caplog.records
    said = "numba: version 0.59.1 cannot be imported: Numba needs NumPy 1.26 or less (NumPy here: "
    assert record.getMessage().startswith(said + np.__version__)


def test_the_oldest_numba_is_that_of_the_extra() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'cpu = ["numba>={".".join(map(str, dispatch.OLDEST_NUMBA))}"]' in project


def test_a_triton_that_cannot_compile_is_tried_once_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "_compute_small", fail)
    dispatch.triton_works.cache_clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            request = a_request(LovaszSoftmax(), 1, SIDE)
            assert choose([request], weighted_sum(LovaszSoftmax()), CUDA) is Backend.TRITON  # compiles nothing
            divided = dispatch._divide(Batch.of([request]), weighted_sum(LovaszSoftmax()), CUDA, None)
            assert [backend for backend, _ in divided] == [Backend.TORCH]
    dispatch.triton_works.cache_clear()
    assert len(tried) == 1
    assert "Failed to find C compiler" in caplog.text


def test_a_batch_whose_members_take_different_ways_is_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Backend.NUMBA, Backend.TORCH, Backend.NUMBA, Backend.TORCH]
    total = weighted_sum(LovaszHinge())
    requests = [
        Request.checked(normal(1, 30, seed=i, dtype=torch.float32), random_labels(1, 30, values=2, seed=i), total)
        for i in range(len(taken))
    ]
    alone = [
        submit([request], total, CPU, backend=path).collect()[0] for request, path in zip(requests, taken, strict=True)
    ]
    way = {id(request): path for request, path in zip(requests, taken, strict=True)}
    monkeypatch.setattr(
        "lovasz.core.dispatch.choose",
        lambda joint, loss, device: way[id(joint[0])] if len(joint) == 1 else Backend.TORCH,
    )
    together = submit(requests, total, CPU).collect()
    for answer, expected in zip(together, alone, strict=True):
        assert isinstance(answer, Result)
        assert isinstance(expected, Result)
        assert bits(answer) == bits(expected)


def test_a_batch_of_nothing_has_no_answers() -> None:
    assert submit([], weighted_sum(LovaszSoftmax()), torch.device("cpu")).collect() == []


def test_warm_up_compiles_everything_that_a_request_needs() -> None:
    """After it no request compiles anything; what is compiled is counted by Numba itself."""
    pytest.importorskip("numba")
    command = [sys.executable, "-W", "error", "-m", "support.late_compilation"]
    ran = subprocess.run(command, cwd=REPOSITORY / "tests", capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ended\n"), ran.stderr


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "problem"),
    [
        ("numba", torch.float32, CPU, "got 'numba'; expected None or one of lovasz.core.dispatch.Backend"),
        (Backend.NUMBA, torch.float64, CPU, "got Backend.NUMBA for logits of float64; expected None or Backend.TORCH"),
        (Backend.NUMBA, torch.float32, CUDA, "got Backend.NUMBA for logits on cuda; expected"),
        (Backend.TRITON, torch.float32, CPU, "got Backend.TRITON, but no usable triton is installed; expected"),
    ],
)
def test_a_way_that_cannot_be_taken_is_refused(
    backend: Backend, dtype: torch.dtype, device: torch.device, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: package == "numba")
    total = weighted_sum(LovaszSoftmax())
    with pytest.raises(InvalidInput) as caught:
        submit([a_request(total, 1, 8, dtype)], total, device, backend=backend)
    assert caught.value.field == "backend"
    assert caught.value.problem.startswith(problem)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_triton_takes_no_logits_on_a_cpu_but_under_its_interpreter(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = weighted_sum(LovaszSoftmax())
    asked = [a_request(total, 1, 8)], total, torch.device(device)
    monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(IS_INTERPRETED=False))
    with pytest.raises(InvalidInput, match=f"got Backend.TRITON for logits on {device}; expected None or") as caught:
        dispatch.checked(Backend.TRITON, *asked)
    assert caught.value.field == "backend"
    monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(IS_INTERPRETED=True))
    if device == "cpu":
        assert dispatch.checked(Backend.TRITON, *asked) is Backend.TRITON


@pytest.mark.usefixtures("everything_installed")
def test_a_loss_that_triton_is_not_chosen_for_cannot_be_forced_on_it() -> None:
    total = weighted_sum(LovaszSoftmax())
    too_many = a_request(total, MAX_PIXELS // SIDE**2, SIDE)
    assert choose([too_many], total, CUDA) is Backend.TORCH
    with pytest.raises(InvalidInput, match="which takes no loss of this size"):
        submit([too_many], total, CUDA, backend=Backend.TRITON)


def test_joints_that_fall_back_to_torch_are_not_divided_as_triton_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "triton_works", lambda device: False)
    monkeypatch.setattr(limits, "NUMBERED_PIXELS", 100)
    requests = [a_request(LovaszSoftmax(), 1, 8) for _ in range(3)]
    divided = dispatch._divide(Batch.of(requests), weighted_sum(LovaszSoftmax()), CUDA, None)
    assert divided == [(Backend.TORCH, [0, 1, 2])]


def test_a_device_that_is_full_says_nothing_about_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [torch.OutOfMemoryError("full")]

    def compute_small(*arguments: object) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(dispatch, "_compute_small", compute_small)
    dispatch.triton_works.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.triton_works(CUDA)
    assert dispatch.triton_works(CUDA)
    dispatch.triton_works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, Backend.TORCH, Backend.TRITON])
def test_a_capture_is_refused_before_any_backend_is_tried(
    backend: Backend | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "_compute_small", lambda *arguments: tried.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    total = weighted_sum(LovaszSoftmax())
    dispatch.triton_works.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        submit([a_request(total, 1, 8, dtype)], total, CUDA, backend=backend)
    assert tried == []


def test_a_capture_says_nothing_about_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one on this thread's stream nor one of another thread, during which CUDA loads no kernel."""
    failures = [RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")]
    is_capturing = [True]

    def compute_small(*arguments: object) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(dispatch, "_compute_small", compute_small)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    dispatch.triton_works.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        dispatch.triton_works(CUDA)
    is_capturing[0] = False
    with pytest.raises(RuntimeError, match="not permitted"):
        dispatch.triton_works(CUDA)
    assert dispatch.triton_works(CUDA)
    dispatch.triton_works.cache_clear()


@dataclass(frozen=True)
class NewLoss:
    """A loss that no backend knows."""

    class_weights: None = None
    ignore_index: None = None
    kind: str = "new_loss"


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.NUMBA])
def test_a_loss_that_a_backend_does_not_know_is_not_computed_as_another(backend: Backend, is_binary: bool) -> None:
    unknown: Any = NewLoss()
    loss = WeightedSum(((1.0, unknown),))
    object.__setattr__(loss, "is_binary", is_binary)
    logits, labels = torch.zeros(1, 1 if is_binary else 2, 4), torch.zeros(1, 4, dtype=torch.uint8)
    batch = Batch.of([Request.checked(logits, labels, loss)])
    with pytest.raises(NotImplementedError, match="new_loss"):
        compute(backend, Plan.of(batch, loss, CPU), batch, want_grad=False)
