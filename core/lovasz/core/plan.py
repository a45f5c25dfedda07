"""What every backend needs to know of a batch: worked out once, in numpy, from its shapes and its loss alone.

The pixels of a batch stand in one order: joint by joint, request by request, image by image. They are divided at three
levels. A *joint* is the requests that are scored as one; most joints are one request. A *plane* is consecutive pixels
of one request: an image, or several images fused into one run. A *group* is what a term scores at once: a joint, or an
image if the term has ``per_image``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.batch import Batch
from lovasz.spec import CrossEntropy, Layout, LovaszHinge, LovaszSoftmax, WeightedSum

KEPT_PLANS = 64
KEPT_IMAGES = 1 << 12
"""Plans of batches with more images than these are not kept."""

FUSE_ALL = 1 << 62
"""For ``Plan.planes``: fuses images of any size."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Term:
    """A term of the loss, with all that is derived from its options.

    Attributes:
        rule: the number of its rule in ``Plan.rules``: which pixels are void for it.
        per_image: whether its groups are images; if not, they are joints.
        class_weights: float64, shape (K,); 1 where the loss has none.
        listed: bool, shape (K,): the classes that are scored, present or not; None: those that are present.
        label_smoothing: of cross-entropy: s of the target is spread over all K classes, 1 - s stays on the label.
    """

    weight: float
    loss: LovaszSoftmax | LovaszHinge | CrossEntropy
    rule: int
    per_image: bool
    class_weights: npt.NDArray[np.float64]
    listed: npt.NDArray[np.bool_] | None
    label_smoothing: float

    @property
    def label_factor(self) -> float:
        """The factor of cross-entropy's gradient on the label's part of the target."""
        return self.weight * (1 - self.label_smoothing)

    @property
    def spread_factor(self) -> float:
        """The factor of its gradient on each class's part."""
        return self.weight * self.label_smoothing / len(self.class_weights)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a term; int64 arrays, one element a group.

    Attributes:
        first_plane: the group's first plane.
        planes: how many planes it has; they are consecutive.
        start: its first pixel among those of the batch.
        pixels: how many pixels it has; they are consecutive.
        share: float64: its share of its joint's loss.
    """

    first_plane: Integers
    planes: Integers
    start: Integers
    pixels: Integers
    share: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Planes:
    """The planes of a batch; int64 arrays, one element a plane, unless said otherwise.

    Attributes:
        fused: bool, one element a request: whether its images are one plane.
        request: the plane's request.
        joint: its joint.
        pixels: its pixels.
        image_pixels: the pixels of each of its images.
        start: its first pixel among those of the batch.
        logits: its first logit, in elements after its request's first one.
        labels: its first label, likewise.
        of_joint: one element a joint: how many planes it has.
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
        """Joints as groups."""
        first = np.cumsum(self.of_joint) - self.of_joint
        pixels = np.add.reduceat(self.pixels, first)
        return Groups(first, self.of_joint, self.start[first], pixels, np.ones(len(first)))

    @cached_property
    def images(self) -> Groups:
        """Images as groups; only where no images are fused."""
        each = np.arange(len(self))
        return Groups(each, np.ones_like(each), self.start, self.pixels, np.repeat(1.0 / self.of_joint, self.of_joint))

    def groups(self, term: Term) -> Groups:
        return self.images if term.per_image else self.joints

    def addresses(self, tensors: Sequence[Tensor], offsets: Integers) -> npt.NDArray[np.uint64]:
        """The address of each plane's first element.

        Args:
            tensors: one a request.
            offsets: ``logits`` or ``labels``.
        """
        first = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
        size = np.array([tensor.element_size() for tensor in tensors])
        addresses: npt.NDArray[np.uint64] = first[self.request] + (offsets * size[self.request]).astype(np.uint64)
        return addresses


@dataclass(frozen=True)
class Plan:
    """Batches that agree in loss, layouts, joints and device share a plan.

    Attributes:
        layouts: one a request.
        sizes: how many requests each joint has.
    """

    loss: WeightedSum
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]
    device: torch.device
    _planes: dict[int, Planes] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, batch: Batch, loss: WeightedSum, device: torch.device) -> Plan:
        """The plan of a batch; one that was made before if it is still kept."""
        layouts = tuple(request.layout for request in batch.requests)
        make = _kept if sum(layout.images for layout in layouts) <= KEPT_IMAGES else cls
        return make(loss, layouts, batch.sizes, device)

    @property
    def is_hinge(self) -> bool:
        return self.loss.is_hinge

    @cached_property
    def channels(self) -> int:
        """Classes (softmax), or binary labels (hinge): K."""
        return self.layouts[0].channels

    @cached_property
    def label_values(self) -> int:
        """Labels are in [0, this)."""
        return self.layouts[0].label_values

    @cached_property
    def pixels(self) -> int:
        """Pixels of the batch; for the hinge, each counts once, whatever the number of its labels."""
        return sum(layout.images * layout.pixels for layout in self.layouts)

    @cached_property
    def joint_of_request(self) -> Integers:
        """int64, shape (requests,): the joint of each request."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def images(self) -> tuple[int, ...]:
        """How many images each joint has."""
        counts = np.bincount(self.joint_of_request, [layout.images for layout in self.layouts])
        return tuple(counts.astype(int).tolist())

    @cached_property
    def rules(self) -> tuple[int | None, ...]:
        """Each ``ignore_index`` that a term has, once; None: no label is void."""
        return tuple(dict.fromkeys(loss.ignore_index for _, loss in self.loss.terms))

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        return tuple(self._term(weight, loss) for weight, loss in self.loss.terms)

    def _term(self, weight: float, loss: LovaszSoftmax | LovaszHinge | CrossEntropy) -> Term:
        class_weights, listed = None, None
        if not isinstance(loss, LovaszHinge):
            class_weights = loss.class_weights
        if isinstance(loss, LovaszSoftmax) and loss.classes != "present":
            listed = np.full(self.channels, loss.classes == "all")
            if isinstance(loss.classes, tuple):
                listed[list(loss.classes)] = True
        return Term(
            weight=weight,
            loss=loss,
            rule=self.rules.index(loss.ignore_index),
            per_image=not isinstance(loss, CrossEntropy) and loss.per_image,
            class_weights=np.array(class_weights or [1.0] * self.channels, np.float64),
            listed=listed,
            label_smoothing=loss.label_smoothing if isinstance(loss, CrossEntropy) else 0.0,
        )

    @cached_property
    def lovasz(self) -> tuple[Term, ...]:
        """The terms that score segments."""
        return tuple(term for term in self.terms if not isinstance(term.loss, CrossEntropy))

    @cached_property
    def cross_entropies(self) -> tuple[Term, ...]:
        """The other terms."""
        return tuple(term for term in self.terms if isinstance(term.loss, CrossEntropy))

    def planes(self, fuse_below: int) -> Planes:
        """The batch as planes.

        Args:
            fuse_below: the images of a request are one plane if they have fewer pixels than this, and if no term
                scores images on their own.
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
            labels=first * (self.channels if self.is_hinge else 1),
            of_joint=np.bincount(joint, count, len(self.sizes)).astype(np.int64),
        )


@lru_cache(maxsize=KEPT_PLANS)
def _kept(loss: WeightedSum, layouts: tuple[Layout, ...], sizes: tuple[int, ...], device: torch.device) -> Plan:
    return Plan(loss, layouts, sizes, device)
