"""Losses of images: one a loss (``reduction="none"``), images of several items (``offsets``); and masks (``valid``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels
from support.foreign import FOREIGN, WithArray
from support.ways import Way
from torch import Tensor

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LocalLoss,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    compute,
    lovasz_hinge,
    lovasz_sigmoid,
    lovasz_softmax,
)
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import Loss, LossLike, Result, weighted_sum
from lovasz.spec.validity import masked

VOID = 255
PER_IMAGE: list[tuple[LossLike, tuple[int, ...]]] = [
    (LovaszSoftmax(per_image=True, ignore_index=VOID), (4, 5, 6, 7)),
    (LovaszSoftmax("all", [1, 2, 0, 1, 3], per_image=True), (4, 5, 6, 7)),
    ([(0.5, LovaszSoftmax(per_image=True)), (2, LovaszSoftmax([1, 2], per_image=True, ignore_index=0))], (4, 3, 40)),
    (LovaszHinge(per_image=True, ignore_index=VOID), (4, 30)),
    (LovaszHinge(per_image=True, multilabel=True), (4, 3, 5, 6)),
    (LovaszSigmoid(per_image=True, ignore_index=VOID, multilabel=True), (4, 3, 5, 6)),
]
each_loss = pytest.mark.parametrize(("loss", "shape"), PER_IMAGE, ids=lambda value: "")


def tensors(loss: LossLike, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    total = weighted_sum(loss)
    void = VOID if any(term.ignore_index == VOID for _, term in total.terms) else None
    label_shape = shape if total.is_binary else (shape[0], *shape[2:])
    labels = random_labels(*label_shape, values=2 if total.is_binary else shape[1], seed=3, void=void)
    return normal(*shape, seed=1, dtype=torch.float32).to(device), labels.to(device)


@each_loss
def test_each_image_has_its_own_loss(loss: LossLike, shape: tuple[int, ...], device: torch.device) -> None:
    logits, labels = tensors(loss, shape, device)
    result = compute(logits, labels, loss)
    alone = [compute(logits[i : i + 1], labels[i : i + 1], loss) for i in range(len(logits))]
    for t, term in enumerate(result.terms):
        assert term.per_image_loss.tolist() == [image.terms[t].loss for image in alone]
        assert term.loss == pytest.approx(term.per_image_loss.mean(), rel=1e-12)


@each_loss
def test_reduction_none_scales_each_image_by_its_own_factor(
    loss: LossLike, shape: tuple[int, ...], device: torch.device
) -> None:
    logits, labels = tensors(loss, shape, device)
    logits.requires_grad_()
    factors = torch.tensor([1.0, 0.0, -2.0, 0.25], device=device)
    losses = LocalLoss(loss, reduction="none")(logits, labels)
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    (losses * factors).sum().backward()
    expected = []
    for i, factor in enumerate(factors.tolist()):
        alone = compute(logits[i : i + 1].detach(), labels[i : i + 1], loss)
        assert losses[i].item() == pytest.approx(alone.loss, rel=1e-6, abs=1e-7)
        assert alone.grad is not None
        expected.append(alone.grad.cpu().double() * factor)
    assert norm_error(logits.grad, torch.cat(expected)) < 2e-6


def test_functions_take_reduction_none(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (3, 4, 50), device)
    losses = lovasz_softmax(logits, labels, per_image=True, reduction="none")
    assert losses.mean().item() == pytest.approx(lovasz_softmax(logits, labels, per_image=True).item(), rel=1e-6)
    logits, labels = tensors(LovaszHinge(), (3, 50), device)
    for function in (lovasz_hinge, lovasz_sigmoid):
        losses = function(logits, labels, per_image=True, reduction="none")
        assert losses.mean().item() == pytest.approx(function(logits, labels, per_image=True).item(), rel=1e-6)


def test_images_of_a_joint_are_those_of_each_request(device: torch.device) -> None:
    loss = weighted_sum(LovaszSoftmax(per_image=True))
    parts = [tensors(LovaszSoftmax(), (images, 3, 40), device) for images in (2, 1, 3)]
    requests = [Request.checked(logits, labels, loss) for logits, labels in parts]
    answers = submit(requests, loss, device, joined=[3]).collect()
    for (logits, labels), answer in zip(parts, answers, strict=True):
        assert isinstance(answer, Result)
        own = compute(logits, labels, loss).terms[0].per_image_loss
        assert answer.terms[0].per_image_loss.tolist() == own.tolist()
    (first, *_) = answers
    assert isinstance(first, Result)
    assert first.loss == pytest.approx(np.concatenate([a.terms[0].per_image_loss for a in answers]).mean(), rel=1e-12)


def test_not_a_number_in_one_image_is_one_in_all(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (3, 4, 50), device)
    logits[1, 2, 3] = torch.nan
    assert np.isnan(compute(logits, labels, LovaszSoftmax(per_image=True)).terms[0].per_image_loss).all()
    assert lovasz_softmax(logits, labels, per_image=True, reduction="none").isnan().all()


@pytest.mark.parametrize(
    "loss",
    [LovaszSoftmax(), CrossEntropy(), [(1, LovaszSoftmax(per_image=True)), (1, CrossEntropy())]],
    ids=["all pixels", "cross-entropy", "sum"],
)
def test_what_has_no_loss_an_image_is_refused(loss: LossLike, device: torch.device) -> None:
    logits, labels = tensors(loss, (2, 3, 4), device)
    with pytest.raises(
        InvalidInput, match=r"^reduction: got 'none' with .*; expected only Lovász losses with per_image"
    ):
        LocalLoss(loss, reduction="none")(logits, labels)
    with pytest.raises(InvalidInput, match=r"^reduction: got 'sum'; expected 'mean', or 'none' for one loss per image"):
        LocalLoss(loss, reduction="sum")  # type: ignore[arg-type]


def test_more_images_than_are_returned(way: Way, device: torch.device) -> None:
    way.require_speed(1 << 17)
    logits, labels = torch.zeros(65_537, 2, 1, device=device), torch.zeros(65_537, 1, dtype=torch.uint8, device=device)
    assert compute(logits, labels, LovaszSoftmax(per_image=True)).terms[0].per_image_loss.shape == (0,)
    with pytest.raises(InvalidInput, match=r"^reduction: got 'none' with 65537 images; expected at most 65536"):
        lovasz_softmax(logits, labels, per_image=True, reduction="none")


# --- Offsets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(), (3, 2)], ids=["points", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("loss", "channels"),
    [
        (LovaszSoftmax(per_image=True, ignore_index=VOID), (5,)),
        ([(1, LovaszSoftmax(per_image=True)), (0.5, LovaszSoftmax()), (1, CrossEntropy())], (4,)),
        (LovaszHinge(per_image=True), (1,)),
        (LovaszSigmoid(per_image=True, ignore_index=VOID, multilabel=True), (3,)),
    ],
    ids=["softmax", "sum", "hinge", "multilabel"],
)
def test_offsets_make_images_of_several_items(
    loss: LossLike, channels: tuple[int, ...], spatial: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """The same as one request that holds each image's items along a spatial axis, joined with the others."""
    logits, labels = tensors(loss, (50, *channels, *spatial), device)
    logits, total, ends = logits.to(dtype), weighted_sum(loss), [7, 8, 30, 50]
    result = compute(logits, labels, loss, offsets=torch.tensor(ends))
    requests = []
    for start, end in zip([0, *ends], ends, strict=False):
        image, its_labels = (part[start:end].movedim(0, -1)[None] for part in (logits, labels))
        requests.append(Request.checked(image, its_labels, total))
    answers = submit(requests, total, device, joined=[len(ends)]).collect()
    assert isinstance(answers[0], Result)
    assert result.loss == answers[0].loss
    assert result.intersection.tolist() == answers[0].intersection.tolist()
    grads = [
        answer.grad[0].movedim(-1, 0) for answer in answers if isinstance(answer, Result) and answer.grad is not None
    ]
    assert result.grad is not None
    assert torch.equal(result.grad, torch.cat(grads))
    first = result.terms[0].per_image_loss
    assert first.tolist() == [v for a in answers if isinstance(a, Result) for v in a.terms[0].per_image_loss.tolist()]


