"""The losses, each a frozen description that checks its options.

Softmax losses (Lovász-Softmax, cross-entropy) read one class per pixel, binary losses (Lovász hinge, Lovász-Sigmoid,
binary cross-entropy) read one or several labels of 0 or 1.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias, get_args

from lovasz.spec import checks
from lovasz.spec.errors import InvalidInput

Classes: TypeAlias = Literal["present", "all"] | tuple[int, ...]
Input: TypeAlias = Literal["logits", "probabilities"]
Reduction: TypeAlias = Literal["mean", "none"]
GradientReduction: TypeAlias = Literal["mean", "active_mean", "sum"]


class _Description:
    """A loss says what to compute; it computes nothing itself."""

    def __call__(self, *arguments: object, **options: object) -> NoReturn:
        """Refuses the call that other losses take.

        Raises:
            TypeError: always; it says what computes the loss.
        """
        name = type(self).__name__
        raise TypeError(
            f"{name} describes a loss and cannot be called; write LocalLoss({name}(...))(logits, labels), with "
            "LocalLoss from lovasz.core, or RemoteLoss from lovasz.client.torch"
        )


@dataclass(frozen=True)
class LovaszSoftmax(_Description):
    """The Lovász-Softmax loss (Berman, Triki and Blaschko, CVPR 2018).

    Logits have shape (N, C, *spatial), labels (N, *spatial) or (N, 1, *spatial), with any number of spatial axes or
    none. Options may be tensors or arrays of any framework; they are read once, as constants.

    Args:
        classes: which classes are scored. ``"present"``: those with a pixel in the group; ``"all"``: every class; a
            sequence of class numbers: these, even where absent.
        class_weights: one number >= 0 per class, length C. The loss is (1/K) sum of w_c L_c over the K scored classes.
        per_image: False: all pixels of the batch are one group. True: each image is a group, and the loss is the mean
            over all N images (an image whose pixels are all ignored counts as 0).
        ignore_index: pixels with this label are ignored; their gradient is exactly 0.
        input: ``"logits"``, or ``"probabilities"`` if a softmax was already applied.

    Raises:
        InvalidInput: an option has an invalid value.
    """

    classes: Classes | Sequence[int] = "present"
    class_weights: Sequence[float] | None = None
    per_image: bool = False
    ignore_index: int | None = None
    input: Input = "logits"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", self._parsed_classes())
        object.__setattr__(self, "class_weights", checks.class_weights(self.class_weights))
        object.__setattr__(self, "per_image", checks.flag("per_image", self.per_image))
        object.__setattr__(self, "ignore_index", checks.ignore_index(self.ignore_index))
        if self.input not in get_args(Input):
            raise InvalidInput("input", f"got {self.input!r}; expected 'logits' or 'probabilities'")

    def _parsed_classes(self) -> Classes:
        if isinstance(self.classes, str) and self.classes in ("present", "all"):
            return self.classes
        expected = "'present', 'all' or a sequence of class numbers, such as [1, 2]"
        elements = checks.elements("classes", self.classes, expected)
        listed = checks.integers("classes", elements)
        if not listed:
            raise InvalidInput("classes", "got an empty list; expected at least one class number")
        if len(set(listed)) != len(listed):
            raise InvalidInput("classes", f"got {reprlib.repr(list(listed))}; expected each class once")
        if min(listed) < 0:
            raise InvalidInput("classes", f"got {min(listed)}; expected class numbers >= 0")
        return listed

    @property
    def kind(self) -> str:
        """The name of this loss on the wire and in metrics."""
        return "lovasz_softmax"


@dataclass(frozen=True)
class _BinaryLovasz(_Description):
    """The options of the Lovász losses of binary labels."""

    per_image: bool = False
    ignore_index: int | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_image", checks.flag("per_image", self.per_image))
        object.__setattr__(self, "ignore_index", checks.ignore_index(self.ignore_index))
        object.__setattr__(self, "multilabel", checks.flag("multilabel", self.multilabel))


class LovaszHinge(_BinaryLovasz):
    """The Lovász hinge (Yu and Blaschko 2015; Berman, Triki and Blaschko 2018), for one or several binary labels.

    Logits and labels have shape (N, *spatial) or (N, 1, *spatial); labels are 0 and 1. All pixels of a group are one
    binary problem, so logits (N, X, Y) are images without a channel axis; with more axes, logits need it: volumes are
    (N, 1, D, H, W). With ``multilabel`` both have shape (N, L, *spatial): each of the L labels is a separate binary
    problem, and the loss is their mean.

    Args:
        per_image: as for :class:`LovaszSoftmax`.
        ignore_index: as for :class:`LovaszSoftmax`.
        multilabel: whether the second axis holds several binary labels.

    Raises:
        InvalidInput: an option has an invalid value.
    """

    @property
    def kind(self) -> str:
        """The name of this loss on the wire and in metrics."""
        return "lovasz_hinge"


class LovaszSigmoid(_BinaryLovasz):
    """The Lovász extension of the Jaccard loss at the errors |y - sigmoid(x)|, for one or several binary labels.

    It is Lovász-Softmax (Berman, Triki and Blaschko, CVPR 2018) of the foreground alone, for one channel: the same as
    ``LovaszSoftmax(classes=(1,))`` of the two channels (0, x). Shapes and labels are those of :class:`LovaszHinge`. If
    a group has no foreground, its loss is its largest error.

    Args:
        per_image: as for :class:`LovaszSoftmax`.
        ignore_index: as for :class:`LovaszSoftmax`.
        multilabel: as for :class:`LovaszHinge`.

    Raises:
        InvalidInput: an option has an invalid value.
    """

    @property
    def kind(self) -> str:
        """The name of this loss on the wire and in metrics."""
        return "lovasz_sigmoid"


@dataclass(frozen=True)
class CrossEntropy(_Description):
    """Softmax cross-entropy with the semantics of ``torch.nn.functional.cross_entropy(reduction="mean")``.

    One difference: if every pixel is ignored (or has class weight 0), loss and gradient are 0 instead of NaN.

    Args:
        class_weights: torch's ``weight``: one number >= 0 per class, length C; the mean divides by the sum of weights.
        ignore_index: pixels with this label are ignored. The default is torch's.
        label_smoothing: in [0, 1]: the share of the target that is spread evenly over all classes.

    Raises:
        InvalidInput: an option has an invalid value.
    """

    class_weights: Sequence[float] | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", checks.class_weights(self.class_weights))
        object.__setattr__(self, "ignore_index", checks.ignore_index(self.ignore_index))
        smoothing = checks.number("label_smoothing", self.label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise InvalidInput("label_smoothing", f"got {smoothing}; expected a number in [0, 1]")
        object.__setattr__(self, "label_smoothing", smoothing)

    @property
    def kind(self) -> str:
        """The name of this loss on the wire and in metrics."""
        return "cross_entropy"


@dataclass(frozen=True)
class BinaryCrossEntropy(_Description):
    """Cross-entropy of binary labels, as ``torch.nn.BCEWithLogitsLoss(reduction="mean")`` defines it.

    Shapes and labels are those of :class:`LovaszHinge`, beside which it may be a term. The mean is over all pixels and
    labels that are not ignored; if all are ignored, loss and gradient are 0.

    Args:
        pos_weight: the factor of the loss where the label is 1: a number >= 0, or with ``multilabel`` a sequence of L
            numbers, one per label; None for 1. The mean does not divide by it.
        ignore_index: as for :class:`LovaszSoftmax`.
        multilabel: as for :class:`LovaszHinge`.

    Raises:
        InvalidInput: an option has an invalid value.
    """

    pos_weight: float | Sequence[float] | None = None
    ignore_index: int | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos_weight", checks.pos_weight(self.pos_weight))
        object.__setattr__(self, "ignore_index", checks.ignore_index(self.ignore_index))
        object.__setattr__(self, "multilabel", checks.flag("multilabel", self.multilabel))

    @property
    def kind(self) -> str:
        """The name of this loss on the wire and in metrics."""
        return "binary_cross_entropy"


LovaszLoss: TypeAlias = LovaszSoftmax | LovaszHinge | LovaszSigmoid
BinaryLoss: TypeAlias = LovaszHinge | LovaszSigmoid | BinaryCrossEntropy
Loss: TypeAlias = LovaszSoftmax | LovaszHinge | CrossEntropy | LovaszSigmoid | BinaryCrossEntropy
LOSS_KINDS = ("lovasz_softmax", "lovasz_hinge", "cross_entropy", "lovasz_sigmoid", "binary_cross_entropy")
