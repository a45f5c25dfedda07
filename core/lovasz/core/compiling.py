"""The losses inside ``torch.compile``: an operator that the compiler puts into its graphs as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from lovasz.autograd import Computed, constant, is_transformed, operator
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import Loss, LovaszHinge, LovaszSigmoid, LovaszSoftmax, WeightedSum, weighted_sum
from lovasz.spec.arrays import check_dense

KINDS: dict[str, Callable[..., Loss]] = {kind.__name__: kind for kind in (LovaszSoftmax, LovaszHinge, LovaszSigmoid)}
"""The losses that have a function. The compiler's constants are names, not classes."""

KEPT_LOSSES = 64
"""The most losses that are kept for the next call with the same options."""

_PLAIN = (str, bool, int, type(None))
_CONSTANTS = (str, int, float, list, tuple, range, type(None))

_losses: dict[str, WeightedSum] = {}
"""The losses of functions that were compiled, by their text: an operator takes no objects."""


class Known:
    """A loss that ``loss_operator`` knows by its key as long as this object lives. Modules of equal losses share it."""

    def __init__(self, key: str, loss: WeightedSum) -> None:
        self.key, self.loss = key, loss


_known: WeakValueDictionary[str, Known] = WeakValueDictionary()
"""The losses of modules, by their text."""


def loss_of_options(name: str, *options: Any) -> WeightedSum:
    """The loss of this name in ``KINDS``, with these options; made once for options that are no arrays or lists."""
    is_plain = all(type(option) in _PLAIN for option in options)
    return _kept_loss(name, *options) if is_plain else weighted_sum(KINDS[name](*options))


@lru_cache(maxsize=KEPT_LOSSES, typed=True)  # Typed, since True equals 1, but is no class number.
def _kept_loss(name: str, *options: Any) -> WeightedSum:
    return weighted_sum(KINDS[name](*options))


def known(loss: WeightedSum) -> Known:
    """What a module keeps, so that ``loss_operator`` knows its loss."""
    key = repr(loss.terms)
    return _known.setdefault(key, Known(key, loss))


@constant
def key_of_options(name: str, *options: Any) -> str:
    """The key of the loss of this name in ``KINDS``, with these options."""
    loss = loss_of_options(name, *options)
    key = repr(loss.terms)
    _losses[key] = loss
    return key


def is_plain(valid: Any, offsets: Any, reduction: str, group: Any) -> bool:
    """Whether ``loss_operator`` can compute a loss with these arguments here; else it is computed between graphs."""
    return valid is None and offsets is None and reduction == "mean" and group is None and not is_transformed()


def are_constants(options: tuple[Any, ...]) -> bool:
    """Whether the compiler compiles again when one of these options changes: it does not look into arrays."""
    return all(isinstance(option, _CONSTANTS) for option in options)


def _compute(logits: Tensor, labels: Tensor, key: str, number: int, want_grad: bool) -> Computed:
    check_dense("logits", logits)
    loss = _loss_of(key)
    request = Request.checked(logits.detach(), labels, loss)
    pending = submit([request], loss, logits.device, want_grad=want_grad, want_total=want_grad)
    return pending.differentiable()


def _loss_of(key: str) -> WeightedSum:
    """The loss of a module or function that was compiled in this process.

    Raises:
        RuntimeError: there is none.
    """
    module = _known.get(key)
    loss = _losses.get(key) if module is None else module.loss
    if loss is None:
        raise RuntimeError(
            f"this process does not know the loss {key} of an exported program; make the same loss first, and keep it: "
            "criterion = LocalLoss(...)"
        )
    return loss


loss_operator = operator("lovasz::loss", _compute)
