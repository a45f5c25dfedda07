"""Brings requests of any shape into one flat batch: a row a class, the pixels of all requests behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lovasz.core.segments import Groups
from lovasz.spec import InvalidInput, Layout, WeightedSum

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class Request:
    """The tensors of one request, in the shapes of their caller, and the sizes that these come to.

    Attributes:
        grad: room for the gradient, float32 and contiguous on the CPU, which a path may use or leave alone; None if
            the caller has none.
    """

    logits: Tensor
    labels: Tensor
    layout: Layout
    grad: Tensor | None = None

    @classmethod
    def checked(cls, logits: Tensor, labels: Tensor, loss: WeightedSum) -> Request:
        """Raises:
        InvalidInput: an element type, a shape or a device that does not fit.
        """
        if logits.dtype not in FLOAT_TYPES:
            raise InvalidInput("logits", f"got element type {_name(logits.dtype)}; expected {_names(FLOAT_TYPES)}")
        if labels.dtype not in INTEGER_TYPES:
            raise InvalidInput("labels", f"got element type {_name(labels.dtype)}; expected {_names(INTEGER_TYPES)}")
        if labels.device != logits.device:
            raise InvalidInput("labels", f"got device {labels.device}; expected {logits.device} as the logits")
        return cls(logits, labels, loss.layout(logits.shape, labels.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes[:-1])) + f" or {_name(dtypes[-1])}"


@dataclass(frozen=True)
class Ragged:
    """A batch, flat.

    Attributes:
        logits: float32 (float64 for float64 requests), shape (K, P): K classes (softmax) or binary labels (hinge).
            May be a view of a caller's tensor: not to be written to.
        labels: int64, shape (P,) for softmax losses, (K, P) for the hinge.
        requests: the pixels of each request are a group.
        layouts: each request's sizes.
    """

    logits: Tensor
    labels: Tensor
    requests: Groups
    layouts: tuple[Layout, ...]

    @cached_property
    def images(self) -> Groups:
        """The pixels of each image are a group."""
        sizes = [layout.pixels for layout in self.layouts for _ in range(layout.images)]
        return Groups.of_sizes(sizes, self.logits.device)


def flatten(requests: Sequence[Request], loss: WeightedSum, device: torch.device) -> Ragged:
    """Puts the requests, which must agree in element type and channels, behind one another on the device."""
    layouts = tuple(request.layout for request in requests)
    channels = layouts[0].channels
    compute_type = torch.float64 if requests[0].logits.dtype == torch.float64 else torch.float32
    logits, labels = [], []
    for request in requests:
        layout = request.layout
        moved = request.logits.detach().to(device, non_blocking=True)
        shape = (layout.images, channels, layout.pixels)
        logits.append(moved.reshape(shape).transpose(0, 1).reshape(channels, -1).to(compute_type))
        label = request.labels.to(device, non_blocking=True)
        if loss.is_hinge:
            labels.append(label.reshape(shape).transpose(0, 1).reshape(channels, -1).to(torch.int64))
        else:
            labels.append(label.reshape(-1).to(torch.int64))
    return Ragged(
        logits=logits[0] if len(logits) == 1 else torch.cat(logits, dim=1),
        labels=labels[0] if len(labels) == 1 else torch.cat(labels, dim=-1),
        requests=Groups.of_sizes([layout.images * layout.pixels for layout in layouts], device),
        layouts=layouts,
    )


def unflatten(flat: Tensor, batch: Ragged, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Cuts a (K, P) tensor into one contiguous tensor a request, in the shapes given."""
    parts = torch.split(flat, list(batch.requests.sizes), dim=1)
    return [
        part.reshape(layout.channels, layout.images, layout.pixels).transpose(0, 1).reshape(shape).contiguous()
        for part, layout, shape in zip(parts, batch.layouts, shapes, strict=True)
    ]
