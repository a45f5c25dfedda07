"""The rules on shapes: which shapes logits and labels may have, and the sizes that a loss is computed with."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from lovasz.spec import checks
from lovasz.spec.errors import InvalidInput

MAX_CLASSES = 65_536
"""The most classes (or binary labels) in one request: the per-class results must fit in one message."""
MAX_AXES = 16
"""The most axes of a tensor."""
MAX_OTHER_SIZES = 1 << 48
"""The most that the sizes of an empty tensor may multiply to, without its zeros: array libraries refuse larger ones."""
KEPT_LAYOUTS = 256
"""The most layouts of each kind of loss that are kept: trainers send the same few shapes again and again."""


class Layout(NamedTuple):
    """A request's sizes, for any number of axes: it has ``images`` x ``channels`` x ``pixels`` logits.

    A tuple, which is hashed without Python code: plans are looked up by the layouts of all requests of a batch.

    Attributes:
        images: N, the size of the first axis; 0 only for a rank of a joint step.
        channels: the number of classes (softmax) or of binary labels (binary losses).
        pixels: the product of the spatial axes.
        label_values: how many values a label can take: C for a softmax loss, 2 for a binary loss.
        offsets: where the images of terms with ``per_image`` end along the first axis; None if each of its items is an
            image. For a point cloud (P, C): the ends of the clouds.
    """

    images: int
    channels: int
    pixels: int
    label_values: int
    offsets: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """Logits in the request."""
        return self.images * self.channels * self.pixels

    @property
    def scored_images(self) -> int:
        """The images of terms with ``per_image``."""
        return self.images if self.offsets is None else len(self.offsets)


@lru_cache(maxsize=KEPT_LAYOUTS)
def softmax_layout(logits: tuple[int, ...], labels: tuple[int, ...], may_be_empty: bool = False) -> Layout:
    """The layout of logits (N, C, *spatial) and labels (N, *spatial) or (N, 1, *spatial).

    Args:
        may_be_empty: whether N may be 0.

    Raises:
        InvalidInput: a shape is not one of these, or the two do not fit.
    """
    _check_sizes("logits", logits)
    _check_sizes("labels", labels)
    if len(logits) < 2:
        raise InvalidInput("logits", f"got shape {_text(logits)}; expected (N, C, *spatial)")
    if logits[1] == 0:
        raise InvalidInput("logits", f"got shape {_text(logits)} with no class; expected (N, C, *spatial), C >= 2")
    expected = (logits[0], *logits[2:])
    if labels != expected and labels != (logits[0], 1, *logits[2:]):
        cure = _cure_of_labels(logits, labels)
        raise InvalidInput(
            "labels", f"got shape {_text(labels)} for logits {_text(logits)}; expected {_text(expected)}{cure}"
        )
    _check_not_empty(logits, may_be_empty)
    if logits[1] == 1:
        raise InvalidInput(
            "logits",
            f"got shape {_text(logits)} with a single class, whose softmax is 1 everywhere; expected C >= 2 "
            "(for a binary problem with one channel use LovaszHinge or LovaszSigmoid, or for probabilities p of the "
            "foreground torch.cat([1 - p, p], 1) with classes=[1] and input='probabilities')",
        )
    return Layout(logits[0], _bounded(logits[1]), math.prod(logits[2:]), label_values=logits[1])


@lru_cache(maxsize=KEPT_LAYOUTS)
def binary_layout(
    logits: tuple[int, ...], labels: tuple[int, ...], multilabel: bool, may_be_empty: bool = False
) -> Layout:
    """The layout of logits and labels, each (N, *spatial) or (N, 1, *spatial).

    With ``multilabel`` both have shape (N, L, *spatial). Without it, logits of four or more axes need the axis of size
    1, since (N, L, H, W) and volumes (N, D, H, W) look alike.

    Args:
        may_be_empty: whether N may be 0.

    Raises:
        InvalidInput: a shape is not one of these, or the two do not fit.
    """
    _check_sizes("logits", logits)
    _check_sizes("labels", labels)
    if multilabel:
        if len(logits) < 2:
            raise InvalidInput("logits", f"got shape {_text(logits)}; expected (N, L, *spatial)")
        if labels != logits:
            raise InvalidInput(
                "labels",
                f"got shape {_text(labels)} for multilabel logits {_text(logits)}; expected the same"
                + (" (for one class per pixel use LovaszSoftmax)" if labels == (logits[0], *logits[2:]) else ""),
            )
        _check_not_empty(logits, may_be_empty)
        return Layout(logits[0], _bounded(logits[1]), math.prod(logits[2:]), label_values=2)
    if len(logits) < 1:
        raise InvalidInput("logits", "got shape (); expected (N, *spatial) or (N, 1, *spatial)")
    squeezed = (logits[0], *logits[2:]) if len(logits) > 1 and logits[1] == 1 else logits
    if labels != squeezed and labels != (squeezed[0], 1, *squeezed[1:]):
        raise InvalidInput(
            "labels",
            f"got shape {_text(labels)} for binary logits {_text(logits)}; expected {_text(squeezed)} "
            "(for several binary labels per pixel use multilabel=True, for one class per pixel LovaszSoftmax)",
        )
    _check_not_empty(logits, may_be_empty)
    if len(squeezed) > 3 and len(squeezed) == len(logits):
        raise InvalidInput(
            "logits",
            f"got shape {_text(logits)}; expected (N, 1, *spatial) (for {logits[1]} binary labels per pixel use "
            "multilabel=True, for volumes (N, D, H, W) logits[:, None])",
        )
    return Layout(logits[0], 1, math.prod(logits[1:]), label_values=2)


def checked_offsets(values: Any, images: int) -> tuple[int, ...] | None:
    """Offsets as integers, in ascending order, the last one ``images``; None for none.

    Args:
        values: a sequence of integers, or an array of any framework with one axis.

    Raises:
        InvalidInput: they are not such numbers.
    """
    if values is None:
        return None
    expected = f"ascending integers, the end of each image along the first axis, the last one {images}"
    elements = checks.elements("offsets", values, expected)
    ends = checks.integers("offsets", elements)
    of_sizes = " (sizes as offsets: numpy.cumsum(sizes))" if len(ends) > 1 and sum(ends) == images else ""
    previous = 0
    for i, end in enumerate(ends):
        if end <= previous:
            cure = " (leave out the leading 0)" if i == 0 and end == 0 else of_sizes
            raise InvalidInput(f"offsets[{i}]", f"got {end} after {previous}; expected {expected}{cure}")
        previous = end
    if previous != images:
        raise InvalidInput("offsets", f"got {previous} as the last one; expected {expected}{of_sizes}")
    return ends


def _cure_of_labels(logits: tuple[int, ...], labels: tuple[int, ...]) -> str:
    """What makes the labels of a softmax loss fit, in brackets; empty if nothing comes to mind."""
    images, *spatial = expected = (logits[0], *logits[2:])
    if labels == logits:
        return " (for one-hot labels or class probabilities: labels.argmax(1))"
    if labels == (*expected, logits[1]):
        return " (for one-hot labels or class probabilities: labels.argmax(-1))"
    if labels == (*expected, 1):
        return " (labels.squeeze(-1))"
    if images == 1 and labels == tuple(spatial):
        return " (labels[None])"
    if len(labels) > 1 and labels == logits[1:]:
        return " (for a single image: logits[None] and labels[None])"
    if labels == logits[:-1]:
        return " (for logits with the classes last: logits.movedim(-1, 1))"
    if len(labels) > 1 and len(labels) == len(expected) and labels[0] == images:
        return " (resize the logits to the labels: torch.nn.functional.interpolate(logits, size=labels.shape[1:]))"
    return ""


def _check_sizes(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) > MAX_AXES:
        raise InvalidInput(name, f"got {len(shape)} axes; expected at most {MAX_AXES}")
    if any(size < 0 for size in shape):
        raise InvalidInput(name, f"got shape {_text(shape)}; expected sizes >= 1")
    if 0 in shape and math.prod(size for size in shape if size) > MAX_OTHER_SIZES:
        raise InvalidInput(
            name, f"got shape {_text(shape)}; expected at most {MAX_OTHER_SIZES} as the product of the sizes beside 0"
        )


def _bounded(channels: int) -> int:
    if channels > MAX_CLASSES:
        raise InvalidInput("logits", f"got {channels} channels; expected at most {MAX_CLASSES}")
    return channels


def _text(shape: tuple[int, ...]) -> str:
    return str(shape)


def _check_not_empty(logits: tuple[int, ...], may_be_empty: bool) -> None:
    if math.prod(logits) == 0 and not (may_be_empty and logits[0] == 0):
        raise InvalidInput("logits", f"got shape {_text(logits)}, which holds no element; expected at least one pixel")
