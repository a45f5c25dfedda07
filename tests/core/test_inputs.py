"""What may come in: 16-bit types, odd memory, void and non-finite pixels; and what is refused, with which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels, reference_answer
from support.ways import Way
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LocalLoss,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    LovaszSoftmaxLoss,
    compute,
    lovasz_hinge,
    lovasz_softmax,
    reference,
)
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.core.functional import differentiable
from lovasz.spec import Loss, LossLike, weighted_sum
from lovasz.spec.probabilities import LOOKS, LOOKS_OF_PROCESS

VOID = 255
LOSSES: list[LossLike] = [
    LovaszSoftmax(ignore_index=VOID),
    LovaszSoftmax(classes=[0, 2], per_image=True, ignore_index=VOID),
    CrossEntropy(ignore_index=VOID, label_smoothing=0.1),
    [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(classes="all", ignore_index=VOID))],
    LovaszHinge(multilabel=True, ignore_index=VOID),
    LovaszHinge(multilabel=True, per_image=True, ignore_index=VOID),
    [
        (1.0, BinaryCrossEntropy(pos_weight=2.0, multilabel=True, ignore_index=VOID)),
        (0.5, LovaszSigmoid(multilabel=True, per_image=True, ignore_index=VOID)),
    ],
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)
NOT_FINITE = [math.nan, math.inf, -math.inf]


def some_input(loss: LossLike, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two images of 6 x 5 pixels, 3 channels; no label is void."""
    is_binary = weighted_sum(loss).is_binary
    logits = normal(2, 3, 6, 5, seed=1, dtype=dtype)
    shape = logits.shape if is_binary else (2, 6, 5)
    return logits.to(device), random_labels(*shape, values=2 if is_binary else 3, seed=2).to(device)


# --- Element types and memory -------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_widened_and_computed_in_float32(
    loss: LossLike, dtype: torch.dtype, device: torch.device
) -> None:
    logits, labels = some_input(loss, device, dtype)
    narrow, wide = compute(logits, labels, loss), compute(logits.float(), labels, loss)
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.float32
    assert bits(narrow) == bits(wide)