def test_offsets_without_per_image_are_refused(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (40, 5), device)
    with pytest.raises(InvalidInput, match=r"^offsets: got them for a loss that scores all images together; expected "):
        compute(logits, labels, LovaszSoftmax(), offsets=[10, 40])


def test_reduction_none_with_offsets(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (40, 5), device)
    logits.requires_grad_()
    losses = lovasz_softmax(logits, labels, per_image=True, offsets=[10, 40], reduction="none")
    (losses * torch.tensor([0.0, 3.0], device=device)).sum().backward()
    alone = compute(logits.detach()[10:], labels[10:], LovaszSoftmax())
    assert losses[1].item() == pytest.approx(alone.loss, rel=1e-6)
    assert logits.grad is not None
    assert not logits.grad[:10].any()
    assert alone.grad is not None
    assert norm_error(logits.grad[10:], 3 * alone.grad.cpu().double()) < 1e-6


def test_requests_with_and_without_offsets_share_a_batch(device: torch.device) -> None:
    loss = weighted_sum(LovaszSoftmax(per_image=True))
    cloud = tensors(LovaszSoftmax(), (40, 3), device)
    image = tensors(LovaszSoftmax(), (2, 3, 7, 5), device)
    requests = [Request.checked(*cloud, loss, [15, 40]), Request.checked(*image, loss)]
    together = submit(requests, loss, device).collect()
    alone = [compute(*cloud, loss, offsets=[15, 40]), compute(*image, loss)]
    for answer, expected in zip(together, alone, strict=True):
        assert isinstance(answer, Result)
        assert bits(answer) == bits(expected)


