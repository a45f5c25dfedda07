"""A loss whose gradient was computed with its value, as one node of torch's graph. Core and client use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_gradient(logits: Tensor, loss: float | Tensor, grad: Tensor | None, factor: float = 1.0) -> Tensor:
    """A 0-dim tensor with the value ``loss``, whose gradient in ``logits`` is ``grad`` x factor.

    Args:
        logits: the tensor that the gradient flows to.
        loss: a number, or a 0-dim tensor on the logits' device.
        grad: dloss/dlogits in the logits' shape; None if no gradient will be requested. It is scaled in its own dtype:
            float32 for 16-bit logits, so that a gradient scaler's factor is applied before rounding.
        factor: multiplies the gradient, not the loss.

    Returns:
        float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # torch.full does not wait for the device, as a copy would.
    value = loss if isinstance(loss, Tensor) else torch.full((), loss, dtype=dtype, device=logits.device)
    if grad is None:
        return value
    return _WithGradient.apply(logits, value, grad, factor)  # type: ignore[no-any-return, no-untyped-call]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, grad: Tensor, factor: float) -> Tensor:
        # With the logits saved, a second derivative in them reaches _Scale.backward, which refuses it.
        ctx.save_for_backward(logits, grad)
        ctx.factor = factor
        # Not the input itself: autograd takes that for a view, which must not be modified in place (`loss *= weight`).
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, grad = ctx.saved_tensors
        scale = grad_outputs[0] if ctx.factor == 1 else grad_outputs[0] * ctx.factor
        if not torch.is_grad_enabled() and not _graph_is_kept():
            return _scale_in_place(grad, scale).to(logits.dtype), None, None, None
        return _Scale.apply(scale, grad, logits), None, None, None  # type: ignore[no-untyped-call]


def _graph_is_kept() -> bool:
    """Whether another backward pass over the same graph may follow (``retain_graph=True``)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _scale_in_place(grad: Tensor, grad_output: Tensor) -> Tensor:
    """Scales without a copy: the gradient is as large as the logits, and is used once.

    On the CPU a factor of 1 costs nothing. On a GPU, reading the factor would wait for the device.
    """
    if grad_output.device.type == "cpu" and grad_output.item() == 1:
        return grad
    return grad.mul_(grad_output.to(grad.dtype))


class _Scale(torch.autograd.Function):
    """grad x grad_output. Its backward would be the second derivative, which is not supported."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, grad: Tensor, logits: Tensor) -> Tensor:
        return (grad * grad_output.to(grad.dtype)).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "double backward through this loss is not supported: its gradient is computed with its value, and no "
            "second derivative is (leave out create_graph=True, or compute the penalty from another loss)"
        )
