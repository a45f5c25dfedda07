"""Joint steps on the server, from the service down, without gRPC: who belongs together, who is refused, what is left.

Each call goes through the real service, table, admission, memory and engine; only its connection is stood in for.
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import grpc
import numpy as np
import pytest
import torch
from footprint import eventually

from lovasz import framing, wire
from lovasz.core import compute
from lovasz.core.batch import Launched
from lovasz.core.ragged import Request
from lovasz.server import joint
from lovasz.server.admission import Admission
from lovasz.server.batcher import Batcher, Entry
from lovasz.server.engine import Engine
from lovasz.server.errors import AbandonedError, JointBrokenError, OverloadedError, TooLargeError, fresh
from lovasz.server.joint import JointTable
from lovasz.server.metrics import Metrics
from lovasz.server.sending import SendWatch
from lovasz.server.service import LossServicer
from lovasz.server.staging import StagingPool
from lovasz.spec import CrossEntropy, InvalidInput, LossLike, LovaszHinge, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

CPU = torch.device("cpu")
CLASSES = 3
SOFTMAX = LovaszSoftmax()
MIB = 1 << 20
NEVER = 3600.0

OK = grpc.StatusCode.OK
ABORTED = grpc.StatusCode.ABORTED
CANCELLED = grpc.StatusCode.CANCELLED
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


# --- One server without gRPC --------------------------------------------------------------------------------------


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
    """An engine that takes its time, and has so much memory."""

    slowness = 0.0
    memory_elements = 10**9

    def _start(self, entries: Sequence[Entry], stream: torch.cuda.Stream | None) -> Launched:
        if sum(entry.elements for entry in entries) > self.memory_elements:
            raise torch.OutOfMemoryError("no memory left")
        threading.Event().wait(random.random() * self.slowness)
        return super()._start(entries, stream)


class Ended(Exception):
    """The call was ended by the server."""


class Caller:
    """One call's connection."""

    def __init__(self, seconds: float | None = None) -> None:
        self._lock = threading.Lock()
        self._seconds = seconds
        self._callbacks: list[Callable[[], None]] = []
        self.gone = threading.Event()
        self.code = OK
        self.text = ""
        self.metadata: dict[str, str] = {}

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
        with self._lock:
            self.gone.set()
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
        is_hinge = weighted_sum(self.loss).is_hinge
        shape = (self.shape[0], *self.shape[2:])
        generator = torch.Generator().manual_seed(self.seed + 1)
        labels = torch.randint(0, 2 if is_hinge else CLASSES, shape, generator=generator, dtype=torch.uint8)
        if self.label is not None:
            labels.view(-1)[0] = self.label
        return labels

    @property
    def nbytes(self) -> int:
        """What is reserved for it."""
        request = self.request
        return request.payload_bytes + request.grad_bytes

    @property
    def request(self) -> wire.Request:
        logits, labels = self.logits, self.labels
        call = f"{self.run}/{self.step}/{self.rank}".encode() if self.call == b"?" else self.call
        return wire.Request.checked(
            weighted_sum(self.loss),
            wire.TensorSpec(wire.dtype_named(self.dtype), tuple(logits.shape)),
            wire.TensorSpec(wire.dtype_named("uint8"), tuple(labels.shape)),
            self.want_grad,
            joint=wire.Joint(self.run, self.step, self.rank, self.world_size, call) if self.world_size else None,
        )

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

    def __init__(self, budget: int = 64 * MIB, max_requests: int = 1000, timeout: float = NEVER) -> None:
        self.admission = Admission(budget, max_requests)
        self.batcher = Batcher(10**9, 100, 0.0)
        self.metrics = Metrics()
        self.joints = JointTable(self.admission, self.batcher, self.metrics, timeout)
        self.engine = SlowEngine(CPU, self.batcher, self.metrics, health_interval_seconds=NEVER)
        self.pool = CountedPool()
        self._readers, self._calls = ThreadPoolExecutor(200), ThreadPoolExecutor(200)
        self.service = LossServicer(
            self.admission,
            self.batcher,
            self.joints,
            self.engine,
            self.metrics,
            self.pool,
            (),
            self._readers,
            SendWatch(NEVER, self.metrics),
            stall_seconds=NEVER,
            device_stall_seconds=NEVER,
        )

    def compute(self) -> None:
        self.engine.start()

    def ask(self, rank: Rank, caller: Caller | None = None) -> Future[Outcome]:
        """Makes its call, in one message."""
        return self._calls.submit(self._ask, rank, caller or Caller())

    def _ask(self, rank: Rank, caller: Caller) -> Outcome:
        message = framing.UnaryRequest(rank.request.to_proto(), *rank.payload)
        try:
            answer = framing.UnaryResponse.decode(self.service.compute(message, cast("Any", caller)))
        except Ended:
            return Outcome(caller.code, caller.text, caller.metadata)
        return Outcome(OK, header=answer.header, grad=bytes(answer.grad))

    def stream(self, rank: Rank, go_on: threading.Event, caller: Caller) -> Iterator[pb.ComputeStreamResponse | bytes]:
        """Makes its call, in a stream whose last message waits for ``go_on``."""

        def messages() -> Iterator[pb.ComputeStreamRequest | memoryview]:
            logits, labels = rank.payload
            yield pb.ComputeStreamRequest(header=rank.request.to_proto())
            yield memoryview(logits)
            while not go_on.wait(0.01):
                if caller.gone.is_set():
                    raise Ended
            yield memoryview(labels)

        for message in self.service.compute_stream(messages(), cast("Any", caller)):
            yield bytes(message) if isinstance(message, memoryview) else message

    def ask_in_stream(self, rank: Rank, go_on: threading.Event, caller: Caller | None = None) -> Future[Outcome]:
        return self._calls.submit(self._ask_in_stream, rank, go_on, caller or Caller())

    def _ask_in_stream(self, rank: Rank, go_on: threading.Event, caller: Caller) -> Outcome:
        try:
            header, *chunks = self.stream(rank, go_on, caller)
        except Ended:
            return Outcome(caller.code, caller.text, caller.metadata)
        assert isinstance(header, pb.ComputeStreamResponse)
        return Outcome(OK, header=header.header, grad=b"".join(c for c in chunks if isinstance(c, bytes)))

    def waits_for(self, ranks: int) -> bool:
        """Comes to wait with so many ranks whose payload is there."""
        return eventually(lambda: self.arrived == ranks)

    @property
    def arrived(self) -> int:
        groups = list(self.joints._waiting.values())
        return sum(seat.entry is not None for group in groups for seat in list(group.seats.values()))

    def close(self) -> None:
        """Ends, and shows that nothing is left."""
        if self.engine._thread.ident is not None:
            assert self.engine.stop(timeout_seconds=30)
        self._calls.shutdown()
        self._readers.shutdown()
        self.joints._reclaim()
        assert (self.joints.groups, self.joints.waiting_ranks, self.joints.kept) == (0, 0, 0)
        assert not self.joints._seats
        assert (self.admission.bytes_in_flight, self.admission.requests_in_flight) == (0, 0)
        assert not self.pool.lent
        assert len(self.batcher) == 0


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


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


