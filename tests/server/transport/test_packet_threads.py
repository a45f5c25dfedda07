"""Threads that wait for sockets together: which one works, when a socket is waited for again, and how they end."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from support.waiting import eventually

from lovasz.server.transport.packet_threads import PacketThreads

TIMEOUT = 30.0
MOMENT = 0.1


@pytest.fixture
def threads() -> Iterator[PacketThreads]:
    threads = PacketThreads(3, "packet")
    threads.start_all()
    yield threads
    threads.stop(wait=True)
    assert not any(thread.name.startswith("packet_") for thread in threading.enumerate())


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_the_thread_that_waits_since_last_takes_the_next_packet(
    threads: PacketThreads, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    took: queue.SimpleQueue[str] = queue.SimpleQueue()

    def take() -> None:
        ours.recv(10)
        threads.again(ours.fileno())
        took.put(threading.current_thread().name)

    threads.add(ours.fileno(), take)
    names = []
    for _ in range(20):
        theirs.send(b"x")
        names.append(took.get(timeout=TIMEOUT))
        time.sleep(0.01)  # It waits again.
    assert max(map(names.count, names)) > len(names) / 2  # In turn, each would have a third.


def test_packets_are_worked_on_at_once_if_the_socket_is_waited_for_again(
    threads: PacketThreads, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    go_on, busy = threading.Event(), threading.Semaphore(0)

    def take() -> None:
        ours.recv(10)
        threads.again(ours.fileno())
        busy.release()
        assert go_on.wait(TIMEOUT)

    threads.add(ours.fileno(), take)
    for _ in range(4):
        theirs.send(b"x")
    for _ in range(3):
        assert busy.acquire(timeout=TIMEOUT)
    assert not busy.acquire(timeout=MOMENT)  # All threads have one.
    go_on.set()
    assert busy.acquire(timeout=TIMEOUT)


def test_a_socket_is_left_alone_until_it_is_waited_for_again(
    threads: PacketThreads, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    calls = threading.Semaphore(0)
    threads.add(ours.fileno(), calls.release)
    theirs.send(b"x")
    assert calls.acquire(timeout=TIMEOUT)
    assert not calls.acquire(timeout=MOMENT)
    threads.again(ours.fileno())
    assert calls.acquire(timeout=TIMEOUT)
    threads.remove(ours.fileno())
    theirs.send(b"x")
    assert not calls.acquire(timeout=MOMENT)


def test_a_fault_of_a_handler_ends_no_thread(
    threads: PacketThreads, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair
    faults = 5

    def fail(number: int) -> None:
        ours.recv(10)
        threads.again(ours.fileno())
        raise RuntimeError(f"fault {number}")

    threads.add(ours.fileno(), partial(fail, 1))
    for _ in range(faults):
        theirs.send(b"x")
    assert eventually(lambda: caplog.text.count("RuntimeError: fault 1") == faults)


def test_threads_that_never_started_can_be_stopped() -> None:
    PacketThreads(2, "never").stop(wait=True)
