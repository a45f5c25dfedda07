"""The losses as PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from lovasz.autograd import check_only_two, refuse_script
from lovasz.core.compiling import is_plain, known, loss_operator
from lovasz.core.distributed import absence
from lovasz.core.distributed.group import WORLD, check_group
from lovasz.core.functional import check_mean, differentiable, differentiable_joint
from lovasz.spec import (
    GradientReduction,
    Loss,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Reduction,
    Result,
    WeightedSum,
    weighted_sum,
)
from lovasz.spec.checks import gradient_reduction as checked_gradient_reduction
from lovasz.spec.checks import reduction as checked_reduction


class LocalLoss(torch.nn.Module):
    """A loss, or a weighted sum of losses, computed in this process: ``LocalLoss(LovaszSoftmax(ignore_index=255))``.

    The counterpart of :class:`lovasz.client.torch.RemoteLoss`. With ``group``, all ranks of a data-parallel training
    get the loss of all their pixels, and each rank gets its part of the one true gradient. ::

        criterion = LocalLoss(LovaszSoftmax(ignore_index=255), group="world")

    Attributes:
        result: with ``group``, the last result, without its gradient: per-class losses and IoU counts of all ranks.
            None before the first, and without ``group``.
    """

    def __init__(
        self,
        loss: LossLike,
        *,
        reduction: Reduction = "mean",
        group: Any = None,
        gradient_reduction: GradientReduction = "mean",
    ) -> None:
        """Takes one loss, or a list of (weight, loss) pairs.

        Args:
            reduction: ``"mean"``; or ``"none"`` for one loss per image, shape (images,), if all terms are Lovász losses
                with ``per_image``. Not with ``group``: losses of images do not depend on other ranks.
            group: None: the loss of this process's pixels. A process group of ``torch.distributed``: the loss of the
                pixels of all its ranks, which have to make the same number of calls; a batch may be empty (N = 0), and
                a rank whose data end earlier calls :meth:`leave`, if the group is for this loss alone.
                ``"world"``: the default group at the time of a call. A module with a process group can be neither
                pickled nor copied; one with ``"world"`` can.
            gradient_reduction: as for :func:`lovasz.core.lovasz_softmax`.

        Raises:
            InvalidInput: the terms cannot be combined, or an argument is invalid.
        """
        super().__init__()
        parsed = self.loss = weighted_sum(loss)
        self.reduction = checked_reduction(reduction)
        if group is not None:
            check_mean(reduction)
            check_group(group)
        elif self.reduction == "none":
            parsed.check_per_image()
        self.group = group
        self.gradient_reduction = checked_gradient_reduction(gradient_reduction)
        self.result: Result[Tensor] | None = None

    @property
    def loss(self) -> WeightedSum:
        """What it computes. Another loss may be assigned."""
        return self._known.loss

    @loss.setter
    def loss(self, loss: LossLike) -> None:
        # Compiled code knows the loss by its key, for as long as this module lives.
        self._known = known(weighted_sum(loss))
        self._key = self._known.key

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":  # Of a module, torch would make a part of this one.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.loss = self._known.loss  # As this process may not know it.

    def forward(self, logits: Tensor, labels: Any, *others: object, valid: Any = None, offsets: Any = None) -> Tensor:
        """Returns the loss, a 0-dim tensor unless ``reduction`` is ``"none"``, differentiable in the logits.

        Args:
            logits: (N, C, *spatial), or as the loss describes.
            labels: (N, *spatial), or as the loss describes.
            others: none; pixel weights, which other losses take here, are refused.
            valid: as for :func:`lovasz.core.compute`.
            offsets: as for :func:`lovasz.core.compute`.
        """
        check_only_two("LocalLoss", others)
        if torch.compiler.is_compiling() and is_plain(valid, offsets, self.reduction, self.group):
            return loss_operator(logits, labels, self._key, 0, torch.is_grad_enabled() and logits.requires_grad)
        if self.group is not None:
            value, self.result = differentiable_joint(
                logits,
                labels,
                lambda: self.loss,
                valid=valid,
                offsets=offsets,
                group=self.group,
                gradient_reduction=self.gradient_reduction,
            )
            return value
        return differentiable(logits, labels, self.loss, valid=valid, offsets=offsets, reduction=self.reduction)

    def leave(self) -> None:
        """This rank has no more data: from its next step on, the other ranks go on without it.

        Returns at once, unless this rank has left before and made no call since: then it first waits until all others
        have left that round, too, for as long as they have data.

        All ranks call it at the end of their data, also those that end last. Meanwhile a thread takes part in the
        exchanges of the group in this rank's place, without data, so that this thread can wait in the ``join()`` of
        DistributedDataParallel. Call it inside: ::

            criterion = LocalLoss(loss, group=torch.distributed.new_group(backend="gloo"))
            with model.join():
                for images, labels in loader:
                    ...
                criterion.leave()

        Once all ranks have left, the thread ends, and further calls belong to the next round, in which all ranks meet
        again. The next call in the group, also by a function, waits for that, for as long as the other ranks have data.
        Does nothing without ``group``.

        The group is for this loss alone. Two losses that share a group cannot both leave: give each a group of its own.
        Nor can a rank leave the default group, a group in which DistributedDataParallel or others communicate, or one
        that sends by anything but gloo: with NCCL, two threads may not communicate at the same time. Functions such as
        ``lovasz_softmax(..., group=...)`` cannot leave.

        Raises:
            InvalidInput: the group is not a gloo group for this loss alone, as far as this rank can see.
            RuntimeError: the exchange failed after this rank had left the last time, for instance as a process died.
        """
        if self.group is not None:
            absence.leave(self.group, self)

    def close(self) -> None:
        """If this rank has left, waits until all ranks have; call it before ``destroy_process_group``.

        Raises:
            RuntimeError: the exchange failed after this rank had left, for instance as a process died.
        """
        if self.group is not None and self.group != WORLD:  # No rank leaves the default group.
            absence.finish(self.group)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script("LocalLoss")

    def extra_repr(self) -> str:
        return ", ".join(f"{weight} * {loss}" for weight, loss in self.loss.terms)


class _OneLoss(LocalLoss):
    """A module that is made from the options of one loss, ``_kind``."""

    _kind: ClassVar[Callable[..., Loss]]

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        group: Any = None,
        gradient_reduction: GradientReduction = "mean",
        **options: Any,
    ) -> None:
        loss = type(self)._kind(**options)
        super().__init__(loss, reduction=reduction, group=group, gradient_reduction=gradient_reduction)


class LovaszSoftmaxLoss(_OneLoss):
    """The Lovász-Softmax loss as a module; takes the options of :class:`lovasz.spec.LovaszSoftmax`, and ``group``."""

    _kind = LovaszSoftmax


class LovaszHingeLoss(_OneLoss):
    """The Lovász hinge as a module; takes the options of :class:`lovasz.spec.LovaszHinge`, and ``group``."""

    _kind = LovaszHinge


class LovaszSigmoidLoss(_OneLoss):
    """The Lovász-Sigmoid loss as a module; takes the options of :class:`lovasz.spec.LovaszSigmoid`, and ``group``."""

    _kind = LovaszSigmoid
