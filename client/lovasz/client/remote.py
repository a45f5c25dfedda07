"""A server as a target: small requests in one message, large ones in a stream or in shared memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.connection import Connection
from lovasz.client.devices import Devices
from lovasz.client.errors import (
    DeadlineExceededError,
    IncompatibleServerError,
    LossError,
    ServerUnavailableError,
)
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.options import (
    ASKED_OVER_GRPC,
    IN_DEVICE_MEMORY,
    IN_SHARED_MEMORY,
    OVER_GRPC,
    ClientOptions,
    Transport,
)
from lovasz.client.shared_memory import Shared, SharedMemory
from lovasz.client.target import Device, ServerInfo
from lovasz.client.tensors import AnyArray, Array, Outgoing, decode_grad, encode_labels, encode_logits
from lovasz.spec import InvalidInput
from lovasz.spec.arrays import is_torch
from lovasz.spec.probabilities import LOOKS_OF_PROCESS
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

UNARY_BYTES = 2 << 20
"""Requests with a larger payload are streamed: about where a stream becomes faster (measured on loopback, 2 cores)."""
SHARED_BYTES = 64 << 10
"""Requests with a larger payload go through shared memory also where the server takes no calls on its socket; smaller
ones are as fast in a message then. A smaller gradient is copied from shared memory."""

_log = logging.getLogger(__name__)

_MOST_WARNINGS = 10
"""The log gets each warning of the server once, and no more than these."""


@dataclass(frozen=True)
class Call:
    """A request to a server, checked and encoded.

    Attributes:
        target: the server.
        request: all of the request but its payload.
        logits: the bytes that are sent, unless ``region`` has them on a device.
        labels: likewise.
        memory: the pooled memory that these bytes are in, where they are not in the caller's own arrays.
        region: the shared memory that the tensors are in; None if the call does not use any.
        original: the logits as an array or a tensor.
    """

    target: RemoteTarget
    request: wire.Request
    logits: memoryview
    labels: memoryview
    memory: tuple[Memory, ...]
    region: Shared | None
    original: Array

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it on the server within ``timeout`` seconds, retries included."""
        return self.target.compute(self, timeout)


Answer = tuple[wire.Response, Array]
"""A response, and its gradient as it was sent (empty if none was wanted)."""


