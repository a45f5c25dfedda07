"""The oracle itself: held to values computed elsewhere, to the mathematics, and to every option's meaning."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vector_cases import Case, load
from torch import Tensor
from torch.nn import functional

from lovasz.core import reference
from lovasz.spec import (
    BinaryCrossEntropy,
    Classes,
    CrossEntropy,
    InvalidInput,
    Loss,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
)

# The first calls of torch take longer than Hypothesis allows one example.
no_deadline = settings(deadline=None)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_grad(logits: Tensor, labels: Tensor, loss: LossLike) -> tuple[float, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = reference.compute(logits, labels, loss)
    (grad,) = torch.autograd.grad(value, logits)
    return value.item(), grad


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(*shape: int, values: int, seed: int) -> Tensor:
    return torch.randint(0, values, shape, generator=torch.Generator().manual_seed(seed))


# --- The four steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreground_sorted", "expected"),
    [
        ([1, 1, 0, 0], [1 / 2, 1 / 2, 0, 0]),
        ([0, 1, 0, 1], [1 / 3, 1 / 3, 1 / 12, 1 / 4]),
        ([0, 0, 0], [1, 0, 0]),
        ([1], [1]),
        ([0], [1]),
        # The worked example of docs/mathematics.md.
        ([0, 1, 0, 1, 0, 1, 0, 0], [1 / 4, 1 / 4, 1 / 10, 1 / 5, 1 / 30, 1 / 6, 0, 0]),
    ],
)
def test_lovasz_grad(foreground_sorted: list[int], expected: list[float]) -> None:
    torch.testing.assert_close(reference.lovasz_grad(double(foreground_sorted)), double(expected))


def test_softmax_errors() -> None:
    errors = reference.softmax_errors(double([0.9, 0.2, 0.6]), torch.tensor([True, True, False]))
    torch.testing.assert_close(errors, double([0.1, 0.8, 0.6]))


def test_hinge_errors() -> None:
    errors = reference.hinge_errors(double([2.0, -1.0, 2.0, -1.0]), torch.tensor([True, True, False, False]))
    torch.testing.assert_close(errors, double([-1.0, 2.0, 3.0, 0.0]))


def test_worked_example_of_the_mathematics() -> None:
    foreground = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0]) == 1
    errors = double([0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1])
    along = double([1 / 4, 1 / 2, 3 / 5, 4 / 5, 5 / 6, 1, 1, 1])
    torch.testing.assert_close(reference.jaccard_along_order(foreground.double()), along)
    assert reference.lovasz_extension(errors, foreground).item() == pytest.approx(0.98 * 2 / 3, rel=1e-14)


def test_gradient_at_ties_puts_foreground_first_and_then_the_order_of_the_pixels() -> None:
    errors = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)
    foreground = torch.tensor([False, True, False, True, False])
    (grad,) = torch.autograd.grad(reference.lovasz_extension(errors, foreground), errors)
    torch.testing.assert_close(grad, double([0, 1 / 2, 0, 1 / 2, 0]))
    (grad,) = torch.autograd.grad(reference.lovasz_extension(errors, torch.zeros(5, dtype=torch.bool)), errors)
    torch.testing.assert_close(grad, double([1, 0, 0, 0, 0]))


# --- The mathematics: a set function and its extension ------------------------------------------------------------


def jaccard_loss(mispredicted: tuple[bool, ...], foreground: tuple[bool, ...]) -> Fraction:
    """1 - |prediction and truth| / |prediction or truth|, the prediction being the truth with some pixels flipped."""
    prediction = [f != wrong for f, wrong in zip(foreground, mispredicted, strict=True)]
    intersection = sum(p and f for p, f in zip(prediction, foreground, strict=True))
    union = sum(p or f for p, f in zip(prediction, foreground, strict=True))
    return 1 - Fraction(intersection, union) if union else Fraction(0)


foregrounds = st.lists(st.booleans(), min_size=1, max_size=7).map(tuple)
some_errors = st.floats(-2, 3, allow_nan=False, allow_subnormal=False)


@st.composite
def foreground_and(draw: st.DrawFn, *elements: st.SearchStrategy[Any]) -> Any:
    """A foreground, and for each strategy a tuple of its elements, one a pixel."""
    foreground = draw(foregrounds)
    size = len(foreground)
    return (foreground, *(draw(st.lists(e, min_size=size, max_size=size).map(tuple)) for e in elements))


def extension(errors: Tensor, foreground: tuple[bool, ...]) -> float:
    return reference.lovasz_extension(errors, torch.tensor(foreground)).item()


@no_deadline
@given(foreground_and(st.booleans(), st.booleans()))
def test_jaccard_loss_is_monotone_and_submodular(
    sets: tuple[tuple[bool, ...], tuple[bool, ...], tuple[bool, ...]],
) -> None:
    foreground, one, other = sets
    both = tuple(a and b for a, b in zip(one, other, strict=True))
    either = tuple(a or b for a, b in zip(one, other, strict=True))
    values = {name: jaccard_loss(s, foreground) for name, s in (("1", one), ("2", other), ("&", both), ("|", either))}
    assert values["&"] <= values["1"] <= values["|"]
    assert values["1"] + values["2"] >= values["|"] + values["&"]


@no_deadline
@given(foreground_and(st.booleans()))
def test_extension_equals_jaccard_loss_on_vertices(sets: tuple[tuple[bool, ...], tuple[bool, ...]]) -> None:
    foreground, mispredicted = sets
    expected = float(jaccard_loss(mispredicted, foreground))
    assert extension(double(mispredicted), foreground) == pytest.approx(expected, abs=1e-15)


@no_deadline
@given(foreground_and(some_errors, some_errors), st.floats(0, 1))
def test_extension_is_convex(case: tuple[tuple[bool, ...], tuple[float, ...], tuple[float, ...]], share: float) -> None:
    foreground, one, other = case[0], double(case[1]), double(case[2])
    chord = share * extension(one, foreground) + (1 - share) * extension(other, foreground)
    assert extension(share * one + (1 - share) * other, foreground) <= chord + 1e-14


@no_deadline
@given(foreground_and(some_errors).filter(lambda case: len(case[0]) <= 5))
def test_extension_is_the_largest_of_the_linear_functions_of_all_orders(
    case: tuple[tuple[bool, ...], tuple[float, ...]],
) -> None:
    foreground, errors = double(case[0]), double(case[1])
    linear = []
    for order in itertools.permutations(range(len(foreground))):
        g = reference.lovasz_grad(foreground[list(order)])
        linear.append(torch.dot(errors[list(order)], g).item())
    assert extension(errors, case[0]) == pytest.approx(max(linear), abs=1e-14)


@no_deadline
@given(foregrounds)
def test_closed_form(foreground_sorted: tuple[bool, ...]) -> None:
    total, n, b, closed = sum(foreground_sorted), 0, 0, []
    for is_foreground in foreground_sorted:
        if is_foreground:
            closed.append(Fraction(1, total + b))
            n += 1
        else:
            b += 1
            closed.append(Fraction(total - n, (total + b) * (total + b - 1)) if total else Fraction(b == 1))
    assert sum(closed) == 1
    g = reference.lovasz_grad(double(foreground_sorted))
    torch.testing.assert_close(g, double([float(x) for x in closed]), rtol=0, atol=1e-15)


# --- Values known from elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
def test_vectors(case: Case) -> None:
    value, grad = with_grad(torch.from_numpy(case.logits).double(), torch.from_numpy(case.labels), case.loss_spec)
    assert value == pytest.approx(case.loss, rel=1e-14)
    expected = torch.from_numpy(case.grad)
    assert (grad - expected).norm() <= 2e-14 * expected.norm()
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("classes", "expected"), [("present", 7 / 15), ("all", 7 / 15), ((0,), 0.45), ((1, 2), 0.475), ((2, 1), 0.475)]
)
def test_probabilities_of_a_point_cloud(classes: Classes, expected: float) -> None:
    probabilities = double([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.4, 0.5, 0.1]])
    loss = LovaszSoftmax(classes=classes, input="probabilities")
    labels = torch.tensor([0, 1, 2, 0])
    assert reference.compute(probabilities, labels, loss).item() == pytest.approx(expected, rel=1e-14)
    torch.testing.assert_close(
        reference.per_class_losses(probabilities, labels, LovaszSoftmax(input="probabilities")),
        double([0.45, 0.45, 0.5]),
    )


@pytest.mark.parametrize(("per_image", "expected"), [(True, 1.625), (False, 7 / 6)])
def test_hinge_by_hand(per_image: bool, expected: float) -> None:
    logits = double([[2, -1], [0.5, 1.5]])
    labels = torch.tensor([[0, 0], [1, 1]])
    loss = LovaszHinge(per_image=per_image)
    assert reference.compute(logits, labels, loss).item() == pytest.approx(expected, rel=1e-14)


def test_random_batch_with_a_void_pixel() -> None:
    np.random.seed(14)
    logits = torch.from_numpy(np.random.randn(2, 4, 8, 8).astype(np.float32)).double()
    labels = torch.from_numpy(np.random.randint(0, 4, (2, 8, 8)))
    labels[0, 0, 0] = 255
    value, grad = with_grad(logits, labels, LovaszSoftmax(ignore_index=255))
    assert value == pytest.approx(0.77665639, abs=1e-7)  # as computed elsewhere, in float32
    assert grad.norm().item() == pytest.approx(0.01698170, abs=1e-8)
    assert (grad[0, :, 0, 0] == 0).all()
    value, _ = with_grad(logits, labels, LovaszSoftmax(per_image=True, ignore_index=255))
    assert value == pytest.approx(0.78204250, abs=1e-7)


def test_ranks_example_of_the_mathematics() -> None:
    shards = [([0.6, 0.4, 0.2, 0.05], [1, 1, 1, 0]), ([0.8, 0.5, 0.3, 0.1], [1, 0, 0, 0])]
    whole = ([*shards[0][0], *shards[1][0]], [*shards[0][1], *shards[1][1]])
    losses, grads = [], []
    for errors, foreground in [*shards, whole]:
        m = double(errors).requires_grad_()
        value = reference.lovasz_extension(m, torch.tensor(foreground) == 1)
        losses.append(value.item())
        grads.append(torch.autograd.grad(value, m)[0])
    assert losses == pytest.approx([2 / 5, 4 / 5, 157 / 300], rel=1e-14)
    mean = torch.cat(grads[:2]) / 2
    torch.testing.assert_close(mean, double([1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0, 0]))
    torch.testing.assert_close(grads[2], double([1 / 4, 1 / 5, 1 / 6, 0, 1 / 4, 1 / 10, 1 / 30, 0]))
    assert functional.cosine_similarity(mean, grads[2], dim=0).item() == pytest.approx(0.874, abs=5e-4)


# --- Gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        LovaszSoftmax(),
        LovaszSoftmax(classes="all", per_image=True, ignore_index=1),
        LovaszSoftmax(classes=[2, 0], class_weights=[0.5, 1.0, 2.0]),
        LovaszSoftmax(input="probabilities"),
        CrossEntropy(class_weights=[0.5, 1.0, 2.0], label_smoothing=0.1),
        [(0.5, CrossEntropy()), (2.0, LovaszSoftmax(per_image=True))],
    ],
    ids=str,
)
def test_gradcheck_softmax(loss: LossLike) -> None:
    logits = normal(2, 3, 4, 3, seed=3).requires_grad_()  # random, so without ties
    labels = random_labels(2, 4, 3, values=3, seed=4)
    assert torch.autograd.gradcheck(lambda x: reference.compute(x, labels, loss), logits)


BINARY: list[Loss] = [
    LovaszHinge(),
    LovaszHinge(per_image=True),
    LovaszHinge(multilabel=True),
    LovaszSigmoid(),
    BinaryCrossEntropy(pos_weight=2),
]


@pytest.mark.parametrize("loss", BINARY, ids=str)
def test_gradcheck_binary(loss: Loss) -> None:
    logits = normal(2, 3, 7, seed=5).requires_grad_()
    labels = random_labels(2, 3, 7, values=2, seed=6)
    assert torch.autograd.gradcheck(lambda x: reference.compute(x, labels, loss), logits)


# --- Options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [False, True])
def test_void_pixels_are_removed_before_anything(per_image: bool) -> None:
    logits, labels = normal(2, 3, 5, seed=7), random_labels(2, 5, values=3, seed=8)
    loss = LovaszSoftmax(per_image=per_image, ignore_index=255)
    expected, expected_grad = with_grad(logits, labels, loss)
    void = torch.tensor([math.inf, math.nan, 1e30], dtype=torch.float64).expand(2, 3)[..., None]
    padded = torch.cat([void, logits, void], dim=2)
    padded_labels = functional.pad(labels, (1, 1), value=255)
    value, grad = with_grad(padded, padded_labels, loss)
    assert value == expected
    assert torch.equal(grad, functional.pad(expected_grad, (1, 1)))


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["present", "all", (1,)])
def test_wholly_void_batch_is_zero(per_image: bool, classes: Classes) -> None:
    logits = torch.full((2, 3, 4), math.nan, dtype=torch.float64)
    labels = torch.full((2, 4), 255)
    softmax = LovaszSoftmax(per_image=per_image, classes=classes, ignore_index=255)
    both: list[tuple[float, Loss]] = [(1.0, softmax), (1.0, CrossEntropy(ignore_index=255))]
    for terms in (softmax, both):
        value, grad = with_grad(logits, labels, terms)
        assert value == 0
        assert torch.equal(grad, torch.zeros_like(logits))
    assert reference.per_class_losses(logits, labels, softmax).isnan().all()
    value, grad = with_grad(logits[:, 0], labels, LovaszHinge(per_image=per_image, ignore_index=255))
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(logits[:, 0]))


def test_per_image_is_the_mean_over_all_images_a_void_one_counting_as_zero() -> None:
    logits, labels = normal(3, 4, 6, seed=9), random_labels(3, 6, values=3, seed=10)
    labels[1] = 255
    loss = LovaszSoftmax(per_image=True, ignore_index=255)
    alone = [reference.compute(x[None], y[None], loss).item() for x, y in zip(logits, labels, strict=True)]
    assert alone[1] == 0
    assert reference.compute(logits, labels, loss).item() == pytest.approx(sum(alone) / 3, rel=1e-14)
    per_class = reference.per_class_losses(logits, labels, loss)
    means = torch.stack([reference.per_class_losses(logits[i : i + 1], labels[i : i + 1], loss) for i in (0, 2)])
    torch.testing.assert_close(per_class, means.nanmean(dim=0), equal_nan=True)
    assert per_class.isnan().tolist() == [False, False, False, True]


def test_absent_class_costs_its_largest_probability() -> None:
    logits, labels = normal(2, 4, 6, seed=11), random_labels(2, 6, values=3, seed=12)
    value = reference.compute(logits, labels, LovaszSoftmax(classes=[3])).item()
    assert value == pytest.approx(logits.softmax(1)[:, 3].max().item(), rel=1e-14)


def test_class_weights_multiply_and_do_not_normalise() -> None:
    logits, labels = normal(2, 3, 6, seed=13), random_labels(2, 6, values=2, seed=14)
    first, second, _ = reference.per_class_losses(logits, labels, LovaszSoftmax()).tolist()
    value = reference.compute(logits, labels, LovaszSoftmax(class_weights=[2.0, 0.5, 9.0])).item()
    assert value == pytest.approx((2.0 * first + 0.5 * second) / 2, rel=1e-14)


def test_multilabel_hinge_is_the_mean_over_its_labels() -> None:
    logits, labels = normal(2, 3, 4, 4, seed=15), random_labels(2, 3, 4, 4, values=2, seed=16)
    labels[:, 1] = 255
    labels[0, 0, 0] = 255
    alone = [reference.compute(logits[:, i], labels[:, i], LovaszHinge(ignore_index=255)).item() for i in range(3)]
    together = LovaszHinge(multilabel=True, ignore_index=255)
    assert reference.compute(logits, labels, together).item() == pytest.approx(sum(alone) / 3, rel=1e-14)
    per_label = reference.per_class_losses(logits, labels, together)
    torch.testing.assert_close(per_label, double([alone[0], math.nan, alone[2]]), equal_nan=True)


def test_hinge_takes_an_axis_of_one_channel() -> None:
    logits, labels = normal(2, 5, 4, seed=17), random_labels(2, 5, 4, values=2, seed=18)
    expected = reference.compute(logits, labels, LovaszHinge())
    for label_shape in ((2, 5, 4), (2, 1, 5, 4)):
        value = reference.compute(logits[:, None], labels.reshape(label_shape).bool(), LovaszHinge())
        assert value == expected


def test_hinge_beyond_the_margin_is_flat() -> None:
    logits, labels = double([[3.0, 1.0, -4.0, -1.0]]), torch.tensor([[1, 1, 0, 0]])
    value, grad = with_grad(logits, labels, LovaszHinge())
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
def test_cross_entropy_is_torchs(weights: list[float] | None, smoothing: float) -> None:
    logits, labels = normal(2, 3, 4, 5, seed=19), random_labels(2, 4, 5, values=3, seed=20)
    labels[0, 1] = -100
    value = reference.compute(logits, labels, CrossEntropy(class_weights=weights, label_smoothing=smoothing))
    weight = None if weights is None else double(weights)
    expected = functional.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(value, expected)


def test_cross_entropy_of_classes_without_weight_is_zero() -> None:
    logits, labels = normal(1, 3, 4, seed=21), torch.zeros((1, 4), dtype=torch.long)
    value, grad = with_grad(logits, labels, CrossEntropy(class_weights=[0, 1, 1]))
    assert value == 0
    assert (grad == 0).all()


def test_weighted_sum() -> None:
    logits, labels = normal(2, 3, 4, seed=22), random_labels(2, 4, values=3, seed=23)
    terms: list[tuple[float, Loss]] = [
        (0.25, CrossEntropy()),
        (-1.5, LovaszSoftmax(per_image=True)),
        (1.0, LovaszSoftmax(classes=[0])),
    ]
    value, grad = with_grad(logits, labels, terms)
    alone = [(weight, *with_grad(logits, labels, term)) for weight, term in terms]
    assert value == pytest.approx(sum(weight * v for weight, v, _ in alone), rel=1e-13)
    torch.testing.assert_close(grad, sum((weight * g for weight, _, g in alone), torch.zeros_like(logits)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [LovaszSoftmax(classes=[0]), CrossEntropy(), LovaszHinge(multilabel=True)], ids=str)
def test_non_finite_logit_makes_everything_nan(loss: LossLike, bad: float) -> None:
    logits = normal(2, 3, 4, seed=24)
    logits[1, 1, 2] = bad
    shape = (2, 3, 4) if isinstance(loss, LovaszHinge) else (2, 4)
    value, grad = with_grad(logits, random_labels(*shape, values=2, seed=25), loss)
    assert math.isnan(value)
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    logits, labels = normal(2, 3, 4, seed=26).to(dtype), random_labels(2, 4, values=3, seed=27)
    value = reference.compute(logits, labels, [(1.0, CrossEntropy()), (1.0, LovaszSoftmax(class_weights=[1, 2, 3]))])
    assert value.dtype == dtype
    assert value.shape == ()


def test_label_out_of_range_is_refused_with_its_place() -> None:
    labels = torch.tensor([[[0, 1], [255, 3]]], dtype=torch.uint8)
    with pytest.raises(InvalidInput, match=r"labels: got 3 at \(0, 1, 1\); expected .* \[0, 3\) or ignore_index=255"):
        reference.compute(torch.zeros(1, 3, 2, 2), labels, LovaszSoftmax(ignore_index=255))
    with pytest.raises(InvalidInput, match=r"labels: got 255 at \(0, 1, 0\)"):
        reference.compute(
            torch.zeros(1, 4, 2, 2), labels, [(1.0, LovaszSoftmax(ignore_index=255)), (1.0, CrossEntropy())]
        )
    with pytest.raises(InvalidInput, match=r"labels: got dtype torch\.float32"):
        reference.compute(torch.zeros(1, 3, 2, 2), labels.float(), LovaszSoftmax(ignore_index=255))


# --- The other numbers of docs/mathematics.md ---------------------------------------------------------------------


def test_closed_form_is_accurate_in_float32_where_differences_are_not() -> None:
    foreground = torch.rand(2**20, generator=torch.Generator().manual_seed(1)) < 0.3
    total, n, b = foreground.sum(), foreground.long().cumsum(0), (~foreground).long().cumsum(0)

    def closed_form(dtype: torch.dtype) -> Tensor:
        union = (total + b).to(dtype)
        return torch.where(foreground, 1 / union, (total - n).to(dtype) / (union * (union - 1))).double()

    exact = closed_form(torch.float64)
    differences = reference.lovasz_grad(foreground.float()).double()
    counts = exact > 0

    def norm_error(g: Tensor) -> float:
        return float((g - exact).norm() / exact.norm())

    def largest_error(g: Tensor) -> float:
        return float(((g - exact).abs()[counts] / exact[counts]).max())

    closed = closed_form(torch.float32)
    assert norm_error(closed) == pytest.approx(3.0e-8, rel=0.05)
    assert largest_error(closed) == pytest.approx(1.1e-7, rel=0.1)
    assert norm_error(differences) > 1e-2
    assert largest_error(differences) > 100


def test_way_back_through_softmax_without_cancellation() -> None:
    logits, h = double([12, 0, -1, 1]), double([-1e-3, 2e-4, 2e-4, 2e-4])

    def label_gradients(logits: Tensor, h: Tensor) -> tuple[float, float]:
        p = logits.softmax(0)
        plain = p[0] * (h[0] - (p * h).sum())
        stable = p[0] * (h[0] * p[1:].sum() - torch.dot(p[1:], h[1:]))
        return plain.item(), stable.item()

    exact = label_gradients(logits, h)[1]
    plain, stable = label_gradients(logits.float(), h.float())
    assert exact == pytest.approx(-3.0126e-8, rel=1e-4)
    assert abs(plain / exact - 1) > 2e-4  # how far, depends on the order of the sum
    assert abs(stable / exact - 1) < 5e-7
