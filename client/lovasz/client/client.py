"""The client: a loss and its gradient from a server, or from this process, in one call."""

from __future__ import annotations

import contextvars
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from lovasz import spec, wire
from lovasz.client.access import TLS, Access, FilePath
from lovasz.client.errors import CallCancelledError, from_invalid_input
from lovasz.client.joint import Joint, checked_joint
from lovasz.client.options import DEFAULT_TIMEOUT_SECONDS, ClientOptions, checked_timeout
from lovasz.client.remote import RemoteTarget
from lovasz.client.submission import CallThreads, on_current_stream
from lovasz.client.target import INPROCESS, PreparedCall, ServerInfo, Target, checked_target
from lovasz.client.tensors import AnyArray, with_mask
from lovasz.spec.checks import flag

_SUBMIT_THREADS = 16
_ABORT_SECONDS = 2.0
"""How long a rank that cannot take part in a step may try to say so."""
_CANCELLED_SECONDS = 0.5
"""How long calls that were cancelled may take to end, before their threads are left alone."""


class LossClient:
    """Computes losses on a server. Threads can share a client; call ``close``, or use it in a ``with`` block.

    A pickled or copied client opens its own connection.
    """

    def __init__(
        self,
        target: str,
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
    ) -> None:
        """Checks its arguments. It connects at the first call.

        A call that finds no server, or a full one, is repeated until its timeout. Before the client's first answer its
        address may be wrong: until then a call is tried at most 5 times, within about 10 seconds. A server that says
        when to try again, as one that is starting or full, counts as an answer.

        Args:
            target: HOST:PORT, ``unix:/path``, any other target of gRPC, or ``"inprocess"``: no server, ``lovasz.core``
                computes here on the logits' device.
            timeout: seconds for a call with all its retries, unless the call gives its own; no effect in process.
            transport: ``"auto"``: tensors go through shared memory if the target is a Unix socket and its server takes
                it (``--shared-memory``), else over gRPC; tensors on a GPU that the server can reach stay there.
                ``"grpc"``: over gRPC only. ``"shm"``: never over gRPC.
            wire_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: the dtype in which logits and gradient travel;
                None: the logits' own. 16 bits halve the traffic; docs/benchmarks.md states the error. No effect in
                process.
            load_balancing: which server a call goes to if the target has several addresses. None: the first that
                answers. ``"round_robin"``: each in turn. ``"ring_hash"``: all ranks of a joint training go to one
                server, and trainings are spread; needs grpcio 1.70 or newer and an environment variable, see
                docs/joint.md. No effect in process and on a Unix socket.
            run: the training's name, at most 200 characters: the server's metrics then show its loss and IoU. A joint
                step is shown under its own run.
            http_proxy: True: connections go through the HTTP proxy that the environment names (``grpc_proxy``,
                ``https_proxy`` or ``http_proxy``; ``no_proxy`` lists hosts without), as gRPC does by default; never to
                a server on this host.
            tls: which CAs to trust, and this client's own certificate; None: plain text. No effect in process and on a
                Unix socket.
            token: for a server with ``--tokens``. It is not kept in pickles.
            token_file: a file that contains only the token, in place of ``token``; it is read again when it changes.
            allow_token_without_tls: True: the token may go to another host in plain text. Everyone who can read the
                network traffic then knows it.

        Raises:
            ValueError: an argument is invalid, or a file cannot be read.
            ModuleNotFoundError: the target is ``"inprocess"``, and torch is not installed.
        """
        self._open(
            target,
            ClientOptions.parsed(
                timeout=timeout,
                transport=transport,
                wire_dtype=wire_dtype,
                load_balancing=load_balancing,
                run=run,
                http_proxy=http_proxy,
                access=Access.parsed(tls, token, token_file, allow_token_without_tls),
            ),
        )

    @classmethod
    def with_options(cls, target: str, options: ClientOptions) -> LossClient:
        """A client with options that were parsed before.

        Raises:
            ValueError: the target is invalid, or does not fit the options, or a file cannot be read.
        """
        client = cls.__new__(cls)
        client._open(target, options)
        return client

    def __reduce__(self) -> tuple[Callable[..., LossClient], tuple[str, ClientOptions]]:
        return type(self).with_options, (self.target, self.options)

    def _open(self, target: str, options: ClientOptions) -> None:
        self.target = checked_target(target)
        self.options = options
        self._target = _target(target, options)
        self._threads = CallThreads(_SUBMIT_THREADS)
        self._closed = False
        # A client that is dropped is part of cycles, which Python may collect far later.
        weakref.finalize(self, self._target.close).atexit = False

    def compute(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.LossLike,
        *,
        valid: AnyArray | None = None,
        offsets: AnyArray | None = None,
        want_grad: bool = True,
        joint: Joint | None = None,
        timeout: float | None = None,
    ) -> spec.Result[Any]:
        """The loss, its gradient, per-class losses and IoU counts.

        Args:
            logits: numpy or torch, on any device, or an array of JAX, TensorFlow or another framework (read by
                ``__array__`` or DLPack); float32, float16, bfloat16 or float64 (which travels as float32); shape
                (N, C, *spatial), or as the loss describes.
            labels: likewise; integers, bool, or floats that are whole numbers; shape (N, *spatial) or
                (N, 1, *spatial), or as the loss describes.
            loss: one of the losses, such as :class:`LovaszSoftmax`, or a list of (weight, loss).
            valid: bool, a mask in the shape of the labels, or with 1 along some axes: pixels where it is false are
                ignored, as those of ``ignore_index`` are. In a joint step all ranks give one, or none does.
            offsets: for terms with ``per_image``: where each image ends along the first axis, if an image has several
                items there. For a batch of point clouds (P, C): the end of each cloud, as Pointcept's ``offset``.
            want_grad: False for validation: no gradient is computed or sent.
            joint: this rank's place in a joint step; its ``step`` must be set. Loss, per-class losses and counts are
                then those of all ranks' pixels, and the gradient is that of the joint loss for this rank's logits. N
                may be 0. If the request is invalid, the other ranks of the step are told at once.
            timeout: seconds; None: the client's.

        Returns:
            The result. Its ``grad`` is a tensor on the logits' device if they are one, otherwise an array of numpy; in
            their dtype (float32 for 16-bit logits). On a GPU, use it on the stream that is current at the call, or on
            one that waits for that stream: its memory may be used again when it is dropped.

        Raises:
            InvalidInputError: the request is invalid.
            LossError: one of its other subclasses.
        """
        inputs = logits, labels, loss, valid, offsets
        call, deadline = self._begin(*inputs, want_grad, joint, timeout, blocking=True)
        return self._finish(call, deadline)

    def submit(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.LossLike,
        *,
        valid: AnyArray | None = None,
        offsets: AnyArray | None = None,
        want_grad: bool = True,
        joint: Joint | None = None,
        timeout: float | None = None,
    ) -> Future[spec.Result[Any]]:
        """Like :meth:`compute`, but returns a future at once, so that other work can overlap the call.

        Arrays that are not on the host are copied before it returns. Do not change arrays on the host until the future
        is done. Errors of an invalid request are raised here, all others by the future.
        """
        inputs = logits, labels, loss, valid, offsets
        call, deadline = self._begin(*inputs, want_grad, joint, timeout, blocking=False)
        try:
            # In the caller's context, so that the call belongs to the caller's trace.
            work = partial(contextvars.copy_context().run, self._finish, call, deadline)
            return self._threads.submit(on_current_stream(logits, work), call.discard)
        except RuntimeError:
            call.discard()
            self._check_open()
            raise

    def abort(self, joint: Joint, reason: str, *, want_grad: bool = True) -> bool:
        """Ends a joint step in which this rank cannot take part: the others get CallAbortedError with the reason.

        Needed only where a rank fails before it calls; :meth:`compute` and :meth:`submit` do it themselves when they
        refuse their arguments. It tries once, for at most two seconds.

        Args:
            joint: this rank's place in the step.
            reason: for the other ranks; at most 1000 characters are passed on.
            want_grad: whether it is a step with a gradient.

        Returns:
            Whether the server was told. If not, the others wait until the timeout of the step.

        Raises:
            InvalidInputError: ``joint`` is invalid.
        """
        self._check_open()
        return self._abort(checked_joint(joint).at(joint.step), reason, want_grad)

    def leave(self, joint: Joint, evaluation_step: int, *, timeout: float | None = None) -> None:
        """This rank takes no part in further steps of a run: the others go on without it.

        Args:
            joint: this rank's place; ``step`` is the first one with a gradient that it takes no part in. If it returns,
                its ``round`` must be one more.
            evaluation_step: the first step without a gradient that it takes no part in.
            timeout: seconds; None: the client's.

        Raises:
            LossError: one of its subclasses.
        """
        self._check_open()
        try:
            leave = wire.Leave(checked_joint(joint).at(joint.step), evaluation_step)
        except spec.InvalidInput as error:
            raise from_invalid_input(error) from None
        self._target.leave_run(leave, self._seconds(timeout))

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is, and its limits.

        Raises:
            LossError: one of its subclasses.
        """
        self._check_open()
        return self._target.server_info(self._seconds(timeout))

    def transport(self, *, on_gpu: bool = False, timeout: float | None = None) -> str:
        """The way that requests take, as :attr:`Timing.transport` tells it; empty in process.

        A single request may take another: one whose header or answer is too long for a packet, or whose tensors are on
        a GPU that the server cannot reach.

        Args:
            on_gpu: True: the way of tensors that are on a GPU.
            timeout: seconds; None: the client's.

        Raises:
            LossError: one of its subclasses: the client is not connected yet, and no server answers, or not in time; or
                its ``transport`` is ``"shm"``, and shared memory is not available.
        """
        self._check_open()
        return self._target.transport(self._seconds(timeout), on_gpu=on_gpu)

    def close(self, *, cancel: bool = False) -> None:
        """Waits for submitted calls, then ends the connections. Further calls raise CallCancelledError.

        Args:
            cancel: ends the calls that are not done instead, with CallCancelledError. An exception inside the ``with``
                of a client does so, Ctrl-C included.
        """
        self._closed = True
        if cancel:
            self._target.close()
            self._threads.close(_CANCELLED_SECONDS)
            return
        self._threads.close()
        self._target.close()

    def __enter__(self) -> LossClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _begin(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.LossLike,
        valid: AnyArray | None,
        offsets: AnyArray | None,
        want_grad: bool,
        joint: Joint | None,
        timeout: float | None,
        *,
        blocking: bool,
    ) -> tuple[PreparedCall, float]:
        """The call, prepared, and its deadline."""
        self._check_open()
        place = None if joint is None else checked_joint(joint).at(joint.step, blocking=blocking)
        try:
            deadline = time.monotonic() + self._seconds(timeout)
            want_grad = flag("want_grad", want_grad)
            total = spec.weighted_sum(loss)
            if valid is not None:
                labels, total = with_mask(logits, labels, valid, total)
            left = deadline - time.monotonic()
            return self._target.prepare(logits, labels, total, want_grad, place, offsets, left), deadline
        except Exception as error:
            if place is not None:
                self._abort(place, str(error) or type(error).__name__, want_grad)
            if isinstance(error, spec.InvalidInput):
                raise from_invalid_input(error) from None
            raise

    def _abort(self, place: wire.Joint, reason: str, want_grad: bool) -> bool:
        if place.world_size == 1:
            return True
        with suppress(Exception):  # The caller has an error of its own to raise.
            self._target.abort_step(wire.Abort(place, want_grad, reason), _ABORT_SECONDS)
            return True
        return False

    def _finish(self, call: PreparedCall, deadline: float) -> spec.Result[Any]:
        try:
            return call.compute(deadline - time.monotonic())
        except spec.InvalidInput as error:
            raise from_invalid_input(error) from None

    def _seconds(self, timeout: float | None) -> float:
        return self.options.timeout if timeout is None else checked_timeout(timeout)

    def _check_open(self) -> None:
        if self._closed:
            raise CallCancelledError(f"{self.target}: the client was closed")


def _target(name: str, options: ClientOptions) -> Target:
    if name == INPROCESS:
        try:
            from lovasz.client.inprocess import InProcessTarget
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                "the target 'inprocess' needs torch: pip install 'lovasz[torch]'", name="torch"
            ) from None
        return InProcessTarget()
    return RemoteTarget(name, options)
