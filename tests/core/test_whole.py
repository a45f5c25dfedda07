"""Small joints that one thread computes each, against the same loops run step by step over the whole batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.comparison import bits, normal, random_labels

from lovasz.core import CrossEntropy, InvalidInput, LovaszSoftmax
from lovasz.core.answers import JointFault
from lovasz.core.backends.numba import call as call_module
from lovasz.core.backends.numba import compute as numba_compute
from lovasz.core.backends.numba import extension, whole
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.scratch import ScratchPool
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.spec import LossLike, Result, weighted_sum

VOID = 255
STEP_BY_STEP = extension.THRESHOLDS._replace(whole=0, thread=1)

LOSSES: dict[str, LossLike] = {
    "present": LovaszSoftmax(ignore_index=VOID),
    "weights": LovaszSoftmax(classes="all", class_weights=[1.0, 0.3, 0.0, 0.7, 2.0], ignore_index=VOID),
    "images": LovaszSoftmax(classes=[3, 1], per_image=True, ignore_index=VOID),
    "terms": [
        (0.7, CrossEntropy(class_weights=[1.0, 0.3, 1.0, 0.7, 0.0], ignore_index=VOID)),
        (-1.3, LovaszSoftmax(per_image=True, ignore_index=VOID)),
        (0.2, CrossEntropy(label_smoothing=0.1, ignore_index=VOID)),
        (0.1, LovaszSoftmax(classes="all", ignore_index=VOID)),
    ],
    "different void": [(1.0, CrossEntropy(ignore_index=2)), (0.5, LovaszSoftmax(ignore_index=1))],
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

SHAPES = [(1, 5, 7, 9), (3, 5, 16, 16), (2, 5, 33), (1, 5, 1, 1), (64, 5), (2, 5, 3, 4, 5), (2, 5, 20, 21)] * 5
"""Of the logits; enough requests for the largest joint to be a small part of the batch."""
SIZES = [1, 2, 1, 3, 1, 1, 5, 1, *[1] * 20]
"""Requests of each joint."""


def requests(loss: LossLike, dtype: torch.dtype, label_dtype: torch.dtype) -> list[Request]:
    total, made = weighted_sum(loss), []
    for seed, (images, channels, *spatial) in enumerate(SHAPES):
        void = VOID if total.void_label == VOID else 2
        labels = random_labels(images, *spatial, values=2 + seed % 4, seed=seed, void=void)  # Some classes are absent.
        if seed == 7:
            labels[:] = void
        logits = 2 * normal(images, channels, *spatial, seed=seed)
        made.append(Request.checked(logits.to(dtype), labels.to(label_dtype), total))
    return made


def answers(made: list[Request], loss: LossLike, want_grad: bool = True) -> list[Any]:
    joined = SIZES if len(made) == sum(SIZES) else None
    options: dict[str, Any] = {"joined": joined, "want_grad": want_grad, "backend": Backend.NUMBA}
    return submit(made, weighted_sum(loss), torch.device("cpu"), **options).collect()


@each_loss
def test_what_a_call_leaves_in_memory_changes_no_bit(loss: LossLike, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_compute, "SCRATCH", ScratchPool())
    made = requests(loss, torch.float32, torch.uint8)
    expected = [bits(answer) for answer in answers(made, loss)]
    assert [bits(answer) for answer in answers(made, loss)] == expected
    answers([replace(one, logits=torch.full_like(one.logits, math.nan)) for one in made], loss)
    assert [bits(answer) for answer in answers(made, loss)] == expected
    answers(made[:3], loss, want_grad=False)
    assert [bits(answer) for answer in answers(made, loss)] == expected


def small(pixels: int, seed: int) -> Request:
    """A request of one image of five classes."""
    labels = random_labels(1, pixels, values=5, seed=seed)
    return Request.checked(normal(1, 5, pixels, seed=seed, dtype=torch.float32), labels, weighted_sum(LovaszSoftmax()))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The names of the compiled loops that were run, each with the threads that its batch had."""
    found: list[tuple[str, int]] = []
    run = Call.run

    def noted(call: Any, loop: Any, **arguments: Any) -> None:
        found.append((loop.__name__, call.threads))
        run(call, loop, **arguments)

    monkeypatch.setattr(Call, "run", noted)
    return found


