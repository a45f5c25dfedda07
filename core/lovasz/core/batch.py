"""Requests and batches of them: the tensors as callers hand them over, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lovasz.spec import InvalidInput, Layout, WeightedSum

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class Request:
    """The tensors of one request, in their caller's shapes.

    Attributes:
        layout: the sizes that these shapes stand for.
        grad: memory for the gradient, float32 and contiguous, on the CPU; a backend may use it. None if the caller
            offers none.
    """

    logits: Tensor
    labels: Tensor
    layout: Layout
    grad: Tensor | None = None

    @classmethod
    def checked(cls, logits: Tensor, labels: Tensor, loss: WeightedSum) -> Request:
        """Checks element types, shapes and devices.

        Raises:
            InvalidInput: one of them does not fit the loss.
        """
        if logits.dtype not in FLOAT_TYPES:
            raise InvalidInput("logits", f"got element type {_name(logits.dtype)}; expected {_names(FLOAT_TYPES)}")
        if labels.dtype not in INTEGER_TYPES:
            raise InvalidInput("labels", f"got element type {_name(labels.dtype)}; expected {_names(INTEGER_TYPES)}")
        if labels.device != logits.device:
            raise InvalidInput("labels", f"got device {labels.device}; expected {logits.device} as the logits")
        return cls(logits, labels, loss.layout(logits.shape, labels.shape))


@dataclass(frozen=True)
class Batch:
    """Requests that are computed at once; they agree in element type and channels.

    Attributes:
        sizes: how many consecutive requests make up each *joint*. A joint is scored as one request that holds all its
            images in order. Most joints are one request.
    """

    requests: tuple[Request, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[Request], sizes: Sequence[int] | None = None) -> Batch:
        """Each request on its own, unless sizes are given."""
        return cls(tuple(requests), (1,) * len(requests) if sizes is None else tuple(sizes))

    @cached_property
    def joints(self) -> tuple[tuple[Request, ...], ...]:
        """The requests of each joint."""
        stops = list(accumulate(self.sizes))
        return tuple(self.requests[stop - size : stop] for stop, size in zip(stops, self.sizes, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes[:-1])) + f" or {_name(dtypes[-1])}"


def classes_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Views or copies (images, K, pixels), of any shape with these elements, as (K, images x pixels)."""
    by_image = tensor.reshape(layout.images, layout.channels, layout.pixels)
    return by_image.transpose(0, 1).reshape(layout.channels, -1)


def images_first(rows: Tensor, request: Request) -> Tensor:
    """Copies (K, images x pixels) into a contiguous tensor in the shape of the request's logits."""
    layout = request.layout
    by_class = rows.reshape(layout.channels, layout.images, layout.pixels)
    return by_class.transpose(0, 1).reshape(request.logits.shape).contiguous()
