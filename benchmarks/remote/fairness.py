"""The latency of small requests while a large request of the same client is in transit."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.progress import Progress
from benchmarks.remote.effort import Effort
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import HALF_TRAINED, Pair, Workload
from lovasz.client import CrossEntropy, LossClient
from lovasz.server.launch import ServerProcess

SMALL_BYTES = 100_000
MIN_LARGE = 3
"""How many large requests pass at least: a part of one would be only its transport, or only its computation."""


def fairness(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    small, large = _request(SMALL_BYTES), _request(effort.fair_bytes)
    with LossClient(server.target) as client:

        def sample() -> tuple[float, float, float]:
            """The start of a small request, its seconds, and those of the server's queue and computation."""
            start = time.perf_counter()
            timing = client.compute(*small, CrossEntropy()).timing
            return start, time.perf_counter() - start, timing.queue_seconds + timing.compute_seconds if timing else 0.0

        client.compute(*large, CrossEntropy())
        sample()
        progress("fairness: small requests alone")
        alone = [sample() for _ in range(effort.fair_samples)]
        progress("fairness: small requests beside a large one")
        spans: list[tuple[float, float]] = []
        end = threading.Event()

        def send_large() -> None:
            while not end.is_set():
                start = time.perf_counter()
                client.compute(*large, CrossEntropy())
                spans.append((start, time.perf_counter()))

        beside: list[tuple[float, float, float]] = []
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send_large)
            try:
                until = time.perf_counter() + effort.fair_seconds
                while time.perf_counter() < until and not sending.done():
                    if len(beside) >= effort.fair_samples and len(spans) >= MIN_LARGE:
                        break
                    beside.append(sample())
            finally:
                end.set()
            sending.result()
    beside = [one for one in beside if any(first <= one[0] < last for first, last in spans)]
    large_ms = 1e3 * statistics.median(last - first for first, last in spans)
    quiet, loaded = (_latencies(samples) for samples in (alone, beside))
    return Part(
        "fairness",
        f"Latency of a request of {SMALL_BYTES // 1000} KB, milliseconds",
        f"Cross-entropy over TCP, one client. The large request has {effort.fair_bytes >> 20} MiB and takes "
        f"{large_ms:.0f} ms. In transit: without the server's queue and computation, which the large one uses, too.",
        (
            Column("beside", "small requests", ""),
            Column("samples", "calls", "d"),
            Column("p50_ms", "p50", ".2f"),
            Column("p99_ms", "p99", ".2f"),
            Column("way_p50_ms", "in transit, p50", ".2f"),
            Column("way_p99_ms", "in transit, p99", ".2f"),
        ),
        [{"beside": "alone", **quiet}, {"beside": "while a large one is in transit", **loaded}],
        {"large_ms": large_ms},
    )


def _request(nbytes: int) -> Pair:
    (pair,) = Workload.of_bytes(nbytes).inputs(HALF_TRAINED, labels=torch.uint8)
    return pair


def _latencies(samples: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    total = [1e3 * seconds for _, seconds, _ in samples] or [float("nan")]
    way = [1e3 * (seconds - server) for _, seconds, server in samples] or [float("nan")]
    return {
        "samples": len(samples),
        "p50_ms": float(np.quantile(total, 0.5)),
        "p99_ms": float(np.quantile(total, 0.99)),
        "way_p50_ms": float(np.quantile(way, 0.5)),
        "way_p99_ms": float(np.quantile(way, 0.99)),
    }
