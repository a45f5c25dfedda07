"""A request's answer is the same bits whatever else is in its batch, in whatever order and on however many threads."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels, reference_answer
from support.ways import WAYS, Way
from torch import Tensor

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    compute,
)
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.spec import LossLike, Result, weighted_sum

VOID = 255
CHANNELS = 5
SHAPES = [(1, 7, 9), (3, 16, 16), (2, 33), (1, 1), (64,), (2, 3, 4, 5), (1, 150, 231)]
"""Of the labels: images and spatial axes. The last is large enough to be shared among threads."""

LOSSES: list[LossLike] = [
    LovaszSoftmax(ignore_index=VOID),
    LovaszSoftmax(classes="all", per_image=True, ignore_index=VOID),
    LovaszSoftmax(classes=[3, 1], class_weights=[1.0, 0.3, 1.0, 0.7, 1.0], ignore_index=VOID),
    LovaszSoftmax(input="probabilities", ignore_index=VOID),
    CrossEntropy(class_weights=[1.0, 0.3, 1.0, 0.7, 0.0], ignore_index=VOID, label_smoothing=0.1),
    [
        (0.7, CrossEntropy(ignore_index=VOID)),
        (-1.3, LovaszSoftmax(per_image=True, ignore_index=VOID)),
        (0.1, LovaszSoftmax(classes="all", ignore_index=VOID)),
    ],
    LovaszHinge(multilabel=True, ignore_index=VOID),
    [
        (1.0, LovaszHinge(multilabel=True, per_image=True, ignore_index=VOID)),
        (0.3, LovaszHinge(multilabel=True, ignore_index=VOID)),
    ],
    [
        (1.0, BinaryCrossEntropy(pos_weight=2.0, multilabel=True, ignore_index=VOID)),
        (0.5, LovaszSigmoid(multilabel=True, per_image=True, ignore_index=VOID)),
    ],
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)

Tensors = tuple[Tensor, Tensor]


def tensors(
    shape: tuple[int, ...],
    loss: LossLike,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    channels: int = CHANNELS,
) -> Tensors:
    total = weighted_sum(loss)
    images, *spatial = shape
    logits = 2 * normal(images, channels, *spatial, seed=seed)
    if total.probabilities:
        logits = logits.softmax(1)
    label_shape = logits.shape if total.is_binary else shape
    # Few classes in small requests, so that some are absent from one and present in another.
    values = 2 if total.is_binary else min(channels, 2 + seed % channels)
    labels = random_labels(*label_shape, values=values, seed=seed, void=VOID)
    labels.view(-1)[0] = 1  # never wholly void
    return logits.to(dtype).to(device), labels.to(torch.uint8).to(device)


def members(loss: LossLike, dtype: torch.dtype, device: torch.device, way: Way | None = None) -> list[Tensors]:
    """A request of each shape; none that this way would take too long for."""
    slow = way is not None and way.is_interpreted
    shapes = [shape for shape in SHAPES if not slow or (shape[0] <= 3 and prod(shape) <= 1000)]
    return [tensors(shape, loss, dtype, device, seed) for seed, shape in enumerate(shapes)]


def strangers(loss: LossLike, dtype: torch.dtype, device: torch.device) -> list[Tensors]:
    """Requests that no answer comes to, or a strange one: a NaN, an infinity, a bad label, nothing but void."""
    not_a_number, infinite, mislabelled, void = (tensors((2, 21), loss, dtype, device, seed) for seed in range(90, 94))
    not_a_number[0][:, :, 4:7] = float("nan")
    not_a_number[1][:] = 1
    infinite[0][1, 2, 20] = float("inf")
    infinite[1][:] = 0
    mislabelled[1].view(-1)[7] = 77
    void[1][:] = VOID
    return [not_a_number, infinite, mislabelled, void]


def answers(batch: list[Tensors], loss: LossLike, *, want_grad: bool = True) -> list[Result[Tensor] | InvalidInput]:
    total = weighted_sum(loss)
    requests = [Request.checked(logits, labels, total) for logits, labels in batch]
    return submit(requests, total, batch[0][0].device, want_grad=want_grad).collect()


def result_bits(answer: Result[Tensor] | InvalidInput) -> tuple[object, ...]:
    return (str(answer),) if isinstance(answer, InvalidInput) else bits(answer)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_batch_gives_each_the_bits_that_it_has_alone(
    loss: LossLike, dtype: torch.dtype, way: Way, device: torch.device
) -> None:
    batch = members(loss, dtype, device, way)
    alone = [bits(compute(*member, loss)) for member in batch]
    assert len(set(alone)) == len(alone)
    some_order = [i for i in (5, 0, 3, 1, 6, 4, 2) if i < len(batch)]
    for order in (list(range(len(batch))), list(reversed(range(len(batch)))), some_order):
        together = answers([batch[i] for i in order], loss)
        assert [result_bits(answer) for answer in together] == [alone[i] for i in order]


@each_loss
def test_strangers_change_no_bit(loss: LossLike, way: Way, device: torch.device) -> None:
    batch, odd = members(loss, torch.float32, device, way), strangers(loss, torch.float32, device)
    alone = [bits(compute(*member, loss)) for member in batch]
    odd_alone = [result_bits(answers([stranger], loss)[0]) for stranger in odd]
    mixed = [member for pair in itertools.zip_longest(odd, batch) for member in pair if member is not None]
    together = [result_bits(answer) for answer in answers(mixed, loss)]
    expected = [member for pair in itertools.zip_longest(odd_alone, alone) for member in pair if member is not None]
    assert together == expected


@each_loss
def test_answers_of_the_strangers(loss: LossLike, device: torch.device) -> None:
    not_a_number, infinite, mislabelled, void = answers(strangers(loss, torch.float32, device), loss)
    assert isinstance(not_a_number, Result)
    assert isinstance(infinite, Result)
    for answer in (not_a_number, infinite):
        assert answer.loss != answer.loss
        assert answer.grad is not None
        assert answer.grad.isnan().all()
    assert isinstance(mislabelled, InvalidInput)
    assert "got 77 at index" in str(mislabelled)
    assert isinstance(void, Result)
    assert void.loss == 0
    assert void.grad is not None
    assert torch.equal(void.grad, torch.zeros_like(void.grad))


@each_loss
def test_loss_alone_has_the_same_bits(loss: LossLike, way: Way, device: torch.device) -> None:
    batch = members(loss, torch.float32, device, way)
    for with_grad, without in zip(answers(batch, loss), answers(batch, loss, want_grad=False), strict=True):
        assert isinstance(with_grad, Result)
        assert isinstance(without, Result)
        assert without.grad is None
        assert bits(without)[1:] == bits(with_grad)[1:]


@each_loss
def test_number_of_threads_changes_no_bit(loss: LossLike, way: Way, threads: None) -> None:
    if way.device != "cpu" or way.is_interpreted:
        pytest.skip("takes no threads")
    batch = members(loss, torch.float32, torch.device("cpu"))
    seen = set()
    for number in (1, 2, 3, 5):
        torch.set_num_threads(number)
        seen.add(tuple(result_bits(answer) for answer in answers(batch, loss)))
    assert len(seen) == 1


LARGE_SHAPES = [(1, 2, 3), (1, 512, 600), (2, 300, 450), (40, 7), (1, 401, 663), (3, 33, 34)]
"""Of the labels; groups of more than 2^18 pixels among small ones, in no order. Of the second and the third, an image
alone is on the other side."""

LARGE_LOSSES: list[LossLike] = [
    [(0.5, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(classes="all", ignore_index=VOID))],
    [
        (1.0, LovaszSoftmax(per_image=True, ignore_index=VOID)),
        (-0.3, LovaszSoftmax(classes=[1, 2], class_weights=[1.0, 0.2, 0.7], ignore_index=VOID)),
    ],
    LovaszSoftmax(input="probabilities", ignore_index=VOID),
    [
        (1.0, LovaszHinge(multilabel=True, ignore_index=VOID)),
        (0.3, LovaszHinge(multilabel=True, per_image=True, ignore_index=VOID)),
    ],
    [
        (1.0, LovaszSigmoid(multilabel=True, ignore_index=VOID)),
        (0.3, BinaryCrossEntropy(pos_weight=[1.0, 0.0, 3.0], multilabel=True, ignore_index=VOID)),
    ],
]
each_large_loss = pytest.mark.parametrize("loss", LARGE_LOSSES, ids=lambda loss: weighted_sum(loss).kind)

COMPILED = [way for way in WAYS if way.backend is not Backend.TORCH and way.ranks != "by sorting"]
compiled_ways = pytest.mark.parametrize("way", COMPILED, ids=str, indirect=True)


def large_members(loss: LossLike, way: Way) -> list[Tensors]:
    way.require_speed(max(map(prod, LARGE_SHAPES)))
    on = torch.device(way.device)
    return [tensors(shape, loss, torch.float32, on, seed, channels=3) for seed, shape in enumerate(LARGE_SHAPES)]


@each_large_loss
@compiled_ways
def test_large_and_small_requests_together(loss: LossLike, way: Way, threads: None) -> None:
    """Each has the bits that it has alone, in any order, on any number of threads, run after run."""
    batch = large_members(loss, way)
    alone = [bits(compute(*member, loss)) for member in batch]
    assert len(set(alone)) == len(alone)
    orders = [list(range(len(batch))), list(reversed(range(len(batch)))), [3, 4, 0, 5, 1, 2]]
    for number, order in zip((2, 3, 5), orders, strict=True):
        torch.set_num_threads(number)
        together = answers([batch[i] for i in order], loss)
        assert [result_bits(answer) for answer in together] == [alone[i] for i in order]
        assert [bits(compute(*member, loss)) for member in batch[1:3]] == alone[1:3]


@pytest.mark.parametrize("per_image", [False, True])
@compiled_ways
def test_single_class_that_threads_divide_into_parts(per_image: bool, way: Way, threads: None) -> None:
    """On one thread each segment is counted in one table; on several, this one in parts whose tables are added up."""
    way.require_speed(1 << 20)
    loss = LovaszHinge(per_image=per_image, ignore_index=VOID)
    logits = 3 * normal(1, 1024, 1024, seed=31, dtype=torch.float32)
    labels = random_labels(1, 1024, 1024, values=2, seed=32, void=VOID)
    logits[0, :100] = 0.25  # many ties, and all in the first part
    inputs = logits.to(way.device), labels.to(way.device)
    small = normal(2, 30, 30, seed=33, dtype=torch.float32), random_labels(2, 30, 30, values=2, seed=34)
    seen, beside_another = set(), set()
    for number in (1, 2, 3, 5, 2):
        torch.set_num_threads(number)
        seen.add(bits(compute(*inputs, loss)))
        beside_another.add(result_bits(answers([(small[0].to(way.device), small[1].to(way.device)), inputs], loss)[1]))
        without_grad = compute(*inputs, loss, want_grad=False)
        assert bits(without_grad)[1:] == next(iter(seen))[1:]
    assert len(seen) == 1
    assert beside_another == seen


@pytest.mark.parametrize("weight", [0.0, -0.0])
@compiled_ways
def test_term_of_weight_0_gives_the_same_zeros_on_any_number_of_threads(weight: float, way: Way, threads: None) -> None:
    """The order of few pixels matters: one thread writes the gradient of all, several add to theirs."""
    way.require_speed(1 << 19)
    loss = [(weight, LovaszHinge())]
    logits = normal(1, 512, 1024, seed=35, dtype=torch.float32).to(way.device)
    labels = torch.zeros(1, 512, 1024, dtype=torch.uint8, device=way.device)
    labels[0, 0], logits[0, 0] = 1, -2.5
    seen = set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        seen.add(bits(compute(logits, labels, loss)))
    assert len(seen) == 1


@each_loss
def test_run_to_run_no_bit_changes(loss: LossLike, way: Way, device: torch.device) -> None:
    batch = members(loss, torch.float32, device, way)
    assert len({tuple(result_bits(answer) for answer in answers(batch, loss)) for _ in range(3)}) == 1


def test_request_so_large_that_its_rows_are_worked_on_in_blocks(way: Way, device: torch.device) -> None:
    """Rows are worked on together as long as they are small: the batch takes them in other portions than each alone."""
    way.require_speed(3 * 900_000)
    loss = weighted_sum(LovaszSoftmax(classes="all"))
    batch = []
    for seed, pixels in ((1, 900_000), (2, 700_000)):
        logits = normal(1, 3, pixels, seed=seed, dtype=torch.float32).to(device)
        batch.append((logits, random_labels(1, pixels, values=2, seed=seed).to(device)))
    together = [result_bits(answer) for answer in answers(batch, loss)]
    assert together == [bits(compute(*member, loss)) for member in batch]


@each_loss
def test_batch_agrees_with_the_reference(loss: LossLike, torch_device: torch.device) -> None:
    batch = members(loss, torch.float64, torch_device)[:-1]
    for (logits, labels), answer in zip(batch, answers(batch, loss), strict=True):
        expected, expected_grad = reference_answer(logits, labels, loss)
        assert isinstance(answer, Result)
        assert answer.loss == pytest.approx(expected, rel=1e-11)
        assert norm_error(answer.grad, expected_grad) < 1e-11


@each_loss
def test_gradients_are_contiguous_and_apart(loss: LossLike, way: Way, device: torch.device) -> None:
    batch = members(loss, torch.float32, device, way)
    before = [result_bits(answer) for answer in answers(batch, loss)]
    together = answers(batch, loss)
    for (logits, _), answer in zip(batch, together, strict=True):
        assert isinstance(answer, Result)
        assert answer.grad is not None
        assert answer.grad.is_contiguous()
        assert answer.grad.shape == logits.shape
    grads = [answer.grad for answer in together if isinstance(answer, Result) and answer.grad is not None]
    grads[1].fill_(7)
    for i in (0, *range(2, len(batch))):
        assert result_bits(together[i]) == before[i]


def test_requests_may_differ_in_axes_and_in_the_dtype_of_labels(device: torch.device) -> None:
    loss = LovaszSoftmax()
    logits, labels = tensors((2, 6, 4), loss, torch.float32, device, seed=3)
    labels = labels % CHANNELS
    batch = [(logits, labels.to(dtype)) for dtype in (torch.int64, torch.int8, torch.uint8)]
    batch.append((logits.reshape(2, CHANNELS, 24), labels.reshape(2, 24)))
    first, *others = answers(batch, loss)
    for other in others:
        assert isinstance(first, Result)
        assert isinstance(other, Result)
        assert other.loss == first.loss
        assert first.grad is not None
        assert other.grad is not None
        assert torch.equal(other.grad.reshape(first.grad.shape), first.grad)
