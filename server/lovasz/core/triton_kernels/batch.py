"""A batch as the kernels see it: where each request's tensors are, and its labels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lovasz.core.ragged import Batch, Request
from lovasz.core.segments import on_device
from lovasz.core.triton_kernels.planes import FAULTS, Plane, read_labels
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, WeightedSum

_JOINED_BELOW_PIXELS = 256
"""Images of fewer pixels would not fill a block: they are copied into one (those of a point cloud have one pixel)."""

_SOFTMAX_BLOCK = 256
_HINGE_BLOCK = 1024
"""Pixels that a program takes ..."""
_INTERPRETED_BLOCK = 4096
"""... and under the interpreter, which takes tens of milliseconds for each program, whatever its size."""

_WARPS = 4

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@dataclass(frozen=True)
class Placed:
    """A request's tensors where the kernels read and write them.

    Attributes:
        logits: shape (images, channels, pixels), contiguous, as ``grad``. One image if the request's are joined.
        labels: shape (images, 1, pixels) for softmax, that of the logits for the hinge; contiguous.
        grad: float32; None if no gradient is wanted.
    """

    request: Request
    logits: Tensor
    labels: Tensor
    grad: Tensor | None

    def grad_of_request(self) -> Tensor:
        assert self.grad is not None
        layout, shape = self.request.layout, self.request.logits.shape
        if len(self.grad) == layout.images:
            return self.grad.view(shape)
        joined = self.grad.view(layout.channels, layout.images, layout.pixels)
        return joined.transpose(0, 1).reshape(shape).contiguous()


def _place(requests: Sequence[Request], loss: WeightedSum, device: torch.device, *, want_grad: bool) -> list[Placed]:
    """Brings the requests' tensors to the device; what is there already and contiguous stays where it is."""
    same_labels = len({request.labels.dtype for request in requests}) == 1
    any_per_image = any(is_per_image(term) for _, term in loss.terms)
    placed = []
    for request in requests:
        layout = request.layout
        shape = (layout.images, layout.channels, layout.pixels)
        label_shape = shape if loss.is_hinge else (layout.images, 1, layout.pixels)
        logits = request.logits.detach().to(device, non_blocking=True).reshape(shape)
        labels = request.labels.to(device, non_blocking=True).reshape(label_shape)
        if layout.images > 1 and layout.pixels < _JOINED_BELOW_PIXELS and not any_per_image:
            logits, labels = (t.transpose(0, 1).reshape(1, t.shape[1], -1) for t in (logits, labels))
        logits, labels = logits.contiguous(), labels.contiguous()
        if not same_labels:
            labels = labels.to(torch.int64)
        elif labels.dtype == torch.bool:
            labels = labels.view(torch.uint8)
        grad = torch.empty_like(logits, dtype=torch.float32) if want_grad else None
        placed.append(Placed(request, logits, labels, grad))
    return placed


def is_per_image(loss: LovaszSoftmax | LovaszHinge | CrossEntropy) -> bool:
    return not isinstance(loss, CrossEntropy) and loss.per_image


