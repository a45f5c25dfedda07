"""What is timed: our own ways to compute a loss, the usual implementation, and PyTorch's cross-entropy."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from benchmarks import usual
from benchmarks.workloads import Pair, Problem, Workload
from lovasz.core import LovaszHinge, LovaszSoftmax, compute, lovasz_hinge, lovasz_softmax
from lovasz.core.answers import Part, Pending
from lovasz.core.batch import Batch, Request
from lovasz.core.dispatch import Backend, submit
from lovasz.core.plan import Plan
from lovasz.spec import Result, weighted_sum

Answers = list[tuple[float, Tensor]]
"""The loss and the gradient of each request."""
Run = Callable[[], Answers]
"""Forward and backward, for all requests of a workload."""
Criterion = Callable[[Tensor, Tensor], Tensor]

TORCH_LOGITS_BYTES = 40 << 20
"""The torch backend is slow on a CPU: it is timed only where the logits take at most this many bytes."""


class Truth(enum.Enum):
    """The loss that a contender computes: its answers are compared with this one in float64."""

    LOVASZ = "lovasz"
    CROSS_ENTROPY = "cross-entropy"


class Contender(enum.Enum):
    """The values are what the tables call them."""

    OURS = "lovasz.core"
    """As a user calls it, through autograd; one request after the other."""
    BATCHED = "lovasz.core, one batch"
    """All requests in one call, as the server computes them."""
    SORTED = "lovasz.core, sorted"
    TABLES = "lovasz.core, tables"
    TORCH = "lovasz.core, torch path"
    USUAL = usual.NAME
    CROSS_ENTROPY = "torch cross-entropy"
    """For the hinge, binary cross-entropy."""
    WARM_CROSS_ENTROPY = "torch cross-entropy, warm pages"
    """The same in a process that keeps the memory that it has freed: the system maps none of it anew."""

    @property
    def truth(self) -> Truth:
        return Truth.CROSS_ENTROPY if self.is_cross_entropy else Truth.LOVASZ

    @property
    def is_compiled(self) -> bool:
        """Whether Numba compiles it."""
        return self in (Contender.OURS, Contender.BATCHED, Contender.SORTED, Contender.TABLES)

    @property
    def is_cross_entropy(self) -> bool:
        return self in (Contender.CROSS_ENTROPY, Contender.WARM_CROSS_ENTROPY)


def contenders_on_cpu(workload: Workload) -> list[Contender]:
    """The contenders of a workload, with those of our own variants that show something which OURS alone does not."""
    entered = [Contender.OURS]
    if workload.requests > 1:
        entered.append(Contender.BATCHED)
    elif importlib.util.find_spec("numba") is not None:
        entered += [Contender.SORTED] if workload.growth else [Contender.SORTED, Contender.TABLES]
        if not workload.growth and workload.logits_bytes <= TORCH_LOGITS_BYTES:
            entered.append(Contender.TORCH)
    warm = [] if workload.growth else [Contender.WARM_CROSS_ENTROPY]
    return [*entered, Contender.USUAL, Contender.CROSS_ENTROPY, *warm]


def bind(contender: Contender, problem: Problem, pairs: Sequence[Pair]) -> Run:
    """Prepares a contender for these requests. The result can be called any number of times."""
    loss = LovaszSoftmax() if problem is Problem.SOFTMAX else LovaszHinge()
    if contender is Contender.BATCHED:
        return lambda: _in_one_batch(pairs, loss)
    if contender is Contender.TORCH:
        return lambda: [_by_torch(logits, labels, loss) for logits, labels in pairs]
    if contender in (Contender.SORTED, Contender.TABLES):
        return lambda: [_by_numba(contender, logits, labels, loss) for logits, labels in pairs]
    criterion = _criterion(contender, problem)
    if contender.is_cross_entropy and problem is Problem.HINGE:
        pairs = [(logits, labels.to(logits.dtype)) for logits, labels in pairs]
    leaves = [(logits.detach().requires_grad_(), labels) for logits, labels in pairs]
    return lambda: _through_autograd(criterion, leaves)


def _criterion(contender: Contender, problem: Problem) -> Criterion:
    softmax = problem is Problem.SOFTMAX
    if contender is Contender.OURS:
        return lovasz_softmax if softmax else lovasz_hinge
    if contender.is_cross_entropy:
        return functional.cross_entropy if softmax else functional.binary_cross_entropy_with_logits
    criterion: Criterion = usual.losses().LovaszLoss("multiclass" if softmax else "binary", from_logits=True)
    return criterion


def _through_autograd(criterion: Criterion, leaves: Sequence[Pair]) -> Answers:
    """One request after the other. The caller gets the gradients: no call finds those of the call before."""
    answers = []
    for leaf, labels in leaves:
        loss = criterion(leaf, labels)
        loss.backward()
        assert leaf.grad is not None
        answers.append((loss.detach(), leaf.grad))
        leaf.grad = None
    return [(loss.item(), grad) for loss, grad in answers]


def _by_torch(logits: Tensor, labels: Tensor, loss: LovaszSoftmax | LovaszHinge) -> tuple[float, Tensor]:
    result = compute(logits, labels, loss, backend=Backend.TORCH)
    assert result.grad is not None
    return result.loss, result.grad


def _by_numba(
    contender: Contender, logits: Tensor, labels: Tensor, loss: LovaszSoftmax | LovaszHinge
) -> tuple[float, Tensor]:
    """The compiled backend with all segments sorted, or all counted."""
    from lovasz.core.backends.numba import compute as numba_compute
    from lovasz.core.backends.numba.extension import COUNT_ALL, SORT_ALL

    total = weighted_sum(loss)
    batch = Batch.of([Request.checked(logits, labels, total)])
    plan = Plan.of(batch, total, logits.device)
    thresholds = SORT_ALL if contender is Contender.SORTED else COUNT_ALL
    computed = numba_compute.compute(plan, batch, want_grad=True, thresholds=thresholds)
    (answer,) = Pending(batch, (Part((0,), plan, batch, computed),), total, want_grad=True).collect()
    assert isinstance(answer, Result)
    assert answer.grad is not None
    return answer.loss, answer.grad


def _in_one_batch(pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge) -> Answers:
    total = weighted_sum(loss)
    requests = [Request.checked(logits, labels, total) for logits, labels in pairs]
    answers: Answers = []
    for answer in submit(requests, total, pairs[0][0].device).collect():
        assert isinstance(answer, Result)
        assert answer.grad is not None
        answers.append((answer.loss, answer.grad))
    return answers
