"""One computation on the CPU: the tensors that compiled loops read and write, the tasks, the threads, the scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.backends.numba.planes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    Blocks,
    Labelling,
    Planes,
)
from lovasz.core.backends.numba.scratch import Scratch
from lovasz.core.backends.numba.softmax import Counts
from lovasz.core.backends.numba.workers import WORKERS, thread_count
from lovasz.core.batch import Batch, Request, classes_first, images_first
from lovasz.core.computed import Fault
from lovasz.core.plan import Plan, Term
from lovasz.core.ranks import Ranks
from lovasz.core.stop import Stop
from lovasz.spec import Layout

_FLOAT_KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_LABEL_KINDS = {
    torch.bool: UINT8,
    torch.uint8: UINT8,
    torch.int8: INT8,
    torch.int16: INT16,
    torch.int32: INT32,
    torch.int64: INT64,
}

_ONE_THREAD_ELEMENTS = 1 << 15
"""Batches of fewer elements are computed by the calling thread alone: waking another thread would take as long."""

_BLOCK_PIXELS = 1 << 14
"""Pixels per task. Each task costs an atomic claim and atomic additions to the counts."""

_FUSE_BELOW_PIXELS = 64
"""Images of fewer pixels are fused, also the points of a cloud: loops over the pixels of a plane need enough pixels."""

_ROW_PADDING = 1040
"""Elements between two rows of scratch. Rows at a distance of a power of two would compete for the same cache lines."""


class JointCounts(NamedTuple):
    """Numbers of pixels of each joint, over all its ranks: int64, (K, joints); faults: (3, joints).

    ``valid`` is of binary losses alone.
    """

    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]
    faults: npt.NDArray[np.int64]


class Call:
    """The computation of one batch.

    Attributes:
        ranks: if the batch is one rank's part of a joint: all ranks of it.
        grads: one per request, float32, flat, in the order of the planes; empty if no gradient is wanted.
        counts: labels, predictions, hits and faults.
        errors: float32, shape (K, pixels + padding).
    """

    def __init__(
        self,
        plan: Plan,
        batch: Batch,
        scratch: Scratch,
        *,
        want_grad: bool,
        stop: Stop | None,
        ranks: Ranks | None,
    ) -> None:
        self.ranks = ranks
        self.plan, self.scratch, self.want_grad, self._stop = plan, scratch, want_grad, stop
        self.plan_planes = plan.planes(_FUSE_BELOW_PIXELS)
        self._requests, fused = batch.requests, self.plan_planes.fused
        # Referenced until the computation ends, since compiled code holds nothing but addresses.
        pairs = list(zip(batch.requests, fused, strict=True))
        self._logits = [_contiguous(r.logits, r.layout, is_fused) for r, is_fused in pairs]
        self._labels = [_contiguous(r.labels, r.layout, is_fused and plan.is_binary) for r, is_fused in pairs]
        self.grads = [_room(r, is_fused, want_grad) for r, is_fused in pairs]
        self.logits_kind = _FLOAT_KINDS[batch.requests[0].logits.dtype]
        self.planes = self._planes()
        self.blocks = _blocks(self.plan_planes.pixels)
        self.threads = 1 if plan.pixels * plan.channels < _ONE_THREAD_ELEMENTS else thread_count()
        values, common = plan.label_values, plan.rules[0] if len(plan.rules) == 1 else None
        self.labelling = Labelling(values, values, 0 if common is None else common, common is not None)
        labels, predictions, hits = np.zeros((3, len(self.plan_planes) * plan.channels), np.int64)
        self.counts = Counts(labels, predictions, hits, np.zeros(len(Fault) * len(plan.sizes), np.int64))
        self.errors = self.rows("errors", plan.channels, np.float32)

    def _planes(self) -> Planes:
        layout = self.plan_planes
        kinds = np.array([_LABEL_KINDS[labels.dtype] for labels in self._labels])
        return Planes(
            logits=layout.addresses(self._logits, layout.logits),
            labels=layout.addresses(self._labels, layout.labels),
            label_kind=kinds[layout.request],
            grads=layout.addresses(self.grads, layout.logits),
            start=layout.start,
            pixels=layout.pixels,
            joint=layout.joint,
        )

    def grads_of_requests(self) -> tuple[Tensor, ...]:
        """The gradients in the shapes of the requests' logits."""
        return tuple(
            images_first(grad, request) if fused else grad.view(request.logits.shape)
            for grad, request, fused in zip(self.grads, self._requests, self.plan_planes.fused, strict=True)
        )

    def clear_grads(self, scored: npt.NDArray[np.bool_] | None = None) -> None:
        """Sets gradients to 0.

        Args:
            scored: shape (planes, K): the rows to leave as they are; None to clear all.
        """
        first = 0
        for grad, layout, fused in zip(self.grads, self.plan.layouts, self.plan_planes.fused, strict=True):
            count = 1 if fused else layout.images
            rows = grad.numpy().reshape(count, layout.channels, -1)
            rows[slice(None) if scored is None else ~scored[first : first + count]] = 0
            first += count

    def ignored_code(self, term: Term) -> int:
        """The code that is void for this term, but not for all terms; ``labelling.void`` if there is none."""
        index = term.loss.ignore_index
        return self.labelling.void if index is None or not 0 <= index < self.labelling.values else index

    def rows(self, name: str, rows: int, dtype: Any) -> npt.NDArray[Any]:
        """Rows of scratch with one element per pixel, and padding, so that the array of all rows stays contiguous."""
        padded = self.plan.pixels + (_ROW_PADDING if rows > 1 else 0)
        return self.scratch.array(name, (rows, padded), dtype)

    def codes(self) -> npt.NDArray[Any]:
        """Memory for codes: (1, pixels); for binary losses, one row per label."""
        wide = self.labelling.void > np.iinfo(np.uint8).max
        name, dtype = ("wide codes", np.int32) if wide else ("codes", np.uint8)
        return self.rows(name, self.plan.channels if self.plan.is_binary else 1, dtype)

    def run(self, loop: Callable[..., None], *, threads: int | None = None, **arguments: Any) -> None:
        """Runs a compiled loop over its tasks; see ``Workers.run``."""
        WORKERS.run(loop, threads or self.threads, stop=self._stop, **arguments)

    def run_blocks(self, loop: Callable[..., None], **arguments: Any) -> None:
        """Runs a compiled loop over the blocks of all planes."""
        threads = min(self.threads, len(self.blocks.plane))
        self.run(loop, threads=threads, blocks=self.blocks, planes=self.planes, **arguments)

    def per_plane(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rearranges flat (planes x K) counts as (K, planes)."""
        return counts.reshape(-1, self.plan.channels).T.copy()

    def joint_counts(
        self, valid: npt.NDArray[np.int64] | None = None, maxima: Sequence[npt.NDArray[np.int64]] = ()
    ) -> JointCounts:
        """The counts of each joint, once all blocks have been counted.

        Args:
            valid: flat (planes x K), as ``counts``.
            maxima: written: if there are other ranks, the maximum over all of them.
        """
        joints, counts = self.plan_planes.joints, self.counts
        of_planes = [counts.labels, counts.predictions, counts.hits, counts.labels if valid is None else valid]
        of_joints = (
            np.add.reduceat(np.stack(of_planes).reshape(4, -1, self.plan.channels), joints.first_plane, axis=1)
            .swapaxes(1, 2)
            .copy()
        )
        faults = counts.faults.reshape(-1, len(self.plan.sizes))
        if self.ranks is not None:
            self.ranks.reduce([of_joints, faults], maxima)
        return JointCounts(*of_joints, faults)

    @property
    def joint_pixels(self) -> npt.NDArray[np.int64]:
        """The number of pixels of each joint, over all its ranks."""
        if self.ranks is None:
            return self.plan_planes.joints.pixels
        return np.array([sum(self.ranks.pixels)])

    def share(self, term: Term) -> npt.NDArray[np.float64]:
        """Each group's share of its joint's loss, as ``Groups.share``."""
        share = self.plan_planes.groups(term).share
        if self.ranks is None or not term.per_image:
            return share
        return np.full_like(share, 1.0 / sum(self.ranks.images))


def _contiguous(tensor: Tensor, layout: Layout, transpose: bool) -> Tensor:
    tensor = tensor.detach()
    return (classes_first(tensor, layout) if transpose else tensor).contiguous()


def _room(request: Request, fused: bool, want_grad: bool) -> Tensor:
    if want_grad and request.grad is not None and not fused:
        return request.grad.view(-1)
    # Allocated by NumPy, since it asks the system for large pages.
    return torch.from_numpy(np.empty(request.logits.numel() if want_grad else 0, np.float32))


def _blocks(pixels: npt.NDArray[np.int64]) -> Blocks:
    count = -(-pixels // _BLOCK_PIXELS)
    plane = np.repeat(np.arange(len(pixels)), count)
    first = (np.arange(len(plane)) - np.repeat(np.cumsum(count) - count, count)) * _BLOCK_PIXELS
    return Blocks(plane, first, np.minimum(first + _BLOCK_PIXELS, pixels[plane]))
