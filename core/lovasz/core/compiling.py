"""The losses inside ``torch.compile``: an operator that the compiler puts into its graphs as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lovasz.autograd import Computed, constant, operator
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import LossLike, LovaszHinge, LovaszSigmoid, LovaszSoftmax, WeightedSum, weighted_sum

_losses: dict[str, WeightedSum] = {}
"""The losses that were asked for, by their text: an operator takes no objects."""


def key_of(loss: LossLike) -> str:
    """The name under which ``loss_operator`` knows a loss."""
    total = weighted_sum(loss)
    key = repr(total.terms)
    _losses[key] = total
    return key


@constant
def softmax_key(*options: Any) -> str:
    """The key of a Lovász-Softmax loss; the arguments are those of ``LovaszSoftmax``."""
    return key_of(LovaszSoftmax(*options))


@constant
def hinge_key(*options: Any) -> str:
    """The key of a Lovász hinge; the arguments are those of ``LovaszHinge``."""
    return key_of(LovaszHinge(*options))


@constant
def sigmoid_key(*options: Any) -> str:
    """The key of a Lovász-Sigmoid loss; the arguments are those of ``LovaszSigmoid``."""
    return key_of(LovaszSigmoid(*options))


def is_plain(valid: Any, offsets: Any, reduction: str, group: Any) -> bool:
    """Whether ``loss_operator`` can compute a loss with these arguments; with others it is computed between graphs."""
    return valid is None and offsets is None and reduction == "mean" and group is None


def _compute(logits: Tensor, labels: Tensor, key: str, number: int, want_grad: bool) -> Computed:
    loss = _losses[key]
    request = Request.checked(logits, labels, loss)
    pending = submit([request], loss, logits.device, want_grad=want_grad, want_total=want_grad)
    return pending.differentiable()


loss_operator = operator("lovasz::loss", _compute)
