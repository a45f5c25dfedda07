"""The reader of a stream: what it takes, whom it does not wait for, and that it leaves a staging alone when told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from lovasz import wire
from lovasz.server.errors import AbandonedError, StalledError
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.staging import Staging
from lovasz.server.transport import receiving
from lovasz.server.transport.receiving import Patience, Receiver
from lovasz.spec import InvalidInput, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

HEADER = wire.Request.checked(
    weighted_sum(LovaszSoftmax()),
    wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 100)),
    wire.TensorSpec(wire.dtype_named("uint8"), (1, 100)),
    want_grad=True,
)
FIRST = pb.ComputeStreamRequest(header=HEADER.to_proto())
PAYLOAD = torch.randn(300, generator=torch.Generator().manual_seed(1)).numpy().tobytes() + bytes(range(100))
LONG = 30.0
"""Seconds that no test waits for."""
SHORT = 0.05


class Call:
    """A stream whose messages come when the test sends them, and the threads that read it."""

    has_left = False
    """Whether gRPC says that the caller went away, once its messages have ended."""

    def __init__(self, *messages: object) -> None:
        self._messages: queue.Queue[object] = queue.Queue()
        self._threads: list[threading.Thread] = []
        for message in messages:
            self.send(message)

    def __iter__(self) -> Iterator[pb.ComputeStreamRequest | memoryview]:
        return self

    def __next__(self) -> pb.ComputeStreamRequest | memoryview:
        message = self._messages.get(timeout=LONG)
        if isinstance(message, BaseException):
            raise message
        return message  # type: ignore[return-value]

    def send(self, message: object) -> None:
        self._messages.put(memoryview(message) if isinstance(message, bytes) else message)

    def end(self) -> None:
        self.send(StopIteration())

    def start(self, read: Callable[[], None]) -> None:
        thread = threading.Thread(target=read, daemon=True)
        self._threads.append(thread)
        thread.start()

    def receiver(self, stall_seconds: float = LONG) -> Receiver:
        patience = Patience(header_seconds=stall_seconds, stall_seconds=stall_seconds, payload_seconds=LONG)
        return Receiver(self, self.start, patience, lambda: self.has_left)

    def join(self) -> None:
        """Waits until nothing reads any more."""
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.fixture
def staging() -> Staging:
    return Staging(HEADER, StagingPool(torch.device("cpu")))


def bytes_of(staging: Staging) -> bytes:
    request = staging.request()
    return request.logits.numpy().tobytes() + request.labels.numpy().tobytes()


def fill(staging: Staging, value: int) -> None:
    staging.receive([bytes([value]) * len(PAYLOAD)])


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1200, 5000])
def test_takes_the_header_and_then_the_payload(staging: Staging, chunk_bytes: int) -> None:
    call = Call(FIRST, *(bytes(chunk) for chunk in wire.chunks([memoryview(PAYLOAD)], chunk_bytes)))
    call.end()
    receiver = call.receiver()
    assert receiver.header() == FIRST.header
    receiver.payload(staging)
    receiver.stop()
    call.join()
    assert bytes_of(staging) == PAYLOAD


def test_reads_no_payload_before_there_is_room(staging: Staging) -> None:
    call = Call(FIRST, PAYLOAD)
    call.end()
    receiver = call.receiver()
    receiver.header()
    assert call._messages.qsize() == 2
    receiver.payload(staging)
    call.join()
    assert bytes_of(staging) == PAYLOAD


@pytest.mark.parametrize(
    "first", [b"chunk", pb.ComputeStreamRequest(), StopIteration()], ids=["chunk", "nothing in it", "end"]
)
def test_a_stream_that_begins_without_a_header_is_refused(first: object) -> None:
    call = Call(first)
    with pytest.raises(InvalidInput, match="header: the stream does not begin with one"):
        call.receiver().header()
    call.join()


@pytest.mark.parametrize("message", [FIRST, pb.ComputeStreamRequest()], ids=["header", "nothing in it"])
def test_after_the_header_there_are_only_chunks(staging: Staging, message: pb.ComputeStreamRequest) -> None:
    call = Call(FIRST, PAYLOAD[:10], message)
    receiver = call.receiver()
    receiver.header()
    with pytest.raises(InvalidInput, match="message: got a message without a chunk; expected chunks after the header"):
        receiver.payload(staging)
    call.join()


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (PAYLOAD[:-1], "payload: got 1299 bytes; expected 1300"),
        (b"", "payload: got 0 bytes; expected 1300"),
        (PAYLOAD + b"x", "payload: got at least 1301 bytes; expected 1300"),
    ],
    ids=["too short", "empty", "too long"],
)
def test_a_payload_of_another_size_is_refused(staging: Staging, payload: bytes, text: str) -> None:
    call = Call(FIRST, payload)
    call.end()
    receiver = call.receiver()
    receiver.header()
    with pytest.raises(InvalidInput, match=text):
        receiver.payload(staging)
    call.join()


def test_a_header_that_does_not_come_is_not_waited_for(staging: Staging) -> None:
    call = Call()
    receiver = call.receiver(SHORT)
    with pytest.raises(StalledError, match=r"no header arrived within 0\.05 s \(--header-timeout\)"):
        receiver.header()
    receiver.stop()
    call.send(FIRST)  # It comes too late, and the rest is not waited for.
    call.send(PAYLOAD)
    call.join()


def test_a_payload_that_stops_coming_is_not_waited_for(staging: Staging) -> None:
    call = Call(FIRST, PAYLOAD[:200])
    receiver = call.receiver(SHORT)
    receiver.header()
    with pytest.raises(
        StalledError, match=r"of 1300 bytes of the payload arrived, and less than \d+ of them in the last"
    ):
        receiver.payload(staging)
    receiver.stop()
    call.end()
    call.join()


class Trickle(Call):
    """Sends its payload in pieces, each after a pause, and then ends."""

    def __init__(self, piece_bytes: int, pause_seconds: float) -> None:
        super().__init__()
        self._pieces = iter([FIRST, *wire.chunks([memoryview(PAYLOAD)], piece_bytes)])
        self._pause_seconds = pause_seconds
        self.cut_off = threading.Event()

    def __next__(self) -> pb.ComputeStreamRequest | memoryview:
        piece = next(self._pieces)
        if isinstance(piece, memoryview) and self.cut_off.wait(self._pause_seconds):
            raise RuntimeError("the call is over")
        return piece


def test_a_payload_that_trickles_is_not_waited_for(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "LEAST_BYTES", 10_000)
    call = Trickle(piece_bytes=1, pause_seconds=0.005)
    receiver = call.receiver(stall_seconds=0.1)
    receiver.header()
    with pytest.raises(StalledError, match="less than 10000 of them in the last"):
        receiver.payload(staging)
    call.cut_off.set()
    call.join()


def test_a_slow_payload_that_brings_enough_in_each_period_is_waited_for(
    staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "LEAST_BYTES", 1)
    call = Trickle(piece_bytes=50, pause_seconds=0.05)  # 1.3 s in all: more than the stall timeout.
    receiver = call.receiver(stall_seconds=1.0)
    receiver.header()
    receiver.payload(staging)
    call.join()
    assert bytes_of(staging) == PAYLOAD


def test_after_stop_a_staging_is_left_alone(staging: Staging) -> None:
    call = Call(FIRST, PAYLOAD[:200])
    receiver = call.receiver(SHORT)
    receiver.header()
    with pytest.raises(StalledError):
        receiver.payload(staging)
    receiver.stop()
    fill(staging, 7)  # As the next request would.
    call.send(PAYLOAD[200:])
    call.end()
    call.join()
    assert bytes_of(staging) == b"\x07" * len(PAYLOAD)


def test_stop_before_the_payload_ends_the_reading() -> None:
    call = Call(FIRST, PAYLOAD[:200], PAYLOAD[200:])
    receiver = call.receiver()
    receiver.header()
    receiver.stop()
    call.join()
    assert call._messages.qsize() >= 1


def test_stop_after_the_payload_is_harmless(staging: Staging) -> None:
    call = Call(FIRST, PAYLOAD)
    call.end()
    receiver = call.receiver()
    receiver.header()
    receiver.payload(staging)
    receiver.stop()
    receiver.stop()
    call.join()


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["header", "start of the payload", "middle of the payload"])
def test_what_breaks_the_stream_comes_out(staging: Staging, sent: int) -> None:
    call = Call(*[FIRST, PAYLOAD[:500]][:sent], ConnectionResetError("the caller is gone"))
    receiver = call.receiver()
    with pytest.raises(ConnectionResetError, match="the caller is gone"):  # noqa: PT012 - in one of the two
        receiver.header()
        receiver.payload(staging)
    call.join()


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["header", "start of the payload", "middle of the payload"])
def test_messages_that_end_early_since_the_caller_went_away_are_no_invalid_input(staging: Staging, sent: int) -> None:
    call = Call(*[FIRST, PAYLOAD[:500]][:sent])
    call.has_left = True
    call.end()
    receiver = call.receiver()
    with pytest.raises(AbandonedError):  # noqa: PT012 - in one of the two
        receiver.header()
        receiver.payload(staging)
    call.join()


def test_a_payload_that_is_too_slow_for_its_size_is_not_waited_for(
    staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "LEAST_BYTES", 1)
    call = Trickle(piece_bytes=10, pause_seconds=0.01)  # 1300 bytes in 1.3 s
    receiver = Receiver(
        call, call.start, Patience(header_seconds=LONG, stall_seconds=0.1, payload_seconds=0.2), lambda: False
    )
    receiver.header()
    with pytest.raises(StalledError, match=r"too few to be complete within 0\.2 s \(--payload-timeout\)"):
        receiver.payload(staging)
    call.cut_off.set()
    call.join()
