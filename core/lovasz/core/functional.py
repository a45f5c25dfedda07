"""The losses as functions: tensors in, loss and gradient out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lovasz.autograd import with_gradient
from lovasz.core.batch import Request
from lovasz.core.compiling import hinge_key, loss_operator, softmax_key
from lovasz.core.dispatch import Backend, replay, submit
from lovasz.spec import (
    Classes,
    Input,
    LossLike,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    weighted_sum,
)


def compute(
    logits: Tensor, labels: Tensor, loss: LossLike, *, want_grad: bool = True, backend: Backend | None = None
) -> Result[Tensor]:
    """Computes loss, gradient, per-class losses and IoU counts on the device of the logits. Not differentiable.

    Args:
        logits: float16, bfloat16, float32 or float64, (N, C, *spatial), or as the loss describes.
        labels: integers or bool, (N, *spatial), or as the loss describes; on the same device.
        loss: one of the losses, or a list of (weight, loss) pairs.
        want_grad: whether to compute the gradient.
        backend: the backend to use; None for the fastest one that takes the request.

    Returns:
        The result; its ``grad`` is float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    parsed = weighted_sum(loss)
    request = Request.checked(logits, labels, parsed)
    (answer,) = submit([request], parsed, logits.device, want_grad=want_grad, backend=backend).collect()
    if not isinstance(answer, Result):
        raise answer
    return answer


def differentiable(logits: Tensor, labels: Tensor, loss: LossLike) -> Tensor:
    """Computes a loss that autograd can differentiate with respect to the logits; takes arguments like ``compute``."""
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    parsed = weighted_sum(loss)
    known = replay(logits, labels, parsed) if want_grad else None
    if known is not None:
        return with_gradient(logits, *known)
    request = Request.checked(logits, labels, parsed)
    launched = submit([request], parsed, logits.device, want_grad=want_grad, want_total=want_grad)
    return with_gradient(logits, *launched.differentiable())


def lovasz_softmax(
    logits: Tensor,
    labels: Tensor,
    classes: Classes | Sequence[int] = "present",
    class_weights: Sequence[float] | None = None,
    per_image: bool = False,
    ignore_index: int | None = None,
    input: Input = "logits",
) -> Tensor:
    """The Lovász-Softmax loss, differentiable with respect to the logits (algorithm 1 of Berman et al., CVPR 2018).

    loss = mean over scored classes c of sum_i m_i(c) g_i(c), with the errors m in descending order.

    Args:
        logits: float16, bfloat16, float32 or float64, shape (N, C, *spatial).
        labels: integers, shape (N, *spatial).
        classes: this and the following arguments are the options of :class:`lovasz.spec.LovaszSoftmax`.

    Returns:
        A 0-dim tensor; float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    if torch.compiler.is_compiling():
        key = softmax_key(classes, class_weights, per_image, ignore_index, input)
        return loss_operator(logits, labels, key, torch.is_grad_enabled() and logits.requires_grad)
    return differentiable(logits, labels, LovaszSoftmax(classes, class_weights, per_image, ignore_index, input))


def lovasz_hinge(
    logits: Tensor,
    labels: Tensor,
    per_image: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
) -> Tensor:
    """The Lovász hinge, differentiable with respect to the logits (Yu and Blaschko 2015; Berman et al. 2018).

    loss = sum_i relu(m_i) g_i with m_i = 1 - s_i x_i in descending order; s_i is +1 where the label is 1, and -1
    elsewhere.

    Args:
        logits: float16, bfloat16, float32 or float64, shape (N, *spatial) or (N, 1, *spatial); with ``multilabel``
            (N, L, *spatial).
        labels: integers 0 and 1, or bool, shape (N, *spatial); with ``multilabel`` (N, L, *spatial).
        per_image: this and the following arguments are the options of :class:`lovasz.spec.LovaszHinge`.

    Returns:
        A 0-dim tensor; float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    if torch.compiler.is_compiling():
        key = hinge_key(per_image, ignore_index, multilabel)
        return loss_operator(logits, labels, key, torch.is_grad_enabled() and logits.requires_grad)
    return differentiable(logits, labels, LovaszHinge(per_image, ignore_index, multilabel))
