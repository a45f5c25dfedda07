"""The steps of a joint loss: this rank's input is checked, the ranks compare settings, and each computes the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lovasz.core.answers import Answer
from lovasz.core.batch import Request
from lovasz.core.dispatch import choose, submit
from lovasz.core.distributed import pixels
from lovasz.core.distributed.group import Group
from lovasz.core.distributed.header import Sizes, exchange, settings
from lovasz.spec import InvalidInput, Result, WeightedSum


def compute_joint(prepare: Callable[[], tuple[Request, WeightedSum]], given: Any, *, want_grad: bool) -> Result[Tensor]:
    """The loss of all ranks' pixels, and the gradient of this rank's logits. All ranks of the group have to call it.

    Args:
        prepare: makes this rank's request, which may have no images, and the loss. What it raises is raised on every
            rank.
        given: the process group, or ``"world"``.
        want_grad: whether this rank wants the gradient.

    Raises:
        InvalidInput: the input of a rank is invalid, or the ranks differ; on every rank, with the same text.
        RuntimeError: a rank failed for another reason; on every rank.
    """
    group = Group(given)
    try:
        request, loss = prepare()
        labels = pixels.sent_labels(request.labels)
        backend = choose([request], loss, request.logits.device)
        own = settings(request, loss, want_grad, backend.value), Sizes.of(request, labels.dtype)
    except Exception as fault:
        exchange(group, fault)
        raise
    sizes = exchange(group, own)
    requests = pixels.gather(group, request, labels, loss, sizes)
    pending = submit(requests, loss, request.logits.device, joined=[group.size], want_grad=want_grad)
    return replace(_of_rank(pending.collect(), group.rank), ranks=group.size)


def _of_rank(answers: list[Answer], rank: int) -> Result[Tensor]:
    """A rank's answer; if a rank has a fault, the first such fault is raised on every rank."""
    for place, answer in enumerate(answers):
        if isinstance(answer, InvalidInput):
            raise InvalidInput(f"rank {place}: {answer.field}", answer.problem)
    own = answers[rank]
    assert isinstance(own, Result)
    return own
