"""IoU from counts of pixels: of one result, and summed over the batches and ranks of a data set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lovasz.spec.errors import InvalidInput

Counts: TypeAlias = npt.NDArray[np.int64]


class HasCounts(Protocol):
    """What has counts of pixels for each class, of one rank or several: a ``Result``, or a ``DatasetIoU``."""

    @property
    def intersection(self) -> Counts: ...

    @property
    def union(self) -> Counts: ...

    @property
    def ranks(self) -> int: ...


def class_iou(intersection: Counts, union: Counts) -> npt.NDArray[np.float64]:
    """float64, shape (C,): intersection over union; NaN for a class without a union."""
    iou = np.full(union.shape, np.nan)
    np.divide(intersection, union, out=iou, where=union > 0)
    return iou


def mean_iou(intersection: Counts, union: Counts) -> float:
    """The mean over the classes that have a union; NaN if none has."""
    iou = class_iou(intersection, union)[union > 0]
    return float(iou.mean()) if len(iou) else math.nan


class DatasetIoU:
    """The IoU of a data set: counts of pixels, summed over batches and over ranks. ::

        iou = DatasetIoU()
        for images, labels in validation_loader:
            iou.add(client.compute(model(images), labels, loss, want_grad=False))
        iou.mean_iou

    The IoU of a data set is a ratio of sums; the mean of the batches' IoUs is a different number.

    Attributes:
        intersection: int64, shape (C,): the sum of what was added; shape (0,) before.
        union: int64, shape (C,): likewise.
        ranks: the number of ranks whose pixels are counted: 1, or more after :meth:`all_reduce` or with joint steps.
        left_out: the number of results that were added and have no counts, as their logits were not all finite.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what was added."""
        self.intersection: Counts = np.zeros(0, np.int64)
        self.union: Counts = np.zeros(0, np.int64)
        self.ranks = 1
        self.left_out = 0

    def add(self, counts: HasCounts) -> None:
        """Adds the counts of a batch or of another part of the data set.

        A result of a joint step has the counts of all ranks' pixels already, on every rank: add it on each rank, and do
        not call :meth:`all_reduce`. Warns of a result whose loss is NaN: its logits were not all finite, so it has no
        counts, and the IoU is that of the other results.

        Args:
            counts: a :class:`Result`, or another :class:`DatasetIoU`; one that has no classes yet changes nothing.

        Raises:
            InvalidInput: it is not a result, or its number of classes differs from that of the earlier ones.
        """
        if not hasattr(counts, "union"):
            raise InvalidInput(
                "counts",
                f"got {type(counts).__name__}; expected a result (of compute, or RemoteLoss.result) or a DatasetIoU",
            )
        self.intersection, self.union = _sum([self, counts])
        self.ranks = max(self.ranks, counts.ranks)
        self.left_out += getattr(counts, "left_out", 0)
        if math.isnan(getattr(counts, "loss", 0.0)):
            self.left_out += 1
            warnings.warn(
                "counts: a result has none, as its logits were not all finite (its loss is NaN); the IoU leaves its "
                "pixels out (left_out counts such results)",
                stacklevel=2,
            )

    def all_reduce(self, group: Any = None) -> None:
        """Adds the counts of all ranks of a process group of ``torch.distributed``, on every rank.

        All ranks have to call it, once, after their last batch. A rank that added nothing takes part. After
        :meth:`reset`, the next pass over the data set can begin.

        Args:
            group: the process group; None: the default one. With NCCL, each rank must have set its CUDA device.

        Raises:
            InvalidInput: the ranks differ in the number of classes; or the counts of a rank are of several ranks
                already, as after a joint step or a first call, and would be counted twice. Raised on every rank.
            ModuleNotFoundError: torch is not installed.
        """
        from torch import distributed

        parts: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(parts, self, group=group)
        parts = parts or [self]  # No parts: a rank outside the group, for which torch warns and does nothing.
        if len(parts) > 1 and any(part.ranks > 1 for part in parts):
            raise InvalidInput(
                "counts", f"got those of {max(part.ranks for part in parts)} ranks, already added; expected one rank's"
            )
        self.intersection, self.union = _sum(parts)
        self.ranks = max(self.ranks, len(parts))
        self.left_out = sum(part.left_out for part in parts)

    @property
    def class_iou(self) -> npt.NDArray[np.float64]:
        """float64, shape (C,): intersection over union of arg-max and label; NaN for a class without a union."""
        return class_iou(self.intersection, self.union)

    @property
    def mean_iou(self) -> float:
        """The mean of ``class_iou`` over the classes that have one; NaN if none has."""
        return mean_iou(self.intersection, self.union)


def _sum(parts: Sequence[HasCounts]) -> tuple[Counts, Counts]:
    """The sums of intersections and unions; parts without classes are left out."""
    parts = [part for part in parts if len(part.union)] or parts[:1]
    classes = sorted({len(part.union) for part in parts})
    if len(classes) > 1:
        raise InvalidInput("counts", f"got parts with {classes[0]} and {classes[-1]} classes; expected the same number")
    return np.sum([part.intersection for part in parts], axis=0), np.sum([part.union for part in parts], axis=0)