# --- Who belongs together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_ranks_are_computed_as_one_request_in_their_order_whatever_the_order_of_arrival(
    desk: Desk, order: tuple[int, ...]
) -> None:
    desk.compute()
    ranks = [replace(rank, shape=(1 + rank.rank, CLASSES, 5, 4)) for rank in ranks_of(3)]
    calls: dict[int, Future[Outcome]] = {}
    for place, rank in enumerate(order):
        calls[rank] = desk.ask(ranks[rank])
        assert place == 2 or desk.waits_for(place + 1)
    for rank, call in calls.items():
        assert_right(call.result(60), rank, ranks)


def test_a_group_of_one_rank_waits_for_nobody(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(1)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)


def test_images_of_other_sizes_belong_together_too(desk: Desk) -> None:
    desk.compute()
    ranks = [Rank(rank=rank, shape=shape) for rank, shape in enumerate([(1, CLASSES, 40, 30), (3, CLASSES, 7)])]
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)


def test_training_and_evaluation_runs_and_steps_are_groups_of_their_own(desk: Desk) -> None:
    desk.compute()
    groups = [
        ranks_of(2, **options)
        for options in ({}, {"want_grad": False}, {"step": 1}, {"run": "other"}, {"run": "other", "step": 1})
    ]
    first = [desk.ask(ranks[0]) for ranks in groups]
    assert eventually(lambda: desk.joints.groups == 5)
    second = [desk.ask(ranks[1]) for ranks in groups]
    for ranks, *calls in zip(groups, first, second, strict=True):
        for rank, outcome in enumerate(ended(*calls)):
            assert_right(outcome, rank, ranks)


