"""What the tests of the core compare: answers with the reference in float64, and answers with each other, in bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lovasz.core import reference
from lovasz.core.backends.numba import bins
from lovasz.spec import LossLike, Result

_extension = reference.lovasz_extension

IN_TABLES = 2.0 ** (1 - bins.OCTAVES)
"""Of the largest error's power of two: what is smaller has no octave of its own in tables."""


def reference_answer(logits: Tensor, labels: Tensor, loss: LossLike) -> tuple[float, Tensor]:
    """Loss and gradient (float64, on the CPU) of the textbook route, at these very logits."""
    logits = logits.detach().cpu().double().requires_grad_()
    value = reference.compute(logits, labels.cpu(), loss)
    (grad,) = torch.autograd.grad(value, logits)
    return value.item(), grad


def shared_ties_answer(logits: Tensor, labels: Tensor, loss: LossLike) -> tuple[float, Tensor]:
    """The same, but equal errors, and all that is too small for an octave of its own, share their gradient evenly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "lovasz_extension", _shared_ties_extension)
        return reference_answer(logits, labels, loss)


def _shared_ties_extension(errors: Tensor, foreground: Tensor) -> Tensor:
    """Among equal errors, the mean of what pixels get where foreground comes first and where background does."""
    total = int(foreground.sum())
    if total == 0:
        return _extension(errors, foreground)
    values = errors.detach()
    largest = values.max()
    if largest > 0:
        values = torch.where(values < IN_TABLES * 2 ** largest.log2().floor(), 0, values)
    _, tie = torch.unique(-values, return_inverse=True)
    ties = int(tie.max()) + 1
    n, b = (torch.bincount(tie[which], minlength=ties).double() for which in (foreground, ~foreground))
    n_before, b_before = n.cumsum(0) - n, b.cumsum(0) - b

    def jaccard(n: Tensor, b: Tensor) -> Tensor:
        return (n + b) / (total + b)

    n_after, b_after = n_before + n, b_before + b
    step = jaccard(n_after, b_before) - jaccard(n_before, b_before)
    foreground_g = (step + jaccard(n_after, b_after) - jaccard(n_before, b_after)) / (2 * n)
    step = jaccard(n_before, b_after) - jaccard(n_before, b_before)
    background_g = (step + jaccard(n_after, b_after) - jaccard(n_after, b_before)) / (2 * b)
    return torch.dot(errors, torch.where(foreground, foreground_g[tie], background_g[tie]))


def slow_bin(errors: npt.NDArray[np.float64], top: int) -> npt.NDArray[np.int64]:
    """The bin of each error, as the docstring of :mod:`lovasz.core.backends.numba.bins` has it."""
    octave = top - (np.frexp(errors)[1].astype(np.int64) - 1)
    found = np.full(len(errors), bins.BINS - 1)
    for o, first in enumerate(bins.first_bins()[:-1]):
        here = (octave == o) & (errors > 0)
        upper, width = 2.0 ** (top - o + 1), 2.0 ** (top - o - bins.bits_of(o))
        found[here] = first + np.ceil((upper - errors[here]) / width) - 1
    return found


@contextmanager
def noting_near_ties(*, tables: bool) -> Iterator[list[bool]]:
    """While the reference computes: of each segment, whether float32 can take unequal errors for equal ones.

    Args:
        tables: whether errors are taken for equal that share a bin; else only those that rounding can bring together.
    """
    near: list[bool] = []

    def noted(errors: Tensor, foreground: Tensor) -> Tensor:
        values = np.unique(errors.detach().numpy())[::-1]
        low, high = values[:-1] * (1 - 1e-6), values[1:] * (1 + 1e-6)
        if tables and values[0] > 0:
            top = int(np.frexp(values[0])[1]) - 1
            top = max(top, bins.FINE_TOP)
            near.append(bool((slow_bin(low, top) >= slow_bin(high, top)).any()))
        else:
            near.append(bool((low <= high).any()))
        return _extension(errors, foreground)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "lovasz_extension", noted)
        yield near


def norm_error(grad: Tensor | None, expected: Tensor) -> float:
    """The error of a gradient, relative to the norm of the true one; plain error where that is 0."""
    assert grad is not None
    assert grad.shape == expected.shape
    error, norm = (grad.cpu().double() - expected).norm().item(), expected.norm().item()
    return error / norm if norm else error


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_labels(*shape: int, values: int, seed: int, void: int | None = None) -> Tensor:
    """Labels in [0, values); a fifth of them ``void`` if there is such a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, values, shape, generator=generator)
    if void is not None:
        labels[torch.rand(shape, generator=generator) < 0.2] = void
    return labels


def bits(answer: Result[Tensor]) -> tuple[object, ...]:
    """All that an answer holds, as bytes: equal only if every bit is, the sign of a zero included."""
    values = [np.float64(answer.loss), answer.intersection, answer.union]
    for term in answer.terms:
        values += [np.float64(term.loss), term.per_class_loss]
    grad = None if answer.grad is None else answer.grad.cpu().contiguous().numpy().tobytes()
    return (grad, *(value.tobytes() for value in values))
