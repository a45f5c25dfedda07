"""Requests whose shapes were checked, kept for the next calls: trainers send the same few kinds again and again."""

from __future__ import annotations

from functools import lru_cache

from lovasz import spec, wire
from lovasz.client.tensors import AnyArray, Outgoing

KEPT_REQUESTS = 64
"""The most requests that are kept, in a process: one for each loss with its shapes and element types."""


def checked_request(
    loss: spec.WeightedSum,
    logits: Outgoing,
    labels: Outgoing,
    want_grad: bool,
    run: str,
    offsets: AnyArray | None,
    may_be_empty: bool,
) -> wire.Request:
    """A request without places in shared memory and in a joint step; the same object for calls of the same kind.

    So what a request works out once, such as its header, is not worked out again. With offsets, which differ from call
    to call, it is not kept.

    Raises:
        InvalidInput: see :meth:`lovasz.wire.Request.checked`.
    """
    if offsets is not None:
        return wire.Request.checked(
            loss, logits.spec, labels.spec, want_grad, run=run, offsets=offsets, may_be_empty=may_be_empty
        )
    shapes = logits.source.shape, labels.source.shape
    return _kept(loss, logits.dtype, labels.dtype, shapes, want_grad, run, may_be_empty)


@lru_cache(maxsize=KEPT_REQUESTS)
def _kept(
    loss: spec.WeightedSum,
    logits: wire.DType,
    labels: wire.DType,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    want_grad: bool,
    run: str,
    may_be_empty: bool,
) -> wire.Request:
    of_logits, of_labels = (tuple(shape) for shape in shapes)  # Those of torch are tuples of their own kind.
    specs = wire.TensorSpec(logits, of_logits), wire.TensorSpec(labels, of_labels)
    return wire.Request.checked(loss, *specs, want_grad, run=run, may_be_empty=may_be_empty)