def test_a_bad_label_stands_where_the_caller_has_it(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (40, 3), device)
    labels[31] = 7
    with pytest.raises(InvalidInput, match=r"^labels: got 7 at index \[31\]"):
        compute(logits, labels, LovaszSoftmax(per_image=True), offsets=[15, 40])


@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        ([0, 40], r"offsets\[0\]: got 0 after 0; .*\(leave out the leading 0\)"),
        ([20, 20, 40], r"offsets\[1\]: got 20 after 20; expected ascending integers"),
        ([20, 30], r"offsets: got 30 as the last one; expected ascending integers, .*, the last one 40"),
        ([], r"offsets: got 0 as the last one"),
        ([15, 25], r"offsets: got 25 as the last one; .* \(sizes as offsets: numpy.cumsum\(sizes\)\)"),
        ([25, 15], r"offsets\[1\]: got 15 after 25; .* \(sizes as offsets: numpy.cumsum\(sizes\)\)"),
        ([20.5, 40], r"offsets\[0\]: got 20.5; expected an integer"),
        ("40", r"offsets: got '40'; expected ascending integers"),
        (np.array([[40]]), r"offsets: got an array of shape \(1, 1\)"),
    ],
)
def test_offsets_that_are_none(offsets: Any, text: str) -> None:
    logits, labels = torch.zeros(40, 3), torch.zeros(40, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="^" + text):
        compute(logits, labels, LovaszSoftmax(per_image=True), offsets=offsets)


# --- Masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (LovaszSoftmax(), (2, 5, 6, 7)),
        (LovaszSoftmax(ignore_index=VOID), (2, 5, 6, 7)),
        ([(1, CrossEntropy()), (1, LovaszSoftmax())], (2, 5, 6, 7)),
        ([(1, CrossEntropy(ignore_index=VOID)), (1, LovaszSoftmax(ignore_index=VOID, per_image=True))], (2, 5, 6, 7)),
        (LovaszSoftmax(), (1, 300, 40)),
        (LovaszHinge(), (2, 40)),
        ([(1, BinaryCrossEntropy()), (1, LovaszSigmoid(multilabel=False))], (2, 40)),
        (LovaszSigmoid(multilabel=True), (2, 3, 40)),
    ],
    ids=lambda value: "",
)
def test_pixels_outside_the_mask_are_void(
    loss: LossLike, shape: tuple[int, ...], way: Way, device: torch.device
) -> None:
    way.require_speed(4096)
    logits, labels = tensors(loss, shape, device)
    valid = torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)).to(device) < 0.7
    result = compute(logits, labels, loss, valid=valid)
    terms = [(w, type(t)(**{**vars(t), "ignore_index": -7})) for w, t in weighted_sum(loss).terms]
    marked = labels.masked_fill(~valid, -7)
    for ignored in {term.ignore_index for _, term in weighted_sum(loss).terms} - {None}:
        marked = torch.where(labels == ignored, -7, marked)
    assert bits(result) == bits(compute(logits, marked, terms))
    hidden = logits.clone().reshape(labels.shape[0], -1, *labels.shape[1:]) if logits.dim() != labels.dim() else logits
    assert result.grad is not None
    grad = result.grad.reshape(hidden.shape)
    outside = ~valid if grad.dim() == valid.dim() else (~valid)[:, None].expand(grad.shape)
    assert not grad[outside].any()


