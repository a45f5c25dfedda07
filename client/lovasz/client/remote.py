"""A server as a target: small requests in one message, large ones in a stream or in shared memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.connection import Connection
from lovasz.client.devices import Devices
from lovasz.client.errors import DeadlineExceededError, IncompatibleServerError, LossError
from lovasz.client.memory import KEPT, SMALL_BYTES, Memory, MemoryPool
from lovasz.client.options import (
    ASKED_OVER_GRPC,
    IN_DEVICE_MEMORY,
    IN_SHARED_MEMORY,
    OVER_GRPC,
    ClientOptions,
    Transport,
)
from lovasz.client.regions import Shared
from lovasz.client.requests import checked_request
from lovasz.client.shared_memory import NoRegionLeftError, SharedMemory
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
        request: all of the request but its payload and its places.
        joint: its rank's place in a joint step; None if it is computed alone.
        original: the logits as an array or a tensor.
        region: the shared memory that the tensors are in; None if the call does not use any.
        payload: the bytes of logits and labels, where they are not in a region.
        memory: the pooled memory that these bytes are in, where they are not in the caller's own arrays.
    """

    target: RemoteTarget
    request: wire.Request
    joint: wire.Joint | None
    original: Array
    region: Shared | None
    payload: tuple[memoryview, ...] = ()
    memory: tuple[Memory, ...] = ()

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it on the server within ``timeout`` seconds, retries included."""
        return self.target.compute(self, timeout)

    def discard(self) -> None:
        """Gives its memory back to the pools."""
        for memory in self.memory:
            self.target._memory.give(memory)
        if self.region is not None:
            self.region.give_back()


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
        self._memory: MemoryPool[Memory] = MemoryPool(Memory, most_idle=KEPT)
        self._shared: SharedMemory | None = None
        if path is not None and self._transport is not Transport.GRPC and wire.CAN_SHARE_MEMORY:
            self._shared = SharedMemory(path, self._connection, waits=self._transport is Transport.SHM)
        self._devices = None if self._shared is None else Devices(self._shared)

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
        timeout: float,
    ) -> Call:
        scores = encode_logits(logits, self._wire_dtype)
        shared, devices = self._offered(), self._devices
        if shared is not None and devices is not None and devices.may_take(scores.original):
            targets = encode_labels(labels, narrow=False)
            request = self._checked(loss, scores, targets, want_grad, joint, offsets)
            region = devices.region(scores.original, request.places.nbytes, timeout)
            if region is not None:
                return self._in_region(region, request, joint, scores, targets)
        targets = encode_labels(labels)
        request = self._checked(loss, scores, targets, want_grad, joint, offsets)
        if shared is not None and (shared.takes_calls is not False or request.payload_bytes > SHARED_BYTES):
            own = shared.take(request.places.nbytes)
            if own is not None:
                return self._in_region(own, request, joint, scores, targets)
        memory: list[Memory] = []

        def on_host(tensor: Outgoing, nbytes: int) -> memoryview:
            array = tensor.array() if nbytes <= SMALL_BYTES else tensor.in_place()
            if array is not None:
                return wire.as_bytes(array)
            memory.append(self._memory.take(nbytes))
            return memory[-1].write(0, tensor)

        payload = on_host(scores, request.logits.nbytes), on_host(targets, request.labels.nbytes)
        return Call(self, request, joint, scores.original, None, payload, tuple(memory))

    def _checked(
        self,
        loss: spec.WeightedSum,
        scores: Outgoing,
        targets: Outgoing,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
    ) -> wire.Request:
        request = checked_request(loss, scores, targets, want_grad, self._run, offsets, may_be_empty=joint is not None)
        if scores.name != "bfloat16" or is_torch(scores.original):
            LOOKS_OF_PROCESS.warn_of_probabilities(scores.original, loss)
        return request

    def _in_region(
        self, region: Shared, request: wire.Request, joint: wire.Joint | None, scores: Outgoing, targets: Outgoing
    ) -> Call:
        try:
            region.write_tensors(request.places, scores, targets)
        except BaseException:
            region.close()
            raise
        return Call(self, request, joint, scores.original, region)

    def _offered(self) -> SharedMemory | None:
        """What can be shared with the server; None if it seems not to take shared memory."""
        shared = self._shared
        return shared if shared is not None and (self._transport is Transport.SHM or shared.is_offered) else None

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        self._connection.check_open()
        try:
            if call.region is not None:
                response, grad = self._through_region(call, call.region, timeout)
            else:
                response, grad = self._in_messages(call, timeout)
        except _FROM_GRPC as error:
            raise self._translated(error, call.joint) from None
        if response.warning and response.warning not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(response.warning)
            _log.warning("%s: %s", self._name, "".join(c if c.isprintable() else " " for c in response.warning))
        return spec.Result(
            response.loss,
            None if response.grad is None else decode_grad(grad, response, call.original, self._float32_array),
            response.terms,
            response.intersection,
            response.union,
            response.timing,
            response.ranks,
        )

    def abort_step(self, abort: wire.Abort, timeout: float) -> None:
        try:
            self._channels.abort(abort.to_proto(), timeout=timeout, metadata=self._connection.metadata(abort.joint))
        except _FROM_GRPC as error:
            raise self._translated(error) from None

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        message, metadata = leave.to_proto(), self._connection.metadata
        try:
            self._retries.call(
                lambda left: self._channels.leave(message, timeout=left, metadata=metadata(leave.joint)), timeout
            )
        except _FROM_GRPC as error:
            raise self._translated(error) from None

    def server_info(self, timeout: float) -> ServerInfo:
        try:
            info = self._connection.info(timeout)
        except _FROM_GRPC as error:
            raise self._translated(error) from None
        return ServerInfo(
            version=info.version,
            devices=tuple([Device(one.name, one.hardware, one.healthy, one.starting) for one in info.devices]),
            losses=tuple(info.losses),
            memory_budget_bytes=info.memory_budget_bytes,
            max_requests=info.max_requests,
        )

    def transport(self, timeout: float, *, on_gpu: bool) -> str:
        shared = self._offered()
        if shared is None:
            return OVER_GRPC
        try:
            session = shared.session(timeout)
        except _FROM_GRPC as error:
            raise self._translated(error) from None
        except LossError as error:
            if self._transport is Transport.SHM:
                raise
            shared.pause(error)
            return OVER_GRPC
        kind = IN_DEVICE_MEMORY if on_gpu and session.devices else IN_SHARED_MEMORY
        return kind if session.takes_calls else kind + ASKED_OVER_GRPC

    def _translated(self, error: Exception, joint: wire.Joint | None = None) -> Exception:
        """The client's error for one of ``_FROM_GRPC``, raised by a call of this rank."""
        if isinstance(error, _WrongAnswer):
            return IncompatibleServerError(f"{self._name}: the answer does not fit the request: {error}")
        translated = self._connection.translated(error)
        if joint is not None and isinstance(translated, DeadlineExceededError):
            text = "for a rank to learn which others are missing, it must be longer than --joint-timeout"
            return DeadlineExceededError(f"{translated}; {text}")
        return translated

    def close(self) -> None:
        self._connection.close()
        self._memory.close()
        if self._shared is not None:
            self._shared.close()  # First: in a forked process it leaves the session to the parent.
        if self._devices is not None:
            self._devices.close()

    def _in_messages(self, call: Call, timeout: float) -> Answer:
        try:
            return self._over_grpc(call, timeout)
        finally:
            call.discard()

    def _over_grpc(self, call: Call, timeout: float) -> Answer:
        send = self._unary if call.request.payload_bytes <= UNARY_BYTES else self._stream
        return self._retries.call(partial(send, call), timeout, is_joint=call.joint is not None)

    def _unary(self, call: Call, timeout: float) -> Answer:
        request = framing.UnaryRequest(_header(call), *call.payload)
        answer = self._channels.unary(request, timeout=timeout, metadata=self._connection.metadata(call.joint))
        return self._received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> Answer:
        answers = self._channels.stream(
            _messages(call), timeout=timeout, metadata=self._connection.metadata(call.joint)
        )
        try:
            first = next(answers, None)
            if not isinstance(first, pb.ComputeStreamResponse) or not first.HasField("header"):
                raise _WrongAnswer("it does not begin with a header")
            return self._received(first.header, _chunks(answers), call)
        finally:
            answers.cancel()  # No effect on a call that has ended.

    def _received(self, header: pb.ResponseHeader, chunks: Iterable[framing.Bytes], call: Call) -> Answer:
        try:
            response = wire.Response.from_proto(header, call.request, OVER_GRPC)
            grad = np.empty(0, np.float32)
            if response.grad is not None:
                grad = self._memory.new(response.grad.shape, response.grad.dtype.numpy)
            wire.Assembly([wire.as_bytes(grad)]).add_all(chunks)
        except InvalidInput as error:
            raise _WrongAnswer(str(error)) from None
        return response, grad

    def _through_region(self, call: Call, region: Shared, timeout: float) -> Answer:
        """The region is reused only after success: after a failure the server may still be writing to it."""
        shared, devices, deadline = self._shared, self._devices, time.monotonic() + timeout
        assert shared is not None
        assert devices is not None
        try:
            try:
                attempt = partial(self._in_shared_memory, call, shared, region)
                response = self._retries.call(attempt, timeout, is_joint=call.joint is not None)
            except LossError as error:  # The server takes no such memory, or no more of it.
                on_device = region.kind == IN_DEVICE_MEMORY
                if self._transport is Transport.SHM and not on_device:
                    raise
                if not isinstance(error, NoRegionLeftError):
                    (devices if on_device else shared).pause(error)
                timeout = deadline - time.monotonic()
                if on_device:
                    answer = self._through_region(call, shared.moved(region, call.request), timeout)
                else:
                    answer = self._over_grpc(replace(call, payload=region.tensors(call.request)), timeout)
                region.close()
                return answer
        except BaseException:
            region.close()
            raise
        if response.grad is None:
            region.give_back()
            return response, np.empty(0, np.float32)
        copied = response.grad.nbytes <= SHARED_BYTES or shared.is_nearly_full
        return response, region.take_gradient(call.request.places.grad, response.grad, copied=copied)

    def _in_shared_memory(self, call: Call, shared: SharedMemory, region: Shared, timeout: float) -> wire.Response:
        deadline = time.monotonic() + timeout
        region.complete()
        session = shared.share(region, timeout)
        timeout = deadline - time.monotonic()
        place = call.request.places
        packet = pb.SharedMemoryRequest()
        header = packet.call.header
        at = wire.SharedTensors(session.name, region.number, place.logits, place.labels, place.grad)
        call.request.write(header, at, call.joint)
        metadata = self._connection.metadata(call.joint)
        if session.takes(call.request, header):
            for key, value in metadata:
                packet.call.metadata[key] = value
            answer, transport = session.socket.call(packet, timeout), region.kind
        else:
            request = framing.UnaryRequest(header, b"", b"")
            try:
                answer = self._channels.shared(request, timeout=timeout, metadata=metadata).header
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:  # It may have restarted and not know the session.
                    session.close()
                raise
            transport = region.kind + ASKED_OVER_GRPC
        try:
            return wire.Response.from_proto(answer, call.request, transport)
        except InvalidInput as error:
            raise _WrongAnswer(str(error)) from None

    def _float32_array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return self._memory.new(shape, np.dtype(np.float32))


class _WrongAnswer(Exception):
    """The answer does not fit the request; the text says why."""


_FROM_GRPC = (grpc.RpcError, ValueError, _WrongAnswer)
"""What a call raises: gRPC's errors (a ValueError if its channel was closed meanwhile), and those of answers."""


def _header(call: Call) -> pb.RequestHeader:
    """The header of a call whose tensors travel."""
    header = pb.RequestHeader()
    call.request.write(header, None, call.joint)
    return header


def _messages(call: Call) -> Iterator[pb.ComputeStreamRequest | memoryview]:
    """The messages of a streamed request: its header, then the chunks of its payload."""
    yield pb.ComputeStreamRequest(header=_header(call))
    yield from wire.chunks(call.payload)


def _chunks(answers: Iterable[pb.ComputeStreamResponse | memoryview]) -> Iterator[memoryview]:
    """The chunks of a streamed answer, after its header."""
    for message in answers:
        if not isinstance(message, memoryview):
            raise _WrongAnswer("a message without a chunk came after the header")
        yield message
