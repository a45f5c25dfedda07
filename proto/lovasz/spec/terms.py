"""The weighted sum of terms, the one form in which losses are computed, and which terms can be combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lovasz.spec import checks
from lovasz.spec.errors import InvalidInput
from lovasz.spec.layout import Layout, hinge_layout, softmax_layout
from lovasz.spec.losses import CrossEntropy, Loss, LovaszHinge, LovaszSoftmax

MAX_TERMS = 16
"""Most terms of a weighted sum."""


@dataclass(frozen=True)
class WeightedSum:
    """Losses with weights, summed and computed in one call. ``compute`` turns its ``loss`` argument into this.

    All terms are softmax losses (:class:`LovaszSoftmax`, :class:`CrossEntropy`), or all are hinges: the two read
    logits in different ways.

    Attributes:
        terms: pairs (weight, loss).
        is_hinge: whether the terms are hinges.
        multilabel: whether they are multilabel hinges.
        probabilities: whether they read probabilities instead of logits.

    Raises:
        InvalidInput: no term, too many terms, or terms that cannot be combined.
    """

    terms: tuple[tuple[float, Loss], ...]
    is_hinge: bool = field(init=False, compare=False)
    multilabel: bool = field(init=False, compare=False)
    probabilities: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise InvalidInput("loss", f"got {len(self.terms)} terms; expected 1 to {MAX_TERMS}")
        losses = [loss for _, loss in self.terms]
        hinges = [loss for loss in losses if isinstance(loss, LovaszHinge)]
        inputs = {loss.input if isinstance(loss, LovaszSoftmax) else "logits" for loss in losses}
        if hinges and len(hinges) != len(losses):
            raise InvalidInput(
                "loss", "LovaszHinge is combined with a softmax loss; expected only hinge terms or only softmax terms"
            )
        if len({hinge.multilabel for hinge in hinges}) > 1:
            raise InvalidInput("loss", "hinge terms differ in multilabel; expected the same in all terms")
        if len(inputs) > 1:
            raise InvalidInput(
                "loss",
                "one term reads input='probabilities', another one logits; expected the same input in all terms "
                "(CrossEntropy reads logits)",
            )
        object.__setattr__(self, "is_hinge", bool(hinges))
        object.__setattr__(self, "multilabel", bool(hinges) and hinges[0].multilabel)
        object.__setattr__(self, "probabilities", inputs == {"probabilities"})

    @property
    def kind(self) -> str:
        """The kinds of its terms, each once, sorted: few distinct values, so it can label a metric."""
        return "+".join(sorted({loss.kind for _, loss in self.terms}))

    @property
    def void_label(self) -> int | None:
        """The label that every term ignores, so that its pixels count for none; None if there is no such label."""
        ignored = {loss.ignore_index for _, loss in self.terms}
        return ignored.pop() if len(ignored) == 1 else None

    def layout(self, logits: Sequence[int], labels: Sequence[int], *, may_be_empty: bool = False) -> Layout:
        """Checks the shapes of a request, and the options that depend on them.

        Args:
            logits: shape of the logits.
            labels: shape of the labels.
            may_be_empty: whether there may be no images, as for one of several requests that are computed as one.

        Raises:
            InvalidInput: a shape that does not fit the loss, or an option that does not fit the number of classes.
        """
        if self.is_hinge:
            layout = hinge_layout(logits, labels, self.multilabel, may_be_empty=may_be_empty)
        else:
            layout = softmax_layout(logits, labels, may_be_empty=may_be_empty)
        for _, loss in self.terms:
            _check_class_options(loss, layout.channels)
        return layout


def _check_class_options(loss: Loss, classes: int) -> None:
    if isinstance(loss, LovaszHinge):
        return
    if loss.class_weights is not None and len(loss.class_weights) != classes:
        raise InvalidInput("class_weights", f"got {len(loss.class_weights)} numbers; expected {classes}, one a class")
    if isinstance(loss, LovaszSoftmax) and not isinstance(loss.classes, str) and max(loss.classes) >= classes:
        raise InvalidInput("classes", f"got class {max(loss.classes)}; expected class numbers in [0, {classes})")


LossLike: TypeAlias = Loss | WeightedSum | Sequence[tuple[float, Loss]]
"""What ``compute`` takes as its loss: one loss, or a list of (weight, loss) pairs."""


def weighted_sum(loss: LossLike) -> WeightedSum:
    """A loss, or a list of (weight, loss) pairs, as a weighted sum.

    Raises:
        InvalidInput: the argument is something else, a weight is not finite, or the terms cannot be combined.
    """
    if isinstance(loss, WeightedSum):
        return loss
    if isinstance(loss, LovaszSoftmax | LovaszHinge | CrossEntropy):
        return WeightedSum(((1.0, loss),))
    if not isinstance(loss, Sequence) or isinstance(loss, str):
        raise InvalidInput(
            "loss", f"got {loss!r}; expected LovaszSoftmax, LovaszHinge, CrossEntropy or a list of (weight, loss) pairs"
        )
    terms = []
    for i, pair in enumerate(loss):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], Loss):
            raise InvalidInput(f"loss[{i}]", f"got {pair!r}; expected a pair (weight, loss)")
        terms.append((checks.number(f"loss[{i}] weight", pair[0]), pair[1]))
    return WeightedSum(tuple(terms))