class Detachable(WithArray):
    """An array of another framework whose arrays have some methods of torch's, as those of PaddlePaddle."""

    def detach(self) -> Detachable:
        return self


@pytest.mark.parametrize("foreign", [*FOREIGN, Detachable])
@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_masks_of_other_frameworks(foreign: Any, make: Any) -> None:
    labels, valid = np.array([[0, 1, 0]]), np.array([[True, False, True]])
    marked, loss = masked((1, 2, 3), make(labels), foreign(valid), weighted_sum(LovaszSoftmax(ignore_index=7)))
    assert np.asarray(marked).tolist() == [[0, 7, 0]]
    assert loss.void_label == 7
    with pytest.raises(InvalidInput, match=r"^valid: got element type int64; expected bool"):
        masked((1, 2, 3), make(labels), foreign(labels), loss)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float32], ids=str)
def test_masks_of_labels_of_any_type(dtype: torch.dtype, device: torch.device) -> None:
    logits = normal(2, 2, 9, seed=1, dtype=torch.float32).to(device)
    labels = random_labels(2, 9, values=2, seed=2).to(device, dtype)
    valid = torch.arange(9, device=device)[None] < 6
    expected = compute(logits[..., :6], labels[..., :6], [(1, CrossEntropy()), (1, LovaszSoftmax())])
    result = compute(logits, labels, [(1, CrossEntropy()), (1, LovaszSoftmax())], valid=valid)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert compute(logits, labels, LovaszSoftmax(), valid=valid.cpu().numpy()).loss == pytest.approx(
        expected.terms[1].loss, rel=1e-6
    )


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(("loss", "shape", "void"), [(LovaszHinge(), (1, 4), 255), (LovaszSoftmax(), (1, 300, 4), -1)])
def test_a_mask_does_not_hide_a_wrong_label(make: Any, loss: Loss, shape: tuple[int, ...], void: int) -> None:
    """255 is a usual value of masks in files, and -1 of void pixels: a valid pixel that has it has no label."""
    labels, valid = np.array([[0, void, 1, void]], np.int16), np.array([[True, False, True, False]])
    marked, _ = masked(shape, make(labels), make(valid), weighted_sum(loss))
    assert np.asarray(marked).tolist() == labels.tolist()
    classes = 2 if isinstance(loss, LovaszHinge) else 300
    text = rf"^labels: got {void} at index \[0, 3\], where valid is True; expected a value in \[0, {classes}\)"
    with pytest.raises(InvalidInput, match=text):
        masked(shape, make(labels), make(valid | (labels == void) & (np.arange(4) == 3)), weighted_sum(loss))
    ignoring = weighted_sum(replace(loss, ignore_index=void))
    marked, _ = masked(shape, make(labels), make(np.ones((1, 4), np.bool_)), ignoring)
    assert np.asarray(marked).tolist() == labels.tolist()


def test_the_axis_of_the_channel_may_be_there_or_not(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(), (2, 4, 5, 6), device)
    valid = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    expected = bits(compute(logits, labels, LovaszSoftmax(), valid=valid))
    assert bits(compute(logits, labels, LovaszSoftmax(), valid=valid[:, None])) == expected
    assert bits(compute(logits, labels[:, None], LovaszSoftmax(), valid=valid)) == expected
    assert bits(compute(logits, labels[:, None], LovaszSoftmax(), valid=valid[:, None])) == expected


