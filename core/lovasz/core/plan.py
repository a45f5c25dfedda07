"""The plan of a batch: what every backend needs to know about it, computed once, in NumPy, from shapes and loss alone.

The pixels of a batch are ordered by joint, then by request, then by image. They are divided at three levels. A *joint*
is the requests that are scored as one; most joints are a single request. A *plane* is consecutive pixels of
one request: an image, or several images fused. A *group* is what a term scores at once: a joint, or an image if the
term has ``per_image``.

A pixel is *void* for a *rule* (an ``ignore_index``) that ignores its label, and so for the terms that have this rule;
for all others it is *valid*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lovasz.core.batch import Batch
from lovasz.spec import BinaryCrossEntropy, CrossEntropy, Layout, Loss, LovaszLoss, LovaszSoftmax, WeightedSum

KEPT_PLANS = 48
KEPT_IMAGES = 1 << 8
KEPT_WEIGHTS = 1 << 11
"""Plans of batches with more images than the one, or more classes x terms than the other, are not kept. Images that all
backends fuse count as one. Callers choose what is kept: so many plans take about 16 MiB at most, with what Numba's
backend keeps with them."""

FUSE_BELOW_PIXELS = 64
"""The least value of ``fuse_below`` in ``Plan.planes``. It fuses the points of a cloud: loops over the pixels of a
plane need enough pixels."""
FUSE_ALL = 1 << 62
"""The value of ``fuse_below`` in ``Plan.planes`` that fuses images of any size."""

Integers = npt.NDArray[np.int64]
KeptT = TypeVar("KeptT")


@dataclass(frozen=True, eq=False)
class Term:
    """A term of the loss, with the values derived from its options.

    Attributes:
        rule: the index of its rule in ``Plan.rules``, which says which pixels are void for it.
        per_image: whether its groups are images; otherwise they are joints.
        class_weights: float64, shape (K,); all 1 if the loss has none.
        listed: bool, shape (K,): the classes to score, present or not; None to score those that are present.
        label_smoothing: cross-entropy's s: the label keeps 1 - s of the target, s is spread over all K classes.
        pos_weight: float64, shape (K,): binary cross-entropy's factor of the loss where the label is 1.
    """

    weight: float
    loss: Loss
    rule: int
    per_image: bool
    class_weights: npt.NDArray[np.float64]
    listed: npt.NDArray[np.bool_] | None
    label_smoothing: float
    pos_weight: npt.NDArray[np.float64]

    @property
    def label_factor(self) -> float:
        """The weight of the label's part of the target in cross-entropy's gradient."""
        return self.weight * (1 - self.label_smoothing)

    @property
    def spread_factor(self) -> float:
        """The factor of cross-entropy's gradient for the part that each class gets by label smoothing."""
        return self.weight * self.label_smoothing / len(self.class_weights)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a term: int64 arrays, one element per group.

    Attributes:
        first_plane: the group's first plane.
        planes: the number of its planes, which are consecutive.
        start: its first pixel, counted from the first pixel of the batch.
        pixels: the number of its pixels, which are consecutive.
        share: float64: its share of its joint's loss.
    """

    first_plane: Integers
    planes: Integers
    start: Integers
    pixels: Integers
    share: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Planes:
    """The planes of a batch: int64 arrays, one element per plane, unless noted otherwise.

    Attributes:
        fused: bool, one element per request: whether its images are one plane.
        request: the plane's request.
        joint: its joint.
        pixels: the number of its pixels.
        image_pixels: the number of pixels in each of its images.
        start: its first pixel, counted from the first pixel of the batch.
        logits: the offset of its first logit from the first logit of its request, in elements.
        labels: the offset of its first label from the first label of its request, in elements.
        of_joint: one element per joint: the number of its planes.
    """

    fused: npt.NDArray[np.bool_]
    request: Integers
    joint: Integers
    pixels: Integers
    image_pixels: Integers
    start: Integers
    logits: Integers
    labels: Integers
    of_joint: Integers

    def __len__(self) -> int:
        return len(self.request)

    @cached_property
    def joints(self) -> Groups:
        """The joints as groups."""
        first = np.cumsum(self.of_joint) - self.of_joint
        pixels = np.add.reduceat(self.pixels, first)
        return Groups(first, self.of_joint, self.start[first], pixels, np.ones(len(first)))

    @cached_property
    def images(self) -> Groups:
        """The images as groups; valid only if no images are fused."""
        each = np.arange(len(self))
        return Groups(each, np.ones_like(each), self.start, self.pixels, np.repeat(1.0 / self.of_joint, self.of_joint))

    def groups(self, term: Term) -> Groups:
        return self.images if term.per_image else self.joints


@dataclass(frozen=True)
class Plan:
    """The plan of all batches with the same loss, layouts, joints and device.

    Attributes:
        layouts: one per request.
        sizes: the number of requests in each joint.
        is_kept: whether the plan is kept for batches of its kind, and with it what is derived from it.
    """

    loss: WeightedSum
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]
    device: torch.device
    is_kept: bool = field(default=False, compare=False)
    _planes: dict[int, Planes] = field(default_factory=dict, compare=False, repr=False)
    _kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, batch: Batch, loss: WeightedSum, device: torch.device) -> Plan:
        """The plan of a batch; reuses an equal plan that is still kept."""
        layouts = batch.layouts
        is_small = sum([layout.images or 1 for layout in layouts]) <= KEPT_IMAGES or _planes_are_few(layouts, loss)
        is_small = is_small and bool(layouts) and layouts[0].channels * len(loss.terms) <= KEPT_WEIGHTS
        make = _kept if is_small else cls
        return make(loss, layouts, batch.sizes, device)

    @cached_property
    def _hash(self) -> int:
        return hash((self.loss, self.layouts, self.sizes, self.device))

    def __hash__(self) -> int:
        """Computed once: it takes a third of a microsecond per request, and a plan is looked up for each batch."""
        return self._hash

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The positions of the requests that have images."""
        return tuple(place for place, layout in enumerate(self.layouts) if layout.images)

    @cached_property
    def is_binary(self) -> bool:
        return self.loss.is_binary

    @cached_property
    def is_sigmoid(self) -> bool:
        return self.loss.is_sigmoid

    @cached_property
    def channels(self) -> int:
        """K, the number of classes (softmax losses) or of binary labels (binary losses)."""
        return self.layouts[0].channels

    @cached_property
    def label_values(self) -> int:
        """The end of the label range: labels that no rule ignores have to be in [0, label_values)."""
        return self.layouts[0].label_values

    @cached_property
    def void_segments(self) -> slice:
        """The classes (binary losses: all labels, whose foreground has the label 1) that every term ignores."""
        void = self.loss.void_label
        if self.is_binary:
            return slice(self.channels if void == 1 else 0)
        return slice(0) if void is None or not 0 <= void < self.channels else slice(void, void + 1)

    @cached_property
    def pixels(self) -> int:
        """The number of pixels in the batch; for binary losses, a pixel counts once, however many labels it has."""
        return sum(layout.images * layout.pixels for layout in self.layouts)

    @cached_property
    def joint_of_request(self) -> Integers:
        """The joint of each request: int64, shape (requests,)."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def images(self) -> tuple[int, ...]:
        """The number of images in each joint."""
        counts = np.bincount(self.joint_of_request, [layout.images for layout in self.layouts])
        return tuple(counts.astype(int).tolist())

    @cached_property
    def rules(self) -> tuple[int | None, ...]:
        """The rules: each different ``ignore_index`` of the terms, once; None is the rule that ignores no label."""
        return tuple(dict.fromkeys(loss.ignore_index for _, loss in self.loss.terms))

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        return tuple(self._term(weight, loss) for weight, loss in self.loss.terms)

    def _term(self, weight: float, loss: Loss) -> Term:
        class_weights, listed, pos_weight = None, None, None
        if isinstance(loss, LovaszSoftmax | CrossEntropy):
            class_weights = loss.class_weights
        if isinstance(loss, BinaryCrossEntropy):
            pos_weight = loss.pos_weight
        if isinstance(loss, LovaszSoftmax) and loss.classes != "present":
            listed = np.full(self.channels, loss.classes == "all")
            if isinstance(loss.classes, tuple):
                listed[list(loss.classes)] = True
        return Term(
            weight=weight,
            loss=loss,
            rule=self.rules.index(loss.ignore_index),
            per_image=isinstance(loss, LovaszLoss) and loss.per_image,
            class_weights=np.array(class_weights or [1.0] * self.channels, np.float64),
            listed=listed,
            label_smoothing=loss.label_smoothing if isinstance(loss, CrossEntropy) else 0.0,
            pos_weight=np.full(self.channels, 1.0 if pos_weight is None else pos_weight, np.float64),
        )

    @cached_property
    def lovasz(self) -> tuple[Term, ...]:
        """The Lovász terms, which score segments."""
        return tuple(term for term in self.terms if isinstance(term.loss, LovaszLoss))

    @cached_property
    def cross_entropies(self) -> tuple[Term, ...]:
        """The cross-entropy terms."""
        return tuple(term for term in self.terms if isinstance(term.loss, CrossEntropy))

    @cached_property
    def binary_cross_entropies(self) -> tuple[Term, ...]:
        """The binary cross-entropy terms."""
        return tuple(term for term in self.terms if isinstance(term.loss, BinaryCrossEntropy))

    def kept(self, make: Callable[[Plan], KeptT]) -> KeptT:
        """What a backend derives from the plan alone, ``make(plan)``: made once, if the plan is kept."""
        if not self.is_kept:
            return make(self)
        known: KeptT | None = self._kept.get(make)
        if known is None:
            known = self._kept[make] = make(self)
        return known

    def planes(self, fuse_below: int) -> Planes:
        """The planes of the batch.

        Args:
            fuse_below: the images of a request are fused if each has fewer pixels than this and no term has
                ``per_image``.
        """
        known = self._planes.get(fuse_below)
        if known is None:
            known = self._planes[fuse_below] = self._make_planes(fuse_below)
        return known

    def _make_planes(self, fuse_below: int) -> Planes:
        sizes = np.array([(layout.images, layout.pixels) for layout in self.layouts], np.int64)
        images, image_pixels = sizes[:, 0], sizes[:, 1]
        apart = any(term.per_image for term in self.terms)
        fused = (images > 1) & (image_pixels < fuse_below) & (not apart)
        count = np.where(fused, 1, images)
        request = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(request)) - (np.cumsum(count) - count)[request]
        pixels = np.where(fused, images * image_pixels, image_pixels)[request]
        first = number * image_pixels[request]
        joint = self.joint_of_request
        return Planes(
            fused=fused,
            request=request,
            joint=joint[request],
            pixels=pixels,
            image_pixels=image_pixels[request],
            start=np.cumsum(pixels) - pixels,
            logits=first * self.channels,
            labels=first * (self.channels if self.is_binary else 1),
            of_joint=np.bincount(joint, count, len(self.sizes)).astype(np.int64),
        )


def _planes_are_few(layouts: tuple[Layout, ...], loss: WeightedSum) -> bool:
    """Whether there are at most ``KEPT_IMAGES`` planes, with any backend."""
    if loss.scores_images:
        return False
    return sum([1 if layout.pixels < FUSE_BELOW_PIXELS else layout.images for layout in layouts]) <= KEPT_IMAGES


@lru_cache(maxsize=KEPT_PLANS)
def _kept(loss: WeightedSum, layouts: tuple[Layout, ...], sizes: tuple[int, ...], device: torch.device) -> Plan:
    return Plan(loss, layouts, sizes, device, is_kept=True)
