"""A loss whose gradient was computed with its value, as one node of torch's graph. Core and client use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.memory_format import has_classes_last, in_format_of

ResultT = TypeVar("ResultT")


def with_gradient(
    logits: Tensor,
    loss: float | Tensor,
    grad: Tensor | None,
    factor: float = 1.0,
    offsets: tuple[int, ...] | None = None,
) -> Tensor:
    """A tensor with the value ``loss``, whose gradient in ``logits`` is ``grad`` x factor.

    Args:
        logits: the tensor that the gradient flows to.
        loss: a number, or a 0-dim tensor on the logits' device. Or one loss per image, shape (images,), each of which
            has the gradient ``grad`` x factor in its own image, and none in others.
        grad: dloss/dlogits in the logits' shape; None if no gradient will be requested. It is scaled in its own dtype:
            float32 for 16-bit logits, so that a gradient scaler's factor is applied before rounding.
        factor: multiplies the gradient, not the loss.
        offsets: where the images end along the first axis, if there is one loss per image; None: each item is one.

    Returns:
        float64 for float64 logits, else float32.
    """
    if grad is None:
        return loss if isinstance(loss, Tensor) else _constant(loss, logits)
    return _WithGradient.apply(logits, loss, grad, factor, offsets)  # type: ignore[no-any-return, no-untyped-call]


def with_gradients(
    logits: Tensor, losses: npt.NDArray[np.float64], grad: Tensor | None, offsets: tuple[int, ...] | None = None
) -> Tensor:
    """As ``with_gradient``, for one loss per image: ``grad`` is the gradient of their mean."""
    of_images = torch.from_numpy(losses).to(logits.device, _dtype_of(logits))
    return with_gradient(logits, of_images, grad, len(losses), offsets)


def _constant(loss: float, logits: Tensor) -> Tensor:
    dtype = _dtype_of(logits)
    if abs(loss) > torch.finfo(dtype).max:  # torch.full refuses it; a gradient scaler can skip infinity.
        loss = math.copysign(math.inf, loss)
    # torch.full does not wait for the device, as a copy would.
    return torch.full((), loss, dtype=dtype, device=logits.device)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: float | Tensor, grad: Tensor, factor: float, offsets: tuple[int, ...] | None
    ) -> Tensor:
        # With the logits saved, a second derivative in them reaches _Scale.backward, which refuses it.
        ctx.save_for_backward(logits, grad)
        ctx.factor, ctx.offsets = factor, offsets
        # Not the input itself: autograd takes that for a view, which must not be modified in place (`loss *= weight`).
        return loss.detach() if isinstance(loss, Tensor) else _constant(loss, logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, grad = ctx.saved_tensors
        scale = grad_outputs[0] if ctx.factor == 1 else grad_outputs[0] * ctx.factor
        if scale.dim() == 1:
            scale = _at_items(scale, ctx.offsets).view(-1, *[1] * (grad.dim() - 1))
        if torch.is_grad_enabled() or _graph_is_kept() or not _has_memory(scale):
            return _scaled(grad, scale, logits), None, None, None, None
        scaled = _scale_in_place(grad, scale).to(logits.dtype)
        return in_format_of(logits, scaled), None, None, None, None


def _at_items(of_images: Tensor, offsets: tuple[int, ...] | None) -> Tensor:
    """The value of its image at each item of the first axis."""
    if offsets is None:
        return of_images
    sizes = torch.tensor(offsets).diff(prepend=torch.tensor([0]))
    return of_images.repeat_interleave(sizes.to(of_images.device), output_size=offsets[-1])


def _graph_is_kept() -> bool:
    """Whether another backward pass over the same graph may follow (``retain_graph=True``)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _has_memory(grad_output: Tensor) -> bool:
    """Whether it has values of its own: not if it stands for many (``torch.autograd.grad(is_grads_batched=True)``)."""
    try:
        grad_output.data_ptr()
    except RuntimeError:
        return False
    return True


def _scale_in_place(grad: Tensor, grad_output: Tensor) -> Tensor:
    """Scales without a copy: the gradient is as large as the logits, and is used once.

    On the CPU a factor of 1 costs nothing. On a GPU, reading the factor would wait for the device.
    """
    if grad_output.device.type == "cpu" and grad_output.dim() == 0 and grad_output.item() == 1:
        return grad
    return grad.mul_(grad_output.to(grad.dtype))


def _scaled(grad: Tensor, grad_output: Tensor, logits: Tensor) -> Tensor:
    """Scales into new memory, in the element type of the logits; where a graph is made of it, one that refuses."""
    if torch.is_grad_enabled():
        return cast("Tensor", _Scale.apply(grad_output, grad, logits))  # type: ignore[no-untyped-call]
    return (grad * grad_output.to(grad.dtype)).to(logits.dtype)


