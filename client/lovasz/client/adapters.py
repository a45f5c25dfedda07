"""Losses as frameworks call them, where that is more than logits and labels."""

from __future__ import annotations

from typing import Any

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError("lovasz.client.adapters needs torch: pip install 'lovasz[torch]'", name="torch") from None

from torch import Tensor

from lovasz.spec import WeightedSum

__all__ = ["MMSegLoss"]


class MMSegLoss(torch.nn.Module):
    """A loss as the decode heads of mmsegmentation call it. ::

        @MODELS.register_module()
        def lovasz_loss(**options):
            return MMSegLoss(LocalLoss(LovaszSoftmax(ignore_index=255)), **options)

    A decode head sums what its losses return. It logs each under ``loss_name``.
    """

    def __init__(self, criterion: torch.nn.Module, *, loss_weight: float = 1.0, loss_name: str = "loss_lovasz") -> None:
        """Wraps a loss of this project.

        Args:
            criterion: a :class:`lovasz.core.LocalLoss` or a :class:`lovasz.client.torch.RemoteLoss`.
            loss_weight: multiplies the loss.
            loss_name: the name in mmsegmentation's logs. mmsegmentation trains only on names that contain ``loss``.

        Raises:
            TypeError: ``criterion`` is another object.
            ValueError: mmsegmentation would not train on ``loss_name``.
        """
        super().__init__()
        if not isinstance(getattr(criterion, "loss", None), WeightedSum):
            raise TypeError(f"criterion: got {type(criterion).__name__}; expected a LocalLoss or a RemoteLoss")
        if "loss" not in loss_name:
            raise ValueError(f"loss_name: got {loss_name!r}; expected a name that contains 'loss'")
        self.criterion = criterion
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """The loss times ``loss_weight``, as a 0-dim tensor that is differentiable with respect to the logits.

        Args:
            pred: logits (N, C, H, W), or as the criterion's loss describes.
            target: labels (N, H, W).
            weight: None; a loss here has no pixel weights.
            avg_factor: None; the loss is a mean already.
            reduction_override: None or ``"mean"``.
            ignore_index: the head's; that of each term must be the same.

        Raises:
            ValueError: an argument has a value that the criterion cannot follow.
            LossError: as the criterion raises it.
        """
        if weight is not None:
            raise ValueError(
                "weight: got pixel weights; expected None (give void pixels the label ignore_index, and leave out "
                "the head's sampler)"
            )
        if avg_factor is not None:
            raise ValueError(f"avg_factor: got {avg_factor}; expected None, as the loss is a mean")
        if reduction_override not in (None, "mean"):
            raise ValueError(f"reduction_override: got {reduction_override!r}; expected None or 'mean'")
        terms: Any = self.criterion.loss
        for _, term in terms.terms:
            if term.ignore_index != ignore_index:
                raise ValueError(
                    f"ignore_index: got {ignore_index} from the decode head, and {term.ignore_index} in {term}; "
                    f"expected the same (set ignore_index={ignore_index} in each term, or the head's)"
                )
        loss: Tensor = self.criterion(pred, target)
        return loss * self.loss_weight

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight:g}, loss_name={self.loss_name!r}"
