"""A server without gRPC: each call goes through the real service, table, admission, memory and engine; only its
connection is stood in for."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import grpc
import numpy as np
import torch
from support.waiting import eventually

from lovasz import wire
from lovasz.core import compute
from lovasz.core.answers import Pending
from lovasz.server.device.engine import Engine
from lovasz.server.memory.pool import StagingPool
from lovasz.server.observe.metrics import Metrics
from lovasz.server.schedule.admission import Admission
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Caller, Job
from lovasz.server.schedule.joint.group import SeatState
from lovasz.server.schedule.joint.table import JointTable
from lovasz.server.transport.call import Pipeline
from lovasz.server.transport.call_limit import CallLimit
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.receiving import Patience
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.servicer import LossServicer
from lovasz.server.transport.timed_calls import TimedCalls
from lovasz.spec import LossLike, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

CPU = torch.device("cpu")
CLASSES = 3
SOFTMAX = LovaszSoftmax()
MIB = 1 << 20
NEVER = 3600.0

OK = grpc.StatusCode.OK
ABORTED = grpc.StatusCode.ABORTED
CANCELLED = grpc.StatusCode.CANCELLED
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class CountedPool(StagingPool):
    """Memory that nobody has twice, and that can be asked for what of it is alive."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._count_lock = threading.Lock()
        self.lent: set[int] = set()
        self.arrays: list[weakref.ref[np.ndarray]] = []
        self.has_memory = True

    def take(self, nbytes: int) -> torch.Tensor:
        if not self.has_memory:
            raise MemoryError
        array = np.empty(max(1, nbytes), np.uint8)
        buffer = torch.from_numpy(array)
        with self._count_lock:
            assert buffer.data_ptr() not in self.lent, "lent twice"
            self.lent.add(buffer.data_ptr())
            self.arrays.append(weakref.ref(array))
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        with self._count_lock:
            self.lent.remove(buffer.data_ptr())

    @property
    def alive(self) -> int:
        return sum(array() is not None for array in self.arrays)


class SlowEngine(Engine):
    """An engine that takes its time, has so much memory, and has a fault if one is given."""

    slowness = 0.0
    memory_elements = 10**9
    fault: Exception | None = None

    def _start(self, jobs: Sequence[Job], callers: Sequence[Caller], stream: torch.cuda.Stream | None) -> Pending:
        if sum(job.elements for job in jobs) > self.memory_elements:
            raise torch.OutOfMemoryError("no memory left")
        if self.fault is not None:
            raise self.fault
        threading.Event().wait(random.random() * self.slowness)
        return super()._start(jobs, callers, stream)


class Ended(Exception):
    """The call was ended by the server."""