class _Scale(torch.autograd.Function):
    """grad x grad_output. Its backward would be the second derivative, which is not supported."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, grad: Tensor, logits: Tensor) -> Tensor:
        return _scaled(grad, grad_output, logits)  # Here no graph is made.

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "double backward through this loss is not supported: its gradient is computed with its value, but "
            "no second derivative (leave out create_graph=True, or compute the penalty from another loss)"
        )


Computed = tuple[float | Tensor, Tensor | None]
"""A loss and its gradient; the gradient already has all factors, and is None if it was not wanted."""


def operator(
    name: str, compute: Callable[[Tensor, Tensor, str, int, bool], Computed]
) -> Callable[[Tensor, Tensor, str, int, bool], Tensor]:
    """Makes an operator that ``torch.compile`` puts into its graphs as it is, instead of tracing into it.

    Args:
        name: the operator's name, such as ``lovasz::loss``.
        compute: called with (logits, labels, key, number, want_grad) each time that the graph runs. The key says which
            loss; the number may differ from call to call. It detaches the logits, and refuses those with a tangent.

    Returns:
        A function of the same arguments that returns the loss as a 0-dim tensor.
    """

    def run(logits: Tensor, labels: Tensor, key: str, number: int, want_grad: bool) -> tuple[Tensor, Tensor]:
        loss, grad = compute(logits, labels, key, number, want_grad)
        dtype = _dtype_of(logits)
        # An output must not share memory with anything else.
        value = loss.clone() if isinstance(loss, Tensor) else _constant(loss, logits)
        return value, logits.new_empty(0, dtype=dtype) if grad is None else in_format_of(logits, grad.to(dtype))

    def fake(logits: Tensor, labels: Tensor, key: str, number: int, want_grad: bool) -> tuple[Tensor, Tensor]:
        dtype, device = _dtype_of(logits), logits.device
        value = logits.new_empty((), dtype=dtype)
        if want_grad and has_classes_last(logits):  # As ``in_format_of`` returns the gradient.
            order = (0, *range(2, logits.dim()), 1)
            return value, torch.empty_permuted(logits.shape, order, dtype=dtype, device=device)
        return value, torch.empty(logits.shape if want_grad else (0,), dtype=dtype, device=device)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])

    def backward(ctx: Any, loss_grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits, grad = ctx.saved_tensors
        # Compilers of torch refuse a second derivative themselves, but not all of their backends do.
        return _scaled(grad, loss_grad, logits), None, None, None, None

    # With the first tag no two calls become one: each may have an effect, such as a step of a joint run.
    # With the second one the compiler keeps it out of CUDA graphs: it waits for the device, or calls a server.
    # With the third one the logits have the memory format that ``fake`` was told: that of the gradient depends on it.
    tags = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides)
    schema = "(Tensor logits, Tensor labels, str key, SymInt number, bool want_grad) -> (Tensor, Tensor)"
    made = torch.library.custom_op(name, run, mutates_args=(), schema=schema, tags=tags)
    made.register_fake(fake)
    made.register_autograd(backward, setup_context=keep)
    return lambda logits, labels, key, number, want_grad: made(logits, labels, key, number, want_grad)[0]


def constant(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Lets ``torch.compile`` call a function while it traces, and put the result into the graph."""
    # As torch.compiler.assume_constant_result does, which would import the compiler: a second at each start.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def is_transformed() -> bool:
    """Whether the compiler is inside a transform of ``torch.func`` or forward-mode differentiation as it traces.

    There an operator would get no tangent, and take that for zero. A loss between the graphs refuses it.
    """
    in_forward_mode: bool = torch.autograd.forward_ad._current_level >= 0
    return in_forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def check_only_two(name: str, others: tuple[object, ...]) -> None:
    """Refuses positional arguments after logits and labels, where other losses take pixel weights.

    Raises:
        TypeError: there are some.
    """
    if others:
        raise TypeError(
            f"{name}: got {2 + len(others)} positional arguments; expected logits and labels. There are no pixel "
            "weights (for void pixels set ignore_index or valid=, for class weights class_weights in the loss); "
            "other arguments are given by name"
        )


def refuse_script(name: str) -> NoReturn:
    """Says that a module cannot be compiled by ``torch.jit.script``, which asks it by ``__prepare_scriptable__``."""
    raise TypeError(
        f"{name}: torch.jit.script does not support this loss; script the model without it, and compute the loss from "
        "its outputs (torch.compile takes both together)"
    )


def no_tensor(logits: object, for_arrays: str) -> str:
    """The problem with logits that are no tensor.

    Args:
        for_arrays: what takes arrays of other frameworks.
    """
    cure = f"{for_arrays} takes other arrays"
    if hasattr(logits, "logits"):  # as the models of transformers return them
        cure = "pass its logits: outputs.logits"
    elif isinstance(logits, list | tuple | dict):  # as networks with auxiliary heads return them
        cure = 'pass one of its tensors, such as outputs["out"] or outputs[0], and add the losses of several'
    return f"got {type(logits).__name__}; expected a torch tensor ({cure})"


_REASON = (
    "a loss is computed between the graphs if it has valid=, offsets=, reduction='none', a group, or an array as an "
    "option, and is not supported inside torch.func or forward-mode differentiation"
)

_between_graphs: dict[str, Callable[..., Any]] = {}


def untraced(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Makes ``torch.compile`` call a function as it is, between two graphs, instead of tracing into it."""
    key = f"{function.__module__}.{function.__qualname__}"

    @constant
    def registered() -> str:
        # Run while the compiler traces, so that importing this module does not import the compiler.
        _between_graphs.setdefault(key, torch.compiler.disable(function, reason=_REASON))
        return key

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> ResultT:
        if torch.compiler.is_compiling():
            result: ResultT = _between_graphs[registered()](*args, **kwargs)
            return result
        # The compiler may have left this frame as it is, and would trace those below.
        untouched: Callable[..., ResultT] = _between_graphs.get(key, function)
        return untouched(*args, **kwargs)

    return called


def _dtype_of(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