def test_a_run_that_starts_again_from_step_0_does_not_mind_its_old_groups(desk: Desk) -> None:
    desk.compute()
    old = [desk.ask(rank) for rank in ranks_of(3, step=57)[:2]]
    assert desk.waits_for(2)
    for step in range(3):
        ranks = ranks_of(3, step=step)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)
    assert desk.waits_for(2)
    again = desk.ask(ranks_of(3, step=57)[2])
    for rank, outcome in enumerate(ended(*old, again)):
        assert_right(outcome, rank, ranks_of(3, step=57))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"world_size": 3}, "world_size: got 3; expected 2"),
        ({"loss": LovaszSoftmax(ignore_index=7)}, r"loss: got 1.0 \* .*ignore_index=7.*; expected 1.0 \* "),
        ({"loss": [(1.000000001, SOFTMAX)]}, r"loss: got 1.000000001 \* .*; expected 1.0 \* "),
        ({"shape": (1, CLASSES + 1, 6)}, "channels: got 4; expected 3"),
        ({"dtype": "float16"}, "element type of the logits: got float16; expected float32"),
    ],
    ids=["world_size", "options", "weight", "channels", "type"],
)
def test_a_rank_that_differs_is_refused_with_the_difference_and_the_others_wait_on(
    desk: Desk, other: dict[str, Any], difference: str
) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(replace(ranks[1], **other, call=b"other")))
    assert refused.code is FAILED_PRECONDITION
    with pytest.raises(AssertionError, match=f"rank 1 at step 0 of run 'run' differs .* in {difference}"):
        raise AssertionError(refused.text)
    assert desk.admission.requests_in_flight == 2
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_a_second_process_of_the_same_rank_is_refused(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(ranks[0].again()))
    assert refused.code is FAILED_PRECONDITION
    assert "rank 0 at step 0 of run 'run' is there already, from another call" in refused.text
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_calls_without_a_name_are_computed_and_not_kept(desk: Desk) -> None:
    desk.compute()
    for step in range(2):
        ranks = ranks_of(2, call=b"", step=step)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)
        assert desk.joints.kept == 0
        assert desk.admission.bytes_in_flight == 0
        assert not desk.pool.lent


def test_a_second_call_without_a_name_is_another_call(desk: Desk) -> None:
    caller = Caller()
    first = desk.ask(Rank(call=b""), caller)
    assert desk.waits_for(1)
    assert ended(desk.ask(Rank(call=b"")))[0].code is FAILED_PRECONDITION
    caller.cancel()
    assert ended(first)[0].code is CANCELLED


# --- Who is missing -----------------------------------------------------------------------------------------------


def test_a_missing_rank_is_named_to_all_who_waited_for_it() -> None:
    desk = Desk(timeout=0.3)
    for outcome in ended(*(desk.ask(rank) for rank in ranks_of(5) if rank.rank not in (1, 3))):
        assert outcome.code is ABORTED
        assert "ranks 1, 3 of 5 did not come to step 0 of run 'run' within 0.3 s (--joint-timeout)" in outcome.text
    assert desk.admission.bytes_in_flight == 0
    desk.compute()
    ranks = ranks_of(5)
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)
    desk.close()


def test_who_waits_elsewhere_in_the_run_is_named_too() -> None:
    desk = Desk(timeout=0.5)
    elsewhere = [desk.ask(Rank(rank=1, step=8)), desk.ask(Rank(rank=1, step=8, want_grad=False))]
    assert desk.waits_for(2)
    (outcome,) = ended(desk.ask(Rank(rank=0, step=7)))
    assert outcome.code is ABORTED
    assert "rank 1 of 2 did not come to step 7" in outcome.text
    ended(*elsewhere)
    desk.close()


def test_a_rank_that_still_sends_when_the_time_is_up_is_missing_and_is_told_so_when_it_has_sent() -> None:
    desk, go_on = Desk(timeout=0.3), threading.Event()
    late = desk.ask_in_stream(Rank(rank=1), go_on)
    assert eventually(lambda: desk.joints.groups == 1)
    (first,) = ended(desk.ask(Rank(rank=0)))
    assert "rank 1 of 2 did not come" in first.text
    go_on.set()
    (second,) = ended(late)
    assert (first.code, second.code) == (ABORTED, ABORTED)
    assert second.text == first.text
    desk.close()


def test_a_rank_that_leaves_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks, caller = ranks_of(3), Caller()
    stays, leaves = desk.ask(ranks[0]), desk.ask(ranks[1], caller)
    assert desk.waits_for(2)
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    assert desk.joints.waiting_ranks == 1
    for rank, outcome in enumerate(ended(stays, desk.ask(ranks[1].again()), desk.ask(ranks[2]))):
        assert_right(outcome, rank, ranks)


def test_a_group_that_all_have_left_is_gone_with_its_room(desk: Desk) -> None:
    callers = [Caller() for _ in range(3)]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks_of(4), callers, strict=False)]
    assert desk.waits_for(3)
    assert desk.admission.requests_in_flight == 4
    for caller in callers:
        caller.cancel()
    assert [outcome.code for outcome in ended(*calls)] == [CANCELLED] * 3
    assert (desk.joints.groups, desk.admission.requests_in_flight, desk.admission.bytes_in_flight) == (0, 0, 0)


