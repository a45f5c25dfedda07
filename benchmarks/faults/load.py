"""Callers that make known requests until they are told to end, and check every answer to the bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.core.memory import status_bytes
from benchmarks.workloads import HALF_TRAINED, Workload
from lovasz.client import LossClient, LossError, LovaszSoftmax
from lovasz.core import compute
from lovasz.server.launch import ServerProcess

LOSS = LovaszSoftmax()
REQUEST_BYTES = (20_000, 300_000, 3_000_000)
"""Payloads: in one message, and in a stream."""


@dataclass
class Counts:
    """What became of calls.

    Attributes:
        seconds: of each answered call.
        ended: when each was answered (``time.monotonic``).
        errors: how many calls failed, by the type of their error.
    """

    wrong: int = 0
    seconds: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        return len(self.seconds)

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


@contextmanager
def callers(target: str, number: int, timeout: float = 60.0) -> Iterator[Counts]:
    """So many callers, each with a client of its own, one call at a time, inside a ``with``."""
    inputs = [Workload.of_bytes(nbytes).inputs(HALF_TRAINED, labels=torch.uint8)[0] for nbytes in REQUEST_BYTES]
    known = [compute(logits, labels, LOSS) for logits, labels in inputs]
    counts, end, lock = Counts(), threading.Event(), threading.Lock()

    def call(place: int) -> None:
        with LossClient(target, timeout=timeout) as client:
            while not end.is_set():
                place = (place + 1) % len(inputs)
                start = time.monotonic()
                try:
                    result = client.compute(*inputs[place], LOSS)
                except LossError as error:
                    with lock:
                        name = type(error).__name__
                        counts.errors[name] = counts.errors.get(name, 0) + 1
                    end.wait(0.1)
                    continue
                is_right = result.loss == known[place].loss and np.array_equal(
                    np.asarray(result.grad), np.asarray(known[place].grad)
                )
                with lock:
                    counts.wrong += not is_right
                    counts.ended.append(time.monotonic())
                    counts.seconds.append(counts.ended[-1] - start)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        end.set()
        for thread in threads:
            thread.join()


def resident_mib(server: ServerProcess) -> float:
    """The memory that the server holds."""
    return status_bytes("VmRSS", server.pid) / (1 << 20)
