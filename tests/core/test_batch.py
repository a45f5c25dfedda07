"""A request's answer is the same bits whatever else is in its batch, in whatever order and on however many threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from core.comparison import bits, norm_error, normal, random_labels, reference_answer
from torch import Tensor

from lovasz.core import CrossEntropy, InvalidInput, LovaszHinge, LovaszSoftmax, compute
from lovasz.core.batch import launch
from lovasz.core.ragged import Request
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
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)

Tensors = tuple[Tensor, Tensor]


def tensors(shape: tuple[int, ...], loss: LossLike, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    total = weighted_sum(loss)
    images, *spatial = shape
    logits = 2 * normal(images, CHANNELS, *spatial, seed=seed)
    if total.probabilities:
        logits = logits.softmax(1)
    label_shape = logits.shape if total.is_hinge else shape
    # Few classes in small requests, so that some are absent from one and present in another.
    values = 2 if total.is_hinge else min(CHANNELS, 2 + seed % CHANNELS)
    labels = random_labels(*label_shape, values=values, seed=seed, void=VOID)
    labels.view(-1)[0] = 1  # never wholly void
    return logits.to(dtype).to(device), labels.to(torch.uint8).to(device)


def members(loss: LossLike, dtype: torch.dtype, device: torch.device) -> list[Tensors]:
    return [tensors(shape, loss, dtype, device, seed) for seed, shape in enumerate(SHAPES)]


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
    return launch(requests, total, batch[0][0].device, want_grad=want_grad).collect()


def result_bits(answer: Result[Tensor] | InvalidInput) -> tuple[object, ...]:
    return (str(answer),) if isinstance(answer, InvalidInput) else bits(answer)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_batch_gives_each_the_bits_that_it_has_alone(loss: LossLike, dtype: torch.dtype, device: torch.device) -> None:
    batch = members(loss, dtype, device)
    alone = [bits(compute(*member, loss)) for member in batch]
    assert len(set(alone)) == len(alone)
    for order in (range(len(batch)), reversed(range(len(batch))), (5, 0, 3, 1, 6, 4, 2)):
        order = list(order)
        together = answers([batch[i] for i in order], loss)
        assert [result_bits(answer) for answer in together] == [alone[i] for i in order]


@each_loss
def test_strangers_change_no_bit(loss: LossLike, device: torch.device) -> None:
    batch, odd = members(loss, torch.float32, device), strangers(loss, torch.float32, device)
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
def test_loss_alone_has_the_same_bits(loss: LossLike, device: torch.device) -> None:
    batch = members(loss, torch.float32, device)
    for with_grad, without in zip(answers(batch, loss), answers(batch, loss, want_grad=False), strict=True):
        assert isinstance(with_grad, Result)
        assert isinstance(without, Result)
        assert without.grad is None
        assert bits(without)[1:] == bits(with_grad)[1:]


@each_loss
def test_number_of_threads_changes_no_bit(loss: LossLike, threads: None) -> None:
    batch = members(loss, torch.float32, torch.device("cpu"))
    seen = set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        seen.add(tuple(result_bits(answer) for answer in answers(batch, loss)))
    assert len(seen) == 1


@each_loss
def test_run_to_run_no_bit_changes(loss: LossLike, device: torch.device) -> None:
    batch = members(loss, torch.float32, device)
    assert len({tuple(result_bits(answer) for answer in answers(batch, loss)) for _ in range(3)}) == 1


def test_request_so_large_that_its_rows_are_worked_on_in_blocks(device: torch.device) -> None:
    """Rows are worked on together as long as they are small: the batch takes them in other portions than each alone."""
    loss = weighted_sum(LovaszSoftmax(classes="all"))
    batch = []
    for seed, pixels in ((1, 900_000), (2, 700_000)):
        logits = normal(1, 3, pixels, seed=seed, dtype=torch.float32).to(device)
        batch.append((logits, random_labels(1, pixels, values=2, seed=seed).to(device)))
    together = [result_bits(answer) for answer in answers(batch, loss)]
    assert together == [bits(compute(*member, loss)) for member in batch]


@each_loss
def test_batch_agrees_with_the_reference(loss: LossLike, device: torch.device) -> None:
    batch = members(loss, torch.float64, device)[:-1]
    for (logits, labels), answer in zip(batch, answers(batch, loss), strict=True):
        expected, expected_grad = reference_answer(logits, labels, loss)
        assert isinstance(answer, Result)
        assert answer.loss == pytest.approx(expected, rel=1e-11)
        assert norm_error(answer.grad, expected_grad) < 1e-11


@each_loss
def test_gradients_are_contiguous_and_apart(loss: LossLike, device: torch.device) -> None:
    batch = members(loss, torch.float32, device)
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
