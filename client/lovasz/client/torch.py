"""``RemoteLoss``: a loss that a server computes, as a module of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lovasz.autograd import with_gradient
from lovasz.client.client import DEFAULT_TIMEOUT_SECONDS, LossClient
from lovasz.client.joint import Joint
from lovasz.spec import LossLike, Result, weighted_sum

__all__ = ["RemoteLoss"]


class RemoteLoss(torch.nn.Module):
    """A loss, or a weighted sum of losses, computed by a server. ::

        criterion = RemoteLoss("localhost:50051", [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())])
        criterion(logits, labels).backward()

    The forward pass makes the one call, which brings the gradient too; the backward pass only scales it, in float32,
    and hands it on in the logits' dtype and on their device: it is right under autocast and with a gradient scaler.
    No gradient is asked for under ``torch.no_grad``, for logits that need none, and in eval mode
    (``criterion.eval()``). Pickled and copied without its connection.

    With ``joint``, all ranks of a data-parallel training get the loss of their pixels together, and each its own part
    of its one true gradient. ::

        criterion = RemoteLoss("localhost:50051", LovaszSoftmax(), joint=Joint.from_distributed("cityscapes-7"))

    Calls are counted, those with and without a gradient apart, and the calls of all ranks with the same number belong
    together: each rank makes as many, also where gradients are accumulated. A call that raises is not counted.

    Attributes:
        result: the last answer, with per-class losses, IoU counts and timing, without its gradient; None before.
    """

    def __init__(
        self,
        target: str | LossClient,
        loss: LossLike,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        transport: str = "auto",
        wire_dtype: str | None = None,
        load_balancing: str | None = None,
        run: str | None = None,
        joint: Joint | None = None,
        gradient_reduction: str = "mean",
    ) -> None:
        """
        Args:
            target: as for :class:`LossClient`; or a client, which this module then uses and does not close.
            loss: :class:`LovaszSoftmax`, :class:`LovaszHinge`, :class:`CrossEntropy`, or a list of (weight, loss).
            timeout: seconds for a call; not used with a client, which has its own, as for the next three.
            transport: as for :class:`LossClient`.
            wire_dtype: as for :class:`LossClient`.
            load_balancing: as for :class:`LossClient`.
            run: as for :class:`LossClient`.
            joint: this rank, in a data-parallel training.
            gradient_reduction: what the trainer does with the gradients of its ranks: ``"mean"``, as
                DistributedDataParallel does: they are multiplied by world_size, so that the mean is the true gradient;
                or ``"sum"``: they are left as they are.

        Raises:
            InvalidInput: terms that do not go together.
            ValueError: gradient_reduction is neither; at the first call: another argument that cannot be.
        """
        super().__init__()
        if gradient_reduction not in ("mean", "sum"):
            raise ValueError(f"gradient_reduction: got {gradient_reduction!r}; expected 'mean' or 'sum'")
        self.joint = joint
        self.gradient_reduction = gradient_reduction
        self._first_step = 0 if joint is None or joint.step is None else joint.step
        self._calls = {True: 0, False: 0}
        self.loss = weighted_sum(loss)
        self.result: Result[Any] | None = None
        self._own = isinstance(target, str)
        self._client = None if isinstance(target, str) else target
        self._target = target if isinstance(target, str) else target.target
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "transport": transport,
            "wire_dtype": wire_dtype,
            "load_balancing": load_balancing,
            "run": run,
        }
        if not isinstance(target, str):
            self._options = target.options

    @property
    def client(self) -> LossClient:
        """The client, which is opened when it is first used."""
        if self._client is None:
            self._client = LossClient(self._target, **self._options)
        return self._client

    def forward(self, logits: Tensor, labels: Tensor, step: int | None = None) -> Tensor:
        """The loss as a 0-dim tensor (float64 for float64 logits, else float32), differentiable once.

        Args:
            logits: float32, float16, bfloat16 or float64 (which travels as float32), (N, C, *spatial), on any device.
            labels: integers or bool, (N, *spatial), on any device.
            step: the number of the joint step, for those who count; None: that of the call, counted from the ``step``
                of ``joint`` (0 if it has none).

        Raises:
            LossError: or one of its kinds; see :meth:`LossClient.compute`.
        """
        want_grad = self.training and torch.is_grad_enabled() and logits.requires_grad
        joint = self.joint
        if joint is not None:
            counted = self._first_step + self._calls[want_grad]
            joint = replace(joint, step=counted if step is None else step)
        result = self.client.compute(logits, labels, self.loss, want_grad=want_grad, joint=joint)
        self._calls[want_grad] += step is None
        self.result = Result(result.loss, None, result.terms, result.intersection, result.union, result.timing)
        averaged = joint is not None and self.gradient_reduction == "mean"
        return with_gradient(logits, result.loss, result.grad, joint.world_size if joint and averaged else 1)

    def close(self) -> None:
        """Closes the connection, if it is this module's own."""
        if self._own and self._client is not None:
            self._client.close()
            self._client = None

    def extra_repr(self) -> str:
        terms = " + ".join(f"{weight:g} * {loss}" for weight, loss in self.loss.terms)
        return f"{self._target}, {terms}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_client=None, _own=True, result=None)
        return state
