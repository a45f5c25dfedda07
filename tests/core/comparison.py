"""What the tests of the core compare: answers with the reference in float64, and answers with each other, in bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lovasz.core import reference
from lovasz.spec import LossLike, Result


def reference_answer(logits: Tensor, labels: Tensor, loss: LossLike) -> tuple[float, Tensor]:
    """Loss and gradient (float64, on the CPU) of the textbook route, at these very logits."""
    logits = logits.detach().cpu().double().requires_grad_()
    value = reference.compute(logits, labels.cpu(), loss)
    (grad,) = torch.autograd.grad(value, logits)
    return value.item(), grad


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
