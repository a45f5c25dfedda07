"""The losses as functions: tensors in, loss and gradient out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lovasz.autograd import no_tensor, untraced, with_gradient, with_gradients
from lovasz.core.arrays import as_tensor
from lovasz.core.batch import Request
from lovasz.core.compiling import are_constants, is_plain, key_of_options, loss_of_options, loss_operator
from lovasz.core.dispatch import Backend, replay, submit
from lovasz.core.distributed.joint import compute_joint
from lovasz.spec import (
    Classes,
    GradientReduction,
    Input,
    InvalidInput,
    LossLike,
    Reduction,
    Result,
    WeightedSum,
    weighted_sum,
)
from lovasz.spec.arrays import check_dense
from lovasz.spec.checks import flag
from lovasz.spec.checks import gradient_reduction as checked_gradient_reduction
from lovasz.spec.checks import reduction as checked_reduction
from lovasz.spec.probabilities import LOOKS_OF_PROCESS
from lovasz.spec.validity import masked


def compute(
    logits: Any,
    labels: Any,
    loss: LossLike,
    *,
    valid: Any = None,
    offsets: Any = None,
    want_grad: bool = True,
    backend: Backend | None = None,
    group: Any = None,
) -> Result[Tensor]:
    """Computes loss, gradient, per-class losses and IoU counts on the device of the logits. Not differentiable.

    Args:
        logits: float16, bfloat16, float32 or float64, (N, C, *spatial), or as the loss describes; a tensor, or an array
            of NumPy, JAX, TensorFlow or another framework (read by DLPack or ``__array__``).
        labels: (N, *spatial), or as the loss describes: integers, bool, or floats that are whole numbers. A tensor on
            the same device, or an array.
        loss: one of the losses, or a list of (weight, loss) pairs.
        valid: bool, a mask in the shape of the labels, or with 1 along some axes: pixels where it is false are ignored,
            as those of ``ignore_index`` are. None: all pixels take part.
        offsets: for terms with ``per_image``: where each image ends along the first axis, if an image has several
            items there. For a batch of point clouds (P, C): the end of each cloud, as Pointcept's ``offset`` has them.
        want_grad: whether to compute the gradient.
        backend: the backend to use; None for the fastest one that takes the request. Not with ``group``.
        group: None: the loss of these pixels. A process group of ``torch.distributed``, or ``"world"`` for its default
            group: the loss of the pixels of all ranks, which all have to make this call; ``grad`` is for this rank's
            logits, of which there may be none (N = 0).

    Returns:
        The result; its ``grad`` is float64 for float64 logits, otherwise float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the message says which. With ``group``, it is raised
            on every rank, also if the ranks differ in loss, element type, number of classes or ``want_grad``.
        RuntimeError: with ``group``: another rank failed for another reason.
    """
    want_grad = flag("want_grad", want_grad)
    if group is not None:
        if backend is not None:
            raise InvalidInput("backend", f"got {backend} with group; expected None")
        result, _ = compute_joint(
            lambda: _prepared(as_tensor("logits", logits), labels, loss, valid, offsets), group, want_grad=want_grad
        )
        return result
    logits = as_tensor("logits", logits)
    request, parsed = _prepared(logits, labels, loss, valid, offsets, may_be_empty=False)
    (answer,) = submit([request], parsed, logits.device, want_grad=want_grad, backend=backend).collect()
    if not isinstance(answer, Result):
        raise answer
    return answer


@untraced
def differentiable(
    logits: Tensor,
    labels: Any,
    loss: LossLike,
    *,
    valid: Any = None,
    offsets: Any = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Computes a loss that autograd can differentiate with respect to the logits, which have to be a tensor.

    Takes the other arguments like ``compute``.

    Args:
        reduction: ``"mean"``, or ``"none"`` for one loss per image, shape (images,).
    """
    _check_is_tensor(logits)
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    labels, parsed = _masked(logits, _labels(labels, logits), valid, weighted_sum(loss))
    is_mean = checked_reduction(reduction) == "mean"
    known = replay(logits, labels, parsed) if want_grad and offsets is None and is_mean else None
    if known is not None:
        return with_gradient(logits, *known)
    request = Request.checked(logits, labels, parsed, offsets)
    if not is_mean:
        parsed.check_losses_of_images(request.layout.scored_images)
    _look_at(request.logits, parsed)
    pending = submit([request], parsed, logits.device, want_grad=want_grad, want_total=want_grad and is_mean)
    if is_mean:
        return with_gradient(logits, *pending.differentiable())
    (answer,) = pending.collect()
    if not isinstance(answer, Result):
        raise answer
    return with_gradients(logits, parsed.per_image_losses(answer.terms), answer.grad, request.layout.offsets)


