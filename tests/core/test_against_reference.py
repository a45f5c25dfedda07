"""The production path against the textbook in float64, over random options, shapes, labels and ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import (
    norm_error,
    normal,
    noting_near_ties,
    random_labels,
    reference_answer,
    shared_ties_answer,
)
from support.ways import INTERPRETED, Way
from torch import Tensor
from torch.nn import functional

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    compute,
    reference,
)
from lovasz.spec import Loss, LossLike, Result, WeightedSum, weighted_sum

random_cases = settings(deadline=None, max_examples=5 if INTERPRETED else 100)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

VOID = 255
weights = st.floats(-2, 2).map(lambda weight: round(weight, 3))
spatial_axes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def logits_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Random logits of shape (N, C, *spatial); or few different pixels, so that errors tie; or all the same."""
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["normal", "tied", "equal", "confident"]))
    if kind == "equal":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "tied":
        images, classes, *spatial = shape
        pool = normal(3, classes, seed=seed)
        choice = torch.randint(0, 3, (images, *spatial), generator=torch.Generator().manual_seed(seed))
        return pool[choice].movedim(-1, 1).contiguous()
    return normal(*shape, seed=seed) * (8 if kind == "confident" else 1)


@st.composite
def labels_of(draw: st.DrawFn, shape: tuple[int, ...], values: int, void: int | None) -> Tensor:
    """Labels that need not use all values, with void pixels if there is such a label: none, some or all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(0, draw(st.integers(1, values)), shape, generator=generator)
    if void is not None:
        share = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
        labels[torch.rand(shape, generator=generator) < share] = void
    return labels.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8])))


def class_weights(classes: int) -> st.SearchStrategy[list[float] | None]:
    weight = st.sampled_from([0.0, 0.25, 1.0, 3.0])
    return st.none() | st.lists(weight, min_size=classes, max_size=classes)


@st.composite
def softmax_terms(draw: st.DrawFn, classes: int, ignore: st.SearchStrategy[int | None], **fixed: Any) -> LovaszSoftmax:
    listed = st.lists(st.integers(0, classes - 1), min_size=1, unique=True)
    return LovaszSoftmax(
        classes=draw(st.sampled_from(["present", "all"]) | listed),
        class_weights=draw(class_weights(classes)),
        per_image=draw(st.booleans()),
        ignore_index=draw(ignore),
        **fixed,
    )


@st.composite
def cross_entropies(draw: st.DrawFn, classes: int, ignore: st.SearchStrategy[int | None]) -> CrossEntropy:
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return CrossEntropy(draw(class_weights(classes)), ignore_index=draw(ignore), label_smoothing=smoothing)


def ignored(void: int | None, values: int) -> st.SearchStrategy[int | None]:
    """Where no label is void: nothing ignored, a value that does not occur, or one of the classes."""
    return st.just(void) if void is not None else st.none() | st.integers(-1, values - 1)


@st.composite
def softmax_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, LossLike]:
    classes, spatial = draw(st.integers(2, 6)), draw(spatial_axes)
    images = draw(st.integers(1, 3 if spatial else 12))
    void = draw(st.sampled_from([None, VOID]))
    logits = draw(logits_of((images, classes, *spatial)))
    labels = draw(labels_of((images, *spatial), classes, void))
    term = softmax_terms(classes, ignored(void, classes)) | cross_entropies(classes, ignored(void, classes))
    return logits, labels, draw(term | st.lists(st.tuples(weights, term), min_size=1, max_size=3))


@st.composite
def probability_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, LossLike]:
    """Multiples of 1/8: many ties, and 1 - p is exact on both sides."""
    classes, spatial = draw(st.integers(2, 4)), draw(spatial_axes)
    images, seed = draw(st.integers(1, 3 if spatial else 12)), draw(st.integers(0, 2**31))
    void = draw(st.sampled_from([None, VOID]))
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randint(0, 9, (images, classes, *spatial), generator=generator).double() / 8
    labels = draw(labels_of((images, *spatial), classes, void))
    term = softmax_terms(classes, ignored(void, classes), input="probabilities")
    return probabilities, labels, draw(term | st.lists(st.tuples(weights, term), min_size=1, max_size=2))


@st.composite
def binary_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, LossLike]:
    """Multiples of 1/2, so that errors tie (also at 0), or random numbers."""
    layout = draw(st.sampled_from(["plain", "one channel", "one channel, labels too", "multilabel"]))
    spatial = draw(spatial_axes)
    channels = draw(st.integers(1, 4)) if layout == "multilabel" else 1
    shape = (draw(st.integers(1, 3 if spatial else 9)), channels, *spatial)
    seed = draw(st.integers(0, 2**31))
    logits = normal(*shape, seed=seed) * 2
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2
    void = draw(st.sampled_from([None, VOID]))
    labels = draw(labels_of(shape, 2, void))
    if void is None and draw(st.booleans()):
        labels = labels.bool()
    if layout == "plain" and len(spatial) < 3:  # Volumes have the axis of the channel.
        logits, labels = logits.squeeze(1), labels.squeeze(1)
    elif layout == "one channel":
        labels = labels.squeeze(1)
    ignore = ignored(void, 2)
    multilabel = st.just(layout == "multilabel")
    lovasz = st.builds(draw(st.sampled_from([LovaszHinge, LovaszSigmoid])), st.booleans(), ignore, multilabel)
    pos_weight = st.none() | st.sampled_from([0.0, 0.5, 3.0])
    pos_weight |= st.lists(st.sampled_from([0.0, 0.25, 4.0]), min_size=channels, max_size=channels)
    term = lovasz | st.builds(BinaryCrossEntropy, pos_weight, ignore, multilabel)
    return logits, labels, draw(term | st.lists(st.tuples(weights, term), min_size=1, max_size=3))


def assert_is_the_reference(
    case: tuple[Tensor, Tensor, LossLike], dtype: torch.dtype, way: Way, device: torch.device
) -> Result[Tensor]:
    logits, labels, loss = case
    logits, terms = logits.to(dtype), weighted_sum(loss).terms
    result = compute(logits.to(device), labels.to(device), loss)
    assert result.grad is not None
    assert result.grad.dtype == dtype
    truths, near_ties = term_answers(logits, labels, loss, way)
    rel, tiny = (1e-11, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)
    assert len(result.terms) == len(terms)
    for (_, term), (expected, _), answer in zip(terms, truths, result.terms, strict=True):
        assert answer.kind == term.kind
        assert answer.loss == pytest.approx(expected, rel=rel, abs=tiny)
        if isinstance(term, CrossEntropy | BinaryCrossEntropy):
            assert answer.per_class_loss.shape == (0,)
        else:
            per_class = reference.per_class_losses(logits.double(), labels, term).numpy()
            np.testing.assert_allclose(answer.per_class_loss, per_class, rtol=rel, atol=tiny)
    total = sum(weight * answer.loss for (weight, _), answer in zip(terms, result.terms, strict=True))
    assert result.loss == pytest.approx(total, rel=1e-12, abs=1e-13)
    if not near_ties:
        # Terms of opposite signs may cancel; their errors do not.
        grads = [weight * grad for (weight, _), (_, grad) in zip(terms, truths, strict=True)]
        error = (result.grad.cpu() - torch.stack(grads).sum(0)).norm()
        # A probability near 1 is rounded by as much as any, and its distance to 1 has the weight of its class.
        heaviest = max(abs(weight) * max(getattr(term, "class_weights", None) or [1.0]) for weight, term in terms)
        assert error <= rel * sum(grad.norm() for grad in grads) + tiny / 10 * heaviest
    counted = counted_pixels(logits, labels, weighted_sum(loss))
    without_grad = compute(logits.to(device), labels.to(device), loss, want_grad=False)
    assert without_grad.grad is None
    assert without_grad.loss == result.loss
    assert (result.grad.cpu()[~counted.expand(logits.shape)] == 0).all()
    return result


def term_answers(logits: Tensor, labels: Tensor, loss: LossLike, way: Way) -> tuple[list[tuple[float, Tensor]], bool]:
    """The reference's answer to each term, and whether this way may rank pixels otherwise in a gradient: where float32
    brings errors together that the reference tells apart. Where errors are equal in truth, it may not."""
    terms = [term for _, term in weighted_sum(loss).terms]
    if logits.dtype == torch.float64:
        return [reference_answer(logits, labels, term) for term in terms], False
    tables = way.counts(labels.numel())
    with noting_near_ties(tables=tables) as near:
        answers = [reference_answer(logits, labels, term) for term in terms]
    if tables and not any(near):
        answers = [shared_ties_answer(logits, labels, term) for term in terms]
    return answers, any(near)


def counted_pixels(logits: Tensor, labels: Tensor, loss: WeightedSum) -> Tensor:
    """bool, broadcasts to the logits: pixels that at least one term counts."""
    terms = [labels != t.ignore_index if t.ignore_index is not None else labels == labels for _, t in loss.terms]
    counted = torch.stack(terms).any(0)
    return counted.unsqueeze(1) if counted.dim() < logits.dim() else counted


def counts(predicted: Tensor, true: Tensor, *, void: bool) -> tuple[int, int]:
    """Intersection and union of a class. One that is void for all terms has none, even if it is predicted."""
    return (0, 0) if void else (int((predicted & true).sum()), int((predicted | true).sum()))


def is_void(label: int, loss: LossLike) -> bool:
    return all(term.ignore_index == label for _, term in weighted_sum(loss).terms)


def iou(intersection: int, union: int) -> float:
    return intersection / union if union else math.nan


@each_dtype
@random_cases
@given(softmax_cases())
def test_softmax_losses(
    dtype: torch.dtype, way: Way, device: torch.device, case: tuple[Tensor, Tensor, LossLike]
) -> None:
    result = assert_is_the_reference(case, dtype, way, device)
    logits, labels, loss = case
    counted = counted_pixels(logits, labels, weighted_sum(loss)).squeeze(1)
    prediction = logits.to(dtype).argmax(1)
    expected = [
        counts((prediction == c) & counted, (labels == c) & counted, void=is_void(c, loss))
        for c in range(logits.shape[1])
    ]
    assert list(zip(result.intersection.tolist(), result.union.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(result.class_iou, [iou(*pair) for pair in expected])


@each_dtype
@random_cases
@given(probability_cases())
def test_probabilities(
    dtype: torch.dtype, way: Way, device: torch.device, case: tuple[Tensor, Tensor, LossLike]
) -> None:
    assert_is_the_reference(case, dtype, way, device)


@each_dtype
@random_cases
@given(binary_cases())
def test_binary_losses(
    dtype: torch.dtype, way: Way, device: torch.device, case: tuple[Tensor, Tensor, LossLike]
) -> None:
    result = assert_is_the_reference(case, dtype, way, device)
    logits, labels, loss = case
    counted = counted_pixels(logits, labels, weighted_sum(loss))
    if not weighted_sum(loss).multilabel:
        logits, labels, counted = (tensor.reshape(len(tensor), 1, -1) for tensor in (logits, labels, counted))
    predicted, true = (logits.to(dtype) > 0) & counted, (labels == 1) & counted
    void = is_void(1, loss)
    expected = [counts(predicted[:, c], true[:, c], void=void) for c in range(logits.shape[1])]
    assert list(zip(result.intersection.tolist(), result.union.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(result.class_iou, [iou(*pair) for pair in expected])


@pytest.mark.parametrize("smoothing", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("class_weight", [None, [0.5, 0.0, 2.0, 1.0]])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_is_torchs(
    smoothing: float, class_weight: list[float] | None, ignore_index: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits = normal(2, 4, 9, 7, seed=1).requires_grad_()
    labels = torch.randint(0, 4, (2, 9, 7), generator=torch.Generator().manual_seed(2))
    labels[0, 3:5] = ignore_index
    weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
    expected = functional.cross_entropy(
        logits, labels, weight=weight, ignore_index=ignore_index, label_smoothing=smoothing
    )
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = CrossEntropy(class_weight, ignore_index, smoothing)
    result = compute(logits.detach().to(device, dtype), labels.to(device), loss)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert result.loss == pytest.approx(expected.item(), rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@pytest.mark.parametrize("pos_weight", [None, 2.5, [0.5, 0.0, 4.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_cross_entropy_is_torchs(
    pos_weight: float | list[float] | None, dtype: torch.dtype, device: torch.device
) -> None:
    logits = (normal(2, 3, 9, 7, seed=1) * 6).requires_grad_()
    labels = torch.randint(0, 2, (2, 3, 9, 7), generator=torch.Generator().manual_seed(2))
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64).reshape(-1, 1, 1)
    expected = functional.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=weight)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = BinaryCrossEntropy(pos_weight, multilabel=True)
    result = compute(logits.detach().to(device, dtype), labels.to(device), loss)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert result.loss == pytest.approx(expected.item(), rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@each_dtype
def test_lovasz_sigmoid_is_lovasz_softmax_of_the_foreground(dtype: torch.dtype, way: Way, device: torch.device) -> None:
    logits = normal(2, 1, 20, 30, seed=1, dtype=dtype) * 3
    labels = random_labels(2, 20, 30, values=2, seed=2, void=VOID)
    for per_image in (False, True):
        detour = LovaszSoftmax(classes=[1], per_image=per_image, ignore_index=VOID)
        truth, both = reference_answer(torch.cat([torch.zeros_like(logits), logits], 1), labels, detour)
        loss = LovaszSigmoid(per_image=per_image, ignore_index=VOID)
        result = compute(logits.to(device), labels.to(device), loss)
        assert result.loss == pytest.approx(truth, rel=1e-6 if dtype == torch.float32 else 1e-12)
        in_float32 = 1e-3 if way.counts(labels.numel()) else 1e-5  # a bin is one tie
        assert norm_error(result.grad, both[:, 1:]) < (in_float32 if dtype == torch.float32 else 1e-12)


@each_dtype
def test_binary_losses_of_confident_pixels_keep_their_digits(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.tensor([[12.0, 9.0, -14.0, 13.0, -40.0, 0.5]], dtype=dtype)
    labels = torch.tensor([[1, 1, 0, 0, 1, 1]])
    for loss in (BinaryCrossEntropy(), LovaszSigmoid()):
        truth, expected = reference_answer(logits, labels, loss)
        result = compute(logits.to(device), labels.to(device), loss)
        assert result.loss == pytest.approx(truth, rel=1e-6)
        assert result.grad is not None
        np.testing.assert_allclose(
            result.grad.cpu(), expected, rtol=2e-6 if dtype == torch.float32 else 1e-9, atol=1e-16
        )


@each_dtype
def test_cross_entropy_where_nothing_has_weight_is_zero(dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = (
        normal(1, 3, 4, seed=3, dtype=dtype).to(device),
        torch.zeros(1, 4, dtype=torch.int64, device=device),
    )
    result = compute(logits, labels, CrossEntropy(class_weights=[0, 1, 1], label_smoothing=0.1))
    assert result.loss == 0
    assert torch.equal(result.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permuting_pixels_permutes_the_gradient_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    logits, order = normal(1, 5, 3000, seed=4, dtype=dtype), torch.randperm(3000, generator=torch.Generator())
    labels = torch.randint(0, 5, (1, 3000), generator=torch.Generator().manual_seed(5))
    loss: list[tuple[float, Loss]] = [(1.0, LovaszSoftmax()), (0.5, CrossEntropy(label_smoothing=0.1))]
    straight = compute(logits.to(device), labels.to(device), loss)
    permuted = compute(logits[..., order].to(device), labels[..., order].to(device), loss)
    assert straight.grad is not None
    assert permuted.grad is not None
    assert permuted.loss == straight.loss
    assert torch.equal(permuted.grad.cpu(), straight.grad.cpu()[..., order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_of_equal_logits_tie_whatever_their_labels(dtype: torch.dtype, way: Way, device: torch.device) -> None:
    logits = normal(1, 6, 20, seed=8, dtype=dtype).repeat_interleave(25, dim=2)
    labels = torch.randint(0, 6, (1, 500), generator=torch.Generator().manual_seed(9))
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    shared = way.counts(500) and dtype == torch.float32
    expected, expected_grad = (shared_ties_answer if shared else reference_answer)(logits, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < (1e-6 if dtype == torch.float32 else 1e-12)


@random_cases
@given(softmax_cases().filter(lambda case: isinstance(case[2], LovaszSoftmax) and case[2].class_weights is None))
def test_softmax_loss_is_within_0_and_1(device: torch.device, case: tuple[Tensor, Tensor, LossLike]) -> None:
    logits, labels, loss = case
    assert 0 <= compute(logits.float().to(device), labels.to(device), loss).loss <= 1 + 1e-6


@pytest.mark.parametrize("per_image", [False, True])
def test_perfect_prediction_costs_nothing(per_image: bool, device: torch.device) -> None:
    labels = torch.randint(0, 4, (2, 6, 5), generator=torch.Generator().manual_seed(6)).to(device)
    one_hot = functional.one_hot(labels, 4).movedim(-1, 1).float()
    results = [
        compute(one_hot, labels, LovaszSoftmax(per_image=per_image, input="probabilities")),
        compute(one_hot * 200, labels, LovaszSoftmax(per_image=per_image)),
        compute(one_hot * 2 - 1, one_hot.long(), LovaszHinge(per_image=per_image, multilabel=True)),
    ]
    for result in results:
        assert result.loss == 0
        assert (result.class_iou == 1).all()


def test_wrong_prediction_costs_everything(device: torch.device) -> None:
    labels = torch.randint(0, 4, (2, 6, 5), generator=torch.Generator().manual_seed(7)).to(device)
    wrong = functional.one_hot((labels + 1) % 4, 4).movedim(-1, 1).float()
    result = compute(wrong * 200, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(1, rel=1e-6)
    assert (result.class_iou == 0).all()
