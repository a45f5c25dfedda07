"""This process as a target: ``lovasz.core`` computes on the logits' device. Imported only when it is asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lovasz import core, spec, wire
from lovasz.client.target import Device, ServerInfo
from lovasz.client.tensors import AnyArray, encode_labels
from lovasz.core.arrays import as_tensor
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import InvalidInput
from lovasz.spec.arrays import is_torch
from lovasz.version import VERSION


@dataclass(frozen=True)
class Call:
    """A request, checked, as tensors on the logits' device."""

    logits: torch.Tensor
    labels: torch.Tensor
    loss: spec.WeightedSum
    layout: spec.Layout
    want_grad: bool
    as_numpy: bool

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it in this thread; the timeout has no effect."""
        started = time.monotonic()
        if self.layout.images:
            offsets = self.layout.offsets
            result = core.compute(self.logits, self.labels, self.loss, offsets=offsets, want_grad=self.want_grad)
        else:
            result = self._of_no_images()
        timing = spec.Timing(0.0, 0.0, time.monotonic() - started, 1)
        grad: Any = result.grad
        if self.as_numpy and grad is not None:
            grad = grad.cpu().numpy()
        return spec.Result(result.loss, grad, result.terms, result.intersection, result.union, timing)

    def discard(self) -> None:
        """It holds nothing but tensors."""

    def _of_no_images(self) -> spec.Result[torch.Tensor]:
        request = Request(self.logits, self.labels, self.layout)
        (answer,) = submit([request], self.loss, self.logits.device, want_grad=self.want_grad).collect()
        assert isinstance(answer, spec.Result)
        return answer


class InProcessTarget:
    """No server: for tests, laptops, and trainers that need none."""

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
        timeout: float,
    ) -> Call:
        if joint is not None and joint.world_size > 1:
            raise InvalidInput(
                "joint",
                f"got world_size {joint.world_size} with the target 'inprocess'; expected a server, or one rank",
            )
        narrow = labels if is_torch(labels) else encode_labels(labels).array()
        scores = as_tensor("logits", logits).detach()
        targets = as_tensor("labels", narrow).detach().to(scores.device)
        layout = Request.checked(scores, targets, loss, offsets, may_be_empty=joint is not None).layout
        return Call(scores, targets, loss, layout, want_grad, as_numpy=not is_torch(logits))

    def abort_step(self, abort: wire.Abort, timeout: float) -> None:
        """There are no other ranks."""

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        """There are no other ranks."""

    def server_info(self, timeout: float) -> ServerInfo:
        device = Device("cpu", f"this process, torch {torch.__version__}", healthy=True)
        return ServerInfo(VERSION, (device,), spec.LOSS_KINDS, memory_budget_bytes=0, max_requests=0)

    def transport(self, timeout: float, *, on_gpu: bool) -> str:
        return ""

    def close(self) -> None:
        pass