def test_a_rank_that_leaves_while_it_sends_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks, caller, never = ranks_of(2), Caller(), threading.Event()
    leaves = desk.ask_in_stream(ranks[0], never, caller)
    assert eventually(lambda: desk.joints.waiting_ranks == 1)
    stays = desk.ask(ranks[1])
    assert desk.waits_for(1)
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(desk.ask(ranks[0].again()), stays)):
        assert_right(outcome, rank, ranks)


def test_a_rank_that_leaves_a_complete_group_is_computed_with(desk: Desk) -> None:
    ranks, caller = ranks_of(2), Caller()
    calls = desk.ask(ranks[0], caller), desk.ask(ranks[1])
    assert eventually(lambda: len(desk.batcher) == 1)
    caller.cancel()
    desk.compute()
    gone, here = ended(*calls)
    assert gone.code is CANCELLED
    assert_right(here, 1, ranks)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)


def test_a_complete_group_that_all_have_left_is_not_computed(desk: Desk) -> None:
    callers = [Caller(), Caller()]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks_of(2), callers, strict=True)]
    assert eventually(lambda: len(desk.batcher) == 1)
    for caller in callers:
        caller.cancel()
    assert [outcome.code for outcome in ended(*calls)] == [CANCELLED] * 2
    assert len(desk.batcher) == 0
    assert not desk.pool.lent


def test_a_rank_for_which_there_is_no_memory_is_refused_and_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.pool.has_memory = False
    (refused,) = ended(desk.ask(ranks[1]))
    assert refused.code is RESOURCE_EXHAUSTED
    assert "no memory left" in refused.text
    desk.pool.has_memory = True
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


# --- Calls that come again ----------------------------------------------------------------------------------------


def test_a_call_that_comes_again_while_the_old_one_waits_takes_its_place(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    old = desk.ask(ranks[0])
    assert desk.waits_for(1)
    new = desk.ask(ranks[0])
    (replaced,) = ended(old)
    assert (replaced.code, replaced.text) == (CANCELLED, "the same call came again")
    assert desk.waits_for(1)
    assert desk.admission.requests_in_flight == 2
    for rank, outcome in enumerate(ended(new, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_a_rank_that_comes_again_alone_keeps_the_room_of_its_group_also_while_the_server_drains() -> None:
    ranks = ranks_of(2)
    desk = Desk(budget=2 * ranks[0].nbytes)
    desk.compute()
    old = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.admission.close()
    new = desk.ask(ranks[0])
    assert ended(old)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(new, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)
    desk.close()


def test_a_call_that_comes_again_while_the_old_one_still_sends_takes_its_place(desk: Desk) -> None:
    desk.compute()
    ranks, go_on = ranks_of(2), threading.Event()
    old = desk.ask_in_stream(ranks[0], go_on)
    assert eventually(lambda: desk.joints.waiting_ranks == 1)
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)
    go_on.set()
    (replaced,) = ended(old)
    assert (replaced.code, replaced.text) == (CANCELLED, "the same call came again")


def test_a_call_that_comes_again_while_it_is_computed_gets_the_same_answer(desk: Desk) -> None:
    ranks = ranks_of(2)
    calls = [desk.ask(rank) for rank in ranks]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = [desk.ask(ranks[0]) for _ in range(3)]
    threading.Event().wait(0.1)
    desk.compute()
    first, _ = ended(*calls)
    assert_right(first, 0, ranks)
    for outcome in ended(*again):
        assert outcome.code is OK
        assert outcome.grad == first.grad
        assert outcome.header.loss == first.header.loss


def test_a_call_that_comes_again_after_its_caller_has_left_gets_the_answer(desk: Desk) -> None:
    ranks, caller = ranks_of(2), Caller()
    calls = [desk.ask(ranks[0], caller), desk.ask(ranks[1])]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = desk.ask(ranks[0])
    caller.cancel()
    desk.compute()
    assert ended(calls[0])[0].code is CANCELLED
    assert_right(again.result(60), 0, ranks)
    ended(calls[1])


def test_a_call_that_comes_again_while_its_answer_is_sent_does_not_wait_for_that(desk: Desk) -> None:
    """As where a connection was lost and the server does not know it yet."""
    desk.compute()
    ranks, go_on, caller = ranks_of(2), threading.Event(), Caller()
    go_on.set()
    other = desk.ask(ranks[1])
    sending = desk.stream(ranks[0], go_on, caller)
    next(sending)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)
    desk.joints._reclaim()
    assert desk.pool.lent, "what is being sent stays"
    header, (_, grads) = ended(other)[0].header, alone(tuple(ranks_of(2, call=b"", run="")))
    assert b"".join(c for c in sending if isinstance(c, bytes)) == grads[0].tobytes()
    assert header.loss > 0


def test_a_call_that_comes_again_and_whose_group_failed_is_a_new_member(desk: Desk) -> None:
    desk.engine.memory_elements = 5
    ranks = ranks_of(2)
    calls = [desk.ask(rank) for rank in ranks]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = desk.ask(ranks[0])
    threading.Event().wait(0.1)
    desk.compute()
    assert [outcome.code for outcome in ended(*calls)] == [RESOURCE_EXHAUSTED] * 2
    assert desk.waits_for(1)
    desk.engine.memory_elements = 10**9
    for rank, outcome in enumerate(ended(again, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_an_answer_can_be_had_again_until_its_rank_comes_with_its_next_step(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first, second = ended(*map(desk.ask, ranks))
    assert desk.joints.kept == 2
    assert desk.admission.requests_in_flight == 0
    for _ in range(2):
        assert ended(desk.ask(ranks[0]))[0].grad == first.grad
    following = desk.ask(Rank(rank=0, step=1))
    assert desk.waits_for(1)
    assert desk.joints.kept == 1
    assert ended(desk.ask(ranks[1]))[0].grad == second.grad
    ended(following, desk.ask(Rank(rank=1, step=1)))


def test_an_answer_is_kept_for_a_while_only(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "KEPT_SECONDS", 0.0)
    desk.compute()
    ended(*map(desk.ask, ranks_of(2)))
    assert desk.joints.kept == 2
    desk.joints.check()
    assert desk.joints.kept == 0
    assert desk.admission.bytes_in_flight == 0


def test_an_answer_that_is_being_sent_is_kept_whatever_the_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "KEPT_SECONDS", 0.0)
    desk.compute()
    ranks, go_on = ranks_of(2), threading.Event()
    go_on.set()
    other = desk.ask(ranks[1])
    sending = desk.stream(ranks[0], go_on, Caller())
    next(sending)
    ended(other)
    desk.joints.check()
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)
    list(sending)


def test_a_name_that_was_used_for_another_call_brings_no_wrong_answer(desk: Desk) -> None:
    """As by a client that takes the same bytes for each call."""
    desk.compute()
    for options in ({}, {"step": 1}, {"run": "other"}, {"want_grad": False}, {"shape": (2, CLASSES, 9)}):
        ranks = ranks_of(2, call=b"1", **options)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)


# --- Room ---------------------------------------------------------------------------------------------------------


def test_the_first_rank_takes_room_for_all_and_the_others_need_none() -> None:
    ranks, strangers = ranks_of(2), ranks_of(2, run="other")
    desk = Desk(budget=2 * ranks[0].nbytes)
    desk.compute()
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(strangers[0]))
    assert refused.code is RESOURCE_EXHAUSTED
    assert int(refused.metadata["grpc-retry-pushback-ms"]) > 0
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)
    for rank, outcome in enumerate(ended(*map(desk.ask, strangers))):
        assert_right(outcome, rank, strangers)
    desk.close()


