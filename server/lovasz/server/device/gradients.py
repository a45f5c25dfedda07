"""Copies gradients to where they are sent from, in the element type of the logits, scaled so that none underflows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lovasz.core.answers import Answer
from lovasz.server.memory.device_staging import DeviceStaging
from lovasz.server.schedule.job import Caller
from lovasz.spec import Result

_FLOAT16_PEAK_EXPONENT = 14
"""Float16 gradients are scaled so that the largest is in [2^13, 2^14): a quarter of the range is left."""
_LARGEST_SCALE_EXPONENT = 126
_BLOCK_ELEMENTS = 1 << 15


def to_callers(answers: Sequence[Answer], callers: Sequence[Caller]) -> list[tuple[Answer, float]]:
    """Queues the copies of a job's gradients on the current stream.

    Returns:
        For each caller the answer, its gradient on the host once the stream has done its work, or on the device if its
        caller shares memory there; and the factor that the gradient was multiplied by, the same for the whole job.
    """
    grads = [answer.grad for answer in answers if isinstance(answer, Result) and answer.grad is not None]
    if len(grads) < len(answers):
        return [(answer, 1.0) for answer in answers]
    dtype = callers[0].request.logits.dtype
    scale = wire_scale(grads, dtype)
    placed: list[tuple[Answer, float]] = []
    for answer, grad, caller in zip(answers, grads, callers, strict=True):
        assert isinstance(answer, Result)
        place: torch.Tensor | None
        if isinstance(caller.staging, DeviceStaging):
            place = (grad.mul_(scale) if scale != 1 else grad).to(dtype).contiguous()
        else:
            place = None if caller.staging is None else caller.staging.grad
            if place is None:
                place = torch.empty(grad.shape, dtype=dtype)
            write_scaled(grad, scale, place)
        placed.append((Result(answer.loss, place, answer.terms, answer.intersection, answer.union), scale))
    return placed


def wire_scale(grads: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """The power of two that keeps float16 gradients from underflow; 1 for other element types."""
    if dtype != torch.float16:
        return 1.0
    extremes = [_extremes(grad) for grad in grads if grad.numel()]
    peak = max((max(-smallest, largest) for smallest, largest in extremes), default=0.0)
    if not 0 < peak < math.inf:
        return 1.0
    # The scale itself must be a float32, so that the product is exact.
    return math.ldexp(1.0, min(_FLOAT16_PEAK_EXPONENT - math.frexp(peak)[1], _LARGEST_SCALE_EXPONENT))


def write_scaled(grad: torch.Tensor, scale: float, place: torch.Tensor) -> None:
    """Writes a gradient times the scale to its place, in the element type of the place; overwrites the gradient."""
    if grad.device.type != "cpu":
        place.copy_(grad.mul_(scale) if scale != 1 else grad, non_blocking=True)
    elif grad.data_ptr() != place.data_ptr():
        # In blocks that stay in cache, and are too small for torch to use other threads: these would spin for a while
        # afterwards, on cores that the computation needs.
        for source, target in zip(
            grad.view(-1).split(_BLOCK_ELEMENTS), place.view(-1).split(_BLOCK_ELEMENTS), strict=True
        ):
            target.copy_(source.mul_(scale) if scale != 1 else source)


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    if values.device.type == "cpu":
        array = values.numpy()
        return float(array.min()), float(array.max())
    smallest, largest = torch.aminmax(values)
    return float(smallest), float(largest)
