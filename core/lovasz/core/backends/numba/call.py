"""One computation on the CPU: the tensors that compiled loops read and write, the tasks, the threads, the scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.backends.numba.outline import MOST_BYTE, Outline, TypeOutline
from lovasz.core.backends.numba.planes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    Planes,
)
from lovasz.core.backends.numba.scratch import GRADIENTS, MadeT, Scratch
from lovasz.core.backends.numba.softmax import Counts
from lovasz.core.backends.numba.workers import WORKERS, thread_count
from lovasz.core.batch import Batch, Request, classes_first, images_first
from lovasz.core.computed import Fault
from lovasz.core.plan import Plan, Term
from lovasz.core.ranks import Ranks
from lovasz.core.scoring import segment_factors
from lovasz.core.stop import Stop
from lovasz.memory_format import contiguous
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

_NOTHING = torch.empty(0, device="cpu")
ROW_PADDING = 1040
"""Elements between two rows of scratch. Rows at a distance of a power of two would compete for the same cache lines."""


class JointCounts(NamedTuple):
    """Numbers of pixels of each joint, over all its ranks: int64, (K, joints); faults: (3, joints).

    ``valid`` and ``positive`` are of binary losses alone.
    """

    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]
    faults: npt.NDArray[np.int64]


class Arrays:
    """Small arrays in scratch, the same ones for all calls with the same outline and element types.

    Attributes:
        planes: the planes, with the addresses of the tensors of one call.
        of_planes: int64, (5, planes, K): labels, predictions, hits, ``Call.valid`` and ``Call.positive``.
        faults: int64, (3, joints).
        counts: the first three of these five, ``Counts.nearest`` and the faults; flat.
    """

    def __init__(self, plan: Plan, outline: Outline, types: TypeOutline, scratch: Scratch) -> None:
        layout, joints = outline.planes, len(plan.sizes)
        self._request, self._offsets = outline.request, types.offsets
        self._addresses = scratch.array("addresses", (4, len(layout)), np.int64)
        logits, labels, grads, points = self._addresses.view(np.uint64)
        self.planes = Planes(
            logits=logits,
            labels=labels,
            label_kind=types.label_kind,
            grads=grads,
            start=layout.start,
            pixels=layout.pixels,
            joint=layout.joint,
            are_points=types.plane_points,
            points=points,
        )
        of_planes = 6 * len(layout) * plan.channels
        self._numbers = scratch.array("counts", (of_planes + len(Fault) * joints,), np.int64)
        self.of_planes = self._numbers[:of_planes].reshape(6, -1, plan.channels)[:5]
        self.faults = self._numbers[of_planes:].reshape(-1, joints)
        labels, predictions, hits, self.valid, self.positive, nearest = self._numbers[:of_planes].reshape(6, -1)
        self.counts = Counts(labels, predictions, hits, nearest, self._numbers[of_planes:])

    def begin(self, *tensors: Sequence[Tensor]) -> None:
        """Writes the addresses, and clears the counts.

        Args:
            tensors: logits, labels, gradients and gradients of points: one of each per request.
        """
        firsts = np.array([list(map(Tensor.data_ptr, some)) for some in tensors], np.int64)
        np.add(firsts[:, self._request], self._offsets, out=self._addresses)
        self._numbers.fill(0)


class Call:
    """The computation of one batch.

    Attributes:
        ranks: if the batch is one rank's part of a joint: all ranks of it.
        grads: one per request, float32: of the shape of its logits, or flat, K rows, where these had to be transposed;
            empty if no gradient is wanted.
        outline: what the plan alone decides.
        planes: the planes, with addresses.
        counts: labels, predictions, hits and faults.
        valid, positive: flat (planes x K), for binary losses: the number of pixels that are not void, and of those of
            these whose error is above 0.
    """

    def __init__(
        self,
        plan: Plan,
        batch: Batch,
        scratch: Scratch,
        *,
        want_grad: bool,
        most_threads: int,
        stop: Stop | None,
        ranks: Ranks | None,
    ) -> None:
        self.ranks = ranks
        self.plan, self.scratch, self.want_grad, self._stop = plan, scratch, want_grad, stop
        self.outline: Outline = plan.kept(Outline)
        self.plan_planes = self.outline.planes
        requests = self._requests = batch.requests
        self.logits_kind = _FLOAT_KINDS[requests[0].logits.dtype]
        types = self.outline.of_types((self.logits_kind, *[_LABEL_KINDS[r.labels.dtype] for r in requests]))
        self._transposed = types.transposed
        # Referenced until the computation ends, since compiled code holds nothing but addresses.
        self._logits = [
            r.logits if r.logits.is_contiguous() and not transposed else _copied(r.logits, r.layout, transposed)
            for r, transposed in zip(requests, types.transposed, strict=True)
        ]
        self._labels = [
            r.labels if r.labels.is_contiguous() and not transposed else _copied(r.labels, r.layout, transposed)
            for r, transposed in zip(requests, types.transposed_labels, strict=True)
        ]
        self.grads = list(map(_room, requests, types.transposed)) if want_grad else [_NOTHING] * len(requests)
        # Loops write the gradients of points to rows of scratch; only the last one writes them in their order.
        has_points = want_grad and any(types.are_points)
        g = self._g = self._rows_of_points(types.are_points) if has_points else self.grads
        arrays = self.kept("call", (types,), lambda: Arrays(plan, self.outline, types, scratch))
        arrays.begin(self._logits, self._labels, g, self.grads)
        self.arrays, self.planes, self.counts = arrays, arrays.planes, arrays.counts
        self.valid, self.positive = arrays.valid, arrays.positive
        self.threads = min(most_threads, thread_count())

    def kept(self, name: str, key: tuple[object, ...], make: Callable[[], MadeT]) -> MadeT:
        """As ``Scratch.kept``, if the plan is kept, too: one that is not may be large, and does not come again."""
        return self.scratch.kept(name, key, make) if self.plan.is_kept else make()

    @cached_property
    def errors(self) -> npt.NDArray[np.float32]:
        """Float32, shape (K, pixels + padding): scratch; or the memory of the gradient if ``errors_are_in_grads``."""
        if self.errors_are_in_grads:
            return self.grads[0].numpy().reshape(self.plan.channels, -1)
        return self.rows("errors", self.plan.channels, np.float32)

    @cached_property
    def errors_are_in_grads(self) -> bool:
        """Whether each pixel's error is read before its gradient is written, so that one memory does for both.

        Not a caller's memory: the caller may change it meanwhile, and it may overlap that of the logits.
        """
        plan, is_alone = self.plan, len(self._requests) == 1 and self._requests[0].grad is None and self.ranks is None
        has_same_rows = plan.is_binary and (plan.channels == 1 or len(self.plan_planes) == 1)
        return is_alone and has_same_rows and len(plan.lovasz) == 1 and self.want_grad

    def _rows_of_points(self, are_points: list[bool]) -> list[Tensor]:
        """``grads``, with rows of scratch in place of those of points."""
        sizes = [r.logits.numel() if points else 0 for r, points in zip(self._requests, are_points, strict=True)]
        rows = torch.from_numpy(self.scratch.array("point gradients", (sum(sizes),), np.float32)).split(sizes)
        return [row if points else grad for row, grad, points in zip(rows, self.grads, are_points, strict=True)]

    def grads_of_requests(self) -> tuple[Tensor, ...]:
        """The gradients in the shapes of the requests' logits."""
        if not any(self._transposed):
            return tuple(self.grads)
        return tuple(
            images_first(grad, request) if transposed else grad
            for grad, request, transposed in zip(self.grads, self._requests, self._transposed, strict=True)
        )

    def clear_grads(self, scored: npt.NDArray[np.bool_] | None = None) -> None:
        """Sets gradients to 0.

        Args:
            scored: shape (planes, K): the rows to leave as they are; None to clear all.
        """
        if scored is not None and scored.all():
            return
        first = 0
        for grad, layout, fused in zip(self._g, self.plan.layouts, self.plan_planes.fused, strict=True):
            count = 1 if fused else layout.images
            rows = grad.numpy().reshape(count, layout.channels, -1)
            rows[slice(None) if scored is None else ~scored[first : first + count]] = 0
            first += count

    def rows(self, name: str, rows: int, dtype: Any) -> npt.NDArray[Any]:
        """Rows of scratch with one element per pixel, and padding, so that the array of all rows stays contiguous."""
        padded = self.plan.pixels + (ROW_PADDING if rows > 1 else 0)
        return self.scratch.array(name, (rows, padded), dtype)

    def codes(self) -> npt.NDArray[Any]:
        """Memory for codes: (1, pixels); for binary losses, one row per label."""
        wide = self.outline.labelling.void > MOST_BYTE
        name, dtype = ("wide codes", np.int32) if wide else ("codes", np.uint8)
        return self.rows(name, self.plan.channels if self.plan.is_binary else 1, dtype)

    def run(self, loop: Callable[..., None], *, threads: int | None = None, **arguments: Any) -> None:
        """Runs a compiled loop over its tasks; see ``Workers.run``."""
        WORKERS.run(loop, threads or self.threads, stop=self._stop, **arguments)

    def run_blocks(self, loop: Callable[..., None], **arguments: Any) -> None:
        """Runs a compiled loop over the blocks of all planes."""
        blocks = self.outline.blocks
        threads = min(self.threads, len(blocks.plane))
        self.run(loop, threads=threads, blocks=blocks, planes=self.planes, **arguments)

    def per_plane(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rearranges flat (planes x K) counts as (K, planes)."""
        return counts.reshape(-1, self.plan.channels).T.copy()

    def joint_counts(self, maxima: Sequence[npt.NDArray[np.int64]] = ()) -> JointCounts:
        """The counts of each joint, once all blocks have been counted.

        Args:
            maxima: written: if there are other ranks, the maximum over all of them.
        """
        first_planes = self.plan_planes.joints.first_plane
        of_joints = np.add.reduceat(self.arrays.of_planes, first_planes, axis=1).swapaxes(1, 2).copy()
        faults = self.arrays.faults.copy()
        if self.ranks is not None:
            self.ranks.reduce([of_joints, faults], maxima)
        return JointCounts(*of_joints, faults)

    def nearest(self, term: Term) -> npt.NDArray[np.int64]:
        """``Counts.nearest`` of each segment of a term, (K, groups), once all blocks have been counted."""
        of_planes, first_planes = self.per_plane(self.counts.nearest), self.plan_planes.joints.first_plane
        if term.per_image or len(first_planes) == len(self.plan_planes):
            return of_planes
        of_joints: npt.NDArray[np.int64] = np.maximum.reduceat(of_planes, first_planes, axis=1)
        return of_joints

    @property
    def joint_pixels(self) -> npt.NDArray[np.int64]:
        """The number of pixels of each joint, over all its ranks."""
        if self.ranks is None:
            return self.plan_planes.joints.pixels
        return np.array([sum(self.ranks.pixels)])

    def factors(self, term: Term) -> npt.NDArray[np.float64]:
        """``TermOutline.factors``, with shares among the images of all ranks."""
        factors = self.outline.of_term(term).factors
        if self.ranks is None or not term.per_image:
            return factors
        share = np.full(factors.shape[1], 1.0 / sum(self.ranks.images))
        of_all: npt.NDArray[np.float64] = segment_factors(term, share, term.class_weights)
        return of_all


def _copied(tensor: Tensor, layout: Layout, transpose: bool) -> Tensor:
    tensor = tensor.detach()
    return classes_first(tensor, layout).contiguous() if transpose else contiguous(tensor)


def _room(request: Request, transposed: bool) -> Tensor:
    shape = request.logits.shape
    if request.grad is not None and not transposed:
        return request.grad.view(shape)
    return GRADIENTS.tensor((shape.numel(),) if transposed else tuple(shape))
