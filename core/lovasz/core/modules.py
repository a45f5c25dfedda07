"""The losses as PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lovasz.core.compiling import key_of, loss_operator
from lovasz.core.functional import differentiable
from lovasz.spec import LossLike, LovaszHinge, LovaszSigmoid, LovaszSoftmax, weighted_sum


class LocalLoss(torch.nn.Module):
    """A loss, or a weighted sum of losses, computed in this process: ``LocalLoss(LovaszSoftmax(ignore_index=255))``.

    The counterpart of :class:`lovasz.client.torch.RemoteLoss`.
    """

    def __init__(self, loss: LossLike) -> None:
        """Takes one loss, or a list of (weight, loss) pairs.

        Raises:
            InvalidInput: the terms cannot be combined.
        """
        super().__init__()
        self.loss = weighted_sum(loss)
        self._key = key_of(self.loss)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = key_of(self.loss)  # As this process may not know it.

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss as a 0-dim tensor, differentiable with respect to the logits."""
        if torch.compiler.is_compiling():
            return loss_operator(logits, labels, self._key, 0, torch.is_grad_enabled() and logits.requires_grad)
        return differentiable(logits, labels, self.loss)

    def extra_repr(self) -> str:
        return ", ".join(f"{weight} * {loss}" for weight, loss in self.loss.terms)


class LovaszSoftmaxLoss(LocalLoss):
    """The Lovász-Softmax loss as a module; takes the options of :class:`lovasz.spec.LovaszSoftmax`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(LovaszSoftmax(**options))


class LovaszHingeLoss(LocalLoss):
    """The Lovász hinge as a module; takes the options of :class:`lovasz.spec.LovaszHinge`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(LovaszHinge(**options))


class LovaszSigmoidLoss(LocalLoss):
    """The Lovász-Sigmoid loss as a module; takes the options of :class:`lovasz.spec.LovaszSigmoid`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(LovaszSigmoid(**options))
