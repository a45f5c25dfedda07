"""The protobuf form of a loss: every loss survives it, and an invalid message is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lovasz import spec, wire
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    WeightedSum,
    weighted_sum,
)
from lovasz.v1 import loss_pb2 as pb

untimed = settings(deadline=None)

finite = st.floats(allow_nan=False, allow_infinity=False)
class_weights = st.none() | st.lists(st.floats(0, 1e300), min_size=1, max_size=4)
ignore_index = st.none() | st.integers(-(2**63), 2**63 - 1)
listed_classes = st.lists(st.integers(0, spec.MAX_CLASSES - 1), min_size=1, max_size=5, unique=True)


def lovasz_softmax(input_kind: spec.Input) -> st.SearchStrategy[LovaszSoftmax]:
    classes = st.sampled_from(["present", "all"]) | listed_classes
    return st.builds(LovaszSoftmax, classes, class_weights, st.booleans(), ignore_index, st.just(input_kind))


cross_entropy = st.builds(CrossEntropy, class_weights, ignore_index, st.floats(0, 1))


pos_weight = st.none() | st.floats(0, 1e6) | st.lists(st.floats(0, 1e6), min_size=1, max_size=5)


def binary(kind: type[LovaszHinge | LovaszSigmoid], multilabel: bool) -> st.SearchStrategy[spec.Loss]:
    lovasz = st.builds(kind, st.booleans(), ignore_index, st.just(multilabel))
    return lovasz | st.builds(BinaryCrossEntropy, pos_weight, ignore_index, st.just(multilabel))


losses = st.one_of(
    st.lists(st.tuples(finite, terms), min_size=1, max_size=spec.MAX_TERMS).map(weighted_sum)
    for terms in (
        lovasz_softmax("logits") | cross_entropy,
        lovasz_softmax("probabilities"),
        binary(LovaszHinge, multilabel=False),
        binary(LovaszHinge, multilabel=True),
        binary(LovaszSigmoid, multilabel=True),
    )
)


@untimed
@given(losses)
def test_every_loss_survives_protobuf(loss: WeightedSum) -> None:
    sent = wire.loss_to_proto(loss).SerializeToString()
    assert wire.loss_from_proto(pb.Loss.FromString(sent)) == loss


@pytest.mark.parametrize(
    "loss",
    [LovaszSoftmax(), LovaszHinge(), CrossEntropy(), LovaszSigmoid(), BinaryCrossEntropy()],
    ids=lambda loss: loss.kind,
)
@pytest.mark.parametrize("value", [None, 0], ids=["none", "zero"])
def test_no_ignore_index_is_not_label_0(loss: spec.Loss, value: int | None) -> None:
    described = weighted_sum(replace(loss, ignore_index=value))
    sent = wire.loss_to_proto(described).SerializeToString()
    ((_, received),) = wire.loss_from_proto(pb.Loss.FromString(sent)).terms
    assert received.ignore_index == value


def softmax_term(**changes: Any) -> pb.Loss:
    fields = {"class_selection": pb.CLASS_SELECTION_PRESENT, "input": pb.INPUT_KIND_LOGITS, **changes}
    return pb.Loss(terms=[pb.Term(weight=1, lovasz_softmax=pb.LovaszSoftmax(**fields))])


@pytest.mark.parametrize("weight", [0.0, 1.0, -2.5])
def test_every_weight_survives_protobuf(weight: float) -> None:
    """Also 0, which is told apart from a weight that was not set."""
    loss = weighted_sum([(weight, LovaszSoftmax())])
    assert wire.loss_from_proto(pb.Loss.FromString(wire.loss_to_proto(loss).SerializeToString())) == loss


def test_the_message_that_the_refusals_start_from_is_good() -> None:
    assert wire.loss_from_proto(softmax_term()) == weighted_sum(LovaszSoftmax())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Loss(), "loss.terms: got 0 terms; expected 1 to 16"),
        (pb.Loss(terms=[pb.Term(weight=1)] * 17), "loss.terms: got 17 terms; expected 1 to 16"),
        (pb.Loss(terms=[pb.Term(weight=1)]), "loss.terms[0].loss: is not set, or is of a kind"),
        (
            pb.Loss(terms=[pb.Term(weight=1, lovasz_hinge=pb.LovaszHinge()), pb.Term(lovasz_hinge=pb.LovaszHinge())]),
            "loss.terms[1].weight: is not set; expected a finite number, such as 1",
        ),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_UNSPECIFIED),
            "lovasz_softmax.class_selection: got CLASS_SELECTION_UNSPECIFIED; expected CLASS_SELECTION_PRESENT",
        ),
        (softmax_term(class_selection=99), "lovasz_softmax.class_selection: got 99; expected"),
        (
            softmax_term(input=pb.INPUT_KIND_UNSPECIFIED),
            "lovasz_softmax.input: got INPUT_KIND_UNSPECIFIED; expected INPUT_KIND_LOGITS or",
        ),
        (softmax_term(input=99), "lovasz_softmax.input: got 99; expected"),
        (
            softmax_term(listed_classes=[1, 2]),
            "lovasz_softmax.listed_classes: got [1, 2] beside CLASS_SELECTION_PRESENT; expected none",
        ),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_ALL, listed_classes=[0]),
            "lovasz_softmax.listed_classes: got [0] beside CLASS_SELECTION_ALL; expected none",
        ),
        (softmax_term(class_selection=pb.CLASS_SELECTION_LISTED), "classes: got an empty list"),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_LISTED, listed_classes=[3, 3]),
            "classes: got [3, 3]; expected each class once",
        ),
        (
            softmax_term(class_selection=pb.CLASS_SELECTION_LISTED, listed_classes=[-1]),
            "classes: got -1; expected class numbers >= 0",
        ),
        (softmax_term(class_weights=[1, -1]), "class_weights[1]: got -1.0; expected a number >= 0"),
        (softmax_term(class_weights=[float("inf")]), "class_weights[0]: got inf; expected a finite number"),
        (
            pb.Loss(terms=[pb.Term(weight=float("nan"), lovasz_hinge=pb.LovaszHinge())]),
            "got nan; expected a finite number",
        ),
        (
            pb.Loss(terms=[pb.Term(weight=1, cross_entropy=pb.CrossEntropy(label_smoothing=1.5))]),
            "label_smoothing: got 1.5; expected a number in [0, 1]",
        ),
        (
            pb.Loss(
                terms=[
                    pb.Term(weight=1, lovasz_hinge=pb.LovaszHinge()),
                    pb.Term(weight=1, cross_entropy=pb.CrossEntropy()),
                ]
            ),
            "loss: LovaszHinge is combined with a softmax loss",
        ),
    ],
)
def test_a_loss_that_cannot_be_is_refused(message: pb.Loss, text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        wire.loss_from_proto(pb.Loss.FromString(message.SerializeToString()))
    assert text in str(refused.value)


def test_a_loss_that_the_wire_does_not_know_is_not_sent_as_another() -> None:
    unknown: Any = object()
    with pytest.raises(NotImplementedError, match="object"):
        wire.loss_to_proto(WeightedSum(((1.0, unknown),)))