@untraced
def differentiable_joint(
    logits: Tensor,
    labels: Any,
    loss: Callable[[], LossLike],
    *,
    valid: Any,
    offsets: Any,
    group: Any,
    gradient_reduction: GradientReduction,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Result[Tensor]]:
    """Computes the loss of all ranks of a group, which autograd can differentiate; takes arguments like ``compute``.

    Args:
        loss: makes the loss. What it raises is raised on every rank.
        gradient_reduction: how the trainer combines the gradients of the ranks.

    Returns:
        (loss, result): the result's own gradient is None.
    """

    def prepare() -> tuple[Request, WeightedSum]:
        checked_gradient_reduction(gradient_reduction)
        check_mean(reduction)
        _check_is_tensor(logits)
        return _prepared(logits, labels, loss(), valid, offsets)

    want_grad = isinstance(logits, Tensor) and torch.is_grad_enabled() and logits.requires_grad
    result, ranks = compute_joint(prepare, group, want_grad=want_grad, gradient_reduction=gradient_reduction)
    factor = {"mean": ranks, "active_mean": result.ranks, "sum": 1}[gradient_reduction]
    return with_gradient(logits, result.loss, result.grad, factor), replace(result, grad=None)


def check_mean(reduction: Reduction) -> None:
    """Checks that the loss of a group's pixels is asked for, not the loss of each image."""
    if checked_reduction(reduction) != "mean":
        raise InvalidInput(
            "reduction", "got 'none' with group; expected 'mean', or no group: it does not change the loss of an image"
        )


