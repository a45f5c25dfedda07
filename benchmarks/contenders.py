"""Who is timed: our own ways to compute a loss, the usual implementation, and torch's cross-entropy as a yardstick."""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from textbook import textbook_hinge, textbook_softmax
from torch import Tensor
from torch.nn import functional
from workloads import Pair, Problem, Workload

from lovasz.core import LovaszHinge, LovaszSoftmax, compute, lovasz_hinge, lovasz_softmax
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.spec import Result, weighted_sum

Answers = list[tuple[float, Tensor]]
"""The loss and the gradient of each request."""
Run = Callable[[], Answers]
"""Forward and backward, for all requests of a workload."""
Criterion = Callable[[Tensor, Tensor], Tensor]

SMP = "segmentation-models-pytorch"
SMP_MODULE = "segmentation_models_pytorch"
TORCH_PATH_BYTES = 40 << 20
"""torch's path is slow on a CPU: it is timed on workloads of at most so many bytes of logits."""


class Truth(enum.Enum):
    """What a contender's answers are held against, in float64."""

    LOVASZ = "lovasz"
    CROSS_ENTROPY = "cross-entropy"


class Contender(enum.Enum):
    OURS = "lovasz.core"
    """As a user calls it, through autograd; requests one after the other."""
    BATCHED = "lovasz.core, one batch"
    """All requests in one call, as the server does it."""
    SORTED = "lovasz.core, sorted"
    TABLES = "lovasz.core, tables"
    TORCH = "lovasz.core, torch path"
    USUAL = "the usual implementation"
    CROSS_ENTROPY = "torch cross-entropy"
    """For the hinge, binary cross-entropy."""

    @property
    def truth(self) -> Truth:
        return Truth.CROSS_ENTROPY if self is Contender.CROSS_ENTROPY else Truth.LOVASZ


FORCED = {
    Contender.SORTED: Backend.NUMBA_SORTED,
    Contender.TABLES: Backend.NUMBA_TABLES,
    Contender.TORCH: Backend.TORCH,
}


def contenders_of(workload: Workload, device: torch.device) -> list[Contender]:
    """Who enters: the variants of our own where they tell something that :attr:`Contender.OURS` alone does not."""
    entered = [Contender.OURS]
    compiled = device.type == "cpu" and importlib.util.find_spec("numba") is not None
    if workload.requests > 1:
        entered.append(Contender.BATCHED)
    elif compiled:
        entered += [Contender.SORTED] if workload.growth else [Contender.SORTED, Contender.TABLES]
    single = workload.requests == 1 and not workload.growth
    if device.type == "cuda" or (compiled and single and workload.logits_bytes <= TORCH_PATH_BYTES):
        entered.append(Contender.TORCH)
    return [*entered, Contender.USUAL, Contender.CROSS_ENTROPY]


def label(contender: Contender) -> str:
    """What the table calls a contender: for the usual implementation, whose it is here."""
    if contender is Contender.USUAL:
        return SMP if importlib.util.find_spec(SMP_MODULE) else "textbook (peer is not installed)"
    return str(contender.value)


def bind(contender: Contender, problem: Problem, pairs: Sequence[Pair]) -> Run:
    """Makes a contender ready to compute these requests, as often as it is called."""
    loss = LovaszSoftmax() if problem is Problem.SOFTMAX else LovaszHinge()
    if contender is Contender.BATCHED:
        return lambda: _in_one_batch(pairs, loss)
    if contender in FORCED:
        return lambda: [_on_path(FORCED[contender], logits, labels, loss) for logits, labels in pairs]
    criterion = _criterion(contender, problem)
    if contender is Contender.CROSS_ENTROPY and problem is Problem.HINGE:
        pairs = [(logits, labels.to(logits.dtype)) for logits, labels in pairs]
    leaves = [(logits.detach().requires_grad_(), labels) for logits, labels in pairs]
    return lambda: _through_autograd(criterion, leaves)


def _criterion(contender: Contender, problem: Problem) -> Criterion:
    softmax = problem is Problem.SOFTMAX
    if contender is Contender.OURS:
        return lovasz_softmax if softmax else lovasz_hinge
    if contender is Contender.CROSS_ENTROPY:
        return functional.cross_entropy if softmax else functional.binary_cross_entropy_with_logits
    losses = _smp_losses()
    if losses is None:
        return textbook_softmax if softmax else textbook_hinge
    criterion: Criterion = losses.LovaszLoss("multiclass" if softmax else "binary", from_logits=True)
    return criterion


def _smp_losses() -> Any:
    """The losses of segmentation-models-pytorch, or None without it.

    Its losses need torch alone, its top level torchvision and more. A bare module in its place, which only knows where
    the package lies, lets the losses be imported without that.
    """
    spec = importlib.util.find_spec(SMP_MODULE)
    if spec is None:
        return None
    bare = types.ModuleType(SMP_MODULE)
    bare.__path__ = list(spec.submodule_search_locations or [])
    bare.__spec__ = spec
    sys.modules[SMP_MODULE] = bare
    return importlib.import_module(f"{SMP_MODULE}.losses")


def _through_autograd(criterion: Criterion, leaves: Sequence[Pair]) -> Answers:
    """One request after the other. Nothing of one call is left for the next: the gradients go to the caller."""
    answers = []
    for leaf, labels in leaves:
        loss = criterion(leaf, labels)
        loss.backward()
        assert leaf.grad is not None
        answers.append((loss.detach(), leaf.grad))
        leaf.grad = None
    return [(loss.item(), grad) for loss, grad in answers]


def _on_path(path: Backend, logits: Tensor, labels: Tensor, loss: LovaszSoftmax | LovaszHinge) -> tuple[float, Tensor]:
    result = compute(logits, labels, loss, backend=path)
    assert result.grad is not None
    return result.loss, result.grad


def _in_one_batch(pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge) -> Answers:
    total = weighted_sum(loss)
    requests = [Request.checked(logits, labels, total) for logits, labels in pairs]
    answers: Answers = []
    for answer in submit(requests, total, pairs[0][0].device).collect():
        assert isinstance(answer, Result)
        assert answer.grad is not None
        answers.append((answer.loss, answer.grad))
    return answers


def version(package: str) -> str | None:
    """Of an installed distribution; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