def test_a_mask_beside_void_labels_in_a_loss_that_autograd_takes(device: torch.device) -> None:
    logits, labels = tensors(LovaszSoftmax(ignore_index=VOID), (2, 4, 30), device)
    logits.requires_grad_()
    valid = torch.ones_like(labels, dtype=torch.bool)
    valid[:, ::3] = False
    LocalLoss(LovaszSoftmax(ignore_index=VOID))(logits, labels, valid=valid).backward()
    expected = compute(logits.detach(), labels.masked_fill(~valid, VOID), LovaszSoftmax(ignore_index=VOID))
    assert expected.grad is not None
    assert torch.equal(logits.grad, expected.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("valid", "loss", "text"),
    [
        (torch.ones(2, 9), LovaszSoftmax(), r"valid: got element type torch.float32; expected bool"),
        (np.ones((2, 9)), LovaszSoftmax(), r"valid: got element type float64; expected bool"),
        (torch.ones(9, dtype=torch.bool), LovaszSoftmax(), r"valid: got shape \(9,\); expected \(2, 9\)"),
        (torch.ones(2, 8, dtype=torch.bool), LovaszSoftmax(), r"valid: got shape \(2, 8\); expected \(2, 9\)"),
        (True, LovaszSoftmax(), "valid: got bool; expected a numpy array"),
        (
            torch.ones(2, 9, dtype=torch.bool),
            [(1, LovaszSoftmax(ignore_index=0)), (1, LovaszSoftmax())],
            r"valid: got a mask for terms whose ignore_index differs \(0, None\); expected the same in all terms",
        ),
        (
            torch.ones(2, 9, dtype=torch.bool),
            [(1, LovaszSoftmax(ignore_index=255)), (1, CrossEntropy())],
            r"valid: got a mask for terms whose ignore_index differs \(-100, 255\)",
        ),
    ],
)
def test_masks_that_are_none(valid: Any, loss: LossLike, text: str) -> None:
    with pytest.raises(InvalidInput, match="^" + text):
        compute(torch.zeros(2, 3, 9), torch.zeros(2, 9, dtype=torch.int64), loss, valid=valid)


@pytest.mark.parametrize("void", [None, 200, 257, 2**40, -7])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32],
    ids=str,
)
@pytest.mark.parametrize("is_array", [False, True], ids=["tensor", "array"])
def test_a_mask_with_labels_of_each_type(dtype: torch.dtype, void: int | None, is_array: bool) -> None:
    if is_array and dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    logits, labels = normal(2, 300, 9, seed=1), random_labels(2, 9, values=4, seed=2)
    valid = torch.arange(9).expand(2, 9) % 3 > 0
    loss = LovaszSoftmax(ignore_index=void)
    of_type = labels.to(dtype)
    expected = compute(logits, labels, loss, valid=valid)
    result = compute(logits, of_type.numpy() if is_array else of_type, loss, valid=valid)
    assert result.loss == expected.loss
    assert result.grad is not None
    assert expected.grad is not None
    assert torch.equal(result.grad, expected.grad)


def test_a_valid_label_that_is_negative_is_named_as_it_came() -> None:
    labels, valid = torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 4, dtype=torch.bool)
    labels[0, 2] = -1
    with pytest.raises(InvalidInput, match=r"^labels: got -1 at index \[0, 2\]"):
        compute(torch.zeros(1, 3, 4), labels, LovaszSoftmax(), valid=valid)


@pytest.mark.parametrize("void", [None, -1])
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.full((1, 4), 1j), "labels: got element type complex128"),
        (torch.full((1, 4), 1j), "labels: got element type"),
        (np.full((1, 4), 1.5, object), "labels: got "),
        (np.full((1, 4), "1"), "labels: got "),
        (np.zeros((1, 4), "M8[s]"), "labels: got "),
        (np.full((1, 4), 2**64 - 1, np.uint64), "labels: got a value of 18446744073709551615; expected 64-bit signed"),
    ],
    ids=["complex", "complex tensor", "object", "text", "dates", "uint64"],
)
def test_a_mask_lets_no_labels_in_that_are_none(labels: Any, text: str, void: int | None) -> None:
    loss, valid = LovaszSoftmax(ignore_index=void), np.ones((1, 4), np.bool_)
    with pytest.raises(InvalidInput, match="^" + text):
        compute(torch.zeros(1, 300, 4), labels, loss, valid=valid)
