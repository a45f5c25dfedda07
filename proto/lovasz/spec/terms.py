"""The weighted sum of terms, the one form in which losses are computed, and which terms can be combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lovasz.spec import checks
from lovasz.spec.checks import shown
from lovasz.spec.errors import InvalidInput
from lovasz.spec.layout import Layout, binary_layout, checked_offsets, softmax_layout
from lovasz.spec.losses import (
    BinaryCrossEntropy,
    BinaryLoss,
    Loss,
    LovaszHinge,
    LovaszLoss,
    LovaszSigmoid,
    LovaszSoftmax,
)
from lovasz.spec.results import MAX_IMAGE_LOSSES, TermResult

MAX_TERMS = 16
"""The most terms of a weighted sum."""


@dataclass(frozen=True)
class WeightedSum:
    """Losses with weights, summed and computed in one call. ``compute`` turns its ``loss`` argument into this.

    All terms are softmax losses (:class:`LovaszSoftmax`, :class:`CrossEntropy`), or all are binary losses
    (:class:`LovaszHinge` or :class:`LovaszSigmoid`, :class:`BinaryCrossEntropy`): the two read logits in different
    ways.

    Attributes:
        terms: pairs (weight, loss).
        is_binary: whether the terms are binary losses.
        is_sigmoid: whether its Lovász terms are :class:`LovaszSigmoid`.
        multilabel: whether they read several binary labels.
        probabilities: whether they read probabilities instead of logits.

    Raises:
        InvalidInput: no term, too many terms, or terms that cannot be combined.
    """

    terms: tuple[tuple[float, Loss], ...]
    is_binary: bool = field(init=False, compare=False)
    is_sigmoid: bool = field(init=False, compare=False)
    multilabel: bool = field(init=False, compare=False)
    probabilities: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise InvalidInput("loss", f"got {len(self.terms)} terms; expected 1 to {MAX_TERMS}")
        losses = [loss for _, loss in self.terms]
        binary = [loss for loss in losses if isinstance(loss, BinaryLoss)]
        inputs = {loss.input if isinstance(loss, LovaszSoftmax) else "logits" for loss in losses}
        if binary and len(binary) != len(losses):
            raise InvalidInput(
                "loss",
                f"{type(binary[0]).__name__} is combined with a softmax loss; expected only binary terms (LovaszHinge "
                "or LovaszSigmoid, BinaryCrossEntropy) or only softmax terms (LovaszSoftmax, CrossEntropy)",
            )
        if len({loss.multilabel for loss in binary}) > 1:
            raise InvalidInput("loss", "binary terms differ in multilabel; expected the same in all terms")
        sigmoid = any(isinstance(loss, LovaszSigmoid) for loss in losses)
        if sigmoid and any(isinstance(loss, LovaszHinge) for loss in losses):
            raise InvalidInput("loss", "LovaszHinge is combined with LovaszSigmoid; expected only one of the two")
        if len(inputs) > 1:
            raise InvalidInput(
                "loss",
                "one term reads input='probabilities', another one logits; expected the same input in all terms "
                "(CrossEntropy reads logits)",
            )
        object.__setattr__(self, "is_binary", bool(binary))
        object.__setattr__(self, "is_sigmoid", sigmoid)
        object.__setattr__(self, "multilabel", bool(binary) and binary[0].multilabel)
        object.__setattr__(self, "probabilities", inputs == {"probabilities"})

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        """Computed once: each call looks something up by its loss."""
        return self._hash

    def __reduce__(self) -> tuple[type[WeightedSum], tuple[tuple[tuple[float, Loss], ...]]]:
        """Made again by pickle and copy: the hash of another process differs."""
        return type(self), (self.terms,)

    @cached_property
    def kind(self) -> str:
        """The kinds of its terms, each once, sorted: few distinct values, so it can label a metric."""
        return "+".join(sorted({loss.kind for _, loss in self.terms}))

    @cached_property
    def void_label(self) -> int | None:
        """The label that every term ignores, so that its pixels count for none; None if there is no such label."""
        ignored = {loss.ignore_index for _, loss in self.terms}
        return ignored.pop() if len(ignored) == 1 else None

    @cached_property
    def scores_images(self) -> bool:
        """Whether a term has ``per_image``."""
        return any(isinstance(loss, LovaszLoss) and loss.per_image for _, loss in self.terms)

    def segments(self, layout: Layout) -> int:
        """How many segments a request has: for each Lovász term, its classes times its groups."""
        total = 0
        for _, loss in self.terms:
            if isinstance(loss, LovaszLoss):
                classes = layout.channels
                if isinstance(loss, LovaszSoftmax) and not isinstance(loss.classes, str):
                    classes = len(loss.classes)
                total += classes * (layout.scored_images if loss.per_image else 1)
        return total

    def per_image_losses(self, results: Sequence[TermResult]) -> npt.NDArray[np.float64]:
        """The loss of each image, from the results of the terms: float64, shape (images,)."""
        losses = [weight * term.per_image_loss for (weight, _), term in zip(self.terms, results, strict=True)]
        total: npt.NDArray[np.float64] = np.sum(losses, axis=0)
        return total

    def check_losses_of_images(self, images: int) -> None:
        """Checks that each image has a loss of its own, and that there are not too many images.

        Raises:
            InvalidInput: a term is no Lovász loss with ``per_image``, or there are more than ``MAX_IMAGE_LOSSES``.
        """
        if images > MAX_IMAGE_LOSSES:
            raise InvalidInput("reduction", f"got 'none' with {images} images; expected at most {MAX_IMAGE_LOSSES}")
        self.check_per_image()

    def check_per_image(self) -> None:
        """Checks that each image has a loss of its own.

        Raises:
            InvalidInput: a term is no Lovász loss with ``per_image``.
        """
        for _, loss in self.terms:
            if not (isinstance(loss, LovaszLoss) and loss.per_image):
                raise InvalidInput(
                    "reduction",
                    f"got 'none' with {loss}; expected only Lovász losses with per_image=True (compute the "
                    "others separately, and add them)",
                )

    def layout(
        self, logits: Sequence[int], labels: Sequence[int], offsets: Any = None, *, may_be_empty: bool = False
    ) -> Layout:
        """Checks the shapes of a request, and the options that depend on them.

        Args:
            logits: shape of the logits.
            labels: shape of the labels.
            offsets: ``Layout.offsets``, as a sequence or an array.
            may_be_empty: whether there may be no images, as for one of several requests that are computed as one.

        Raises:
            InvalidInput: a shape that does not fit the loss, or an option that does not fit the number of classes.
        """
        if self.is_binary:
            layout = binary_layout(tuple(logits), tuple(labels), self.multilabel, may_be_empty)
        else:
            layout = softmax_layout(tuple(logits), tuple(labels), may_be_empty)
        for loss in self._with_class_options:
            _check_class_options(loss, layout.channels)
        if offsets is None:
            return layout
        ends = checked_offsets(offsets, layout.images)
        if not self.scores_images:
            raise InvalidInput(
                "offsets", "got them for a loss that scores all images together; expected per_image=True"
            )
        return layout._replace(offsets=ends)

    @cached_property
    def _with_class_options(self) -> tuple[Loss, ...]:
        """The losses with an option that has to fit the number of classes."""
        return tuple(loss for _, loss in self.terms if _has_class_options(loss))


def _has_class_options(loss: Loss) -> bool:
    names = ("pos_weight", "class_weights", "classes")
    return any(isinstance(getattr(loss, name, None), tuple) for name in names)


def _check_class_options(loss: Loss, classes: int) -> None:
    if isinstance(loss, BinaryCrossEntropy) and isinstance(loss.pos_weight, tuple) and len(loss.pos_weight) != classes:
        raise InvalidInput("pos_weight", f"got {len(loss.pos_weight)} numbers; expected {classes}, one per label")
    if isinstance(loss, BinaryLoss):
        return
    if loss.class_weights is not None and len(loss.class_weights) != classes:
        raise InvalidInput("class_weights", f"got {len(loss.class_weights)} numbers; expected {classes}, one per class")
    if isinstance(loss, LovaszSoftmax) and not isinstance(loss.classes, str) and max(loss.classes) >= classes:
        raise InvalidInput("classes", f"got class {max(loss.classes)}; expected class numbers in [0, {classes})")


def _cure_of_loss(value: Any) -> str:
    """What makes a loss of something that is none, in brackets; empty if nothing comes to mind."""
    if isinstance(getattr(value, "loss", None), WeightedSum):
        return " (of a criterion: criterion.loss)"
    kinds = {kind.__name__: kind for kind in get_args(Loss)}
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    of_torch = {"CrossEntropyLoss": "CrossEntropy", "BCEWithLogitsLoss": "BinaryCrossEntropy"}
    name = of_torch.get(name, name)
    return f" (write {name}())" if name in kinds else ""


LossLike: TypeAlias = Loss | WeightedSum | Sequence[tuple[float, Loss]]
"""What ``compute`` takes as its loss: one loss, or a list of (weight, loss) pairs."""


def weighted_sum(loss: LossLike) -> WeightedSum:
    """A loss, or a list of (weight, loss) pairs, as a weighted sum.

    Raises:
        InvalidInput: the argument is something else, a weight is not finite, or the terms cannot be combined.
    """
    if isinstance(loss, WeightedSum):
        return loss
    if isinstance(loss, Loss):
        return WeightedSum(((1.0, loss),))
    if not isinstance(loss, Sequence) or isinstance(loss, str):
        raise InvalidInput(
            "loss",
            f"got {shown(loss)}; expected LovaszSoftmax, LovaszHinge, LovaszSigmoid, CrossEntropy, BinaryCrossEntropy "
            f"or a list of (weight, loss) pairs{_cure_of_loss(loss)}",
        )
    terms = []
    for i, pair in enumerate(loss):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], Loss):
            is_pair = isinstance(pair, Sequence) and len(pair) == 2
            cure = _cure_of_loss(pair[1]) if is_pair else ""
            if isinstance(pair, Loss):
                cure = f" (write (1.0, {type(pair).__name__}(...)))"
            if is_pair and isinstance(pair[0], Loss):
                cure = f" (the weight comes first: ({pair[1]!r}, {type(pair[0]).__name__}(...)))"
            raise InvalidInput(f"loss[{i}]", f"got {shown(pair)}; expected a pair (weight, loss){cure}")
        terms.append((checks.weight(f"loss[{i}] weight", pair[0]), pair[1]))
    return WeightedSum(tuple(terms))
