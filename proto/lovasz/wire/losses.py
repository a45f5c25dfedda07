"""The protobuf form of a loss: conversion to it and from it. What this version does not know is refused."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from functools import lru_cache

from lovasz import spec
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.enums import enum_text
from lovasz.wire.unknown import check_known

_INPUT_TO_PROTO: dict[str, pb.InputKind] = {
    "logits": pb.INPUT_KIND_LOGITS,
    "probabilities": pb.INPUT_KIND_PROBABILITIES,
}
_INPUT_FROM_PROTO: dict[int, spec.Input] = {
    pb.INPUT_KIND_LOGITS: "logits",
    pb.INPUT_KIND_PROBABILITIES: "probabilities",
}


@lru_cache(maxsize=64)
def loss_to_proto(loss: spec.WeightedSum) -> pb.Loss:
    """The loss as a protobuf message, which is kept for the next call and must not be changed."""
    return pb.Loss(terms=[_term_to_proto(weight, term) for weight, term in loss.terms])


def _term_to_proto(weight: float, loss: spec.Loss) -> pb.Term:
    if isinstance(loss, spec.LovaszSoftmax):
        listed: tuple[int, ...] = ()
        if loss.classes == "present":
            selection = pb.CLASS_SELECTION_PRESENT
        elif loss.classes == "all":
            selection = pb.CLASS_SELECTION_ALL
        else:
            selection, listed = pb.CLASS_SELECTION_LISTED, tuple(int(c) for c in loss.classes)
        softmax = pb.LovaszSoftmax(
            class_selection=selection,
            listed_classes=listed,
            class_weights=loss.class_weights or (),
            per_image=loss.per_image,
            ignore_index=loss.ignore_index,
            input=_INPUT_TO_PROTO[loss.input],
        )
        return pb.Term(weight=weight, lovasz_softmax=softmax)
    if isinstance(loss, spec.LovaszHinge):
        hinge = pb.LovaszHinge(per_image=loss.per_image, ignore_index=loss.ignore_index, multilabel=loss.multilabel)
        return pb.Term(weight=weight, lovasz_hinge=hinge)
    if isinstance(loss, spec.LovaszSigmoid):
        sigmoid = pb.LovaszSigmoid(per_image=loss.per_image, ignore_index=loss.ignore_index, multilabel=loss.multilabel)
        return pb.Term(weight=weight, lovasz_sigmoid=sigmoid)
    if isinstance(loss, spec.BinaryCrossEntropy):
        binary = pb.BinaryCrossEntropy(
            pos_weight=_pos_weight_to_proto(loss.pos_weight), ignore_index=loss.ignore_index, multilabel=loss.multilabel
        )
        return pb.Term(weight=weight, binary_cross_entropy=binary)
    if isinstance(loss, spec.CrossEntropy):
        cross_entropy = pb.CrossEntropy(
            class_weights=loss.class_weights or (), ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing
        )
        return pb.Term(weight=weight, cross_entropy=cross_entropy)
    raise NotImplementedError(type(loss).__name__)


def _pos_weight_to_proto(value: float | Sequence[float] | None) -> Sequence[float]:
    if value is None:
        return ()
    return value if isinstance(value, Sequence) else (value,)


def loss_from_proto(message: pb.Loss) -> spec.WeightedSum:
    """The loss that a protobuf message describes.

    Raises:
        InvalidInput: an option is invalid, or a field or an enum value is unknown to this version.
    """
    if not 1 <= len(message.terms) <= spec.MAX_TERMS:
        raise spec.InvalidInput("loss.terms", f"got {len(message.terms)} terms; expected 1 to {spec.MAX_TERMS}")
    check_known("loss", message)
    return spec.weighted_sum(
        [(_weight_from_proto(i, term), _term_from_proto(i, term)) for i, term in enumerate(message.terms)]
    )


def check_lengths(message: pb.Loss, channels: int) -> None:
    """Checks that no option of a term has more elements than there are classes or labels, before they are read.

    Raises:
        InvalidInput: one has.
    """
    for term in message.terms[: spec.MAX_TERMS]:
        kind = term.WhichOneof("loss")
        if kind == "lovasz_softmax":
            _check_length("class_weights", term.lovasz_softmax.class_weights, channels, "one per class")
            _check_length("classes", term.lovasz_softmax.listed_classes, channels, "each class once")
        elif kind == "cross_entropy":
            _check_length("class_weights", term.cross_entropy.class_weights, channels, "one per class")
        elif kind == "binary_cross_entropy":
            _check_length("pos_weight", term.binary_cross_entropy.pos_weight, channels, "one per label")


def _check_length(name: str, elements: Sequence[object], most: int, what: str) -> None:
    if len(elements) > most:
        raise spec.InvalidInput(name, f"got {len(elements)} numbers; expected {most}, {what}")


def _weight_from_proto(i: int, term: pb.Term) -> float:
    if not term.HasField("weight"):
        raise spec.InvalidInput(f"loss.terms[{i}].weight", "is not set; expected a finite number, such as 1")
    return term.weight


def _term_from_proto(i: int, term: pb.Term) -> spec.Loss:
    kind = term.WhichOneof("loss")
    check_known(f"loss.terms[{i}]", term)
    if kind is not None:
        check_known(f"loss.terms[{i}].{kind}", getattr(term, kind))
    if kind == "lovasz_softmax":
        return _softmax_from_proto(term.lovasz_softmax)
    if kind == "lovasz_hinge":
        hinge = term.lovasz_hinge
        return spec.LovaszHinge(
            per_image=hinge.per_image, ignore_index=_optional_ignore_index(hinge), multilabel=hinge.multilabel
        )
    if kind == "cross_entropy":
        return spec.CrossEntropy(
            class_weights=tuple(term.cross_entropy.class_weights) or None,
            ignore_index=_optional_ignore_index(term.cross_entropy),
            label_smoothing=term.cross_entropy.label_smoothing,
        )
    if kind == "lovasz_sigmoid":
        sigmoid = term.lovasz_sigmoid
        return spec.LovaszSigmoid(
            per_image=sigmoid.per_image, ignore_index=_optional_ignore_index(sigmoid), multilabel=sigmoid.multilabel
        )
    if kind == "binary_cross_entropy":
        binary = term.binary_cross_entropy
        weights = tuple(binary.pos_weight)
        return spec.BinaryCrossEntropy(
            pos_weight=weights[0] if len(weights) == 1 else weights or None,
            ignore_index=_optional_ignore_index(binary),
            multilabel=binary.multilabel,
        )
    raise spec.InvalidInput(
        f"loss.terms[{i}].loss",
        f"is not set, or is of a kind that this server does not know; expected one of {', '.join(spec.LOSS_KINDS)}",
    )


def _softmax_from_proto(message: pb.LovaszSoftmax) -> spec.LovaszSoftmax:
    selections: dict[int, spec.Classes] = {
        pb.CLASS_SELECTION_PRESENT: "present",
        pb.CLASS_SELECTION_ALL: "all",
        pb.CLASS_SELECTION_LISTED: tuple(message.listed_classes),
    }
    classes = selections.get(message.class_selection)
    if classes is None:
        raise spec.InvalidInput(
            "lovasz_softmax.class_selection",
            f"got {enum_text(pb.ClassSelection, message.class_selection)}; expected CLASS_SELECTION_PRESENT, "
            "CLASS_SELECTION_ALL or CLASS_SELECTION_LISTED",
        )
    if isinstance(classes, str) and message.listed_classes:
        raise spec.InvalidInput(
            "lovasz_softmax.listed_classes",
            f"got {reprlib.repr(list(message.listed_classes[:10]))} beside "
            f"{enum_text(pb.ClassSelection, message.class_selection)}; "
            "expected none (they belong to CLASS_SELECTION_LISTED)",
        )
    input_kind = _INPUT_FROM_PROTO.get(message.input)
    if input_kind is None:
        raise spec.InvalidInput(
            "lovasz_softmax.input",
            f"got {enum_text(pb.InputKind, message.input)}; expected INPUT_KIND_LOGITS or INPUT_KIND_PROBABILITIES",
        )
    return spec.LovaszSoftmax(
        classes=classes,
        class_weights=tuple(message.class_weights) or None,
        per_image=message.per_image,
        ignore_index=_optional_ignore_index(message),
        input=input_kind,
    )


def _optional_ignore_index(
    message: pb.LovaszSoftmax | pb.LovaszHinge | pb.CrossEntropy | pb.LovaszSigmoid | pb.BinaryCrossEntropy,
) -> int | None:
    return message.ignore_index if message.HasField("ignore_index") else None