def test_requests_are_reserved_for_all_too() -> None:
    desk = Desk(max_requests=3)
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    assert "2 requests are in flight" in ended(desk.ask(Rank(run="other")))[0].text
    ended(first, desk.ask(ranks[1]))
    (never,) = ended(desk.ask(Rank(world_size=4)))
    assert never.code is RESOURCE_EXHAUSTED
    assert never.metadata["grpc-retry-pushback-ms"] == "-1000"
    assert "4 requests are to be held together; the server holds 3 at most" in never.text
    desk.close()


def test_a_group_that_can_never_fit_is_told_so() -> None:
    desk = Desk(budget=3 * Rank().nbytes)
    (never,) = ended(desk.ask(Rank(world_size=4)))
    assert never.code is RESOURCE_EXHAUSTED
    assert "the tensors of the 4 requests take" in never.text
    assert never.metadata["grpc-retry-pushback-ms"] == "-1000"
    desk.close()


def test_a_rank_that_is_larger_than_the_room_ends_its_group_for_all() -> None:
    small = Rank(rank=0, world_size=3)
    desk = Desk(budget=3 * small.nbytes + 10)
    calls = [desk.ask(small), desk.ask(replace(small, rank=1))]
    assert desk.waits_for(2)
    calls.append(desk.ask(replace(small, rank=2, shape=(2, CLASSES, 6))))
    assert [outcome.code for outcome in ended(*calls)] == [RESOURCE_EXHAUSTED] * 3
    desk.close()


def test_the_room_of_a_small_rank_that_comes_again_is_given_away_only_once_its_group_is_complete() -> None:
    ranks = ranks_of(3)
    ranks[0] = replace(ranks[0], shape=(8, CLASSES, 100))
    desk, caller = Desk(budget=3 * ranks[0].nbytes), Caller()
    desk.compute()
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    leaves = desk.ask(ranks[1], caller)
    assert desk.waits_for(2)
    assert ended(desk.ask(Rank(run="other")))[0].code is RESOURCE_EXHAUSTED
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]), desk.ask(ranks[2]))):
        assert_right(outcome, rank, ranks)
    assert desk.admission.bytes_in_flight == sum(rank.nbytes for rank in ranks)
    desk.close()