@dataclass(frozen=True)
class TritonBatch:
    """A batch as the kernels see it, its labels read.

    Attributes:
        source: the requests.
        placed: their tensors; holds what the addresses in ``planes`` point to.
        rules: what is ignored, each once, in the order of the labels' bits.
        maps: label maps of each image: 1, or the channels for the hinge.
        planes: int64, shape (planes, columns): :class:`Plane`.
        block: pixels that a program takes.
        block_planes: the plane of each program.
        first_blocks: the first program of each plane.
        words: int32, one a pixel of all planes.
        counts: int64, shape (rules, images, maps, label values): valid pixels; in the last row those that any rule
            counts.
        faults: int64, shape (planes, faults), like ``Computed.faults``; sweeps add to it.
    """

    source: Batch
    placed: Sequence[Placed]
    loss: WeightedSum
    rules: tuple[int | None, ...]
    maps: int
    planes: Tensor
    block: int
    block_planes: Tensor
    first_blocks: Tensor
    words: Tensor
    counts: Tensor
    faults: Tensor

    @classmethod
    def of(cls, batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool) -> TritonBatch:
        """Queues the copies to the device, and the reading of the labels."""
        placed, layout = _place(batch.requests, loss, device, want_grad=want_grad), batch.requests[0].layout
        maps = layout.channels if loss.is_hinge else 1
        block = _HINGE_BLOCK if loss.is_hinge else _SOFTMAX_BLOCK
        if device.type != "cuda":
            block = _INTERPRETED_BLOCK
        rows = _plane_rows(batch, placed, maps)
        sizes = [row[Plane.PIXELS] for row in rows]
        planes = on_device(list(chain.from_iterable(rows)), torch.int64, device).view(-1, len(Plane))
        blocks = (planes[:, Plane.PIXELS] + (block - 1)) // block
        programs = sum(triton.cdiv(size, block) for size in sizes)
        rules = tuple(dict.fromkeys(term.ignore_index for _, term in loss.terms))
        sums = len(rules) + (len(rules) > 1)
        made = cls(
            source=batch,
            placed=placed,
            loss=loss,
            rules=rules,
            maps=maps,
            planes=planes,
            block=block,
            block_planes=torch.arange(len(rows), device=device).repeat_interleave(blocks, output_size=programs),
            first_blocks=blocks.cumsum(0) - blocks,
            words=torch.empty(sum(sizes), dtype=torch.int32, device=device),
            counts=torch.zeros(sums, len(rows) // maps, maps, layout.label_values, dtype=torch.int64, device=device),
            faults=torch.zeros(len(rows), FAULTS.value, dtype=torch.int64, device=device),
        )
        ignored = chain.from_iterable((0, 0) if rule is None else (rule, 1) for rule in rules)
        made.launch(
            read_labels,
            on_device(list(ignored), torch.int64, device),
            made.words,
            made.counts,
            made.faults,
            len(rows),
            layout.label_values,
            LABEL=_TYPES[placed[0].labels.dtype],
            RULES=len(rules),
        )
        return made

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Runs a kernel over all pixels. Without the fusion of operations all kernels compute the same errors."""
        kernel[(len(self.block_planes),)](
            self.planes,
            self.block_planes,
            self.first_blocks,
            *arguments,
            **constants,
            BLOCK=self.block,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def channels(self) -> int:
        return self.placed[0].request.layout.channels

    @property
    def logits_type(self) -> Any:
        return _TYPES[self.placed[0].logits.dtype]

    def rule(self, term: LovaszSoftmax | LovaszHinge | CrossEntropy) -> int:
        return self.rules.index(term.ignore_index)

    def of_joints(self, values: Tensor) -> Tensor:
        """Sums integers over each joint: (planes or images, ...) to (joints, ...)."""
        joints = self.planes[:: len(self.planes) // len(values), Plane.JOINT]
        return values.new_zeros(len(self.source.sizes), *values.shape[1:]).index_add_(0, joints, values)

    def group_counts(self, row: int, *, per_image: bool) -> tuple[Tensor, Tensor]:
        """(foreground, valid): pixels of each segment, int64, shape (groups, K)."""
        counts = self.counts[row] if per_image else self.of_joints(self.counts[row])
        if self.loss.is_hinge:
            return counts[..., 1], counts.sum(2)
        return counts[:, 0], counts.sum(2).expand(-1, self.channels)

    def overlap(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """(intersection, union), each of shape (K, joints).

        Args:
            predictions: int64, shape (images, 2, K): pixels of each prediction, and how many of them are right.
        """
        foreground, _ = self.group_counts(-1, per_image=False)
        predicted, hits = self.of_joints(predictions).unbind(1)
        return hits.T, (foreground + predicted - hits).T


def _plane_rows(batch: Batch, placed: Sequence[Placed], maps: int) -> list[list[int]]:
    """The rows of ``planes``: by request, image and label map."""
    rows = []
    first_pixel = first_image = 0
    in_joint = [0] * len(batch.sizes)
    for joint, tensors in zip(batch.joint_of_request, placed, strict=True):
        images, channels, pixels = tensors.logits.shape
        step = channels // maps * pixels
        logits, labels = tensors.logits, tensors.labels
        grad, grad_bytes = (0, 0) if tensors.grad is None else (tensors.grad.data_ptr(), tensors.grad.element_size())
        for number in range(images * maps):
            image, channel = divmod(number, maps)
            row = [0] * len(Plane)
            row[Plane.LOGITS] = logits.data_ptr() + number * step * logits.element_size()
            row[Plane.LABELS] = labels.data_ptr() + number * pixels * labels.element_size()
            row[Plane.GRAD] = grad + number * step * grad_bytes
            row[Plane.PIXELS] = pixels
            row[Plane.FIRST_PIXEL] = first_pixel
            row[Plane.FIRST_IN_JOINT] = in_joint[joint] + image * pixels
            row[Plane.JOINT] = joint
            row[Plane.IMAGE] = first_image + image
            row[Plane.CHANNEL] = channel
            rows.append(row)
            first_pixel += pixels
        first_image += images
        in_joint[joint] += images * pixels
    return rows