class RemoteTarget:
    """A server, reached by gRPC, and by the shared-memory socket."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        """Opens the channels, which connect at the first call.

        Raises:
            ValueError: the options demand shared memory, and the target is not a Unix socket.
        """
        path = wire.socket_path(target)
        if options.transport is Transport.SHM:
            if path is None:
                raise ValueError(f"transport: got 'shm' with the target {target}; expected a target unix:/path")
            longest = wire.MAX_SOCKET_PATH_BYTES - len(wire.MEMORY_SUFFIX)
            if (length := len(os.fsencode(path))) > longest:
                raise ValueError(
                    f"transport: got 'shm' with a path of {length} bytes; expected at most {longest}, as "
                    f"{wire.MEMORY_SUFFIX} is appended to it"
                )
        self._name = target
        self._transport = options.transport
        self._wire_dtype = options.wire_dtype
        self._run = options.run
        self._warned: set[str] = set()
        self._connection = Connection(target, options)
        self._channels, self._retries = self._connection.channels, self._connection.retries
        self._memory: MemoryPool[Memory] = MemoryPool(Memory)
        self._shared = None if path is None or self._transport is Transport.GRPC else SharedMemory(path)
        self._devices = None if self._shared is None else Devices(self._shared, options.timeout)

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
    ) -> Call:
        scores = encode_logits(logits, self._wire_dtype)

        def checked(targets: Outgoing) -> wire.Request:
            request = wire.Request.checked(
                loss, scores.spec, targets.spec, want_grad, joint=joint, run=self._run, offsets=offsets
            )
            if scores.dtype != "bfloat16" or is_torch(scores.source):
                LOOKS_OF_PROCESS.warn_of_probabilities(scores.source, loss)
            return request

        if self._is_offered() and self._devices is not None and self._devices.may_take(logits):
            targets = encode_labels(labels, narrow=False)
            request = checked(targets)
            region = self._devices.region(logits, wire.places(request).nbytes)
            if region is not None:
                return self._in_region(region, request, scores, targets)
        targets = encode_labels(labels)
        request = checked(targets)
        if self._shared is not None and self._is_shared(self._shared, request):
            return self._in_region(self._shared.take(wire.places(request).nbytes), request, scores, targets)
        memory: list[Memory] = []

        def on_host(tensor: Outgoing) -> memoryview:
            array = tensor.in_place() if tensor.spec.nbytes else tensor.array()
            if array is not None:
                return wire.as_bytes(array)
            memory.append(self._memory.take(tensor.spec.nbytes))
            return memory[-1].write(0, tensor)

        return Call(self, request, on_host(scores), on_host(targets), tuple(memory), None, scores.source)

    def _in_region(self, region: Shared, request: wire.Request, scores: Outgoing, targets: Outgoing) -> Call:
        place = wire.places(request)
        try:
            sent = region.write(place.logits, scores), region.write(place.labels, targets)
        except BaseException:
            region.close()
            raise
        return Call(self, request, *sent, memory=(), region=region, original=scores.source)

    def _is_shared(self, shared: SharedMemory, request: wire.Request) -> bool:
        is_worth_it = shared.takes_calls is not False or request.payload_bytes > SHARED_BYTES
        return is_worth_it and self._is_offered()

    def _is_offered(self) -> bool:
        """Whether the server may take shared memory."""
        return self._shared is not None and (self._transport is Transport.SHM or self._shared.is_offered)

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        self._connection.check_open()
        try:
            with self._grpc_errors_translated():
                if call.region is not None:
                    response, grad = self._through_region(call, call.region, timeout)
                else:
                    response, grad = self._in_messages(call, timeout)
        except DeadlineExceededError as error:
            if call.request.joint is None:
                raise
            text = f"{error}; for a rank to learn which others are missing, it must be longer than --joint-timeout"
            raise DeadlineExceededError(text) from None
        if response.warning and response.warning not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(response.warning)
            _log.warning("%s: %s", self._name, "".join(c if c.isprintable() else " " for c in response.warning))
        return spec.Result(
            loss=response.loss,
            grad=None if response.grad is None else decode_grad(grad, response, call.original, self._float32_array),
            terms=response.terms,
            intersection=response.intersection,
            union=response.union,
            timing=response.timing,
            ranks=response.ranks,
        )

    def abort_step(self, abort: wire.Abort, timeout: float) -> None:
        with self._grpc_errors_translated():
            self._channels.abort(abort.to_proto(), timeout=timeout, metadata=self._connection.metadata(abort.joint))

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        message, metadata = leave.to_proto(), self._connection.metadata
        with self._grpc_errors_translated():
            self._retries.call(
                lambda left: self._channels.leave(message, timeout=left, metadata=metadata(leave.joint)), timeout
            )

    def server_info(self, timeout: float) -> ServerInfo:
        with self._grpc_errors_translated():
            info = self._info(timeout)
        return ServerInfo(
            version=info.version,
            devices=tuple(
                Device(device.name, device.hardware, device.healthy, device.starting) for device in info.devices
            ),
            losses=tuple(info.losses),
            memory_budget_bytes=info.memory_budget_bytes,
            max_requests=info.max_requests,
        )

    def transport(self, timeout: float, *, on_gpu: bool) -> str:
        if self._shared is None or not (self._transport is Transport.SHM or self._shared.is_offered):
            return OVER_GRPC
        try:
            session = self._shared.session(timeout)
        except LossError as error:
            if self._transport is Transport.SHM:
                raise
            self._shared.pause(error)
            return OVER_GRPC
        kind = IN_DEVICE_MEMORY if on_gpu and session.devices else IN_SHARED_MEMORY
        return kind if session.takes_calls else kind + ASKED_OVER_GRPC

    @contextmanager
    def _grpc_errors_translated(self) -> Iterator[None]:
        """Turns what gRPC raises inside into the client's errors."""
        try:
            with self._connection.errors_translated():
                yield
        except _WrongAnswer as error:
            raise IncompatibleServerError(f"{self._name}: the answer does not fit the request: {error}") from None

    def close(self) -> None:
        self._connection.close()
        self._memory.close()
        if self._devices is not None:
            self._devices.close()
        if self._shared is not None:
            self._shared.close()

    def _in_messages(self, call: Call, timeout: float) -> Answer:
        try:
            return self._over_grpc(call, timeout)
        finally:
            for memory in call.memory:
                self._memory.give(memory)

    def _over_grpc(self, call: Call, timeout: float) -> Answer:
        send = self._unary if call.request.payload_bytes <= UNARY_BYTES else self._stream
        return self._retries.call(lambda left: send(call, left), timeout)

    def _unary(self, call: Call, timeout: float) -> Answer:
        request = framing.UnaryRequest(call.request.to_proto(), call.logits, call.labels)
        answer = self._channels.unary(request, timeout=timeout, metadata=self._metadata(call))
        return self._received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> Answer:
        answers = self._channels.stream(_messages(call), timeout=timeout, metadata=self._metadata(call))
        try:
            first = next(answers, None)
            if not isinstance(first, pb.ComputeStreamResponse) or not first.HasField("header"):
                raise _WrongAnswer("it does not begin with a header")
            return self._received(first.header, _chunks(answers), call)
        finally:
            answers.cancel()  # No effect on a call that has ended.

    def _received(self, header: pb.ResponseHeader, chunks: Iterable[framing.Bytes], call: Call) -> Answer:
        with _misfit_is_wrong_answer():
            response = wire.Response.from_proto(header, call.request, OVER_GRPC)
            grad = np.empty(0, np.float32)
            if response.grad is not None:
                grad = self._memory.new(response.grad.shape, response.grad.dtype.numpy)
            wire.Assembly([wire.as_bytes(grad)]).add_all(chunks)
        return response, grad

    def _through_region(self, call: Call, region: Shared, timeout: float) -> Answer:
        """The region is reused only after success: after a failure the server may still be writing to it."""
        shared, devices, deadline = self._shared, self._devices, time.monotonic() + timeout
        assert shared is not None
        assert devices is not None
        try:
            try:
                response = self._retries.call(lambda left: self._in_shared_memory(call, shared, region, left), timeout)
            except LossError as error:  # The server takes no such memory.
                timeout = deadline - time.monotonic()
                if region.kind == IN_DEVICE_MEMORY:
                    devices.pause(error)
                    host = shared.moved(region, call.request)
                    logits, labels = host.tensors(call.request)
                    answer = self._through_region(replace(call, logits=logits, labels=labels), host, timeout)
                elif self._transport is Transport.SHM:
                    raise
                else:
                    shared.pause(error)
                    answer = self._over_grpc(call, timeout)
                region.close()
                return answer
        except BaseException:
            region.close()
            raise
        if response.grad is None:
            region.give_back()
            return response, np.empty(0, np.float32)
        copied = response.grad.nbytes <= SHARED_BYTES
        return response, region.take_gradient(wire.places(call.request).grad, response.grad, copied=copied)

    def _in_shared_memory(self, call: Call, shared: SharedMemory, region: Shared, timeout: float) -> wire.Response:
        place = wire.places(call.request)
        region.complete()
        try:
            session = shared.share(region, timeout)
        except ServerUnavailableError:
            self._info(timeout)  # If no server answers: its error.
            raise
        at = wire.SharedTensors(session.name, region.number, place.logits, place.labels, place.grad)
        header = call.request.to_proto(at)
        if session.takes(call.request, header):
            message = pb.SharedMemoryCall(header=header, metadata=dict(self._metadata(call)))
            answer, transport = session.socket.call(message, timeout), region.kind
        else:
            request = framing.UnaryRequest(header, b"", b"")
            try:
                answer = self._channels.shared(request, timeout=timeout, metadata=self._metadata(call)).header
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:  # It may have restarted and not know the session.
                    shared.forget(session)
                raise
            transport = region.kind + ASKED_OVER_GRPC
        with _misfit_is_wrong_answer():
            return wire.Response.from_proto(answer, call.request, transport)

    def _metadata(self, call: Call) -> tuple[tuple[str, str], ...]:
        return self._connection.metadata(call.request.joint)

    def _info(self, timeout: float) -> pb.GetServerInfoResponse:
        metadata = self._connection.metadata(None)
        info: pb.GetServerInfoResponse = self._channels.info(
            pb.GetServerInfoRequest(), timeout=timeout, metadata=metadata
        )
        return info

    def _float32_array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return self._memory.new(shape, np.dtype(np.float32))


class _WrongAnswer(Exception):
    """The answer does not fit the request; the text says why."""


@contextmanager
def _misfit_is_wrong_answer() -> Iterator[None]:
    """Turns an InvalidInput, raised inside by reading an answer, into a _WrongAnswer."""
    try:
        yield
    except InvalidInput as error:
        raise _WrongAnswer(str(error)) from None


def _messages(call: Call) -> Iterator[pb.ComputeStreamRequest | memoryview]:
    """The messages of a streamed request: its header, then the chunks of its payload."""
    yield pb.ComputeStreamRequest(header=call.request.to_proto())
    yield from wire.chunks([call.logits, call.labels])


def _chunks(answers: Iterable[pb.ComputeStreamResponse | memoryview]) -> Iterator[memoryview]:
    """The chunks of a streamed answer, after its header."""
    for message in answers:
        if not isinstance(message, memoryview):
            raise _WrongAnswer("a message without a chunk came after the header")
        yield message