def test_kept_answers_make_room_for_bytes_but_not_in_vain_for_requests() -> None:
    ranks = ranks_of(2)
    desk = Desk(budget=2 * ranks[0].nbytes, max_requests=2)
    desk.compute()
    ended(*map(desk.ask, ranks))
    assert desk.joints.kept == 2
    assert desk.admission.bytes_in_flight == 2 * ranks[0].nbytes
    with desk.admission.reserve(0, 2):
        assert ended(desk.ask(Rank(run="other")))[0].code is RESOURCE_EXHAUSTED
        assert desk.joints.kept == 2
    strangers = ranks_of(2, run="other")
    for rank, outcome in enumerate(ended(*map(desk.ask, strangers))):
        assert_right(outcome, rank, strangers)
    desk.admission.close()
    assert desk.joints.kept == 2
    assert ended(desk.ask(Rank(run="third")))[0].code is UNAVAILABLE
    assert desk.joints.kept == 2
    desk.close()


# --- Stopping -----------------------------------------------------------------------------------------------------


def test_a_server_that_drains_completes_the_groups_that_it_has_and_takes_no_new_ones(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.admission.close()
    assert ended(desk.ask(Rank(step=1)))[0].code is UNAVAILABLE
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_ranks_that_wait_when_the_server_ends_are_told_so(desk: Desk) -> None:
    calls = [desk.ask(rank) for rank in ranks_of(3)[:2]]
    assert desk.waits_for(2)
    desk.admission.close()
    desk.joints.stop()
    for outcome in ended(*calls):
        assert outcome.code is UNAVAILABLE
        assert outcome.text == "the server is stopping, and rank 2 of 3 did not come to step 0 of run 'run'"


def test_a_group_that_is_complete_after_the_queue_is_closed_is_told_so(desk: Desk) -> None:
    first = desk.ask(Rank(rank=0))
    assert desk.waits_for(1)
    desk.batcher.close()
    assert [outcome.code for outcome in ended(first, desk.ask(Rank(rank=1)))] == [UNAVAILABLE] * 2


# --- What the engine makes of a group -----------------------------------------------------------------------------


def test_a_rank_that_cannot_be_computed_with_is_refused_and_named_to_the_others(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    ranks[1] = replace(ranks[1], label=9)
    first, second, third = ended(*map(desk.ask, ranks))
    assert second.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "labels: got 9 at index [0, 0]" in second.text
    for outcome in (first, third):
        assert outcome.code is ABORTED
        assert outcome.text.startswith("rank 1: labels: got 9 at index [0, 0]")


def test_a_group_that_does_not_fit_on_the_device_is_refused_as_a_whole_and_alone(desk: Desk) -> None:
    desk.engine.memory_elements = 100
    ranks, small = ranks_of(2, shape=(1, CLASSES, 30)), ranks_of(2, run="small")
    calls = [desk.ask(rank) for rank in (*ranks, *small)]
    assert eventually(lambda: len(desk.batcher) == 2)
    desk.compute()
    outcomes = ended(*calls)
    for outcome in outcomes[:2]:
        assert outcome.code is RESOURCE_EXHAUSTED
        assert "the logits of 2 ranks, 180 numbers, do not fit into the free memory of cpu" in outcome.text
    for rank, outcome in enumerate(outcomes[2:]):
        assert_right(outcome, rank, small)


def test_float16_gradients_of_a_group_have_one_scale(desk: Desk) -> None:
    """The ranks' own gradients differ a thousandfold."""
    desk.compute()
    loss = CrossEntropy(class_weights=(1.0, 1.0, 1.0))
    ranks = [
        Rank(rank=rank, dtype="float16", loss=loss, shape=(1, CLASSES, size, size)) for rank, size in enumerate((2, 64))
    ]
    outcomes = ended(*map(desk.ask, ranks))
    assert len({outcome.header.grad_scale for outcome in outcomes}) == 1
    scale = outcomes[0].header.grad_scale
    assert np.log2(scale) == int(np.log2(scale))
    _, grads = alone(tuple(replace(rank, call=b"", run="") for rank in ranks))
    for outcome, grad in zip(outcomes, grads, strict=True):
        assert np.allclose(outcome.gradient.astype(np.float64) / scale, grad, rtol=2**-9, atol=1e-7)


def test_the_hinge_is_joined_too(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2, loss=LovaszHinge(), shape=(2, 1, 8))
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)


def joined_entries(count: int, deadline: float | None = None) -> tuple[Entry, ...]:
    loss = weighted_sum(SOFTMAX)
    entries = tuple(
        Entry(Request.checked(rank.logits, rank.labels, loss), loss, want_grad=True, deadline=deadline)
        for rank in ranks_of(count)
    )
    for entry in entries:
        entry.joined = entries
    return entries


def test_a_member_whose_deadline_has_passed_does_not_keep_its_group_from_being_computed() -> None:
    entries = joined_entries(2, deadline=0.0)
    assert entries[0].claim()
    assert all(entry.future.running() for entry in entries)


def test_a_group_costs_what_all_its_members_do() -> None:
    first, second = joined_entries(2)
    assert first.elements == second.elements == 2 * CLASSES * 6
    queue = Batcher(2 * CLASSES * 6, 100, NEVER)
    queue.put(first)
    queue.put(joined_entries(2)[0])
    assert queue.take(idle=True, timeout_seconds=0) == [first]


def test_members_are_computed_until_the_last_one_leaves() -> None:
    entries, told = joined_entries(3), list[int]()
    for entry in entries[:2]:
        entry.cancel()
        assert not entry.future.cancelled()
    assert entries[0].claim()
    for place, entry in enumerate(entries):
        entry.when_left = lambda place=place: told.append(place)
    entries[2].cancel()
    assert told == [2]
    assert all(entry.left for entry in entries)


def test_a_group_that_is_claimed_while_all_are_leaving_is_computed_or_given_up_as_a_whole() -> None:
    for _ in range(300):
        entries, claimed, start = joined_entries(3), list[bool](), threading.Barrier(4)

        def leave(entry: Entry, start: threading.Barrier = start) -> None:
            start.wait()
            entry.cancel()

        threads = [threading.Thread(target=leave, args=(entry,)) for entry in entries]
        for thread in threads:
            thread.start()
        start.wait()
        claimed.append(entries[0].claim())
        for thread in threads:
            thread.join()
        if claimed[0]:
            assert all(entry.future.running() for entry in entries)
        else:
            assert all(entry.future.done() for entry in entries)


# --- What is left -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_no_circle_keeps_the_tensors_of_a_group_alive(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    ended(*map(desk.ask, ranks))
    desk.joints._reclaim()
    assert eventually(lambda: desk.pool.alive == 0), "answered"
    bad = replace(ranks[1], label=9)
    ended(desk.ask(ranks[0]), desk.ask(bad), desk.ask(ranks[2]))
    assert eventually(lambda: desk.pool.alive == 0), "could not be computed with"
    calls = [desk.ask(rank) for rank in ranks[:2]]
    assert desk.waits_for(2)
    desk.joints.stop()
    ended(*calls)
    assert eventually(lambda: desk.pool.alive == 0), "broken"
    desk.engine.memory_elements = 1
    ended(*map(desk.ask, ranks))
    assert eventually(lambda: desk.pool.alive == 0), "did not fit"
    callers = [Caller(), Caller()]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks, callers, strict=False)]
    assert desk.waits_for(2)
    for caller in callers:
        caller.cancel()
    ended(*calls)
    assert eventually(lambda: desk.pool.alive == 0), "left"


