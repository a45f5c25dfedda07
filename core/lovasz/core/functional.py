"""The losses as functions: tensors in, loss and gradient out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lovasz.autograd import with_gradient
from lovasz.core.arrays import as_tensor
from lovasz.core.batch import Request
from lovasz.core.compiling import hinge_key, loss_operator, sigmoid_key, softmax_key
from lovasz.core.dispatch import Backend, replay, submit
from lovasz.spec import (
    Classes,
    Input,
    InvalidInput,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Result,
    WeightedSum,
    weighted_sum,
)
from lovasz.spec.probabilities import LOOKS_OF_PROCESS


def compute(
    logits: Any, labels: Any, loss: LossLike, *, want_grad: bool = True, backend: Backend | None = None
) -> Result[Tensor]:
    """Computes loss, gradient, per-class losses and IoU counts on the device of the logits. Not differentiable.

    Args:
        logits: float16, bfloat16, float32 or float64, (N, C, *spatial), or as the loss describes; a tensor, or an array
            of NumPy, JAX, TensorFlow or another framework (read by DLPack or ``__array__``).
        labels: (N, *spatial), or as the loss describes: integers, bool, or floats that are whole numbers. A tensor on
            the same device, or an array.
        loss: one of the losses, or a list of (weight, loss) pairs.
        want_grad: whether to compute the gradient.
        backend: the backend to use; None for the fastest one that takes the request.

    Returns:
        The result; its ``grad`` is float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    parsed = weighted_sum(loss)
    logits = as_tensor("logits", logits)
    request = Request.checked(logits, _labels(labels, logits), parsed)
    _look_at(logits, parsed)
    (answer,) = submit([request], parsed, logits.device, want_grad=want_grad, backend=backend).collect()
    if not isinstance(answer, Result):
        raise answer
    return answer


def differentiable(logits: Tensor, labels: Any, loss: LossLike) -> Tensor:
    """Computes a loss that autograd can differentiate with respect to the logits, which have to be a tensor.

    Takes the other arguments like ``compute``.
    """
    if not isinstance(logits, Tensor):
        raise InvalidInput(
            "logits", f"got {type(logits).__name__}; expected a torch tensor (lovasz.core.compute takes other arrays)"
        )
    labels = _labels(labels, logits)
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    parsed = weighted_sum(loss)
    known = replay(logits, labels, parsed) if want_grad else None
    if known is not None:
        return with_gradient(logits, *known)
    request = Request.checked(logits, labels, parsed)
    _look_at(logits, parsed)
    launched = submit([request], parsed, logits.device, want_grad=want_grad, want_total=want_grad)
    return with_gradient(logits, *launched.differentiable())


def _look_at(logits: Tensor, loss: WeightedSum) -> None:
    """Warns of logits that look like probabilities; only of the first calls, and never of what is traced."""
    if LOOKS_OF_PROCESS.left == 0 or torch.compiler.is_compiling():
        return
    if not (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
        LOOKS_OF_PROCESS.warn_of_probabilities(logits, loss)


def _labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels as a tensor; those that were none on the device of the logits."""
    return labels if isinstance(labels, Tensor) else as_tensor("labels", labels).to(logits.device)


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
        labels: integers, bool, or floats that are whole numbers, shape (N, *spatial) or (N, 1, *spatial).
        classes: this and the following arguments are the options of :class:`lovasz.spec.LovaszSoftmax`.

    Returns:
        A 0-dim tensor; float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    if torch.compiler.is_compiling():
        key = softmax_key(classes, class_weights, per_image, ignore_index, input)
        return loss_operator(logits, labels, key, 0, torch.is_grad_enabled() and logits.requires_grad)
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
        logits: float16, bfloat16, float32 or float64, shape (N, *spatial) or (N, 1, *spatial), volumes always
            (N, 1, D, H, W); with ``multilabel`` (N, L, *spatial).
        labels: 0 and 1, integers, bool or floats, shape (N, *spatial) or (N, 1, *spatial); with ``multilabel``
            (N, L, *spatial).
        per_image: this and the following arguments are the options of :class:`lovasz.spec.LovaszHinge`.

    Returns:
        A 0-dim tensor; float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    if torch.compiler.is_compiling():
        key = hinge_key(per_image, ignore_index, multilabel)
        return loss_operator(logits, labels, key, 0, torch.is_grad_enabled() and logits.requires_grad)
    return differentiable(logits, labels, LovaszHinge(per_image, ignore_index, multilabel))


def lovasz_sigmoid(
    logits: Tensor,
    labels: Tensor,
    per_image: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
) -> Tensor:
    """The Lovász-Sigmoid loss, differentiable with respect to the logits (Berman et al., CVPR 2018, for one channel).

    loss = sum_i m_i g_i with the errors m_i = |y_i - sigmoid(x_i)| in descending order.

    Takes the arguments of ``lovasz_hinge``, which are the options of :class:`lovasz.spec.LovaszSigmoid`.

    Returns:
        A 0-dim tensor; float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the text says which.
    """
    if torch.compiler.is_compiling():
        key = sigmoid_key(per_image, ignore_index, multilabel)
        return loss_operator(logits, labels, key, 0, torch.is_grad_enabled() and logits.requires_grad)
    return differentiable(logits, labels, LovaszSigmoid(per_image, ignore_index, multilabel))
