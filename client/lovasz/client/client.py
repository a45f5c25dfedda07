"""The client: a loss and its gradient from a server, or from this process, in one call."""

from __future__ import annotations

import contextvars
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from lovasz import spec, wire
from lovasz.client.errors import CallCancelledError, InvalidInputError
from lovasz.client.joint import Joint
from lovasz.client.retry import LOAD_BALANCING
from lovasz.client.tensors import Array

INPROCESS = "inprocess"
DEFAULT_TIMEOUT_SECONDS = 60.0
TRANSPORTS = ("auto", "grpc", "shm")
_LONGEST_SECONDS = 1e8
"""Three years; gRPC takes no endless timeout."""
_SUBMIT_THREADS = 16


@dataclass(frozen=True)
class Device:
    """A device that a server computes on."""

    name: str
    hardware: str
    healthy: bool


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and what it takes.

    Attributes:
        losses: the kinds of losses that it computes.
        memory_budget_bytes: tensor bytes that it holds at most, which is the most that one request can have.
        max_requests: requests that it holds at most at one time.
    """

    version: str
    devices: tuple[Device, ...]
    losses: tuple[str, ...]
    memory_budget_bytes: int
    max_requests: int


class Target(Protocol):
    """Where losses are computed."""

    def encode(
        self, logits: Array, labels: Array, loss: spec.WeightedSum, want_grad: bool, joint: wire.Joint | None
    ) -> Any:
        """Checks a request and takes what it needs of the arrays, which may change afterwards."""

    def compute(self, call: Any, timeout: float) -> spec.Result[Any]:
        """Computes it, within so many seconds."""

    def server_info(self, timeout: float) -> ServerInfo:
        """Tells what is there."""

    def close(self) -> None:
        """Ends its connections."""


class LossClient:
    """Computes losses on a server. Threads can share it; ``close`` it, or use it in a ``with``."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        transport: str = "auto",
        wire_dtype: str | None = None,
        load_balancing: str | None = None,
        run: str | None = None,
    ) -> None:
        """
        Args:
            target: HOST:PORT, ``unix:/path``, any other target of gRPC, or ``"inprocess"``: no server, ``lovasz.core``
                computes here on the logits' device.
            timeout: seconds for a call with all its retries, unless the call says otherwise; without effect in process.
            transport: ``"auto"``: tensors go through shared memory if the target is a Unix socket and its server takes
                it (``--shared-memory``), else over gRPC; ``"grpc"`` or ``"shm"``: that alone.
            wire_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: what logits are rounded to before they are sent,
                and their gradient before it comes back; None: the logits' own dtype. 16 bits halve the traffic, at an
                error that docs/benchmarks.md states. Without effect in process.
            load_balancing: which server a call goes to if the target has several addresses. None: the first that
                answers; ``"round_robin"``: each in turn; ``"ring_hash"``: all ranks of a joint training go to one, and
                trainings are spread, which takes grpcio 1.70 or newer and an environment variable: docs/joint.md.
                Without effect in process and on a Unix socket.
            run: names the training, at most 200 characters: its loss and IoU then stand in the server's metrics. A
                joint step is shown under its own run.

        Raises:
            ValueError: an argument that cannot be.

        A call that finds no server, or a full one, is tried again until its timeout; while the client has had no answer
        yet, and its address may be wrong, 5 times in about 10 seconds.
        Connecting happens at the first call.
        """
        self.target = target
        self.timeout = _checked_timeout(timeout)
        self.options: dict[str, Any] = {
            "timeout": timeout,
            "transport": transport,
            "wire_dtype": wire_dtype,
            "load_balancing": load_balancing,
            "run": run,
        }
        self._target = _open(target, transport, wire_dtype, load_balancing, run)
        self._threads = ThreadPoolExecutor(_SUBMIT_THREADS, thread_name_prefix="lovasz-submit")
        self._closed = False

    def compute(
        self,
        logits: Array,
        labels: Array,
        loss: spec.LossLike,
        *,
        want_grad: bool = True,
        joint: Joint | None = None,
        timeout: float | None = None,
    ) -> spec.Result[Any]:
        """The loss, its gradient, per-class losses and IoU counts.

        Args:
            logits: numpy or torch, on any device; float32, float16 or bfloat16 (float64 travels as float32); shape
                (N, C, *spatial), or as the loss describes.
            labels: numpy or torch; integers or bool; shape (N, *spatial), or as the loss describes.
            loss: :class:`LovaszSoftmax`, :class:`LovaszHinge`, :class:`CrossEntropy`, or a list of (weight, loss).
            want_grad: False for validation: no gradient is computed or sent.
            joint: with a ``step``: this rank's place in it; loss, per-class losses and counts are then those of all
                ranks' pixels, and the gradient is that of the joint loss in this rank's logits.
            timeout: seconds; None for the client's.

        Returns:
            The result. Its ``grad`` is of the same kind and on the same device as the logits, and of their dtype
            (float32 for 16-bit logits).

        Raises:
            InvalidInputError: the request cannot be computed with.
            LossError: or one of its other kinds.
        """
        call, deadline = self._begin(logits, labels, loss, want_grad, joint, timeout)
        return self._finish(call, deadline)

    def submit(
        self,
        logits: Array,
        labels: Array,
        loss: spec.LossLike,
        *,
        want_grad: bool = True,
        joint: Joint | None = None,
        timeout: float | None = None,
    ) -> Future[spec.Result[Any]]:
        """Like :meth:`compute`, but returns a future at once, so that other work overlaps the call.

        The arrays are read before it returns, except those that are on the host already: leave these as they are until
        the future is done. What :meth:`compute` raises for a bad request is raised here, the rest by the future.
        """
        call, deadline = self._begin(logits, labels, loss, want_grad, joint, timeout)
        try:
            # In the context of the caller, whose trace it belongs to.
            return self._threads.submit(contextvars.copy_context().run, self._finish, call, deadline)
        except RuntimeError:
            self._check_open()
            raise

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and what it takes.

        Raises:
            LossError: or one of its kinds.
        """
        self._check_open()
        return self._target.server_info(self.timeout if timeout is None else _checked_timeout(timeout))

    def close(self) -> None:
        """Lets submitted calls finish, then ends the connections. Further calls raise CallCancelledError."""
        self._closed = True
        self._threads.shutdown(wait=True)
        self._target.close()

    def __enter__(self) -> LossClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self,
        logits: Array,
        labels: Array,
        loss: spec.LossLike,
        want_grad: bool,
        joint: Joint | None,
        timeout: float | None,
    ) -> tuple[Any, float]:
        self._check_open()
        deadline = time.monotonic() + (self.timeout if timeout is None else _checked_timeout(timeout))
        place = None if joint is None else joint.at(joint.step)
        try:
            return self._target.encode(logits, labels, spec.weighted_sum(loss), want_grad, place), deadline
        except spec.InvalidInput as error:
            raise InvalidInputError(error.field, error.problem) from None

    def _finish(self, call: Any, deadline: float) -> spec.Result[Any]:
        try:
            return self._target.compute(call, deadline - time.monotonic())
        except spec.InvalidInput as error:
            raise InvalidInputError(error.field, error.problem) from None

    def _check_open(self) -> None:
        if self._closed:
            raise CallCancelledError(f"{self.target}: the client was closed")


def _checked_timeout(timeout: float) -> float:
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}; expected seconds > 0")
    return min(timeout, _LONGEST_SECONDS)


def _open(target: str, transport: str, wire_dtype: str | None, load_balancing: str | None, run: str | None) -> Target:
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: got {transport!r}; expected one of {', '.join(TRANSPORTS)}")
    if wire_dtype is not None and wire_dtype not in wire.FLOATS:
        raise ValueError(f"wire_dtype: got {wire_dtype!r}; expected None or one of {', '.join(wire.FLOATS)}")
    if load_balancing is not None and load_balancing not in LOAD_BALANCING:
        raise ValueError(f"load_balancing: got {load_balancing!r}; expected None or one of {', '.join(LOAD_BALANCING)}")
    if not isinstance(target, str) or not target:
        raise ValueError(f"target: got {target!r}; expected HOST:PORT, unix:/path or 'inprocess'")
    if target == INPROCESS:
        from lovasz.client.inprocess import InProcessTarget

        return InProcessTarget()
    from lovasz.client.remote import RemoteTarget

    return RemoteTarget(target, transport, wire_dtype, load_balancing, run or "")
