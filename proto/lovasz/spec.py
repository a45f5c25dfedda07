"""What a loss is: the frozen descriptions shared by client, server and core, the rules on shapes, and the result.

Pure Python and numpy; knows neither torch nor protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

MAX_CLASSES = 65_536
"""Most classes (or labels of a multilabel hinge) that one request may have: the per-class results stay one message."""
MAX_TERMS = 16
"""Most terms of a weighted sum."""
MAX_AXES = 16
"""Most axes of a tensor."""

Classes: TypeAlias = Literal["present", "all"] | tuple[int, ...]
Input: TypeAlias = Literal["logits", "probabilities"]


class InvalidInput(ValueError):
    """A loss description or a tensor that cannot be computed with. The text names the field, what came and what was
    expected; ``field`` is the name alone."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str]]:
        return type(self), (self.field, self.problem)


def _integer(name: str, value: object) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise InvalidInput(name, f"got {value!r}; expected an integer")


def _number(name: str, value: object) -> float:
    if (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    raise InvalidInput(name, f"got {value!r}; expected a finite number")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidInput(name, f"got {value!r}; expected True or False")


def _class_weights(value: Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    weights = tuple(_number(f"class_weights[{i}]", w) for i, w in enumerate(value))
    if not weights:
        raise InvalidInput("class_weights", "got an empty list; expected one number a class, or None")
    for i, weight in enumerate(weights):
        if weight < 0:
            raise InvalidInput(f"class_weights[{i}]", f"got {weight}; expected a number >= 0")
    return weights


def _ignore_index(value: int | None) -> int | None:
    if value is None:
        return None
    index = _integer("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise InvalidInput("ignore_index", f"got {index}; expected a 64-bit signed integer")
    return index


@dataclass(frozen=True)
class LovaszSoftmax:
    """The Lovász-Softmax loss (Berman, Triki and Blaschko, CVPR 2018).

    Logits have shape (N, C, *spatial), labels (N, *spatial), with any number of spatial axes, also none.

    Args:
        classes: ``"present"`` scores the classes that have a pixel in their group, ``"all"`` every class, a sequence
            of class numbers these ones, each even when absent.
        class_weights: one number >= 0 a class, length C. The loss is (1/K) sum of w_c L_c over the K scored classes.
        per_image: False pools all pixels of the batch into one group; True makes each image a group of its own and
            takes the mean over all N images (a wholly void image counts as 0).
        ignore_index: pixels with this label take no part; their gradient is exactly 0.
        input: ``"logits"``, or ``"probabilities"`` if a softmax was already applied.

    Raises:
        InvalidInput: an option has a value that it cannot have.
    """

    classes: Classes | Sequence[int] = "present"
    class_weights: Sequence[float] | None = None
    per_image: bool = False
    ignore_index: int | None = None
    input: Input = "logits"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", self._parsed_classes())
        object.__setattr__(self, "class_weights", _class_weights(self.class_weights))
        object.__setattr__(self, "per_image", _flag("per_image", self.per_image))
        object.__setattr__(self, "ignore_index", _ignore_index(self.ignore_index))
        if self.input not in get_args(Input):
            raise InvalidInput("input", f"got {self.input!r}; expected 'logits' or 'probabilities'")

    def _parsed_classes(self) -> Classes:
        if isinstance(self.classes, str) and self.classes in ("present", "all"):
            return self.classes
        if isinstance(self.classes, str) or not isinstance(self.classes, Sequence | np.ndarray):
            raise InvalidInput(
                "classes", f"got {self.classes!r}; expected 'present', 'all' or a sequence of class numbers"
            )
        listed = tuple(_integer(f"classes[{i}]", c) for i, c in enumerate(self.classes))
        if not listed:
            raise InvalidInput("classes", "got an empty list; expected at least one class number")
        if len(set(listed)) != len(listed):
            raise InvalidInput("classes", f"got {list(listed)}; expected each class once")
        if min(listed) < 0:
            raise InvalidInput("classes", f"got {min(listed)}; expected class numbers >= 0")
        return listed

    @property
    def kind(self) -> str:
        return "lovasz_softmax"


@dataclass(frozen=True)
class LovaszHinge:
    """The Lovász hinge (Yu and Blaschko 2015; Berman, Triki and Blaschko 2018), for one or several binary labels.

    Logits have shape (N, *spatial) or (N, 1, *spatial), labels (N, *spatial) with values 0 and 1. With ``multilabel``
    both have shape (N, L, *spatial): each of the L labels is a binary problem of its own, and the loss is their mean.

    Args:
        per_image: as for :class:`LovaszSoftmax`.
        ignore_index: as for :class:`LovaszSoftmax`.
        multilabel: the second axis counts labels.

    Raises:
        InvalidInput: an option has a value that it cannot have.
    """

    per_image: bool = False
    ignore_index: int | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_image", _flag("per_image", self.per_image))
        object.__setattr__(self, "ignore_index", _ignore_index(self.ignore_index))
        object.__setattr__(self, "multilabel", _flag("multilabel", self.multilabel))

    @property
    def kind(self) -> str:
        return "lovasz_hinge"


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with the semantics of ``torch.nn.functional.cross_entropy(reduction="mean")``.

    One departure: where every pixel is ignored (or has class weight 0), loss and gradient are 0 instead of NaN.

    Args:
        class_weights: torch's ``weight``: one number >= 0 a class, length C; the mean divides by the sum of weights.
        ignore_index: pixels with this label take no part. As in torch it is -100 unless said otherwise.
        label_smoothing: in [0, 1]: the share of the target that is spread over all classes.

    Raises:
        InvalidInput: an option has a value that it cannot have.
    """

    class_weights: Sequence[float] | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", _class_weights(self.class_weights))
        object.__setattr__(self, "ignore_index", _ignore_index(self.ignore_index))
        smoothing = _number("label_smoothing", self.label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise InvalidInput("label_smoothing", f"got {smoothing}; expected a number in [0, 1]")
        object.__setattr__(self, "label_smoothing", smoothing)

    @property
    def kind(self) -> str:
        return "cross_entropy"


Loss: TypeAlias = LovaszSoftmax | LovaszHinge | CrossEntropy
LOSS_KINDS = ("lovasz_softmax", "lovasz_hinge", "cross_entropy")


@dataclass(frozen=True)
class Layout:
    """The sizes that a request's shapes come to, whatever its axes: ``images`` x ``channels`` x ``pixels`` logits.

    ``channels`` counts classes (softmax) or binary labels (hinge), ``pixels`` is the product of the spatial axes, and
    ``label_values`` is how many values a label can take (C, or 2 for the hinge).
    """

    images: int
    channels: int
    pixels: int
    label_values: int

    @property
    def elements(self) -> int:
        """Logits in the request."""
        return self.images * self.channels * self.pixels


@dataclass(frozen=True)
class WeightedSum:
    """Losses summed with weights and computed in one call: what ``compute`` makes of its ``loss`` argument.

    Either softmax losses alone (:class:`LovaszSoftmax`, :class:`CrossEntropy`) or hinges alone: the two read logits
    in different ways.

    Raises:
        InvalidInput: no term or too many, a weight that is not finite, or terms that do not go together.
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
                "loss", "LovaszHinge stands beside a softmax loss; expected hinge terms alone or softmax terms alone"
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
        """The kinds of its terms, each once, sorted: one of few values, fit for a metric's label."""
        return "+".join(sorted({loss.kind for _, loss in self.terms}))

    def layout(self, logits: Sequence[int], labels: Sequence[int]) -> Layout:
        """Checks the shapes of a request, and the options that depend on them.

        Args:
            logits: shape of the logits.
            labels: shape of the labels.

        Raises:
            InvalidInput: a shape that does not fit the loss, or an option that does not fit the number of classes.
        """
        logits, labels = tuple(logits), tuple(labels)
        for name, shape in (("logits", logits), ("labels", labels)):
            if len(shape) > MAX_AXES:
                raise InvalidInput(name, f"got {len(shape)} axes; expected at most {MAX_AXES}")
            if any(size < 0 for size in shape):
                raise InvalidInput(name, f"got shape {_text(shape)}; expected sizes >= 1")
        layout = self._hinge_layout(logits, labels) if self.is_hinge else self._softmax_layout(logits, labels)
        if layout.channels > MAX_CLASSES:
            raise InvalidInput("logits", f"got {layout.channels} channels; expected at most {MAX_CLASSES}")
        for _, loss in self.terms:
            _check_class_options(loss, layout.channels)
        return layout

    def _softmax_layout(self, logits: tuple[int, ...], labels: tuple[int, ...]) -> Layout:
        if len(logits) < 2:
            raise InvalidInput("logits", f"got shape {_text(logits)}; expected (N, C, *spatial)")
        if logits[1] == 0:
            raise InvalidInput("logits", f"got shape {_text(logits)} with no class; expected (N, C, *spatial), C >= 2")
        expected = (logits[0], *logits[2:])
        if labels != expected:
            raise InvalidInput(
                "labels", f"got shape {_text(labels)} for logits {_text(logits)}; expected {_text(expected)}"
            )
        _check_not_empty(logits)
        if logits[1] == 1:
            raise InvalidInput(
                "logits",
                f"got shape {_text(logits)} with a single class, whose softmax is 1 everywhere; expected C >= 2 "
                "(for a binary problem with one channel use LovaszHinge)",
            )
        return Layout(logits[0], logits[1], math.prod(logits[2:]), label_values=logits[1])

    def _hinge_layout(self, logits: tuple[int, ...], labels: tuple[int, ...]) -> Layout:
        if self.multilabel:
            if len(logits) < 2:
                raise InvalidInput("logits", f"got shape {_text(logits)}; expected (N, L, *spatial)")
            if labels != logits:
                raise InvalidInput(
                    "labels", f"got shape {_text(labels)} for multilabel logits {_text(logits)}; expected the same"
                )
            _check_not_empty(logits)
            return Layout(logits[0], logits[1], math.prod(logits[2:]), label_values=2)
        if len(logits) < 1:
            raise InvalidInput("logits", "got shape (); expected (N, *spatial) or (N, 1, *spatial)")
        squeezed = (logits[0], *logits[2:]) if len(logits) > 1 and logits[1] == 1 else logits
        if labels not in (logits, squeezed):
            raise InvalidInput(
                "labels",
                f"got shape {_text(labels)} for hinge logits {_text(logits)}; expected {_text(squeezed)} "
                "(for several binary labels a pixel, set multilabel=True)",
            )
        _check_not_empty(logits)
        return Layout(logits[0], 1, math.prod(logits[1:]), label_values=2)


def _text(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _check_not_empty(logits: tuple[int, ...]) -> None:
    if math.prod(logits) == 0:
        raise InvalidInput("logits", f"got shape {_text(logits)}, which holds no element; expected at least one pixel")


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
    """Brings a loss, or a list of (weight, loss) pairs, into its one inner form.

    Raises:
        InvalidInput: something else came, or terms that do not go together.
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
        terms.append((_number(f"loss[{i}] weight", pair[0]), pair[1]))
    return WeightedSum(tuple(terms))


ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True)
class TermResult:
    """One term of the weighted sum, before its weight.

    Attributes:
        kind: ``"lovasz_softmax"``, ``"lovasz_hinge"`` or ``"cross_entropy"``.
        loss: the term's value.
        per_class_loss: float64, shape (C,): the loss of each class (each label, for the hinge) before class weights,
            the mean over the groups that score it, NaN where none does. Empty for cross-entropy.
    """

    kind: str
    loss: float
    per_class_loss: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """Where the server spent the time of a request, in seconds, and how many requests shared its batch.

    ``joint_wait_seconds``: how long a joint request waited for the other ranks. ``copy_seconds``: until the batch's
    gradients were in the host's memory, in their dtype.
    """

    receive_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_requests: int
    joint_wait_seconds: float = 0.0
    copy_seconds: float = 0.0


@dataclass(frozen=True)
class Result(Generic[ArrayT]):
    """The answer to one request.

    Attributes:
        loss: the weighted sum of the terms; NaN if a logit of a counted pixel is not finite.
        grad: dloss/dlogits (dloss/dprobabilities for that input), in the logits' shape, and in their dtype but for
            16-bit logits: float32, as float16 would underflow. All NaN where ``loss`` is NaN; None if not asked for.
        terms: each term's own loss, in the order in which they were given.
        intersection: int64, shape (C,): pixels where arg-max and label are both this class (hinge: logit > 0 and
            label 1). A pixel counts if at least one term counts it.
        union: int64, shape (C,): pixels where arg-max or label is this class. Sums of both over a test set give the
            set's IoU.
        timing: where a server spent its time; None if none was asked.
    """

    loss: float
    grad: ArrayT | None
    terms: tuple[TermResult, ...]
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    timing: Timing | None = None

    @property
    def per_class_loss(self) -> npt.NDArray[np.float64]:
        """float64, shape (C,): the per-class loss of the first Lovász term; empty if there is none."""
        return next((t.per_class_loss for t in self.terms if t.per_class_loss.size), np.empty(0))

    @property
    def class_iou(self) -> npt.NDArray[np.float64]:
        """float64, shape (C,): intersection over union of the arg-max, NaN for a class in neither."""
        iou = np.full(self.union.shape, np.nan)
        np.divide(self.intersection, self.union, out=iou, where=self.union > 0)
        return iou


__all__ = [
    "LOSS_KINDS",
    "MAX_AXES",
    "MAX_CLASSES",
    "MAX_TERMS",
    "CrossEntropy",
    "InvalidInput",
    "Layout",
    "Loss",
    "LossLike",
    "LovaszHinge",
    "LovaszSoftmax",
    "Result",
    "TermResult",
    "Timing",
    "WeightedSum",
    "weighted_sum",
]