@pytest.mark.usefixtures("no_collection")
def test_no_circle_keeps_the_tensors_of_a_single_request_alive(desk: Desk) -> None:
    desk.compute()
    for rank in (Rank(world_size=0), Rank(world_size=0, label=9)):
        (outcome,) = ended(desk.ask(rank))
        assert outcome.code is (OK if rank.label is None else grpc.StatusCode.INVALID_ARGUMENT)
        assert eventually(lambda: desk.pool.alive == 0)


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", 1.5),
        JointBrokenError("broken"),
        InvalidInput("labels", "got 9"),
        TooLargeError("large"),
        RuntimeError("a", 2),
        torch.OutOfMemoryError("none left"),
        OSError(5, "failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_for_many_is_copied_for_each(error: Exception) -> None:
    copied = fresh(error)
    assert copied is not error
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_each_waiter_raises_an_error_of_its_own() -> None:
    entries, error = joined_entries(2), AbandonedError("gone")
    for entry in entries:
        entry.future.set_exception(error)
    raised = []
    for entry in entries:
        with pytest.raises(AbandonedError, match="gone") as caught:
            entry.wait()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert error.__traceback__ is None


# --- Everything at once -------------------------------------------------------------------------------------------

NAMED = {ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED, UNAVAILABLE, CANCELLED}


class Mischief:
    """Many runs whose ranks leave, come again, come twice, differ, are of other sizes, or do not come at all."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.seen: dict[tuple[str, grpc.StatusCode], int] = {}
        self.wrong: list[str] = []
        self._losses: tuple[LossLike, ...] = (SOFTMAX, weighted_sum([(1.0, CrossEntropy()), (0.5, SOFTMAX)]))
        self.runs = [self._a_run(f"run {number}") for number in range(5)]
        largest = max(sum(rank.nbytes for rank in step) for run in self.runs for step in run)
        self.desk = Desk(
            budget=int(largest * self._random.choice((1.3, 2.5, 8))),
            max_requests=self._random.choice((6, 12, 40)),
            timeout=0.15,
        )
        self.desk.engine.slowness = self._random.choice((0.0, 0.003))
        self.desk.compute()

    def _a_run(self, name: str) -> list[list[Rank]]:
        world_size, loss = self._random.choice((1, 2, 3, 5)), self._random.choice(self._losses)
        return [
            [
                Rank(
                    rank,
                    world_size,
                    step=step // 2,
                    run=name,
                    loss=loss,
                    want_grad=step % 2 == 0,
                    shape=(1 + self._random.randrange(2), CLASSES, self._random.choice((3, 3, 3, 8))),
                )
                for rank in range(world_size)
            ]
            for step in range(6)
        ]

    def play(self) -> None:
        threads = [
            threading.Thread(target=self._play_rank, args=(run, rank, self._random.random()))
            for run in self.runs
            for rank in range(len(run[0]))
        ]
        for thread in threads:
            thread.start()
        if self._random.random() < 0.3:
            threading.Event().wait(0.2)
            self.desk.admission.close()
            threading.Event().wait(0.1)
            self.desk.joints.stop()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a call does not end"
        self.desk.close()

    def _play_rank(self, run: list[list[Rank]], rank: int, seed: float) -> None:
        rng = random.Random(seed)
        for ranks in run:
            me = replace(ranks[rank], call=rng.randbytes(8))
            what = rng.choice(("well",) * 8 + ("leaves", "again", "twice", "twin", "differs", "stays away", "streams"))
            calls: list[Future[Outcome]] = []
            if what == "leaves":
                caller = Caller()
                calls.append(self._ask(me, rng, caller))
                threading.Event().wait(rng.random() * 0.02)
                caller.cancel()
                if rng.random() < 0.7:
                    calls.append(self._ask(me, rng))
            elif what == "again":
                calls.append(self._ask(me, rng))
                wait_for_all(calls)
                calls.append(self._ask(me, rng))
            elif what == "twice":
                calls += [self._ask(me, rng) for _ in range(3)]
            elif what == "twin":
                calls += [self._ask(me, rng), self._ask(me.again(), rng)]
            elif what == "differs":
                calls += [self._ask(replace(me, loss=LovaszSoftmax(classes="all"), call=b"differs"), rng)]
                calls += [self._ask(me, rng)]
            elif what == "streams":
                go_on, caller = threading.Event(), Caller()
                calls.append(self.desk.ask_in_stream(me, go_on, caller))
                threading.Event().wait(rng.random() * 0.01)
                if rng.random() < 0.5:
                    calls.append(self._ask(me, rng))
                (go_on.set if rng.random() < 0.5 else caller.cancel)()
            elif what == "well":
                for _ in range(4):
                    calls.append(self._ask(me, rng))
                    if calls[-1].result(60).code is not RESOURCE_EXHAUSTED:
                        break
                    threading.Event().wait(rng.random() * 0.02)
            for place, call in enumerate(calls):
                self._judge(what, call.result(60), ranks, rank, differs=what == "differs" and place == 0)

    def _ask(self, rank: Rank, rng: random.Random, caller: Caller | None = None) -> Future[Outcome]:
        if rng.random() < 0.2:
            go_on = threading.Event()
            go_on.set()
            return self.desk.ask_in_stream(rank, go_on, caller)
        return self.desk.ask(rank, caller)

    def _judge(self, what: str, outcome: Outcome, ranks: list[Rank], rank: int, *, differs: bool) -> None:
        with self._lock:
            self.seen[what, outcome.code] = self.seen.get((what, outcome.code), 0) + 1
        if outcome.code in NAMED:
            assert outcome.text or outcome.code is CANCELLED
            return
        whole = [replace(one, loss=LovaszSoftmax(classes="all")) for one in ranks] if differs else ranks
        try:
            assert_right(outcome, rank, whole)
        except AssertionError as error:
            with self._lock:
                self.wrong.append(f"{what}: {outcome.code} {outcome.text} {error}")


def test_whatever_ranks_do_each_call_ends_with_the_right_answer_or_a_named_error_and_nothing_is_left() -> None:
    seen: dict[tuple[str, grpc.StatusCode], int] = {}
    for seed in range(8):
        mischief = Mischief(seed)
        mischief.play()
        assert not mischief.wrong, f"seed {seed}: {mischief.wrong[:3]}"
        for key, count in mischief.seen.items():
            seen[key] = seen.get(key, 0) + count
    codes = {code for _, code in seen}
    assert codes == NAMED | {OK}, "what this is about has come up"
    assert sum(count for (_, code), count in seen.items() if code is OK) > 100
