"""``RemoteLoss``: a loss that a server computes, as a torch module."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn
from weakref import WeakValueDictionary

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError("lovasz.client.torch needs torch: pip install 'lovasz[torch]'", name="torch") from None

from torch import Tensor

from lovasz.autograd import (
    Computed,
    check_only_two,
    is_transformed,
    no_tensor,
    operator,
    refuse_script,
    untraced,
    with_gradient,
    with_gradients,
)
from lovasz.client.access import TLS, Access, FilePath
from lovasz.client.client import LossClient
from lovasz.client.errors import InvalidInputError, from_invalid_input
from lovasz.client.joint import Joint, checked_joint
from lovasz.client.options import DEFAULT_TIMEOUT_SECONDS, ClientOptions
from lovasz.client.target import checked_target
from lovasz.client.tensors import AnyArray
from lovasz.spec import InvalidInput, LossLike, Reduction, Result, weighted_sum
from lovasz.spec.checks import gradient_reduction as checked_gradient_reduction
from lovasz.spec.checks import reduction as checked_reduction
from lovasz.spec.layout import checked_offsets

__all__ = ["RemoteLoss"]


class RemoteLoss(torch.nn.Module):
    """A loss, or a weighted sum of losses, computed by a server. ::

        criterion = RemoteLoss("localhost:50051", [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())])
        criterion(logits, labels).backward()

    The forward pass makes one call, which returns loss and gradient. The backward pass only scales the gradient, in
    float32, and returns it in the logits' dtype and on their device, so autocast and gradient scalers work. No gradient
    is requested under ``torch.no_grad``, as in validation, nor for logits that require none. ``train()`` and ``eval()``
    change nothing. A pickled or copied module opens its own connection.

    With ``joint``, all ranks of a data-parallel training get the loss of all their pixels, and each rank gets its part
    of the one true gradient. ::

        criterion = RemoteLoss("localhost:50051", LovaszSoftmax(), joint="cityscapes-7")

    The module counts its calls, those with a gradient and those without separately, and calls of all ranks with the
    same number form a step. So every rank must make the same number of calls, also with gradient accumulation; a batch
    may be empty (N = 0), and a rank whose data end earlier calls :meth:`leave`. A call that raises is not counted. An
    evaluation under ``torch.no_grad`` has no gradient.

    Attributes:
        result: the last result, without its gradient: per-class losses, IoU counts and timing. None before the first.
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
        http_proxy: bool = False,
        tls: TLS | None = None,
        token: str | None = None,
        token_file: FilePath | None = None,
        allow_token_without_tls: bool = False,
        joint: Joint | str | None = None,
        gradient_reduction: str = "mean",
        reduction: Reduction = "mean",
    ) -> None:
        """Checks its arguments. It connects at the first call.

        Args:
            target: as for :class:`LossClient`; or a client, which this module uses and does not close. The client's
                own options then replace all from ``timeout`` to ``allow_token_without_tls``.
            loss: one of the losses, such as :class:`LovaszSoftmax`, or a list of (weight, loss).
            timeout: seconds for a call with all its retries.
            transport: as for :class:`LossClient`.
            wire_dtype: as for :class:`LossClient`.
            load_balancing: as for :class:`LossClient`.
            run: as for :class:`LossClient`.
            http_proxy: as for :class:`LossClient`.
            tls: as for :class:`LossClient`.
            token: as for :class:`LossClient`.
            token_file: as for :class:`LossClient`.
            allow_token_without_tls: as for :class:`LossClient`.
            joint: this rank's place in a data-parallel training; or the run's name, for rank and world size of
                ``torch.distributed``'s default group at the first call.
            gradient_reduction: how the trainer combines the gradients of its ranks. ``"mean"``, as
                DistributedDataParallel does: gradients are multiplied by world_size, so that their mean is the true
                gradient. ``"active_mean"``, as DistributedDataParallel's ``join(divide_by_initial_world_size=False)``
                does: they are multiplied by the number of ranks that have not left. ``"sum"``: they are left as they
                are.
            reduction: ``"mean"``; or ``"none"`` for one loss per image, shape (images,), if all terms are Lovász losses
                with ``per_image``. Not with ``joint``: losses of images do not depend on other ranks.

        Raises:
            InvalidInput: the loss is invalid, or its terms cannot be combined.
            ValueError: another argument is invalid.
        """
        super().__init__()
        self.reduction = checked_reduction(reduction)
        if reduction == "none" and joint is not None:
            raise ValueError(
                "reduction: got 'none' with joint; expected 'mean', or no joint: "
                "it does not change the loss of an image"
            )
        if isinstance(joint, str):
            joint = Joint(joint)
        self.joint = None if joint is None else checked_joint(joint)
        self.gradient_reduction = checked_gradient_reduction(gradient_reduction)
        self._first_step = 0 if self.joint is None or self.joint.step is None else self.joint.step
        self._calls = {True: 0, False: 0}
        self._reached = {True: 0, False: 0}
        """One more than the largest step so far."""
        self.loss = weighted_sum(loss)
        if reduction == "none":
            self.loss.check_per_image()
        self.result: Result[Any] | None = None
        self._key = _register(self)
        self._client = target if isinstance(target, LossClient) else None
        self._own = self._client is None
        self._target = target.target if isinstance(target, LossClient) else checked_target(target)
        self._options = (
            ClientOptions.parsed(
                timeout=timeout,
                transport=transport,
                wire_dtype=wire_dtype,
                load_balancing=load_balancing,
                run=run,
                http_proxy=http_proxy,
                access=Access.parsed(tls, token, token_file, allow_token_without_tls),
            )
            if self._client is None
            else self._client.options
        )

    @property
    def client(self) -> LossClient:
        """The client; opened at first use."""
        if self._client is None:
            self._client = LossClient.with_options(self._target, self._options)
        return self._client

    def forward(
        self,
        logits: Tensor,
        labels: AnyArray,
        *others: object,
        valid: AnyArray | None = None,
        offsets: AnyArray | None = None,
        step: int | None = None,
    ) -> Tensor:
        """The loss (float64 for float64 logits, else float32), differentiable once: 0-dim, or of shape (images,).

        Args:
            logits: float32, float16, bfloat16 or float64 (which travels as float32), (N, C, *spatial), on any device.
            labels: integers, bool, or floats that are whole numbers, (N, *spatial) or (N, 1, *spatial), on any device.
            others: none; pixel weights, which other losses take here, are refused.
            valid: as for :meth:`LossClient.compute`.
            offsets: as for :meth:`LossClient.compute`.
            step: the number of the joint step; None: the module counts, from the ``step`` of ``joint`` (0 if it has
                none).

        Raises:
            LossError: one of its subclasses; see :meth:`LossClient.compute`.
            TypeError: a further positional argument was given.
        """
        check_only_two("RemoteLoss", others)
        if not isinstance(logits, Tensor):
            error = InvalidInputError("logits", no_tensor(logits, "LossClient.compute"))
            with suppress(Exception):
                self.abort(str(error), step=step)
            raise error
        want_grad = torch.is_grad_enabled() and logits.requires_grad
        is_plain = valid is None and offsets is None and self.reduction == "mean"
        if torch.compiler.is_compiling() and is_plain and not is_transformed():
            return _operator(logits, torch.as_tensor(labels), self._key, -1 if step is None else step, want_grad)
        return _untraced(self, logits, labels, want_grad, step, valid, offsets)

    def _differentiable(
        self, logits: Tensor, labels: AnyArray, want_grad: bool, step: int | None, valid: Any, offsets: Any
    ) -> Tensor:
        if self.reduction == "mean":
            return with_gradient(logits, *self._compute(logits, labels, want_grad, step, valid, offsets))
        try:
            ends = checked_offsets(offsets, logits.shape[0])
            self.loss.check_losses_of_images(logits.shape[0] if ends is None else len(ends))
        except InvalidInput as error:
            raise from_invalid_input(error) from None
        _, grad, _ = self._compute(logits, labels, want_grad, step, valid, ends)
        assert self.result is not None
        return with_gradients(logits, self.loss.per_image_losses(self.result.terms), grad, ends)

    def _compute(
        self,
        logits: Tensor,
        labels: AnyArray,
        want_grad: bool,
        step: int | None,
        valid: AnyArray | None = None,
        offsets: AnyArray | None = None,
    ) -> tuple[float, Any, float]:
        """Makes the call; returns the loss, its gradient, and what the gradient is still to be multiplied with."""
        joint = self._place(want_grad, step)
        result = self.client.compute(
            logits, labels, self.loss, valid=valid, offsets=offsets, want_grad=want_grad, joint=joint
        )
        self._calls[want_grad] += step is None
        # Not by Module's own __setattr__, which looks for parameters first and takes ten times as long.
        object.__setattr__(self, "result", _without_grad(result))
        factor = 1
        if joint is not None and joint.step is not None:
            self._reached[want_grad] = max(self._reached[want_grad], joint.step + 1)
            if self.gradient_reduction == "mean":
                factor = joint.world_size or 1
            elif self.gradient_reduction == "active_mean":
                factor = result.ranks
        return result.loss, result.grad, factor

    def _place(self, want_grad: bool, step: int | None) -> Joint | None:
        """This rank's place in the step of a call, as the caller numbers it, or as it is counted."""
        if self.joint is None:
            return None
        self.joint = self.joint.resolved()
        return replace(self.joint, step=self._first_step + self._calls[want_grad] if step is None else step)

    def abort(self, reason: str, *, step: int | None = None) -> bool:
        """Ends the joint step of the next call for the other ranks: they get CallAbortedError with the reason.

        Needed only where this rank fails before its call, in its model for example; a call with invalid arguments does
        it by itself. It is a step with a gradient unless called under ``torch.no_grad``. It tries once, for at most two
        seconds.

        Args:
            reason: for the other ranks; at most 1000 characters are passed on.
            step: the number of the step; None: the one that the module counts.

        Returns:
            Whether the server was told; False also without ``joint``.

        Raises:
            InvalidInputError: rank and world size are not known, or the step is invalid.
        """
        want_grad = torch.is_grad_enabled()
        place = self._place(want_grad, step)
        return place is not None and self.client.abort(place, reason, want_grad=want_grad)

    def leave(self) -> None:
        """This rank has no more data: from its next step on, the other ranks go on without it.

        All ranks call it at the end of their data, also those that end last. Steps are then counted from the beginning:
        further calls belong to the next round, in which the ranks meet again once the others have left, too. With
        DistributedDataParallel, call it inside its ``join()``. Does nothing without ``joint``.

        Raises:
            LossError: one of its subclasses: the server could not be told; call it again.
        """
        if self.joint is None:
            return
        self.joint = joint = self.joint.resolved()
        first, evaluation_first = (max(self._reached[mode], self._first_step) for mode in (True, False))
        self.client.leave(replace(joint, step=first), evaluation_first)
        self.joint = replace(joint, round=joint.round + 1)
        self._calls, self._reached = {True: 0, False: 0}, {True: 0, False: 0}

    def close(self) -> None:
        """Closes the connection if this module opened it."""
        if self._own and self._client is not None:
            self._client.close()
            self._client = None

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script("RemoteLoss")

    def extra_repr(self) -> str:
        terms = " + ".join(f"{weight:g} * {loss}" for weight, loss in self.loss.terms)
        return f"{self._target}, {terms}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_client=None, _own=True, result=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = _register(self)


_untraced = untraced(RemoteLoss._differentiable)


def _without_grad(result: Result[Any]) -> Result[Any]:
    # As dataclasses.replace, which takes ten times as long.
    return Result(result.loss, None, result.terms, result.intersection, result.union, result.timing, result.ranks)


_modules: WeakValueDictionary[str, RemoteLoss] = WeakValueDictionary()
"""By their keys: an operator of ``torch.compile`` takes no objects."""

_keys = itertools.count()


def _register(module: RemoteLoss) -> str:
    key = str(next(_keys))
    _modules[key] = module
    return key


def _compute_for_graph(logits: Tensor, labels: Tensor, key: str, step: int, want_grad: bool) -> Computed:
    loss, grad, factor = _modules[key]._compute(logits, labels, want_grad, None if step < 0 else step)
    return loss, grad if grad is None or factor == 1 else grad.mul_(factor)


_operator = operator("lovasz::remote_loss", _compute_for_graph)
