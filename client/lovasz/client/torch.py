"""``RemoteLoss``: a loss that a server computes, as a module of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lovasz.autograd import with_gradient
from lovasz.client.client import DEFAULT_TIMEOUT_SECONDS, LossClient
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
    ) -> None:
        """
        Args:
            target: as for :class:`LossClient`; or a client, which this module then uses and does not close.
            loss: :class:`LovaszSoftmax`, :class:`LovaszHinge`, :class:`CrossEntropy`, or a list of (weight, loss).
            timeout: seconds for a call; not used with a client, which has its own, as for the next two.
            transport: as for :class:`LossClient`.
            wire_dtype: as for :class:`LossClient`.

        Raises:
            InvalidInput: terms that do not go together.
            ValueError: at the first call: an argument that cannot be.
        """
        super().__init__()
        self.loss = weighted_sum(loss)
        self.result: Result[Any] | None = None
        self._own = isinstance(target, str)
        self._client = None if isinstance(target, str) else target
        self._target = target if isinstance(target, str) else target.target
        self._options: dict[str, Any] = {"timeout": timeout, "transport": transport, "wire_dtype": wire_dtype}
        if not isinstance(target, str):
            self._options = target.options

    @property
    def client(self) -> LossClient:
        """The client, which is opened when it is first used."""
        if self._client is None:
            self._client = LossClient(self._target, **self._options)
        return self._client

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss as a 0-dim tensor (float64 for float64 logits, else float32), differentiable once.

        Args:
            logits: float32, float16, bfloat16 or float64 (which travels as float32), (N, C, *spatial), on any device.
            labels: integers or bool, (N, *spatial), on any device.

        Raises:
            LossError: or one of its kinds; see :meth:`LossClient.compute`.
        """
        want_grad = self.training and torch.is_grad_enabled() and logits.requires_grad
        result = self.client.compute(logits, labels, self.loss, want_grad=want_grad)
        self.result = Result(result.loss, None, result.terms, result.intersection, result.union, result.timing)
        return with_gradient(logits, result.loss, result.grad)

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
