"""The pixels of all ranks on every rank: tensors as bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lovasz.core.batch import Request
from lovasz.core.distributed.group import Group
from lovasz.core.distributed.header import Sizes
from lovasz.spec import WeightedSum

_ALIGNMENT = 8
"""Bytes; the address of a tensor is a multiple of the size of its elements."""


def sent_labels(labels: Tensor) -> Tensor:
    """Labels in the smallest type that holds all of them."""
    if labels.dtype == torch.bool:
        return labels.view(torch.uint8)
    if labels.element_size() == 1 or labels.numel() == 0:
        return labels
    low, high = (int(value) for value in torch.aminmax(labels))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return labels.to(dtype)
    return labels


@dataclass(frozen=True)
class _Part:
    """A tensor in a rank's bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, data: Tensor) -> Tensor:
        return data[self.start : self.stop].view(self.dtype).view(self.shape)


def _parts(sizes: Sizes) -> tuple[_Part, _Part, _Part]:
    """Where a rank's logits, labels and offsets are in its bytes."""
    logits = _Part(0, sizes.logits_dtype, sizes.logits)
    labels = _Part(_aligned(logits.stop), sizes.labels_dtype, sizes.labels)
    return logits, labels, _Part(_aligned(labels.stop), torch.int64, (sizes.offsets or 0,))


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def nbytes(sizes: Sizes) -> int:
    """The bytes that hold a rank's tensors, more than 0."""
    return max(_aligned(_parts(sizes)[-1].stop), _ALIGNMENT)


def gather(group: Group, own: Request, labels: Tensor, loss: WeightedSum, sizes: Mapping[int, Sizes]) -> list[Request]:
    """The requests of all ranks with data, in the order of the ranks; this rank's is ``own`` itself.

    Every rank sends as many bytes as the largest one has.

    Args:
        labels: the result of ``sent_labels``.
        sizes: of all ranks with data.
    """
    if len(sizes) == 1:
        return [own]
    device = group.device_for(own.logits)
    data = torch.empty(max(map(nbytes, sizes.values())), dtype=torch.uint8, device=device)
    offsets = torch.tensor(own.layout.offsets or (), dtype=torch.int64)
    for part, tensor in zip(_parts(sizes[group.rank]), (own.logits.detach(), labels, offsets), strict=True):
        part.of(data).copy_(tensor.reshape(part.shape))
    requests = []
    of_ranks = group.bytes(data)
    for rank, of_rank in sizes.items():
        if rank == group.rank:
            requests.append(own)
            continue
        logits, targets, ends = (part.of(of_ranks[rank]) for part in _parts(of_rank))
        offsets_of = None if of_rank.offsets is None else ends.tolist()
        logits, targets = logits.to(own.logits.device), targets.to(own.logits.device)
        requests.append(Request.checked(logits, targets, loss, offsets_of, may_be_empty=True))
    return requests


def pass_on(group: Group, sizes: Mapping[int, Sizes]) -> None:
    """Takes part in ``gather`` as a rank that has left."""
    if len(sizes) > 1:
        group.bytes(torch.zeros(max(map(nbytes, sizes.values())), dtype=torch.uint8, device="cpu"))