@each_loss
@pytest.mark.parametrize(
    "labels_dtype",
    [
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtype_of_labels_does_not_matter(loss: LossLike, labels_dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = some_input(loss, device)
    assert bits(compute(logits, labels.to(labels_dtype), loss)) == bits(compute(logits, labels, loss))


def test_labels_may_have_an_axis_of_one_channel(device: torch.device) -> None:
    for loss in (LovaszSoftmax(ignore_index=0), CrossEntropy(), LovaszSoftmax(per_image=True)):
        logits, labels = some_input(loss, device)
        assert bits(compute(logits, labels[:, None], loss)) == bits(compute(logits, labels, loss))
        points, of_points = logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1, 1)
        assert bits(compute(points, of_points, loss)) == bits(compute(points, of_points[:, 0], loss))
    logits, labels = some_input(LovaszHinge(multilabel=True), device)
    for one in (logits[:, 0], logits[:, :1]):
        assert lovasz_hinge(one, labels[:, :1]) == lovasz_hinge(one, labels[:, 0])


def test_hinge_takes_bool_labels(device: torch.device) -> None:
    logits, labels = some_input(LovaszHinge(multilabel=True), device)
    loss = LovaszHinge(multilabel=True)
    assert bits(compute(logits, labels.bool(), loss)) == bits(compute(logits, labels, loss))


def test_labels_of_several_types_in_one_batch(device: torch.device) -> None:
    loss = weighted_sum(LovaszHinge(multilabel=True))
    logits, labels = some_input(loss, device)
    expected = bits(compute(logits, labels, loss))
    for types in ((torch.bool, torch.uint8), (torch.int16, torch.bool, torch.uint8)):
        requests = [Request.checked(logits, labels.to(dtype), loss) for dtype in types]
        assert [bits(answer) for answer in submit(requests, loss, device).collect()] == [expected] * len(types)


@each_loss
def test_odd_strides_do_not_matter(loss: LossLike, device: torch.device) -> None:
    logits, labels = some_input(loss, device)
    expected = bits(compute(logits, labels, loss))
    wide_logits = torch.zeros(2, 3, 6, 10, device=device)
    wide_logits[..., ::2] = logits
    for same in (logits.contiguous(memory_format=torch.channels_last), wide_logits[..., ::2]):
        assert not same.is_contiguous()
        result = compute(same, labels.transpose(-1, -2).contiguous().transpose(-1, -2), loss)
        assert bits(result) == expected
        assert result.grad is not None
        assert result.grad.is_contiguous()


@each_loss
def test_the_default_device_does_not_matter(loss: LossLike, device: torch.device) -> None:
    logits, labels = some_input(loss, device)
    expected = bits(compute(logits, labels, loss))
    with torch.device("meta"):
        answers = [compute(logits, labels, loss) for _ in range(3)]  # A GPU may replay what came before.
    assert [bits(answer) for answer in answers] == [expected] * 3


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sign_that_torch_has_put_off_counts(
    loss: LossLike, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOKS_OF_PROCESS, "left", LOOKS)  # The first calls look at logits before they are computed.
    logits, labels = some_input(loss, device, dtype)
    expected = bits(compute(logits, labels, loss))
    imaginary = torch.complex(torch.zeros_like(logits), -logits).conj().imag
    for same in (imaginary, torch._neg_view(-logits)):
        assert same.is_neg()
        assert torch.equal(same, logits)
        assert bits(compute(same, labels, loss)) == expected


@each_loss
def test_inputs_are_never_written_to(loss: LossLike, device: torch.device) -> None:
    logits, labels = some_input(loss, device)
    labels.view(-1)[::7] = VOID
    logits_before, labels_before = logits.clone(), labels.clone()
    first = compute(logits, labels, loss)
    assert first.grad is not None
    first.grad.fill_(3)
    assert torch.equal(logits, logits_before)
    assert torch.equal(labels, labels_before)
    assert logits._version == 0


def test_probabilities_are_never_written_to(device: torch.device) -> None:
    loss = LovaszSoftmax(input="probabilities")
    logits, labels = some_input(loss, device)
    probabilities = logits.softmax(1)
    before = probabilities.clone()
    compute(probabilities, labels, loss)
    assert torch.equal(probabilities, before)


def test_probability_of_minus_zero_ties_with_zero(device: torch.device) -> None:
    probabilities = torch.tensor([[-0.0, 1.0], [0.0, 1.0]], device=device)
    result = compute(probabilities, torch.tensor([1, 1], device=device), LovaszSoftmax([0], input="probabilities"))
    assert result.grad is not None
    assert result.grad.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_probabilities_of_minus_zero_in_a_group_that_is_counted(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    probabilities = (3 * torch.randn(1, 3, 120_000, generator=generator)).softmax(1).to(dtype)
    labels = torch.randint(0, 3, (1, 120_000), generator=generator).to(device)
    probabilities[:, :, ::10] = 0.0
    negated = torch.where(probabilities == 0, -probabilities, probabilities)
    assert torch.equal(probabilities, negated)
    loss = LovaszSoftmax(input="probabilities")
    expected, result = (compute(values.to(device), labels, loss) for values in (probabilities, negated))
    assert result.loss == expected.loss
    assert torch.equal(result.grad, expected.grad)


@pytest.mark.parametrize("pixels", [3, 100_003])
def test_errors_of_probabilities_just_outside_count_as_zero_with_each_backend(
    pixels: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(4)
    probabilities = torch.rand(1, 2, pixels, generator=generator)
    labels = torch.randint(0, 2, (1, pixels), generator=generator)
    outside = 1e-3 * torch.rand(probabilities[0, 0, ::3].shape, generator=generator)
    probabilities[0, :, ::3] = torch.stack([1 + outside, -outside])
    labels[:, ::6] = 0
    probabilities, labels = probabilities.to(device), labels.to(device)
    loss = LovaszSoftmax(input="probabilities")
    of_torch = compute(probabilities, labels, loss, backend=Backend.TORCH)
    assert of_torch.grad is not None
    result = compute(probabilities, labels, loss)
    assert result.loss == pytest.approx(of_torch.loss, abs=1e-6)
    assert result.grad is not None
    assert norm_error(result.grad, of_torch.grad) <= 1e-3, "a third of the errors are in a few bins"


# --- Void pixels and logits that are not finite -------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_non_finite_logit_makes_the_answer_nan(
    loss: LossLike, bad: float, dtype: torch.dtype, device: torch.device
) -> None:
    logits, labels = some_input(loss, device, dtype)
    logits[1, 1, 2, 3] = bad
    labels[(1, 1, 2, 3) if weighted_sum(loss).is_binary else (1, 2, 3)] = 1  # where minus infinity is no mask
    result = compute(logits, labels, loss)
    assert math.isnan(result.loss)
    assert result.grad is not None
    assert result.grad.shape == logits.shape
    assert result.grad.isnan().all()
    assert (result.intersection == 0).all()
    assert (result.union == 0).all()
    assert result.intersection.shape == result.union.shape == (3,)
    assert np.isnan(result.class_iou).all()
    for (_, term), answer in zip(weighted_sum(loss).terms, result.terms, strict=True):
        assert math.isnan(answer.loss)
        assert answer.per_class_loss.shape == ((0,) if isinstance(term, CrossEntropy | BinaryCrossEntropy) else (3,))
        assert np.isnan(answer.per_class_loss).all()
    without_grad = compute(logits, labels, loss, want_grad=False)
    assert math.isnan(without_grad.loss)
    assert without_grad.grad is None


@each_loss
@pytest.mark.parametrize("bad", [*NOT_FINITE, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_of_void_pixels_do_not_matter(
    loss: LossLike, bad: float, dtype: torch.dtype, device: torch.device
) -> None:
    logits, labels = some_input(loss, device, dtype)
    pixels = (slice(None), slice(None), slice(1, 4), 2)
    labels[pixels if labels.dim() == 4 else (slice(None), slice(1, 4), 2)] = VOID
    expected = compute(logits, labels, loss)
    logits[pixels] = bad
    result = compute(logits, labels, loss)
    assert bits(result) == bits(expected)
    assert result.grad is not None
    assert (result.grad[pixels] == 0).all()
    assert math.isfinite(result.loss)


MASKED: list[tuple[LossLike, float, list[list[float]]]] = [
    (LovaszSoftmax(), 0.6004339163, [[-0.1604322726, 0.0554282180], [0.1604322726, -0.0554282180], [0, 0]]),
    (CrossEntropy(), 0.7871433530, [[-0.34498722, 0.16590610], [0.34498722, -0.16590610], [0, 0]]),
]


@pytest.mark.parametrize(("loss", "expected", "grad"), MASKED)
def test_minus_infinity_masks_a_class(
    loss: LossLike, expected: float, grad: list[list[float]], device: torch.device
) -> None:
    logits = torch.tensor([[[0.2, -0.4], [1.0, 0.3], [-math.inf, -math.inf]]], device=device)
    result = compute(logits, torch.tensor([[0, 1]], device=device), loss)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.grad is not None
    assert result.grad.cpu()[0].numpy() == pytest.approx(np.array(grad), abs=1e-7)


MASKABLE: dict[str, LossLike] = {
    "present": LovaszSoftmax(ignore_index=VOID),
    "all, per image": LovaszSoftmax(classes="all", per_image=True, ignore_index=VOID),
    "the masked class": LovaszSoftmax(classes=[3], ignore_index=VOID),
    "sum": [(1.0, CrossEntropy(class_weights=[1, 2, 1, 3], ignore_index=VOID)), (0.5, LovaszSoftmax(ignore_index=1))],
    "smoothing elsewhere": [(1.0, CrossEntropy(label_smoothing=0.1, ignore_index=0)), (1.0, LovaszSoftmax())],
    "hinge": LovaszHinge(multilabel=True, ignore_index=VOID),
    "sigmoid": LovaszSigmoid(multilabel=True, ignore_index=VOID),
    "binary sum": [
        (1.0, BinaryCrossEntropy(pos_weight=[1, 2, 0.5, 3], multilabel=True, ignore_index=VOID)),
        (0.5, LovaszHinge(multilabel=True, per_image=True, ignore_index=VOID)),
    ],
}


@pytest.mark.parametrize("name", MASKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_classes_are_computed_as_the_textbook_has_them(
    name: str, dtype: torch.dtype, way: Way, device: torch.device
) -> None:
    """Class 3 is masked at every third pixel, which has another label; with label smoothing, at its void pixels."""
    loss, total = MASKABLE[name], weighted_sum(MASKABLE[name])
    logits, masked = normal(2, 4, 9, 7, seed=3, dtype=dtype), torch.zeros(2, 9, 7, dtype=torch.bool)
    masked[:, ::3] = True
    if total.is_binary:
        labels = random_labels(2, 4, 9, 7, values=2, seed=4)
        labels[:, 3][masked] = 0
        labels[0, 0, 0, 0] = VOID
    else:
        labels = random_labels(2, 9, 7, values=4, seed=4)
        labels[masked] = 0 if name == "smoothing elsewhere" else labels[masked] % 3
        if name != "smoothing elsewhere":
            labels[0, 0, 0] = VOID if name != "sum" else 1
    logits[:, 3][masked] = -math.inf
    result = compute(logits.to(device), labels.to(device), loss)
    expected, expected_grad = reference_answer(logits, labels, loss)
    assert math.isfinite(expected)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    in_a_bin = dtype == torch.bfloat16 or (dtype == torch.float32 and total.is_binary and way.counts(labels.numel()))
    assert norm_error(result.grad, expected_grad) < (3e-3 if in_a_bin else 1e-5)  # a bin is one tie
    assert result.grad is not None
    assert (result.grad[:, 3].cpu()[masked] == 0).all()


@pytest.mark.parametrize(
    ("loss", "value"),
    [(LovaszHinge(), 0.65), (LovaszSigmoid(), 0.41385334), (BinaryCrossEntropy(), 0.35740528)],
    ids=lambda value: "",
)
def test_a_binary_loss_takes_minus_infinity_on_background_alone(
    loss: LossLike, value: float, device: torch.device
) -> None:
    logits = torch.tensor([[0.5, -math.inf, -0.2]], device=device)
    result = compute(logits, torch.tensor([[1, 0, 0]], device=device), loss)
    assert result.loss == pytest.approx(value, rel=1e-6)
    assert result.grad is not None
    assert result.grad.isfinite().all()
    assert math.isnan(compute(logits, torch.tensor([[1, 1, 0]], device=device), loss).loss)
    assert math.isnan(compute(-logits, torch.tensor([[1, 1, 0]], device=device), loss).loss)


@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1), LovaszSoftmax(input="probabilities")])
def test_where_each_class_counts_minus_infinity_is_no_mask(loss: LossLike, device: torch.device) -> None:
    values = torch.tensor([[[0.2, 0.4], [0.8, 0.3], [0.0, -math.inf]]], device=device)
    assert math.isnan(compute(values, torch.tensor([[0, 1]], device=device), loss).loss)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_pixel_that_one_term_counts_has_to_be_finite(bad: float, device: torch.device) -> None:
    loss: list[tuple[float, Loss]] = [(1.0, LovaszSoftmax(ignore_index=0)), (1.0, CrossEntropy())]
    logits, labels = some_input(loss, device)
    labels[0, 0, 0] = 0
    logits[0, 0, 0, 0] = bad
    assert math.isnan(compute(logits, labels, loss).loss)
    assert math.isfinite(compute(logits, labels, loss[0][1]).loss)


@each_loss
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_all_void_is_zero(loss: LossLike, value: float, device: torch.device) -> None:
    logits, labels = some_input(loss, device)
    result = compute(logits.fill_(value), labels.fill_(VOID), loss)
    assert result.loss == 0
    assert result.grad is not None
    assert result.grad.cpu().numpy().tobytes() == bytes(result.grad.nbytes)  # +0.0, each
    assert (result.union == 0).all()
    for answer in result.terms:
        assert answer.loss == 0
        assert np.isnan(answer.per_class_loss).all()


def test_void_image_counts_as_zero(device: torch.device) -> None:
    loss = LovaszSoftmax(per_image=True, ignore_index=VOID)
    logits, labels = some_input(loss, device)
    alone = compute(logits[:1], labels[:1], loss)
    labels[1] = VOID
    both = compute(logits, labels, loss)
    assert both.loss == pytest.approx(alone.loss / 2, rel=1e-12)
    np.testing.assert_allclose(both.per_class_loss, alone.per_class_loss, rtol=1e-12)
    assert both.grad is not None
    assert (both.grad[1] == 0).all()


@pytest.mark.parametrize("ignore_index", [-1, -100, 1000, 2**62, -(2**63)])
def test_ignore_index_may_be_any_number(ignore_index: int, device: torch.device) -> None:
    logits, labels = some_input(LovaszSoftmax(), device)
    labels[:, 2] = VOID
    expected = compute(logits, labels, LovaszSoftmax(ignore_index=VOID))
    labels[labels == VOID] = ignore_index
    assert bits(compute(logits, labels, LovaszSoftmax(ignore_index=ignore_index))) == bits(expected)


# --- What is refused ----------------------------------------------------------------------------------------------


def refusal(logits: Tensor, labels: Tensor, loss: LossLike) -> str:
    with pytest.raises(InvalidInput) as caught:
        compute(logits, labels, loss)
    return str(caught.value)


def test_label_out_of_range(device: torch.device) -> None:
    logits, labels = some_input(LovaszSoftmax(), device)
    labels[0, 1, 2] = 7
    labels[1, 0, 0] = -4
    expected = "labels: got 7 at index [0, 1, 2]; expected a value in [0, 3)"
    assert refusal(logits, labels, LovaszSoftmax()) == expected + " (2 such pixels)"
    with_void = expected + " or the ignore_index 255 of LovaszSoftmax (2 such pixels)"
    assert refusal(logits, labels, LovaszSoftmax(ignore_index=VOID)) == with_void
    one_of_two = refusal(logits, labels, [(1.0, LovaszSoftmax(ignore_index=-4)), (1.0, CrossEntropy(ignore_index=7))])
    cure = "; 7 is the ignore_index of CrossEntropy, not of LovaszSoftmax: set ignore_index=7 in every term"
    assert one_of_two == expected + f" or the ignore_index -4 of LovaszSoftmax (1 such pixels{cure})"
    assert refusal(logits, labels.to(torch.int8), CrossEntropy(ignore_index=7)) == (
        "labels: got -4 at index [1, 0, 0]; expected a value in [0, 3) or the ignore_index 7 of CrossEntropy "
        "(1 such pixels)"
    )
    for void in (255, -1, -100):
        marked = some_input(LovaszSoftmax(), device)[1]
        marked[0, 0] = void
        assert refusal(logits, marked, LovaszSoftmax(ignore_index=0)) == (
            f"labels: got {void} at index [0, 0, 0]; expected a value in [0, 3) or the ignore_index 0 of LovaszSoftmax "
            f"(5 such pixels; for void pixels set ignore_index={void})"
        )
    neither = refusal(logits, marked, [(1.0, LovaszSoftmax()), (1.0, CrossEntropy(ignore_index=9))])
    assert neither.endswith("; for void pixels set ignore_index=-100 in every term)")
    from_one = some_input(LovaszSoftmax(), device)[1] % 3 + 1
    assert refusal(logits, from_one, LovaszSoftmax()).endswith(
        "; classes count from 0: for labels 1 to 3 pass labels - 1)"
    )
    with pytest.raises(InvalidInput, match="got 7 at index"):
        lovasz_softmax(logits.requires_grad_(), labels)


def test_hinge_label_out_of_range(device: torch.device) -> None:
    logits, labels = some_input(LovaszHinge(multilabel=True), device)
    labels = labels[:, 0]
    labels[1, 5, 4] = 2
    assert refusal(logits[:, 0], labels, LovaszHinge()) == (
        "labels: got 2 at index [1, 5, 4]; expected a value in [0, 2) (1 such pixels)"
    )
    assert refusal(logits[:, 0], 255 * (labels == 1).int(), LovaszHinge()).endswith(
        "such pixels; for masks of 0 and 255 pass labels > 0, for void pixels set ignore_index=255)"
    )
    with pytest.raises(InvalidInput, match=r"labels: got 2 at index \[1, 0, 5, 4\]"):
        lovasz_hinge(logits[:, :1], labels.unsqueeze(1))


@pytest.mark.parametrize("value", [-5.0, 1.5, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probability_out_of_range(value: float, dtype: torch.dtype, device: torch.device) -> None:
    loss = LovaszSoftmax(input="probabilities", ignore_index=VOID)
    logits, labels = some_input(loss, device)
    probabilities = logits.softmax(1).to(dtype)
    probabilities[0, 1, 2, 3] = value
    labels[0, 0, 0] = VOID
    probabilities[0, 0, 0, 0] = 50  # at a void pixel
    if math.isinf(value):
        assert math.isnan(compute(probabilities, labels, loss).loss)
        return
    assert refusal(probabilities, labels, loss) == (
        f"logits: got {value} at index [0, 1, 2, 3] with input='probabilities'; expected a value in [0, 1] "
        "(for scores before the softmax use input='logits')"
    )
    labels[0, 2, 3] = VOID
    assert math.isfinite(compute(probabilities, labels, loss).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_are_judged_and_reported_alike_at_the_edge(dtype: torch.dtype, device: torch.device) -> None:
    edges = torch.tensor([-1e-3, 1 + 1e-3], dtype=dtype)
    around = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)]).tolist()
    loss, refused = weighted_sum(LovaszSoftmax(input="probabilities")), []
    for value in [-1e-4, *around, -0.02]:
        probabilities = torch.tensor([[0.5, value]], dtype=dtype, device=device)
        request = Request.checked(probabilities, torch.tensor([0], device=device), loss)
        (answer,) = submit([request], loss, device).collect()
        if isinstance(answer, InvalidInput):
            assert f"got {probabilities[0, 1].item()} at index [0, 1]" in str(answer)
            refused.append(value)
    assert -1e-4 not in refused
    assert -0.02 in refused
    assert min(around) in refused


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


INTEGERS = torch.int64


@pytest.mark.parametrize(
    ("logits", "labels", "loss", "text"),
    [
        (
            zeros(2, 3, 4, dtype=INTEGERS),
            zeros(2, 4, dtype=INTEGERS),
            LovaszSoftmax(),
            "logits: got element type int64; expected float32, float16, bfloat16 or float64",
        ),
        (
            zeros(2, 3, 4, dtype=torch.complex64),
            zeros(2, 4, dtype=INTEGERS),
            LovaszSoftmax(),
            "logits: got element type complex64; expected float32, float16, bfloat16 or float64",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4, dtype=torch.complex64),
            LovaszSoftmax(),
            "labels: got element type complex64; expected integers, bool, or floats that are whole numbers",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 5, dtype=INTEGERS),
            LovaszSoftmax(),
            "labels: got shape (2, 5) for logits (2, 3, 4); expected (2, 4) (resize the logits to the labels: "
            "torch.nn.functional.interpolate(logits, size=labels.shape[1:]))",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 3, 4, dtype=INTEGERS),
            LovaszSoftmax(),
            "labels: got shape (2, 3, 4) for logits (2, 3, 4); expected (2, 4) (for one-hot labels or class "
            "probabilities: labels.argmax(1))",
        ),
        (zeros(4), zeros(4, dtype=INTEGERS), LovaszSoftmax(), "logits: got shape (4,); expected (N, C, *spatial)"),
        (
            zeros(2, 1, 4),
            zeros(2, 4, dtype=INTEGERS),
            LovaszSoftmax(),
            "logits: got shape (2, 1, 4) with a single class, whose softmax is 1 everywhere; expected C >= 2 "
            "(for a binary problem with one channel use LovaszHinge or LovaszSigmoid, or for probabilities p of the "
            "foreground torch.cat([1 - p, p], 1) with classes=[1] and input='probabilities')",
        ),
        (
            zeros(2, 0, 4),
            zeros(2, 4, dtype=INTEGERS),
            CrossEntropy(),
            "logits: got shape (2, 0, 4) with no class; expected (N, C, *spatial), C >= 2",
        ),
        (
            zeros(0, 3, 4),
            zeros(0, 4, dtype=INTEGERS),
            LovaszSoftmax(),
            "logits: got shape (0, 3, 4), which holds no element; expected at least one pixel",
        ),
        (
            zeros(2, 3, 0),
            zeros(2, 0, dtype=INTEGERS),
            LovaszSoftmax(),
            "logits: got shape (2, 3, 0), which holds no element; expected at least one pixel",
        ),
        (
            zeros(),
            zeros(dtype=INTEGERS),
            LovaszHinge(),
            "logits: got shape (); expected (N, *spatial) or (N, 1, *spatial)",
        ),
        (
            zeros(2, 0),
            zeros(2, 0, dtype=INTEGERS),
            LovaszHinge(),
            "logits: got shape (2, 0), which holds no element; expected at least one pixel",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4, dtype=INTEGERS),
            LovaszHinge(),
            "labels: got shape (2, 4) for binary logits (2, 3, 4); expected (2, 3, 4) "
            "(for several binary labels per pixel use multilabel=True, for one class per pixel "
            "LovaszSoftmax)",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4, dtype=INTEGERS),
            LovaszHinge(multilabel=True),
            "labels: got shape (2, 4) for multilabel logits (2, 3, 4); expected the same (for one class per pixel use "
            "LovaszSoftmax)",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4, dtype=INTEGERS),
            LovaszSoftmax(class_weights=[1, 2]),
            "class_weights: got 2 numbers; expected 3, one per class",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4, dtype=INTEGERS),
            LovaszSoftmax(classes=[0, 3]),
            "classes: got class 3; expected class numbers in [0, 3)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, labels: Tensor, loss: LossLike, text: str) -> None:
    assert refusal(logits, labels, loss) == text


