"""Brings requests of any shape into one flat batch: a row a class, the pixels of all requests behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lovasz.core.backends.torch.segments import Groups
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


@dataclass(frozen=True)
class Batch:
    """Requests that are computed at once; they agree in element type and channels.

    Attributes:
        sizes: how many requests, behind one another, make up each *joint*: these are scored as if their images stood
            in one request, in that order. Most joints are of one request.
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

    @property
    def joint_of_request(self) -> list[int]:
        return [joint for joint, size in enumerate(self.sizes) for _ in range(size)]

    @property
    def images(self) -> list[int]:
        """Images of each joint."""
        return [sum(request.layout.images for request in joint) for joint in self.joints]

    @property
    def pixels(self) -> list[int]:
        """Pixels of each joint."""
        return [sum(request.layout.images * request.layout.pixels for request in joint) for joint in self.joints]


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
        source: the requests.
        joints: the pixels of each joint are a group.
    """

    logits: Tensor
    labels: Tensor
    source: Batch
    joints: Groups

    @cached_property
    def images(self) -> Groups:
        """The pixels of each image are a group."""
        layouts = [request.layout for request in self.source.requests]
        sizes = [layout.pixels for layout in layouts for _ in range(layout.images)]
        return Groups.of_sizes(sizes, self.logits.device)


def flatten(batch: Batch, loss: WeightedSum, device: torch.device) -> Ragged:
    """Puts the requests behind one another on the device."""
    first = batch.requests[0]
    channels = first.layout.channels
    compute_type = torch.float64 if first.logits.dtype == torch.float64 else torch.float32
    logits, labels = [], []
    for request in batch.requests:
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
        source=batch,
        joints=Groups.of_sizes(batch.pixels, device),
    )


def unflatten(flat: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Cuts a (K, P) tensor into one contiguous tensor a request, in the shape of its logits."""
    parts = torch.split(flat, [request.layout.images * request.layout.pixels for request in batch.requests], dim=1)
    return tuple(
        part.reshape(request.layout.channels, request.layout.images, request.layout.pixels)
        .transpose(0, 1)
        .reshape(request.logits.shape)
        .contiguous()
        for part, request in zip(parts, batch.requests, strict=True)
    )
