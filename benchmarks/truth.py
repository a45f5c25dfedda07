"""The true answers, by the reference implementation in float64, and the errors of other answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.contenders import Answers, Truth
from benchmarks.workloads import Pair, Problem
from lovasz.core import reference
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax

LOSS_ERROR_ALLOWED, GRAD_ERROR_ALLOWED = 1e-6, 2e-5
"""Largest errors that our own implementation may have: the loss relative to it, the gradient relative to its norm."""


def save(file: Path, truth: Truth, problem: Problem, pairs: Sequence[Pair]) -> None:
    """Computes the true losses and gradients of the requests and writes them to a file (npz)."""
    losses, grads = [], []
    for logits, labels in pairs:
        leaf = logits.double().requires_grad_()
        loss = _true_loss(truth, problem, leaf, labels)
        (grad,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        grads.append(grad.cpu().numpy())
    np.savez(file, losses=np.array(losses), grads=np.stack(grads))


def _true_loss(truth: Truth, problem: Problem, logits: Tensor, labels: Tensor) -> Tensor:
    if truth is Truth.LOVASZ:
        return reference.compute(logits, labels, LovaszSoftmax() if problem is Problem.SOFTMAX else LovaszHinge())
    if problem is Problem.SOFTMAX:
        return reference.compute(logits, labels, CrossEntropy())
    return binary_cross_entropy_with_logits(logits, labels.double())


def worst_errors(file: Path, answers: Answers) -> tuple[float, float]:
    """The largest errors over all requests.

    Args:
        file: written by :func:`save`, for the same requests.

    Returns:
        The error of a loss relative to it, and of a gradient relative to its norm.
    """
    with np.load(file) as truths:
        losses, grads = truths["losses"], torch.from_numpy(truths["grads"])
    loss_errors = [_relative(abs(loss - true), abs(true)) for (loss, _), true in zip(answers, losses, strict=True)]
    grad_errors = [
        _relative((grad.cpu().double() - true).norm().item(), true.norm().item())
        for (_, grad), true in zip(answers, grads, strict=True)
    ]
    return float(np.max(loss_errors)), float(np.max(grad_errors))  # unlike max(), np.max returns NaN if there is one


def _relative(error: float, size: float) -> float:
    return float(error / size) if size else float(error)