def test_labels_on_another_device_are_refused() -> None:
    labels = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    with pytest.raises(InvalidInput, match="labels: got device meta; expected cpu, like the logits"):
        Request.checked(zeros(2, 3, 4), labels, weighted_sum(LovaszSoftmax()))


UNREADABLE = [
    (lambda dense: dense.to_sparse(), "got a tensor of layout torch.sparse_coo; expected a dense one"),
    (lambda dense: torch.nested.nested_tensor(list(dense)), "got a nested tensor; expected a dense one"),
    (lambda dense: dense.to("meta"), "got a tensor on the device meta, which has no values; expected one with values"),
]


@pytest.mark.parametrize(("change", "text"), UNREADABLE, ids=["sparse", "nested", "meta"])
@pytest.mark.parametrize("field", ["logits", "labels", "valid"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_hold_no_values_in_memory_are_refused(
    field: str, change: Callable[[Tensor], Tensor], text: str
) -> None:
    tensors = {"logits": normal(2, 3, 4, seed=1), "labels": zeros(2, 4, dtype=INTEGERS), "valid": torch.ones(2, 4) > 0}
    tensors[field] = change(tensors[field])
    for function in (compute, differentiable):
        with pytest.raises(InvalidInput) as caught:
            function(loss=LovaszSoftmax(), **tensors)
        assert str(caught.value) == f"{field}: {text}"


@pytest.mark.parametrize("field", ["logits", "labels"])
def test_tensors_of_torch_func_are_refused(field: str) -> None:
    tensors = {"logits": normal(2, 3, 4, seed=1), "labels": zeros(2, 4, dtype=INTEGERS)}
    for function in (compute, differentiable):

        def called(tensor: Tensor, function: Callable[..., Any] = function) -> Any:
            return function(loss=LovaszSoftmax(), **{**tensors, field: tensor})

        with pytest.raises(InvalidInput, match=rf"^{field}: got a tensor without memory, as inside torch\.func\.grad"):
            torch.vmap(called)(tensors[field][None])
    with pytest.raises(InvalidInput, match="which this loss does not support"):
        torch.func.grad(lambda logits: differentiable(logits, tensors["labels"], LovaszSoftmax()))(tensors["logits"])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("field", ["logits", "labels", "valid"])
def test_tensors_that_are_made_of_others_are_refused(field: str) -> None:
    """As DTensor and FakeTensor, whose address is 0."""
    tensors = {"logits": normal(2, 3, 4, seed=1), "labels": zeros(2, 4, dtype=INTEGERS), "valid": torch.ones(2, 4) > 0}
    tensors[field] = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensors[field])
    for function in (compute, differentiable):
        with pytest.raises(InvalidInput, match=rf"^{field}: got a tensor without memory.*of a DTensor pass to_local"):
            function(loss=LovaszSoftmax(), **tensors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    """It would get no tangent, and take that for zero."""
    logits, labels = normal(2, 3, 4, seed=1), zeros(2, 4, dtype=INTEGERS)

    def loss(values: Tensor) -> Tensor:
        return lovasz_softmax(values, labels)

    text = r"^logits: got a tensor with a tangent \(forward-mode"
    with torch.autograd.forward_ad.dual_level():
        assert loss(logits) > 0, "without a tangent"
        with pytest.raises(InvalidInput, match=text):
            loss(torch.autograd.forward_ad.make_dual(logits, logits))
    with pytest.raises(InvalidInput, match=r"^logits: got a tensor with"):
        torch.autograd.functional.jacobian(loss, logits, vectorize=True, strategy="forward-mode")


def test_a_loss_that_float32_cannot_hold_is_infinite() -> None:
    for loss in (LovaszHinge(), BinaryCrossEntropy(pos_weight=5.0)):
        logits = torch.full((1, 4), -3e38, requires_grad=True)
        value = LocalLoss([(10.0, loss)])(logits, torch.ones(1, 4))
        value.backward()
        assert value.item() == math.inf
        assert logits.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_or_script_of_torch_jit_is_refused() -> None:
    logits, labels = normal(2, 3, 4, seed=1).requires_grad_(), zeros(2, 4, dtype=INTEGERS)
    criterion = LocalLoss(LovaszSoftmax())
    for traced in (criterion, lovasz_softmax, lambda *tensors: compute(*tensors, LovaszSoftmax()).loss):
        with pytest.raises(InvalidInput, match=r"^logits: got a tensor inside torch\.jit\.trace, which"):
            torch.jit.trace(traced, (logits, labels))
    with pytest.raises(TypeError, match=r"^LocalLoss: torch\.jit\.script does not support this loss; script the model"):
        torch.jit.script(torch.nn.Sequential(torch.nn.Conv1d(3, 3, 1), criterion))
    assert criterion(logits, labels).isfinite()


def test_empty_sum_is_refused() -> None:
    assert refusal(zeros(2, 3), zeros(2, dtype=INTEGERS), []) == "loss: got 0 terms; expected 1 to 16"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_answers_are_near_the_truth(dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = normal(2, 19, 20, 40, seed=5, dtype=dtype).to(device), random_labels(2, 20, 40, values=19, seed=6)
    result = compute(logits, labels.to(device), LovaszSoftmax())
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=1e-7)
    assert norm_error(result.grad, expected_grad) < 1e-6


def test_options_may_be_tensors(device: torch.device) -> None:
    logits, labels = some_input(LovaszSoftmax(), device)
    plain = lovasz_softmax(logits, labels, [0, 2], [1.0, 2.0, 0.5], True, 1)
    weights, classes = torch.tensor([1.0, 2.0, 0.5], device=device), torch.tensor([0, 2], device=device)
    index = torch.tensor(1, device=device)
    assert lovasz_softmax(logits, labels, classes, weights, torch.tensor(True), index) == plain
    options = {"classes": classes, "class_weights": weights, "per_image": np.bool_(True), "ignore_index": index}
    assert LovaszSoftmaxLoss(**options)(logits, labels) == plain


def test_want_grad_is_a_flag(device: torch.device) -> None:
    logits, labels = some_input(LovaszSoftmax(), device)
    assert compute(logits, labels, LovaszSoftmax(), want_grad=np.bool_(False)).grad is None
    with pytest.raises(InvalidInput, match=r"^want_grad: got 1; expected True or False"):
        compute(logits, labels, LovaszSoftmax(), want_grad=1)


def test_arguments_in_the_order_of_other_implementations_are_refused(device: torch.device) -> None:
    """The authors' function has (probas, labels, classes, per_image, ignore)."""
    logits, labels = some_input(LovaszSoftmax(), device)
    for build in (lambda: lovasz_softmax(logits, labels, "present", False, 255), lambda: LovaszSoftmax("all", True)):
        with pytest.raises(InvalidInput, match=r"^class_weights: got (False|True); .*\(per_image comes after class_"):
            build()
    with pytest.raises(InvalidInput, match=r"^per_image: got 255; expected True or False"):
        lovasz_hinge(logits, labels, 255)  # type: ignore[arg-type]


def test_one_channel_of_probabilities_has_a_cure(device: torch.device) -> None:
    p = normal(2, 1, 6, 5, seed=1).sigmoid().float().to(device)
    masks = random_labels(2, 6, 5, values=2, seed=2).to(device)
    with pytest.raises(InvalidInput) as caught:
        lovasz_softmax(p, masks, [1], input="probabilities")
    cure = "torch.cat([1 - p, p], 1)"
    assert f"for probabilities p of the foreground {cure} with classes=[1] and input='probabilities'" in str(
        caught.value
    )
    loss = lovasz_softmax(torch.cat([1 - p, p], 1), masks, [1], input="probabilities")
    errors = (masks - p[:, 0].double()).abs().cpu().reshape(-1)
    assert loss.item() == pytest.approx(
        reference.lovasz_extension(errors, masks.cpu().reshape(-1) == 1).item(), rel=1e-6
    )


def test_options_are_judged_alike_whatever_came_before() -> None:
    """True equals 1, but is no class number, and 1 is no flag."""
    logits, labels = torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.int64)
    for fine in ({"classes": (1,)}, {"per_image": True}, {"ignore_index": 1}, {"class_weights": [1.0, 1.0, 1.0]}):
        lovasz_softmax(logits, labels, **fine)
        lovasz_softmax(logits, labels, **fine)
    for field, value in (("classes[0]", (True,)), ("per_image", 1), ("ignore_index", True), ("ignore_index", [1])):
        with pytest.raises(InvalidInput) as caught:
            lovasz_softmax(logits, labels, **{field.removesuffix("[0]"): value})
        assert caught.value.field == field


def test_a_fault_that_has_gone_before_it_is_told_is_an_error_all_the_same(device: torch.device) -> None:
    """A server computes on memory that its caller can change."""
    loss = weighted_sum(LovaszSoftmax(input="probabilities"))
    logits, labels = some_input(LovaszSoftmax(), device)
    probabilities = logits.softmax(1)
    right = probabilities.clone()
    probabilities[1, 2, 3, 4] = 1.5
    pending = submit([Request.checked(probabilities, labels, loss, None)], loss, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    probabilities.copy_(right)
    (answer,) = pending.collect()
    assert isinstance(answer, InvalidInput)
    assert str(answer).startswith("logits: changed while the loss was computed")