class DeskCarrier:
    """What carries one call."""

    def __init__(
        self, seconds: float | None = None, metadata: Sequence[tuple[str, str]] = (), address: str = "desk"
    ) -> None:
        self._sent = metadata
        self._address = address
        self._lock = threading.Lock()
        self._seconds = seconds
        self._callbacks: list[Callable[[], None]] = []
        self.gone = threading.Event()
        self.errors: list[grpc.RpcError] = []
        self.code = OK
        self.text = ""
        self.metadata: dict[str, str] = {}

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._sent

    def peer(self) -> str:
        return self._address

    def time_remaining(self) -> float | None:
        return self._seconds

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self.gone.is_set():
                return False
            self._callbacks.append(callback)
            return True

    def is_active(self) -> bool:
        return not self.gone.is_set()

    def cancel(self) -> None:
        self.gone.set()
        self.end()

    def end(self) -> None:
        """The call has ended, and its answer has left."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        self.metadata.update(metadata)

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        self.code, self.text = code, text
        raise Ended


@dataclass(frozen=True)
class Rank:
    """What one rank sends, and where it belongs; with a world_size of 0 it is computed alone."""

    rank: int = 0
    world_size: int = 2
    step: int = 0
    run: str = "run"
    call: bytes = b"?"
    loss: LossLike = SOFTMAX
    want_grad: bool = True
    shape: tuple[int, ...] = (1, CLASSES, 6)
    dtype: str = "float32"
    label: int | None = None
    round: int = 0
    blocking: bool = False
    process: bytes = b""
    secret: bytes = b""

    def again(self) -> Rank:
        """Its place, in another call."""
        return replace(self, call=self.call + b"'")

    @property
    def seed(self) -> int:
        return hash((self.rank, self.step, self.shape)) % (1 << 31)

    @property
    def logits(self) -> torch.Tensor:
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))
        return values.to(getattr(torch, self.dtype))

    @property
    def labels(self) -> torch.Tensor:
        is_binary = weighted_sum(self.loss).is_binary
        shape = (self.shape[0], *self.shape[2:])
        generator = torch.Generator().manual_seed(self.seed + 1)
        labels = torch.randint(0, 2 if is_binary else CLASSES, shape, generator=generator, dtype=torch.uint8)
        if self.label is not None:
            labels.view(-1)[0] = self.label
        return labels

    @property
    def nbytes(self) -> int:
        """What is reserved for it."""
        request = self.request
        return request.tensor_bytes

    @property
    def request(self) -> wire.Request:
        logits, labels = self.logits, self.labels
        call = f"{self.run}/{self.step}/{self.rank}".encode() if self.call == b"?" else self.call
        return wire.Request.checked(
            weighted_sum(self.loss),
            wire.TensorSpec(wire.dtype_named(self.dtype), tuple(logits.shape)),
            wire.TensorSpec(wire.dtype_named("uint8"), tuple(labels.shape)),
            self.want_grad,
            joint=self.place(call) if self.world_size else None,
        )

    def place(self, call: bytes = b"") -> wire.Joint:
        """Where it belongs."""
        blocking, process, secret = self.blocking, self.process, self.secret
        return wire.Joint(self.run, self.step, self.rank, self.world_size, call, self.round, blocking, process, secret)

    @property
    def payload(self) -> tuple[bytes, bytes]:
        return self.logits.view(torch.uint8).numpy().tobytes(), self.labels.numpy().tobytes()


def ranks_of(world_size: int, **common: Any) -> list[Rank]:
    return [Rank(rank=rank, world_size=world_size, **common) for rank in range(world_size)]


@dataclass
class Outcome:
    """How a call ended."""

    code: grpc.StatusCode
    text: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    header: pb.ResponseHeader = field(default_factory=pb.ResponseHeader)
    grad: bytes = b""

    @property
    def gradient(self) -> np.ndarray:
        dtype = {pb.DATA_TYPE_FLOAT32: np.float32, pb.DATA_TYPE_FLOAT16: np.float16}[self.header.grad.data_type]
        return np.frombuffer(self.grad, dtype).reshape(tuple(self.header.grad.shape))


class Desk:
    """A server whose calls are made in this process. Its engine is started by :meth:`compute`."""

    def __init__(
        self,
        budget: int = 64 * MIB,
        max_requests: int = 1000,
        timeout: float = NEVER,
        regroup: float = 0.0,
        share: float = 1.0,
        max_segments: int = 10**9,
    ) -> None:
        self.admission = Admission(budget, max_requests)
        self.batcher = Batcher(10**9, 100, 0.0)
        self.metrics = Metrics()
        self.joints = JointTable(self.admission, self.batcher, self.metrics, timeout, max_segments, share, regroup)
        self.engine = SlowEngine(CPU, self.batcher, self.metrics, health_interval_seconds=NEVER, stall_seconds=NEVER)
        self.pool = CountedPool()
        self._readers, self._calls = ThreadPoolExecutor(200), ThreadPoolExecutor(200)
        self._asked: list[Future[Outcome]] = []
        pipeline = Pipeline(
            admission=self.admission,
            staging=self.pool,
            batcher=self.batcher,
            compute_now=self.engine.compute_now,
            is_quick=self.engine.is_quick,
            has_large_job=self.engine.has_large_job,
            joints=self.joints,
            metrics=self.metrics,
            calls=CallLimit(1000),
            max_segments=max_segments,
            lanes=Lanes(),
        )
        self.service = LossServicer(
            pipeline=pipeline,
            engine=self.engine,
            shared_memory=(),
            readers=self._readers,
            sending=SendWatch(NEVER, self.metrics),
            patience=Patience(header_seconds=NEVER, stall_seconds=NEVER, payload_seconds=NEVER),
            headerless=TimedCalls("calls", NEVER, 1000, self.metrics),
        )

    def compute(self) -> None:
        self.engine.start()

    def ask(self, rank: Rank, carrier: DeskCarrier | None = None) -> Future[Outcome]:
        """Makes its call, in one message."""
        return self._begun(self._calls.submit(self._ask, rank, carrier or DeskCarrier()))

    def _ask(self, rank: Rank, carrier: DeskCarrier) -> Outcome:
        message = framing.UnaryRequest(rank.request.to_proto(), *rank.payload)
        try:
            answer = framing.UnaryResponse.decode(self.service.compute(message, cast("Any", carrier)))
            carrier.end()
        except Ended:
            return Outcome(carrier.code, carrier.text, carrier.metadata)
        return Outcome(OK, header=answer.header, grad=bytes(answer.grad))

    def stream(
        self, rank: Rank, go_on: threading.Event, carrier: DeskCarrier
    ) -> Iterator[pb.ComputeStreamResponse | bytes]:
        """Makes its call, in a stream whose last message waits for ``go_on``."""

        def messages() -> Iterator[pb.ComputeStreamRequest | memoryview]:
            logits, labels = rank.payload
            yield pb.ComputeStreamRequest(header=rank.request.to_proto())
            yield memoryview(logits)
            while not go_on.wait(0.01):
                if carrier.gone.is_set():
                    carrier.errors.append(grpc.RpcError())  # As gRPC does, whose calls keep what they raise.
                    raise carrier.errors[-1]
            yield memoryview(labels)

        for message in self.service.compute_stream(messages(), cast("Any", carrier)):
            yield bytes(message) if isinstance(message, memoryview) else message

    def ask_in_stream(self, rank: Rank, go_on: threading.Event, carrier: DeskCarrier | None = None) -> Future[Outcome]:
        return self._begun(self._calls.submit(self._ask_in_stream, rank, go_on, carrier or DeskCarrier()))

    def _begun(self, call: Future[Outcome]) -> Future[Outcome]:
        self._asked.append(call)
        return call

    def _ask_in_stream(self, rank: Rank, go_on: threading.Event, carrier: DeskCarrier) -> Outcome:
        try:
            header, *chunks = self.stream(rank, go_on, carrier)
        except Ended:
            return Outcome(carrier.code, carrier.text, carrier.metadata)
        assert isinstance(header, pb.ComputeStreamResponse)
        return Outcome(OK, header=header.header, grad=b"".join(c for c in chunks if isinstance(c, bytes)))

    def abort(self, rank: Rank, reason: str) -> Outcome:
        """Says that a rank cannot take part in its step."""
        carrier, message = DeskCarrier(), wire.Abort(rank.place(), rank.want_grad, reason).to_proto()
        return self._said(self.service.abort_step, message, carrier)

    def leave(self, rank: Rank, evaluation_step: int = 0) -> Outcome:
        """Says that a rank takes no part from its step on."""
        return self._said(self.service.leave_run, wire.Leave(rank.place(), evaluation_step).to_proto(), DeskCarrier())

    @staticmethod
    def _said(method: Callable[[Any, Any], object], message: object, carrier: DeskCarrier) -> Outcome:
        try:
            method(message, carrier)
        except Ended:
            return Outcome(carrier.code, carrier.text, carrier.metadata)
        return Outcome(OK)

    def waits_for(self, ranks: int) -> bool:
        """Comes to wait with so many ranks whose payload is there."""
        return eventually(lambda: self.arrived == ranks)

    @property
    def arrived(self) -> int:
        groups = list(self.joints._waiting)
        return sum(seat.state is SeatState.ARRIVED for group in groups for seat in list(group.seats.values()))

    def close(self) -> None:
        """Ends, and shows that nothing is left."""
        if late := wait(self._asked, timeout=60).not_done:  # The test has failed, perhaps with ranks that wait.
            self.joints.stop()
        if self.engine._thread.ident is not None:
            assert self.engine.stop(timeout_seconds=30)
        self._calls.shutdown(wait=not late)
        assert not late, f"{len(late)} calls have not ended"
        self._readers.shutdown()
        self.joints._reclaim(None)
        assert (self.joints.groups, self.joints.waiting_ranks, self.joints.kept) == (0, 0, 0)
        assert not self.joints._seats
        assert (self.admission.bytes_in_flight, self.admission.requests_in_flight) == (0, 0)
        assert not self.pool.lent
        assert len(self.batcher) == 0


@cache
def alone(ranks: tuple[Rank, ...]) -> tuple[float, list[np.ndarray]]:
    """The loss of one request with the images of all ranks, and each rank's part of its gradient; pixels in a row, so
    that sizes may differ."""

    def pixels(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
        logits = rank.logits.flatten(2) if rank.logits.dim() > 2 else rank.logits.unsqueeze(2)
        return logits.movedim(1, 2).reshape(-1, logits.shape[1]), rank.labels.reshape(-1)

    parts = [pixels(rank) for rank in ranks]
    logits, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    whole = compute(logits, labels, weighted_sum(ranks[0].loss))
    assert whole.grad is not None
    grads = []
    for rank, grad in zip(ranks, whole.grad.split([len(part[1]) for part in parts]), strict=True):
        shape = rank.logits.shape
        pixels_last = grad.reshape(shape[0], -1, shape[1]).movedim(2, 1)
        grads.append(pixels_last.reshape(shape).numpy().copy())
    return whole.loss, grads


def assert_right(outcome: Outcome, rank: int, ranks: Sequence[Rank]) -> None:
    assert outcome.code is OK, outcome.text
    loss, grads = alone(tuple(replace(one, want_grad=True, call=b"", run="", world_size=len(ranks)) for one in ranks))
    assert outcome.header.loss == loss
    if ranks[rank].want_grad:
        assert np.array_equal(outcome.gradient, grads[rank])
    else:
        assert not outcome.grad


def ended(*calls: Future[Outcome]) -> list[Outcome]:
    return [call.result(timeout=60) for call in calls]
