"""A batch of requests as compiled code takes it: addresses, blocks of pixels, codes of labels, room for counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.backends.numba.images import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    Blocks,
    Images,
    Labelling,
)
from lovasz.core.backends.numba.scratch import Scratch
from lovasz.core.backends.numba.softmax import Counts
from lovasz.core.backends.numba.workers import WORKERS, thread_count
from lovasz.core.batch import Batch, Request
from lovasz.core.stop import Stop
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, WeightedSum

_FLOAT_KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_LABEL_KINDS = {
    torch.bool: UINT8,
    torch.uint8: UINT8,
    torch.int8: INT8,
    torch.int16: INT16,
    torch.int32: INT32,
    torch.int64: INT64,
}

_ALONE_ELEMENTS = 1 << 15
"""So few elements are computed in the calling thread: to wake another takes as long."""

_BLOCK_PIXELS = 1 << 14
"""Pixels of a task; each has to claim it and to add up its counts."""

_FEW_PIXELS = 64
"""Images with fewer pixels are joined."""

_ROW_PADDING = 1040
"""Elements between rows of scratch. Where rows are a power of two apart, they compete for the same lines of a cache."""


@dataclass(frozen=True)
class _Member:
    """One request's tensors, contiguous: (images, K, pixels), labels without K but for the hinge.

    Many images of a few pixels each, as of a point cloud, are joined to one: loops run along the pixels of an image.
    """

    request: Request
    images: int
    pixels: int
    logits: Tensor
    labels: Tensor
    grad: Tensor
    """float32, in the layout of the logits; empty if none is wanted."""

    @classmethod
    def of(cls, request: Request, loss: WeightedSum, *, may_join: bool, want_grad: bool) -> _Member:
        layout, logits, labels = request.layout, request.logits.detach(), request.labels.detach()
        images, pixels = layout.images, layout.pixels
        if may_join and images > 1 and pixels < _FEW_PIXELS:
            logits = logits.reshape(images, layout.channels, pixels).transpose(0, 1)
            if loss.is_hinge:
                labels = labels.reshape(images, layout.channels, pixels).transpose(0, 1)
            images, pixels = 1, images * pixels
        if want_grad and request.grad is not None and images == layout.images:
            grad = request.grad.view(-1)
        else:  # Of NumPy, as it asks the system for large pages.
            grad = torch.from_numpy(np.empty(images * layout.channels * pixels if want_grad else 0, np.float32))
        return cls(request, images, pixels, logits.contiguous(), labels.contiguous(), grad)

    def grad_of_request(self) -> Tensor:
        layout, shape = self.request.layout, self.request.logits.shape
        if self.images == layout.images:
            return self.grad.view(shape)
        return self.grad.view(layout.channels, layout.images, layout.pixels).transpose(0, 1).reshape(shape).contiguous()


class NumbaBatch:
    """The requests as compiled code takes them, and what it counts in them."""

    def __init__(
        self, batch: Batch, loss: WeightedSum, scratch: Scratch, *, want_grad: bool, stop: Stop | None
    ) -> None:
        self.loss, self.scratch, self.want_grad, self._stop = loss, scratch, want_grad, stop
        may_join = not any(isinstance(term, LovaszSoftmax | LovaszHinge) and term.per_image for _, term in loss.terms)
        requests = batch.requests
        self._members = [_Member.of(request, loss, may_join=may_join, want_grad=want_grad) for request in requests]
        self._joint_of_member = np.array(batch.joint_of_request)
        self.channels = requests[0].layout.channels
        self.joint_images = np.bincount(
            self._joint_of_member, [member.images for member in self._members], len(batch.sizes)
        ).astype(np.int64)
        self.images_before = np.cumsum(self.joint_images) - self.joint_images
        self.joint_pixels = np.array(batch.pixels)
        self.logits_kind = _FLOAT_KINDS[requests[0].logits.dtype]
        self.images = self._images()
        self.pixels = int(self.joint_pixels.sum())
        self.blocks = self._blocks()
        elements = self.pixels * self.channels
        self.threads = 1 if elements < _ALONE_ELEMENTS else thread_count()
        self.labelling = self._labelling(requests[0].layout.label_values)
        labels, predictions, hits = np.zeros((3, len(self.images.start) * self.channels), np.int64)
        self.counts = Counts(labels, predictions, hits, np.zeros(3 * len(batch.sizes), np.int64))
        self.errors = self._rows("errors", np.float32)

    def _images(self) -> Images:
        channels, members = self.channels, self._members
        label_rows = channels if self.loss.is_hinge else 1
        images = np.array([member.images for member in members])
        of_image = np.repeat(np.arange(len(members)), images)
        number = np.arange(len(of_image)) - (np.cumsum(images) - images)[of_image]
        pixels = np.array([member.pixels for member in members])[of_image]

        def planes(rows: int, tensors: Sequence[Tensor]) -> npt.NDArray[np.uint64]:
            first = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)[of_image]
            size = np.array([tensor.element_size() for tensor in tensors])[of_image]
            addresses: npt.NDArray[np.uint64] = first + (number * pixels * rows * size).astype(np.uint64)
            return addresses

        return Images(
            logits=planes(channels, [member.logits for member in members]),
            labels=planes(label_rows, [member.labels for member in members]),
            label_kind=np.array([_LABEL_KINDS[member.labels.dtype] for member in members])[of_image],
            grads=planes(channels, [member.grad for member in members]),
            start=np.cumsum(pixels) - pixels,
            pixels=pixels,
            joint=self._joint_of_member[of_image],
        )

    def grads(self) -> tuple[Tensor, ...]:
        """The gradients in the shapes of the requests."""
        return tuple(member.grad_of_request() for member in self._members)

    def clear_grads(self, scored_images: npt.NDArray[np.bool_] | None = None) -> None:
        """Sets gradients to 0; of each image only the classes that are not scored, if these are given."""
        image = 0
        for member in self._members:
            planes = member.grad.numpy().reshape(member.images, self.channels, member.pixels)
            if scored_images is None:
                planes[:] = 0
            else:
                planes[~scored_images[image : image + member.images]] = 0
            image += member.images

    def _blocks(self) -> Blocks:
        pixels = self.images.pixels
        per_image = -(-pixels // _BLOCK_PIXELS)
        image = np.repeat(np.arange(len(pixels)), per_image)
        first = (np.arange(len(image)) - np.repeat(np.cumsum(per_image) - per_image, per_image)) * _BLOCK_PIXELS
        return Blocks(image, first, np.minimum(first + _BLOCK_PIXELS, pixels[image]))

    def _labelling(self, values: int) -> Labelling:
        ignored = {term.ignore_index for _, term in self.loss.terms}
        common = next(iter(ignored)) if len(ignored) == 1 else None
        return Labelling(values, values, 0 if common is None else common, common is not None)

    def ignored_code(self, term: LovaszSoftmax | LovaszHinge | CrossEntropy) -> int:
        """The code that this term ignores and others may not; ``void`` if there is none."""
        index = term.ignore_index
        return self.labelling.void if index is None or not 0 <= index < self.labelling.values else index

    def _rows(self, name: str, dtype: Any, rows: int | None = None) -> npt.NDArray[Any]:
        """Rows of scratch, longer than there are pixels; not cut to that, as the compiler wants them contiguous."""
        rows = rows or self.channels
        padded = self.pixels + (_ROW_PADDING if rows > 1 else 0)
        return self.scratch.array(name, (rows, padded), dtype)

    def codes(self) -> npt.NDArray[Any]:
        """Room for codes: (1, pixels), or a row a label for the hinge."""
        wide = self.labelling.void > np.iinfo(np.uint8).max
        name, dtype = ("wide codes", np.int32) if wide else ("codes", np.uint8)
        return self._rows(name, dtype, self.channels if self.loss.is_hinge else 1)

    def run(self, loop: Callable[..., None], *arguments: Any, threads: int | None = None, **options: Any) -> None:
        WORKERS.run(threads or self.threads, loop, *arguments, stop=self._stop, **options)

    def run_blocks(self, loop: Callable[..., None], *arguments: Any) -> None:
        self.run(loop, self.blocks, self.images, *arguments, threads=min(self.threads, len(self.blocks.image)))

    def per_image(self, counts: npt.NDArray[np.int64]) -> Tensor:
        """(images x K) to (K, images)."""
        return torch.from_numpy(counts.reshape(-1, self.channels).T.copy())

    def per_joint(self, counts: npt.NDArray[np.int64]) -> Tensor:
        """(images x K) to (K, joints)."""
        sums = np.add.reduceat(counts.reshape(-1, self.channels), self.images_before, axis=0)
        return torch.from_numpy(sums.T.copy())

    def intersection_and_union(self) -> tuple[Tensor, Tensor]:
        labels, predictions, hits = map(self.per_joint, self.counts[:3])
        return hits, labels + predictions - hits


@dataclass(frozen=True)
class Groups:
    """The groups of a term: joints or images."""

    first_image: npt.NDArray[np.int64]
    last_image: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    share: Tensor

    @classmethod
    def of(cls, batch: NumbaBatch, *, per_image: bool) -> Groups:
        images = batch.images
        if per_image:
            numbers = np.arange(len(images.start))
            share = np.repeat(1.0 / batch.joint_images, batch.joint_images)
            return cls(numbers, numbers + 1, images.start, images.pixels, torch.from_numpy(share))
        first = batch.images_before
        share = np.ones(len(first))
        return cls(first, first + batch.joint_images, images.start[first], batch.joint_pixels, torch.from_numpy(share))