def _check_is_tensor(logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise InvalidInput("logits", no_tensor(logits, "lovasz.core.compute"))
    check_dense("logits", logits)


def _prepared(
    logits: Tensor, labels: Any, loss: LossLike, valid: Any, offsets: Any, *, may_be_empty: bool = True
) -> tuple[Request, WeightedSum]:
    """A request, and the loss that ignores what ``valid`` leaves out."""
    targets, parsed = _masked(logits, _labels(labels, logits), valid, weighted_sum(loss))
    request = Request.checked(logits, targets, parsed, offsets, may_be_empty=may_be_empty)
    _look_at(request.logits, parsed)
    return request, parsed


def _masked(logits: Tensor, labels: Tensor, valid: Any, loss: WeightedSum) -> tuple[Tensor, WeightedSum]:
    """Labels and loss after ``valid`` has been put into them."""
    return (labels, loss) if valid is None else masked(logits.shape, labels, valid, loss)


def _look_at(logits: Tensor, loss: WeightedSum) -> None:
    """Warns of logits that look like probabilities; only of the first calls, and never of what is traced."""
    if LOOKS_OF_PROCESS.left == 0 or torch.compiler.is_compiling():
        return
    if not (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
        LOOKS_OF_PROCESS.warn_of_probabilities(logits, loss)


def _labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels as a tensor; those that were none on the device of the logits."""
    tensor = as_tensor("labels", labels)
    return tensor if tensor is labels else tensor.to(logits.device)


def lovasz_softmax(
    logits: Tensor,
    labels: Any,
    classes: Classes | Sequence[int] = "present",
    class_weights: Sequence[float] | None = None,
    per_image: bool = False,
    ignore_index: int | None = None,
    input: Input = "logits",
    *,
    valid: Any = None,
    offsets: Any = None,
    reduction: Reduction = "mean",
    group: Any = None,
    gradient_reduction: GradientReduction = "mean",
) -> Tensor:
    """The Lovász-Softmax loss, differentiable with respect to the logits (algorithm 1 of Berman et al., CVPR 2018).

    loss = mean over scored classes c of sum_i m_i(c) g_i(c), with the errors m in descending order.

    Args:
        logits: float16, bfloat16, float32 or float64, shape (N, C, *spatial).
        labels: integers, bool, or floats that are whole numbers, shape (N, *spatial) or (N, 1, *spatial).
        classes: this and the following four arguments are the options of :class:`lovasz.spec.LovaszSoftmax`.
        valid: as for ``compute``.
        offsets: as for ``compute``.
        reduction: ``"mean"``; or with ``per_image`` ``"none"``, for the loss of each image; not with ``group``.
        group: as for ``compute``.
        gradient_reduction: with ``group``: how the trainer combines the gradients of its ranks. ``"mean"``, as
            DistributedDataParallel does: gradients are multiplied by the number of ranks, so that their mean is the
            true gradient. ``"active_mean"``, as its ``join(divide_by_initial_world_size=False)`` does: by the number of
            ranks that have not left (``LocalLoss.leave``). ``"sum"``: they are left as they are.

    Returns:
        A 0-dim tensor, or one of shape (images,) with ``reduction="none"``; float64 for float64 logits, otherwise
        float32.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the message says which. With ``group``, as for
            ``compute``.
    """
    options = classes, class_weights, per_image, ignore_index, input
    return _with_options("LovaszSoftmax", options, logits, labels, valid, offsets, reduction, group, gradient_reduction)


def lovasz_hinge(
    logits: Tensor,
    labels: Any,
    per_image: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
    *,
    valid: Any = None,
    offsets: Any = None,
    reduction: Reduction = "mean",
    group: Any = None,
    gradient_reduction: GradientReduction = "mean",
) -> Tensor:
    """The Lovász hinge, differentiable with respect to the logits (Yu and Blaschko 2015; Berman et al. 2018).

    loss = sum_i relu(m_i) g_i with m_i = 1 - s_i x_i in descending order; s_i is +1 where the label is 1, and -1
    elsewhere.

    Args:
        logits: float16, bfloat16, float32 or float64, shape (N, *spatial) or (N, 1, *spatial), volumes always
            (N, 1, D, H, W); with ``multilabel`` (N, L, *spatial).
        labels: 0 and 1, integers, bool or floats, shape (N, *spatial) or (N, 1, *spatial); with ``multilabel``
            (N, L, *spatial).
        per_image: this and the following two arguments are the options of :class:`lovasz.spec.LovaszHinge`.
        valid: as for ``compute``.
        offsets: as for ``compute``.
        reduction: this and the following two arguments are as for ``lovasz_softmax``.

    Returns:
        As ``lovasz_softmax``.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the message says which. With ``group``, as for
            ``compute``.
    """
    options = per_image, ignore_index, multilabel
    return _with_options("LovaszHinge", options, logits, labels, valid, offsets, reduction, group, gradient_reduction)


def lovasz_sigmoid(
    logits: Tensor,
    labels: Any,
    per_image: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
    *,
    valid: Any = None,
    offsets: Any = None,
    reduction: Reduction = "mean",
    group: Any = None,
    gradient_reduction: GradientReduction = "mean",
) -> Tensor:
    """The Lovász-Sigmoid loss, differentiable with respect to the logits (Berman et al., CVPR 2018, for one channel).

    loss = sum_i m_i g_i with the errors m_i = |y_i - sigmoid(x_i)| in descending order.

    Takes the arguments of ``lovasz_hinge``; its options are those of :class:`lovasz.spec.LovaszSigmoid`.

    Returns:
        As ``lovasz_softmax``.

    Raises:
        InvalidInput: a shape, dtype, option or label is invalid; the message says which. With ``group``, as for
            ``compute``.
    """
    options = per_image, ignore_index, multilabel
    return _with_options("LovaszSigmoid", options, logits, labels, valid, offsets, reduction, group, gradient_reduction)


def _with_options(
    name: str,
    options: tuple[Any, ...],
    logits: Tensor,
    labels: Any,
    valid: Any,
    offsets: Any,
    reduction: Reduction,
    group: Any,
    gradient_reduction: GradientReduction,
) -> Tensor:
    """Computes the loss of this name in ``KINDS``; in ``torch.compile`` as an operator, if one can compute it."""
    if torch.compiler.is_compiling() and is_plain(valid, offsets, reduction, group) and are_constants(options):
        key = key_of_options(name, *options)
        return loss_operator(logits, labels, key, 0, torch.is_grad_enabled() and logits.requires_grad)
    return _eagerly(name, options, logits, labels, valid, offsets, reduction, group, gradient_reduction)


@untraced
def _eagerly(
    name: str,
    options: tuple[Any, ...],
    logits: Tensor,
    labels: Any,
    valid: Any,
    offsets: Any,
    reduction: Reduction,
    group: Any,
    gradient_reduction: GradientReduction,
) -> Tensor:
    if group is None:
        loss = loss_of_options(name, *options)
        return differentiable(logits, labels, loss, valid=valid, offsets=offsets, reduction=reduction)
    value, _ = differentiable_joint(
        logits,
        labels,
        lambda: loss_of_options(name, *options),
        valid=valid,
        offsets=offsets,
        group=group,
        gradient_reduction=gradient_reduction,
        reduction=reduction,
    )
    return value
