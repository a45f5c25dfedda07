"""The steps of a joint loss: this rank's input is checked, the ranks compare settings, and each computes the loss.

There are two ways to compute it, which give the same bits. Each rank gets the pixels of all ranks and computes the
whole joint; or, for large joints on a CPU, each computes its own pixels, and the ranks add their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lovasz.core.answers import Answer, fault_of, result_of_rank
from lovasz.core.batch import Batch, Request
from lovasz.core.computed import Fault
from lovasz.core.dispatch import Backend, choose, submit
from lovasz.core.distributed import pixels
from lovasz.core.distributed.absence import present
from lovasz.core.distributed.group import Group, Parts
from lovasz.core.distributed.header import Sizes, exchange, raise_first, settings
from lovasz.core.plan import Plan
from lovasz.spec import GradientReduction, InvalidInput, Result, WeightedSum

TABLES_FROM_PIXELS = 1 << 19
"""In joints of fewer pixels, every rank gets all pixels: that takes about as many bytes as the tables, or fewer."""


def compute_joint(
    prepare: Callable[[], tuple[Request, WeightedSum]],
    given: Any,
    *,
    want_grad: bool,
    gradient_reduction: GradientReduction = "sum",
) -> tuple[Result[Tensor], int]:
    """The loss of all ranks' pixels, and the gradient of this rank's logits. All ranks of the group have to call it.

    Ranks that have left are no part of it. If this rank has left, it first waits until all others have, too.

    Args:
        prepare: makes this rank's request, which may have no images, and the loss. What it raises is raised on every
            rank.
        given: the process group, or ``"world"``.
        want_grad: whether this rank wants the gradient.
        gradient_reduction: what the caller makes of the gradient, which here is multiplied by nothing; the ranks must
            agree.

    Returns:
        (result, the number of ranks in the group).

    Raises:
        InvalidInput: the input of a rank is invalid, or the ranks differ; on every rank, with the same text.
        RuntimeError: a rank failed for another reason, on every rank; or the exchange failed while this rank was away.
    """
    group = Group(given)
    with present(group):
        return _computed(group, prepare, want_grad, gradient_reduction), group.size


def _computed(
    group: Group,
    prepare: Callable[[], tuple[Request, WeightedSum]],
    want_grad: bool,
    gradient_reduction: GradientReduction = "sum",
) -> Result[Tensor]:
    try:
        request, loss = prepare()
        labels = pixels.sent_labels(request.labels)
        backend = choose([request], loss, request.logits.device)
        common = settings(request, loss, want_grad, gradient_reduction, backend.value)
        own = common, Sizes.of(request, labels.dtype)
    except Exception as fault:
        exchange(group, fault)
        raise
    sizes = exchange(group, own)
    # Tables are on the CPU, from where NCCL alone cannot send them.
    can_add = backend is Backend.NUMBA and group.device.type == "cpu" and len(sizes) == group.size
    if can_add and adds_tables(list(sizes.values()), loss):
        return _in_parts(group, request, loss, list(sizes.values()), want_grad)
    requests = pixels.gather(group, request, labels, loss, sizes)
    pending = submit(requests, loss, request.logits.device, joined=[len(requests)], want_grad=want_grad)
    answers = dict(zip(sizes, pending.collect(), strict=True))
    return replace(_of_rank(answers, group.rank), ranks=len(answers))


def adds_tables(sizes: Sequence[Sizes], loss: WeightedSum) -> bool:
    """Whether the ranks add tables, in place of sending their pixels; every rank must have images for that."""
    pixels = [_pixels(one, loss) for one in sizes]
    return len(sizes) > 1 and min(pixels) > 0 and sum(pixels) >= TABLES_FROM_PIXELS


def _pixels(sizes: Sizes, loss: WeightedSum) -> int:
    """The pixels of a rank; a pixel counts once, however many classes or labels it has."""
    layout = loss.layout(sizes.logits, sizes.labels, may_be_empty=True)
    return layout.images * layout.pixels


def _in_parts(
    group: Group, request: Request, loss: WeightedSum, sizes: Sequence[Sizes], want_grad: bool
) -> Result[Tensor]:
    """Computes this rank's part of the joint; the ranks add their tables and what else is of all pixels."""
    from lovasz.core.backends.numba import compute as numba

    images = [one.logits[0] if one.offsets is None else one.offsets for one in sizes]
    ranks = Parts(group, images, [_pixels(one, loss) for one in sizes])
    own = Batch.of([request])
    divided = own.divided(loss)
    plan = Plan.of(divided, loss, request.logits.device)
    computed = numba.compute(plan, divided, want_grad=want_grad, ranks=ranks)
    values = computed.values()
    if values.faults[[Fault.BAD_LABEL, Fault.OUT_OF_RANGE]].any():
        raise_first(group, fault_of(request, loss, values, 0))
    grad = None
    if computed.grads is not None:
        (grad,) = own.join(computed.grads) if divided is not own else computed.grads
    result = result_of_rank(plan, request, grad, values, sum(images[: group.rank]))
    return replace(result, ranks=group.size)


def _of_rank(answers: Mapping[int, Answer], rank: int) -> Result[Tensor]:
    """A rank's answer; if a rank has a fault, the first such fault is raised on every rank."""
    for other, answer in answers.items():
        if isinstance(answer, InvalidInput):
            raise InvalidInput(f"rank {other}: {answer.field}", answer.problem)
    own = answers[rank]
    assert isinstance(own, Result)
    return own
