"""The result of a loss: its value, gradient, per-class losses, IoU counts and timing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lovasz.spec import iou

ArrayT = TypeVar("ArrayT")

MAX_IMAGE_LOSSES = 65_536
"""The most images of a request whose losses are returned: they must fit in one message."""


@dataclass(frozen=True)
class TermResult:
    """One term of the weighted sum, before its weight.

    Attributes:
        kind: the loss's kind, one of ``lovasz.spec.LOSS_KINDS``.
        loss: the term's value.
        per_class_loss: float64, shape (C,): the loss of each class (binary losses: of each label) before class weights,
            averaged over the groups that score it; NaN if none does. Empty for both cross-entropies.
        per_image_loss: float64, shape (images of this request,): for a term with ``per_image`` the loss of each image,
            0 where all pixels are ignored; ``loss`` is their mean (in a joint step, that of all ranks). Empty for
            other terms, and for more than 65,536 images.
    """

    kind: str
    loss: float
    per_class_loss: npt.NDArray[np.float64]
    per_image_loss: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Timing:
    """Where the server spent the time of a request.

    Attributes:
        receive_seconds: from the start of the call to the last byte of the payload.
        queue_seconds: from there to the start of the computation.
        compute_seconds: the computation of the request's batch.
        batch_requests: how many requests shared that batch, this one included.
        joint_wait_seconds: how long a joint request waited for the other ranks; not in ``queue_seconds``.
        copy_seconds: from the end of the computation until the batch's gradients were in host memory, in their dtype;
            not in ``compute_seconds``.
        transport: the way that the request took: ``"grpc"``; ``"shm"``: tensors in shared memory of the host, header
            and answer on its socket; ``"device"``: the same with device memory; ``"shm+grpc"``, ``"device+grpc"``:
            header and answer over gRPC; empty without a server.
    """

    receive_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_requests: int
    joint_wait_seconds: float = 0.0
    copy_seconds: float = 0.0
    transport: str = ""


@dataclass(frozen=True)
class Result(Generic[ArrayT]):
    """The result of one request.

    Attributes:
        loss: the weighted sum of the terms; NaN if a logit of a counted pixel is not finite.
        grad: dloss/dlogits (dloss/dprobabilities for that input), in the logits' shape and dtype; float32 for 16-bit
            logits, as float16 would underflow. All NaN if ``loss`` is NaN; None if no gradient was wanted.
        terms: each term's own loss, in the order in which the terms were given.
        intersection: int64, shape (C,): pixels where arg-max and label are both this class (binary losses: logit > 0
            and label 1). A pixel counts if at least one term counts it.
        union: int64, shape (C,): pixels where arg-max or label is this class; 0 for a class that every term ignores
            (``ignore_index``), even if it is predicted on pixels that count. :class:`DatasetIoU` sums both over a data
            set.
        timing: where the server spent its time; None without a server.
        ranks: the number of ranks of the joint step, without those that have left; 1 without one.
    """

    loss: float
    grad: ArrayT | None
    terms: tuple[TermResult, ...]
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    timing: Timing | None = None
    ranks: int = 1

    @property
    def per_class_loss(self) -> npt.NDArray[np.float64]:
        """float64, shape (C,): the per-class loss of the first Lovász term; empty if there is none."""
        return next((t.per_class_loss for t in self.terms if t.per_class_loss.size), np.empty(0))

    @property
    def class_iou(self) -> npt.NDArray[np.float64]:
        """float64, shape (C,): intersection over union of arg-max and label; NaN for a class without a union."""
        return iou.class_iou(self.intersection, self.union)

    @property
    def mean_iou(self) -> float:
        """The mean of ``class_iou`` over the classes that have one; NaN if none has."""
        return iou.mean_iou(self.intersection, self.union)
