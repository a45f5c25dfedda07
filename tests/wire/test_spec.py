"""The loss descriptions: every rule with its words, equality, and the rules on shapes."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support.foreign import FOREIGN

from lovasz.core import LocalLoss
from lovasz.spec import (
    LOSS_KINDS,
    MAX_AXES,
    MAX_CLASSES,
    MAX_TERMS,
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    Layout,
    Loss,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Result,
    TermResult,
    WeightedSum,
    weighted_sum,
)


def refusal(build: Callable[[], object]) -> str:
    with pytest.raises(InvalidInput) as caught:
        build()
    assert str(caught.value) == f"{caught.value.field}: {caught.value.problem}"
    return str(caught.value)


# --- Options ------------------------------------------------------------------------------------------------------

EXPECTED_CLASSES = "expected 'present', 'all' or a sequence of class numbers, such as [1, 2]"
EXPECTED_WEIGHTS = "expected one number per class, such as [0.5, 1.0], or None"
BY_NAME = "(per_image comes after class_weights; give it by name)"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": "some"}, f"classes: got 'some'; {EXPECTED_CLASSES}"),
        ({"classes": 3}, f"classes: got 3; {EXPECTED_CLASSES}"),
        ({"classes": np.int64(3)}, f"classes: got {np.int64(3)!r}; {EXPECTED_CLASSES}"),
        ({"classes": torch.tensor(3)}, f"classes: got tensor(3); {EXPECTED_CLASSES}"),
        ({"classes": {1, 2}}, f"classes: got {{1, 2}}; {EXPECTED_CLASSES}"),
        ({"classes": torch.tensor([1.0])}, "classes[0]: got 1.0; expected an integer"),
        ({"classes": torch.tensor([True, False])}, "classes[0]: got True; expected an integer"),
        ({"class_weights": 2.0}, f"class_weights: got 2.0; {EXPECTED_WEIGHTS}"),
        ({"class_weights": torch.tensor(2.0)}, f"class_weights: got tensor(2.); {EXPECTED_WEIGHTS}"),
        ({"class_weights": "12"}, f"class_weights: got '12'; {EXPECTED_WEIGHTS}"),
        ({"class_weights": {0: 1.0}}, f"class_weights: got {{0: 1.0}}; {EXPECTED_WEIGHTS}"),
        ({"class_weights": False}, f"class_weights: got False; {EXPECTED_WEIGHTS} {BY_NAME}"),
        ({"class_weights": torch.ones(1, 2)}, f"class_weights: got an array of shape (1, 2); {EXPECTED_WEIGHTS}"),
        ({"class_weights": [[1.0, 1.0]]}, "class_weights[0]: got [1.0, 1.0]; expected a finite number"),
        ({"classes": np.ones((2, 512, 512), int)}, f"classes: got an array of shape (2, 512, 512); {EXPECTED_CLASSES}"),
        ({"classes": torch.ones(9999).int()}, "classes: got [1, 1, 1, 1, 1, 1, ...]; expected each class once"),
        ({"class_weights": torch.tensor([1.0, -1.0])}, "class_weights[1]: got -1.0; expected a number >= 0"),
        ({"per_image": torch.tensor(1)}, "per_image: got tensor(1); expected True or False"),
        ({"ignore_index": torch.tensor(1.5)}, "ignore_index: got tensor(1.5000); expected an integer"),
        ({"ignore_index": torch.tensor([1])}, "ignore_index: got Tensor of shape (1,); expected an integer"),
        ({"classes": None}, f"classes: got None; {EXPECTED_CLASSES}"),
        ({"classes": []}, "classes: got an empty list; expected at least one class number"),
        ({"classes": [1, 2, 1]}, "classes: got [1, 2, 1]; expected each class once"),
        ({"classes": [1, -1]}, "classes: got -1; expected class numbers >= 0"),
        ({"classes": [0, 1.0]}, "classes[1]: got 1.0; expected an integer"),
        ({"classes": [True]}, "classes[0]: got True; expected an integer"),
        ({"class_weights": []}, "class_weights: got an empty list; expected one number per class, or None"),
        ({"class_weights": [1, -0.5]}, "class_weights[1]: got -0.5; expected a number >= 0"),
        ({"class_weights": [1, math.nan]}, "class_weights[1]: got nan; expected a finite number"),
        ({"class_weights": [math.inf]}, "class_weights[0]: got inf; expected a finite number"),
        ({"class_weights": ["1"]}, "class_weights[0]: got '1'; expected a finite number"),
        ({"class_weights": [False]}, "class_weights[0]: got False; expected a finite number"),
        ({"per_image": 1}, "per_image: got 1; expected True or False"),
        ({"per_image": "yes"}, "per_image: got 'yes'; expected True or False"),
        ({"ignore_index": 1.5}, "ignore_index: got 1.5; expected an integer"),
        ({"ignore_index": True}, "ignore_index: got True; expected an integer"),
        ({"ignore_index": 2**63}, f"ignore_index: got {2**63}; expected a 64-bit signed integer"),
        ({"ignore_index": -(2**63) - 1}, f"ignore_index: got {-(2**63) - 1}; expected a 64-bit signed integer"),
        ({"input": "scores"}, "input: got 'scores'; expected 'logits' or 'probabilities'"),
    ],
)
def test_softmax_options(options: dict[str, Any], text: str) -> None:
    assert refusal(lambda: LovaszSoftmax(**options)) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"per_image": None}, "per_image: got None; expected True or False"),
        ({"ignore_index": "255"}, "ignore_index: got '255'; expected an integer"),
        ({"multilabel": 1}, "multilabel: got 1; expected True or False"),
    ],
)
@pytest.mark.parametrize("kind", [LovaszHinge, LovaszSigmoid])
def test_hinge_options(kind: type[LovaszHinge | LovaszSigmoid], options: dict[str, Any], text: str) -> None:
    assert refusal(lambda: kind(**options)) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pos_weight": -1}, "pos_weight: got [-1.0]; expected a number >= 0, one number per label, or None"),
        ({"pos_weight": [1, -2]}, "pos_weight: got [1.0, -2.0]; expected a number >= 0, one number per label, or None"),
        ({"pos_weight": []}, "pos_weight: got []; expected a number >= 0, one number per label, or None"),
        ({"pos_weight": "1"}, "pos_weight: got '1'; expected a number >= 0, one number per label, or None"),
        ({"pos_weight": math.nan}, "pos_weight: got nan; expected a finite number"),
        ({"pos_weight": [1, None]}, "pos_weight[1]: got None; expected a finite number"),
        ({"ignore_index": 1.0}, "ignore_index: got 1.0; expected an integer"),
        ({"multilabel": None}, "multilabel: got None; expected True or False"),
    ],
)
def test_binary_cross_entropy_options(options: dict[str, Any], text: str) -> None:
    assert refusal(lambda: BinaryCrossEntropy(**options)) == text


def test_a_single_pos_weight_is_one_for_all_labels() -> None:
    assert BinaryCrossEntropy(torch.tensor([3.0])) == BinaryCrossEntropy(np.float32(3)) == BinaryCrossEntropy(3)
    text = "pos_weight: got 2 numbers; expected 3, one per label"
    loss = weighted_sum(BinaryCrossEntropy([1, 2], multilabel=True))
    assert refusal(lambda: loss.layout((1, 3, 4), (1, 3, 4))) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_weights": [-1]}, "class_weights[0]: got -1.0; expected a number >= 0"),
        ({"ignore_index": 0.0}, "ignore_index: got 0.0; expected an integer"),
        ({"label_smoothing": -0.1}, "label_smoothing: got -0.1; expected a number in [0, 1]"),
        ({"label_smoothing": 1.01}, "label_smoothing: got 1.01; expected a number in [0, 1]"),
        ({"label_smoothing": math.nan}, "label_smoothing: got nan; expected a finite number"),
        ({"label_smoothing": None}, "label_smoothing: got None; expected a finite number"),
    ],
)
def test_cross_entropy_options(options: dict[str, Any], text: str) -> None:
    assert refusal(lambda: CrossEntropy(**options)) == text


def test_options_are_brought_into_plain_immutable_values() -> None:
    loss = LovaszSoftmax(
        classes=[np.int64(2), 0],
        class_weights=np.array([1, 2, 3], dtype=np.float32),
        per_image=np.bool_(True),
        ignore_index=np.uint8(255),
    )
    assert loss == LovaszSoftmax((2, 0), (1.0, 2.0, 3.0), True, 255)
    assert type(loss.ignore_index) is int
    assert type(loss.per_image) is bool
    assert isinstance(loss.classes, tuple)
    assert all(type(c) is int for c in loss.classes)
    assert isinstance(loss.class_weights, tuple)
    assert all(type(w) is float for w in loss.class_weights)
    assert CrossEntropy(label_smoothing=1).label_smoothing == 1.0


@pytest.mark.parametrize("array", [np.array, torch.tensor, lambda values: FOREIGN[0](np.array(values))])
def test_options_may_be_arrays_of_any_framework(array: Callable[[Any], Any]) -> None:
    expected = LovaszSoftmax((2, 0), (1.0, 2.0, 0.5), True, 255)
    loss = LovaszSoftmax(array([2, 0]), array([1.0, 2.0, 0.5]), array(True), array(255))
    assert loss == expected
    assert hash(loss) == hash(expected)
    assert repr(loss) == repr(expected)
    assert LovaszSoftmax([array(2), array(0)], [array(1.0), 2, array(0.5)], array(True), array(255)) == expected
    assert LovaszHinge(array(True), array(1), array(False)) == LovaszHinge(True, 1, False)
    assert CrossEntropy(array([1, 2]), array(1), array(0.5)) == CrossEntropy((1.0, 2.0), 1, 0.5)
    assert weighted_sum([(array(2.0), expected)]) == weighted_sum([(2.0, expected)])


def test_weights_of_a_parameter_are_taken() -> None:
    weights = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert CrossEntropy(weights) == CrossEntropy((1.0, 2.0))
    assert LovaszSoftmax(range(1, 4), (w for w in (1, 2))) == LovaszSoftmax((1, 2, 3), (1.0, 2.0))


@pytest.mark.parametrize("weight", [torch.nn.Parameter(torch.tensor(1.0)), torch.ones((), requires_grad=True).exp()])
def test_weights_of_terms_that_are_learned_are_refused(weight: torch.Tensor) -> None:
    """They would stay as they are: a loss has a gradient in its logits alone."""
    text = refusal(lambda: LocalLoss([(1.0, CrossEntropy()), (weight, LovaszSoftmax())]))
    assert text == (
        f"loss[1] weight: got a {type(weight).__name__} that requires a gradient, which it would not get; expected a "
        "constant (a weight that is learned multiplies a loss of its own: weight * criterion(logits, labels))"
    )
    assert weighted_sum([(weight.detach(), CrossEntropy())]).terms[0][0] == weight.item()


def test_defaults() -> None:
    assert LovaszSoftmax() == LovaszSoftmax("present", None, False, None, "logits")
    assert LovaszHinge() == LovaszHinge(False, None, False)
    assert CrossEntropy() == CrossEntropy(None, -100, 0.0)


DIFFERENT: list[LossLike] = [
    LovaszSoftmax(),
    LovaszSoftmax("all"),
    LovaszSoftmax([0, 1]),
    LovaszSoftmax([1, 0]),
    LovaszSoftmax(class_weights=[1, 1]),
    LovaszSoftmax(per_image=True),
    LovaszSoftmax(ignore_index=0),
    LovaszSoftmax(input="probabilities"),
    LovaszHinge(),
    LovaszHinge(per_image=True),
    LovaszHinge(ignore_index=0),
    LovaszHinge(multilabel=True),
    LovaszSigmoid(),
    LovaszSigmoid(per_image=True),
    LovaszSigmoid(ignore_index=0),
    LovaszSigmoid(multilabel=True),
    BinaryCrossEntropy(),
    BinaryCrossEntropy(pos_weight=2),
    BinaryCrossEntropy(pos_weight=[2, 1]),
    BinaryCrossEntropy(ignore_index=0),
    BinaryCrossEntropy(multilabel=True),
    CrossEntropy(),
    CrossEntropy([1, 1]),
    CrossEntropy(ignore_index=None),
    CrossEntropy(label_smoothing=0.5),
    [(2.0, LovaszSoftmax())],
    [(1.0, LovaszSoftmax()), (1.0, CrossEntropy())],
    [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())],
]


def test_losses_are_equal_and_hash_alike_if_they_say_the_same() -> None:
    sums = [weighted_sum(loss) for loss in DIFFERENT]
    assert len(set(sums)) == len(sums)
    for loss, total in zip(DIFFERENT, sums, strict=True):
        again = weighted_sum([(weight, dataclasses.replace(term)) for weight, term in total.terms])
        assert again == total
        assert hash(again) == hash(total)
        assert weighted_sum(loss) == total
        assert pickle.loads(pickle.dumps(total)) == total
        assert pickle.dumps(total) == pickle.dumps(again)  # Without the hash, which differs in another process.
    assert LovaszSoftmax([0, 1]) == LovaszSoftmax((0, 1))
    assert hash(LovaszSoftmax(class_weights=[1])) == hash(LovaszSoftmax(class_weights=(1.0,)))


def test_losses_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LovaszSoftmax().per_image = True  # type: ignore[misc]


@pytest.mark.parametrize("kind", get_args(Loss), ids=lambda kind: kind.__name__)
def test_a_loss_that_is_called_says_what_computes_it(kind: type[Loss]) -> None:
    name = kind.__name__
    text = rf"^{name} describes a loss and cannot be called; write LocalLoss\({name}\(...\)\)\(logits, labels\)"
    with pytest.raises(TypeError, match=text):
        kind()(np.zeros((1, 2, 3)), np.zeros((1, 3)))


def test_refusal_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(InvalidInput("labels", "got 7; expected less")))
    assert isinstance(error, ValueError)
    assert (str(error), error.field, error.problem) == (
        "labels: got 7; expected less",
        "labels",
        "got 7; expected less",
    )


# --- Sums ---------------------------------------------------------------------------------------------------------

EXPECTED_LOSS = (
    "expected LovaszSoftmax, LovaszHinge, LovaszSigmoid, CrossEntropy, BinaryCrossEntropy or a list of (weight, loss) "
    "pairs"
)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, f"loss: got None; {EXPECTED_LOSS}"),
        ("lovasz_softmax", f"loss: got 'lovasz_softmax'; {EXPECTED_LOSS}"),
        (LovaszSoftmax, f"loss: got {LovaszSoftmax!r}; {EXPECTED_LOSS} (write LovaszSoftmax())"),
        ([], "loss: got 0 terms; expected 1 to 16"),
        ([(1.0, CrossEntropy())] * 17, "loss: got 17 terms; expected 1 to 16"),
        (
            [CrossEntropy()],
            f"loss[0]: got {CrossEntropy()!r}; expected a pair (weight, loss) (write (1.0, CrossEntropy(...)))",
        ),
        ([(1.0, CrossEntropy()), (1.0,)], "loss[1]: got (1.0,); expected a pair (weight, loss)"),
        (
            [(CrossEntropy(), 1.0)],
            f"loss[0]: got {(CrossEntropy(), 1.0)!r}; expected a pair (weight, loss) "
            "(the weight comes first: (1.0, CrossEntropy(...)))",
        ),
        (
            [(1.0, torch.nn.CrossEntropyLoss())],
            "loss[0]: got (1.0, CrossEntropyLoss()); expected a pair (weight, loss) (write CrossEntropy())",
        ),
        (
            LocalLoss(LovaszHinge()),
            f"loss: got {LocalLoss(LovaszHinge())!r}; {EXPECTED_LOSS} (of a criterion: criterion.loss)",
        ),
        ([(math.inf, CrossEntropy())], "loss[0] weight: got inf; expected a finite number"),
        ([("1", CrossEntropy())], "loss[0] weight: got '1'; expected a finite number"),
        (
            [(1.0, LovaszHinge()), (1.0, LovaszSoftmax())],
            "loss: LovaszHinge is combined with a softmax loss; expected only binary terms (LovaszHinge or "
            "LovaszSigmoid, BinaryCrossEntropy) or only softmax terms (LovaszSoftmax, CrossEntropy)",
        ),
        (
            [(1.0, CrossEntropy()), (1.0, BinaryCrossEntropy())],
            "loss: BinaryCrossEntropy is combined with a softmax loss; expected only binary terms (LovaszHinge or "
            "LovaszSigmoid, BinaryCrossEntropy) or only softmax terms (LovaszSoftmax, CrossEntropy)",
        ),
        (
            [(1.0, LovaszHinge()), (1.0, BinaryCrossEntropy(multilabel=True))],
            "loss: binary terms differ in multilabel; expected the same in all terms",
        ),
        (
            [(1.0, LovaszHinge()), (1.0, LovaszSigmoid())],
            "loss: LovaszHinge is combined with LovaszSigmoid; expected only one of the two",
        ),
        (
            [(1.0, CrossEntropy()), (1.0, LovaszSoftmax(input="probabilities"))],
            "loss: one term reads input='probabilities', another one logits; expected the same input in all terms "
            "(CrossEntropy reads logits)",
        ),
    ],
)
def test_what_is_no_sum(loss: Any, text: str) -> None:
    assert refusal(lambda: weighted_sum(loss)) == text


def test_weighted_sum() -> None:
    softmax, cross_entropy = LovaszSoftmax(per_image=True), CrossEntropy()
    total = weighted_sum([(1, cross_entropy), [-0.5, softmax]])
    assert total.terms == ((1.0, cross_entropy), (-0.5, softmax))
    assert type(total.terms[0][0]) is float
    assert weighted_sum(total) is total
    assert weighted_sum(softmax) == WeightedSum(((1.0, softmax),))
    assert len(weighted_sum([(1.0, softmax)] * MAX_TERMS).terms) == MAX_TERMS


@pytest.mark.parametrize(
    ("loss", "kind", "is_binary", "multilabel", "probabilities"),
    [
        (LovaszSoftmax(), "lovasz_softmax", False, False, False),
        (LovaszSoftmax(input="probabilities"), "lovasz_softmax", False, False, True),
        (LovaszHinge(), "lovasz_hinge", True, False, False),
        (LovaszHinge(multilabel=True), "lovasz_hinge", True, True, False),
        ([(1, LovaszSigmoid()), (1, BinaryCrossEntropy())], "binary_cross_entropy+lovasz_sigmoid", True, False, False),
        ([(1.0, LovaszSoftmax()), (2.0, CrossEntropy())], "cross_entropy+lovasz_softmax", False, False, False),
        ([(1.0, CrossEntropy()), (2.0, CrossEntropy([1, 2]))], "cross_entropy", False, False, False),
    ],
)
def test_what_a_sum_is(loss: LossLike, kind: str, is_binary: bool, multilabel: bool, probabilities: bool) -> None:
    total = weighted_sum(loss)
    assert (total.kind, total.is_binary, total.multilabel) == (kind, is_binary, multilabel)
    assert total.probabilities == probabilities


def test_the_kinds_are_those_of_all_losses() -> None:
    assert tuple(kind().kind for kind in get_args(Loss)) == LOSS_KINDS


# --- Shapes -------------------------------------------------------------------------------------------------------

ONE_HOT = "expected (2, 4) (for one-hot labels or class probabilities: labels"
SOFTMAX, HINGE, MULTILABEL = LovaszSoftmax(), LovaszHinge(), LovaszHinge(multilabel=True)


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "expected"),
    [
        (SOFTMAX, (2, 3, 4, 5), (2, 4, 5), Layout(2, 3, 20, 3)),
        (SOFTMAX, (7, 3), (7,), Layout(7, 3, 1, 3)),
        (SOFTMAX, (1, 2, 3, 4, 5), (1, 3, 4, 5), Layout(1, 2, 60, 2)),
        (CrossEntropy(), (2, MAX_CLASSES, 1), (2, 1), Layout(2, MAX_CLASSES, 1, MAX_CLASSES)),
        (HINGE, (2, 4, 5), (2, 4, 5), Layout(2, 1, 20, 2)),
        (HINGE, (2, 1, 4, 5), (2, 4, 5), Layout(2, 1, 20, 2)),
        (HINGE, (2, 1, 4, 5), (2, 1, 4, 5), Layout(2, 1, 20, 2)),
        (HINGE, (9,), (9,), Layout(9, 1, 1, 2)),
        (HINGE, (9, 1), (9,), Layout(9, 1, 1, 2)),
        (HINGE, (9,), (9, 1), Layout(9, 1, 1, 2)),
        (HINGE, (2, 4, 5), (2, 1, 4, 5), Layout(2, 1, 20, 2)),
        (HINGE, (2, 1, 3, 4, 5), (2, 3, 4, 5), Layout(2, 1, 60, 2)),
        (HINGE, (2, 1, 3, 4, 5), (2, 1, 3, 4, 5), Layout(2, 1, 60, 2)),
        (HINGE, (2, 1, 1, 5), (2, 1, 5), Layout(2, 1, 5, 2)),
        (SOFTMAX, (2, 3, 4, 5), (2, 1, 4, 5), Layout(2, 3, 20, 3)),
        (SOFTMAX, (7, 3), (7, 1), Layout(7, 3, 1, 3)),
        (MULTILABEL, (2, 3, 4), (2, 3, 4), Layout(2, 3, 4, 2)),
        (MULTILABEL, (2, 1), (2, 1), Layout(2, 1, 1, 2)),
        (SOFTMAX, (1, 2, *[1] * (MAX_AXES - 2)), (1, *[1] * (MAX_AXES - 2)), Layout(1, 2, 1, 2)),
    ],
)
def test_layout(loss: LossLike, logits: tuple[int, ...], labels: tuple[int, ...], expected: Layout) -> None:
    layout = weighted_sum(loss).layout(logits, labels)
    assert layout == expected
    assert layout.elements == math.prod(logits)


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "text"),
    [
        (SOFTMAX, (), (), "logits: got shape (); expected (N, C, *spatial)"),
        (SOFTMAX, (5,), (5,), "logits: got shape (5,); expected (N, C, *spatial)"),
        (SOFTMAX, (2, 0, 4), (2, 4), "logits: got shape (2, 0, 4) with no class; expected (N, C, *spatial), C >= 2"),
        (SOFTMAX, (2, 3, 4), (2, 3, 4), f"labels: got shape (2, 3, 4) for logits (2, 3, 4); {ONE_HOT}.argmax(1))"),
        (SOFTMAX, (2, 3, 4), (2, 4, 3), f"labels: got shape (2, 4, 3) for logits (2, 3, 4); {ONE_HOT}.argmax(-1))"),
        (
            SOFTMAX,
            (2, 3, 4),
            (2, 4, 1),
            "labels: got shape (2, 4, 1) for logits (2, 3, 4); expected (2, 4) (labels.squeeze(-1))",
        ),
        (SOFTMAX, (1, 3, 4), (4,), "labels: got shape (4,) for logits (1, 3, 4); expected (1, 4) (labels[None])"),
        (
            SOFTMAX,
            (2, 4, 5, 3),
            (2, 4, 5),
            "labels: got shape (2, 4, 5) for logits (2, 4, 5, 3); expected (2, 5, 3) (for logits with the classes "
            "last: logits.movedim(-1, 1))",
        ),
        (
            SOFTMAX,
            (2, 3, 4, 4),
            (2, 16, 16),
            "labels: got shape (2, 16, 16) for logits (2, 3, 4, 4); expected (2, 4, 4) (resize the logits to the "
            "labels: torch.nn.functional.interpolate(logits, size=labels.shape[1:]))",
        ),
        (SOFTMAX, (2, 3, 4), (2, 2, 4), "labels: got shape (2, 2, 4) for logits (2, 3, 4); expected (2, 4)"),
        (SOFTMAX, (2, 3), (3,), "labels: got shape (3,) for logits (2, 3); expected (2,)"),
        (SOFTMAX, (0, 3), (0,), "logits: got shape (0, 3), which holds no element; expected at least one pixel"),
        (
            SOFTMAX,
            (2, 1, 4),
            (2, 4),
            "logits: got shape (2, 1, 4) with a single class, whose softmax is 1 everywhere; expected C >= 2 "
            "(for a binary problem with one channel use LovaszHinge or LovaszSigmoid, or for probabilities p of the "
            "foreground torch.cat([1 - p, p], 1) with classes=[1] and input='probabilities')",
        ),
        (SOFTMAX, (2, -3, 4), (2, 4), "logits: got shape (2, -3, 4); expected sizes >= 1"),
        (SOFTMAX, (2, 3, 4), (2, -4), "labels: got shape (2, -4); expected sizes >= 1"),
        (SOFTMAX, (1,) * 17, (1,) * 16, "logits: got 17 axes; expected at most 16"),
        (HINGE, (1,) * 16, (1,) * 17, "labels: got 17 axes; expected at most 16"),
        (SOFTMAX, (1, 65_537, 1), (1, 1), "logits: got 65537 channels; expected at most 65536"),
        (HINGE, (), (), "logits: got shape (); expected (N, *spatial) or (N, 1, *spatial)"),
        (
            HINGE,
            (2, 3, 4),
            (2, 4),
            "labels: got shape (2, 4) for binary logits (2, 3, 4); expected (2, 3, 4) "
            "(for several binary labels per pixel use multilabel=True, for one class per pixel "
            "LovaszSoftmax)",
        ),
        (
            HINGE,
            (2, 1, 4),
            (2, 2, 4),
            "labels: got shape (2, 2, 4) for binary logits (2, 1, 4); expected (2, 4) "
            "(for several binary labels per pixel use multilabel=True, for one class per pixel "
            "LovaszSoftmax)",
        ),
        (HINGE, (0,), (0,), "logits: got shape (0,), which holds no element; expected at least one pixel"),
        (MULTILABEL, (4,), (4,), "logits: got shape (4,); expected (N, L, *spatial)"),
        (
            MULTILABEL,
            (2, 3, 4),
            (2, 4),
            "labels: got shape (2, 4) for multilabel logits (2, 3, 4); expected the same (for one class per pixel use "
            "LovaszSoftmax)",
        ),
        (
            MULTILABEL,
            (2, 3, 4),
            (2, 2, 4),
            "labels: got shape (2, 2, 4) for multilabel logits (2, 3, 4); expected the same",
        ),
        (
            HINGE,
            (2, 3, 4, 5),
            (2, 3, 4, 5),
            "logits: got shape (2, 3, 4, 5); expected (N, 1, *spatial) (for 3 binary labels per pixel use "
            "multilabel=True, for volumes (N, D, H, W) logits[:, None])",
        ),
        (
            MULTILABEL,
            (2, 0, 4),
            (2, 0, 4),
            "logits: got shape (2, 0, 4), which holds no element; expected at least one pixel",
        ),
        (MULTILABEL, (1, 65_537), (1, 65_537), "logits: got 65537 channels; expected at most 65536"),
        (
            LovaszSoftmax(class_weights=[1, 2]),
            (2, 3),
            (2,),
            "class_weights: got 2 numbers; expected 3, one per class",
        ),
        (
            [(1.0, SOFTMAX), (1.0, CrossEntropy(class_weights=[1, 2, 3, 4]))],
            (2, 3),
            (2,),
            "class_weights: got 4 numbers; expected 3, one per class",
        ),
        (LovaszSoftmax(classes=[1, 5]), (2, 3), (2,), "classes: got class 5; expected class numbers in [0, 3)"),
    ],
)
def test_shapes_that_do_not_fit(loss: LossLike, logits: tuple[int, ...], labels: tuple[int, ...], text: str) -> None:
    assert refusal(lambda: weighted_sum(loss).layout(logits, labels)) == text


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (LovaszSoftmax(), None),
        (LovaszSoftmax(ignore_index=0), 0),
        ([(1, LovaszSoftmax(ignore_index=255)), (1, CrossEntropy(ignore_index=255))], 255),
        ([(1, LovaszSoftmax(ignore_index=255)), (1, CrossEntropy())], None),
        ([(1, LovaszSoftmax(ignore_index=0)), (1, CrossEntropy(ignore_index=1))], None),
    ],
)
def test_a_label_is_void_if_every_term_ignores_it(loss: LossLike, label: int | None) -> None:
    assert weighted_sum(loss).void_label == label


# --- Results ------------------------------------------------------------------------------------------------------


def test_result() -> None:
    cross_entropy = TermResult("cross_entropy", 0.7, np.empty(0))
    lovasz = TermResult("lovasz_softmax", 0.3, np.array([0.2, np.nan, 0.4]))
    intersection, union = np.array([1, 0, 0]), np.array([4, 0, 2])
    result: Result[Any] = Result(1.0, None, (cross_entropy, lovasz), intersection, union)
    np.testing.assert_array_equal(result.per_class_loss, lovasz.per_class_loss)
    np.testing.assert_array_equal(result.class_iou, [0.25, np.nan, 0.0])
    assert result.mean_iou == 0.125
    nowhere: Result[Any] = Result(0.0, None, (cross_entropy,), np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert np.isnan(nowhere.mean_iou)
    alone: Result[Any] = Result(0.7, None, (cross_entropy,), intersection, union)
    assert alone.per_class_loss.shape == (0,)