def names(ran: list[tuple[str, int]]) -> list[str]:
    return [name for name, _ in ran]


@each_loss
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_joints_computed_by_one_thread_each_have_the_bits_of_all_steps(
    loss: LossLike,
    number: int,
    dtype: torch.dtype,
    ran: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
) -> None:
    made = requests(loss, dtype, torch.uint8 if number == 1 else torch.int64)
    torch.set_num_threads(number)
    together = answers(made, loss)
    assert names(ran) == [whole.compute.__name__]
    without_grad = answers(made, loss, want_grad=False)
    monkeypatch.setattr(extension, "THRESHOLDS", STEP_BY_STEP)
    ran.clear()
    stepwise = answers(made, loss)
    assert "finish" in names(ran)
    for answer, expected, other in zip(together, stepwise, without_grad, strict=True):
        assert isinstance(expected, Result)
        assert bits(answer) == bits(expected)
        assert other.grad is None
        assert other.loss == expected.loss


def test_a_fault_is_of_its_joint_alone() -> None:
    """The requests 4 to 6 are one joint; the last request is another."""
    loss = LOSSES["terms"]
    made = requests(loss, torch.float32, torch.int64)
    expected = answers(made, loss)
    made[5].labels[0, 0, 0, 0] = 9
    made[-1].logits[0, 0, 0, 0] = float("nan")
    found = answers(made, loss)
    assert isinstance(found[5], InvalidInput)
    assert isinstance(found[4], JointFault)
    assert isinstance(found[6], JointFault)
    assert math.isnan(found[-1].loss)
    for place in set(range(len(made) - 1)) - {4, 5, 6}:
        assert bits(found[place]) == bits(expected[place])


@pytest.mark.parametrize(
    ("shape", "number"),
    [((1, 5, 256, 256), 2), ((1, 2, 512, 512), 1), ((1, 300, 4, 4), 1)],
    ids=["uneven", "in tables", "many classes"],
)
def test_other_joints_are_computed_step_by_step(
    shape: tuple[int, ...], number: int, ran: list[tuple[str, int]], threads: None
) -> None:
    torch.set_num_threads(number)
    loss = LovaszSoftmax()
    labels = random_labels(shape[0], *shape[2:], values=2, seed=1)
    answers([Request.checked(normal(*shape, seed=1, dtype=torch.float32), labels, weighted_sum(loss))], loss)
    assert "prepare" in names(ran)
    assert whole.compute.__name__ not in names(ran)


@pytest.mark.parametrize(
    ("pixels", "is_whole"),
    [
        ([3000, 3000], True),
        ([3000, 2500, 3000, 3000], True),
        ([3000, 3000, 3000], False),  # A thread would have two of them, and the other one only one.
        ([3000, 100, 100], False),
        ([3000, *[100] * 90], True),
    ],
    ids=["two", "four", "three", "one large", "one large, many small"],
)
def test_threads_take_whole_joints_if_they_end_at_about_the_same_time(
    pixels: list[int], is_whole: bool, ran: list[tuple[str, int]], threads: None
) -> None:
    torch.set_num_threads(2)
    answers([small(count, seed) for seed, count in enumerate(pixels)], LovaszSoftmax())
    assert (names(ran) == [whole.compute.__name__]) is is_whole


def test_a_small_batch_is_computed_by_the_thread_that_asks(
    ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_module, "thread_count", lambda: 3)
    monkeypatch.setattr(extension, "THRESHOLDS", extension.THRESHOLDS._replace(thread=1000))
    for pixels, threads in ((1, 1), (399, 1), (400, 2), (599, 2), (600, 3), (5000, 3)):  # of five classes
        ran.clear()
        answers([small(pixels, seed=1)], LovaszSoftmax())
        assert {used for _, used in ran} == {threads}
