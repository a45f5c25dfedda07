"""A batch as flat tensors: one row per class, with the pixels of all requests one after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lovasz.core.backends.torch.segments import Groups
from lovasz.core.batch import Batch, classes_first, images_first
from lovasz.core.plan import FUSE_ALL, Plan, Term


@dataclass(frozen=True)
class Flat:
    """The tensors of a batch as flat tensors.

    Attributes:
        logits: float32 (float64 for float64 requests), shape (K, P). May be a view of a caller's tensor, so nothing
            writes to it.
        labels: int64, shape (P,) for softmax losses, (K, P) for the hinge.
    """

    plan: Plan
    logits: Tensor
    labels: Tensor

    @classmethod
    def of(cls, plan: Plan, batch: Batch) -> Flat:
        """Puts the requests of a batch, in their order, into flat tensors on the device."""
        first, device = batch.requests[0], plan.device
        compute_type = torch.float64 if first.logits.dtype == torch.float64 else torch.float32
        logits, labels = [], []
        for request in batch.requests:
            on_device = request.logits.detach().to(device, non_blocking=True)
            logits.append(classes_first(on_device, request.layout).to(compute_type))
            label = request.labels.to(device, non_blocking=True)
            labels.append(
                (classes_first(label, request.layout) if plan.is_binary else label.reshape(-1)).to(torch.int64)
            )
        if len(logits) == 1:
            return cls(plan, logits[0], labels[0])
        return cls(plan, torch.cat(logits, dim=1), torch.cat(labels, dim=-1))

    @cached_property
    def joints(self) -> Groups:
        """The pixels of each joint."""
        return Groups.of(self.plan.planes(FUSE_ALL).joints, self.plan.device)

    @cached_property
    def images(self) -> Groups:
        """The pixels of each image."""
        return Groups.of(self.plan.planes(FUSE_ALL).images, self.plan.device)

    def groups(self, term: Term) -> Groups:
        return self.images if term.per_image else self.joints

    def split(self, rows: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Splits (K, P) into one contiguous tensor per request, of the shape of its logits."""
        parts = torch.split(rows, [layout.images * layout.pixels for layout in self.plan.layouts], dim=1)
        return tuple(images_first(part, request) for part, request in zip(parts, batch.requests, strict=True))
