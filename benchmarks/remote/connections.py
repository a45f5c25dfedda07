"""Large streams at once from one process, over one connection or several."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from benchmarks.progress import Progress
from benchmarks.remote.effort import Effort
from benchmarks.remote.large import LARGE
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import HALF_TRAINED
from lovasz.client import CrossEntropy, LossClient
from lovasz.server.launch import ServerProcess

CONNECTIONS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4))
"""Threads that send at once, and the connections that they share."""


def connections(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    ((logits, labels),) = LARGE.inputs(HALF_TRAINED, labels=torch.uint8)
    most = max(threads for threads, _ in CONNECTIONS)
    rates: dict[tuple[int, int], list[float]] = {pair: [] for pair in CONNECTIONS}
    with ExitStack() as stack:
        clients = [stack.enter_context(LossClient(server.target)) for _ in range(most)]
        pool = stack.enter_context(ThreadPoolExecutor(most))

        def send(number: int, calls: int) -> None:
            for _ in range(calls):
                clients[number].compute(logits, labels, CrossEntropy())

        def block(threads: int, own: int, calls: int) -> float:
            start = time.perf_counter()
            for done in [pool.submit(send, number % own, calls) for number in range(threads)]:
                done.result()
            return threads * calls / (time.perf_counter() - start)

        block(most, most, 1)
        for turn in range(effort.turns):
            for threads, own in CONNECTIONS:
                progress(f"connections, turn {turn + 1} of {effort.turns}, {threads} threads, {own} connections")
                rates[threads, own].append(block(threads, own, effort.stream_calls))
    alone = statistics.median(rates[1, 1])
    return Part(
        "connections",
        f"Streams of {LARGE.name} at once from one process, requests a second",
        "Cross-entropy, float32 over TCP: about 40 MB each way for a request.",
        (
            Column("threads", "at once", "d"),
            Column("connections", "connections", "d"),
            Column("requests_per_second", "requests/s", ".1f"),
            Column("gigabytes_per_second", "GB/s, both ways", ".2f"),
            Column("of_one", "of one", ".2f"),
        ),
        [
            {
                "threads": threads,
                "connections": own,
                "requests_per_second": (rate := statistics.median(blocks)),
                "gigabytes_per_second": rate * (2 * LARGE.logits_bytes + labels.nbytes) / 1e9,
                "of_one": rate / alone,
                "blocks": blocks,
            }
            for (threads, own), blocks in rates.items()
        ],
    )
