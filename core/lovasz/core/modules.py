"""The losses as PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lovasz.autograd import check_only_two
from lovasz.core.compiling import is_plain, key_of, loss_operator
from lovasz.core.functional import differentiable
from lovasz.spec import LossLike, LovaszHinge, LovaszSigmoid, LovaszSoftmax, Reduction, weighted_sum
from lovasz.spec.checks import reduction as checked_reduction


class LocalLoss(torch.nn.Module):
    """A loss, or a weighted sum of losses, computed in this process: ``LocalLoss(LovaszSoftmax(ignore_index=255))``.

    The counterpart of :class:`lovasz.client.torch.RemoteLoss`.
    """

    def __init__(self, loss: LossLike, *, reduction: Reduction = "mean") -> None:
        """Takes one loss, or a list of (weight, loss) pairs.

        Args:
            reduction: ``"mean"``; or ``"none"`` for one loss an image, shape (images,), if all terms are Lovász losses
                with ``per_image``.

        Raises:
            InvalidInput: the terms cannot be combined.
        """
        super().__init__()
        self.loss = weighted_sum(loss)
        self.reduction = checked_reduction(reduction)
        self._key = key_of(self.loss)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = key_of(self.loss)  # As this process may not know it.

    def forward(self, logits: Tensor, labels: Any, *others: object, valid: Any = None, offsets: Any = None) -> Tensor:
        """Returns the loss, a 0-dim tensor unless ``reduction`` is ``"none"``, differentiable in the logits.

        Args:
            logits: (N, C, *spatial), or as the loss describes.
            labels: (N, *spatial), or as the loss describes.
            others: none; weights of pixels, which other losses take here, are refused.
            valid: as for :func:`lovasz.core.compute`.
            offsets: as for :func:`lovasz.core.compute`.
        """
        check_only_two("LocalLoss", others)
        if torch.compiler.is_compiling() and is_plain(valid, offsets, self.reduction):
            return loss_operator(logits, labels, self._key, 0, torch.is_grad_enabled() and logits.requires_grad)
        return differentiable(logits, labels, self.loss, valid=valid, offsets=offsets, reduction=self.reduction)

    def extra_repr(self) -> str:
        return ", ".join(f"{weight} * {loss}" for weight, loss in self.loss.terms)


class LovaszSoftmaxLoss(LocalLoss):
    """The Lovász-Softmax loss as a module; takes the options of :class:`lovasz.spec.LovaszSoftmax`."""

    def __init__(self, *, reduction: Reduction = "mean", **options: Any) -> None:
        super().__init__(LovaszSoftmax(**options), reduction=reduction)


class LovaszHingeLoss(LocalLoss):
    """The Lovász hinge as a module; takes the options of :class:`lovasz.spec.LovaszHinge`."""

    def __init__(self, *, reduction: Reduction = "mean", **options: Any) -> None:
        super().__init__(LovaszHinge(**options), reduction=reduction)


class LovaszSigmoidLoss(LocalLoss):
    """The Lovász-Sigmoid loss as a module; takes the options of :class:`lovasz.spec.LovaszSigmoid`."""

    def __init__(self, *, reduction: Reduction = "mean", **options: Any) -> None:
        super().__init__(LovaszSigmoid(**options), reduction=reduction)
