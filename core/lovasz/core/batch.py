"""Requests and batches: the tensors as callers pass them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lovasz.spec import InvalidInput, Layout, WeightedSum
from lovasz.spec.labels import too_large, whole_numbers, wrong_type

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class Request:
    """The tensors of one request, in the caller's shapes.

    Attributes:
        labels: of one of ``INTEGER_TYPES``.
        layout: the number of images, channels and pixels, read from the shapes.
        grad: memory on the CPU that a backend may use for the gradient, float32 and contiguous; None if the caller
            provides none.
    """

    logits: Tensor
    labels: Tensor
    layout: Layout
    grad: Tensor | None = None

    @classmethod
    def checked(
        cls,
        logits: Tensor,
        labels: Tensor,
        loss: WeightedSum,
        offsets: Any = None,
        *,
        may_be_empty: bool = False,
    ) -> Request:
        """Makes a request after checking element types, shapes and devices.

        Args:
            offsets: ``Layout.offsets``, as a sequence or an array.
            may_be_empty: whether there may be no images, as in one of several requests that are scored as one.

        Raises:
            InvalidInput: one of them does not fit the loss.
        """
        if logits.dtype not in FLOAT_TYPES:
            raise InvalidInput("logits", f"got element type {_name(logits.dtype)}; expected {_names(FLOAT_TYPES)}")
        if labels.device != logits.device:
            raise InvalidInput("labels", f"got device {labels.device}; expected {logits.device}, like the logits")
        if labels.dtype not in INTEGER_TYPES:
            labels = _integers(labels)
        if logits.is_neg():  # As the imaginary part of a conjugate: memory has the negated values.
            logits = logits.detach().resolve_neg()
        return cls(logits, labels, loss.layout(logits.shape, labels.shape, offsets, may_be_empty=may_be_empty))

    def images(self) -> tuple[Request, ...]:
        """The images that ``Layout.offsets`` marks, each a request (1, K, pixels)."""
        _, channels, pixels, label_values, _ = self.layout
        sizes = self._sizes
        has_channels = self.labels.numel() == self.logits.numel()
        of_labels = (1, channels, -1) if has_channels else (1, -1)
        logits, labels = (
            tensor.detach().reshape(self.layout.images, -1, pixels).split(sizes)
            for tensor in (self.logits, self.labels)
        )
        return tuple(
            [
                Request(
                    scores.transpose(0, 1).reshape(1, channels, -1),
                    targets.transpose(0, 1).reshape(of_labels),
                    Layout(1, channels, size * pixels, label_values),
                )
                for scores, targets, size in zip(logits, labels, sizes, strict=True)
            ]
        )

    def join(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient of the logits, from those of ``images``."""
        images, channels, pixels, *_ = self.layout
        joined = grads[0].new_empty(images, channels, pixels)
        sizes = self._sizes
        for place, grad, size in zip(joined.split(sizes), grads, sizes, strict=True):
            place.copy_(grad.reshape(channels, size, pixels).transpose(0, 1))
        return joined.reshape(self.logits.shape)

    @property
    def _sizes(self) -> list[int]:
        """How many items of the first axis each of ``images`` has."""
        ends = self.layout.offsets or ()
        return [end - start for start, end in zip((0, *ends), ends, strict=False)]


@dataclass(frozen=True)
class Batch:
    """Requests that are computed together; they have the same element type and number of channels.

    Attributes:
        layouts: the layout of each request.
        sizes: the number of consecutive requests in each *joint*. A joint is scored like one request that holds all its
            images in order. Most joints are a single request.
    """

    requests: tuple[Request, ...]
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[Request], sizes: Sequence[int] | None = None) -> Batch:
        """Makes a batch; without ``sizes``, each request is a joint of its own."""
        layouts = tuple([request.layout for request in requests])
        return cls(tuple(requests), layouts, (1,) * len(requests) if sizes is None else tuple(sizes))

    def with_images(self) -> Batch:
        """The batch without requests that have no images, and without joints that have none."""
        filled = [[request for request in joint if request.layout.images] for joint in self.joints]
        return Batch.of([request for joint in filled for request in joint], [len(joint) for joint in filled if joint])

    @cached_property
    def joints(self) -> tuple[tuple[Request, ...], ...]:
        """The requests of each joint."""
        if len(self.sizes) == len(self.requests):
            return tuple((request,) for request in self.requests)
        stops = list(accumulate(self.sizes))
        return tuple(self.requests[stop - size : stop] for stop, size in zip(stops, self.sizes, strict=True))

    def divided(self, loss: WeightedSum) -> Batch:
        """The batch with one request for each image, where ``Layout.offsets`` marks images that the loss scores.

        Backends know no offsets: their images are the items of the first axis.
        """
        if not loss.scores_images or all(layout.offsets is None for layout in self.layouts):
            return self
        sizes = [sum(_parts(request) for request in joint) for joint in self.joints]
        requests = [part for r in self.requests for part in (r.images() if r.layout.offsets else (r,))]
        return Batch.of(requests, sizes)

    def join(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of each request, from those of ``divided``."""
        joined, first = [], 0
        for request in self.requests:
            own = grads[first : first + _parts(request)]
            joined.append(request.join(own) if request.layout.offsets else own[0])
            first += len(own)
        return tuple(joined)


def _parts(request: Request) -> int:
    return len(request.layout.offsets or (1,))


def _integers(labels: Tensor) -> Tensor:
    """Labels of another element type as integers. Floats and uint64 are read for it, so it waits for their device."""
    if labels.dtype in FLOAT_TYPES:
        integers: Tensor = whole_numbers(labels.detach().to(torch.promote_types(labels.dtype, torch.float32)))
        return integers
    if labels.dtype in (torch.uint16, torch.uint32):
        return labels.to(torch.int64)
    if labels.dtype != torch.uint64:
        raise wrong_type(_name(labels.dtype))
    if (labels.view(torch.int64) < 0).any():
        raise too_large(int(labels.cpu().numpy().max()))
    return labels.view(torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes[:-1])) + f" or {_name(dtypes[-1])}"


def classes_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Views or copies a tensor as (K, images x pixels); its elements are in the order (images, K, pixels)."""
    by_image = tensor.reshape(layout.images, layout.channels, layout.pixels)
    return by_image.transpose(0, 1).reshape(layout.channels, -1)


def images_first(rows: Tensor, request: Request) -> Tensor:
    """Copies (K, images x pixels) to a contiguous tensor of the shape of the request's logits."""
    layout = request.layout
    by_class = rows.reshape(layout.channels, layout.images, layout.pixels)
    return by_class.transpose(0, 1).reshape(request.logits.shape).contiguous()
