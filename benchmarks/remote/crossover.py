"""The size of a request above which a stream, or shared memory, is faster than one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import progress
from benchmarks.progress import Progress
from benchmarks.remote import client_internals
from benchmarks.remote.effort import Effort
from benchmarks.remote.race import Timed, race
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import HALF_TRAINED, Pair, Workload
from lovasz.client import CrossEntropy, LossClient
from lovasz.server.launch import ServerProcess

STREAM_BYTES = (250_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000)
SHARED_BYTES = (16_000, 32_000, 64_000, 128_000, 256_000, 512_000, 1_000_000, 2_000_000)
CALLS = 10

Transport = Callable[[], AbstractContextManager[None]]


def crossover(server: ServerProcess, effort: Effort, say: Progress) -> tuple[Part, Part]:
    """Compares one message with a stream and with shared memory, for cross-entropy, which computes least."""
    tcp, unix = server.targets
    return (
        _part(
            "unary",
            "One message or a stream, TCP",
            "stream",
            f"The client changes to a stream above {client_internals.stream_above_bytes():,} bytes.",
            _rows(tcp, "stream", "grpc", client_internals.stream, STREAM_BYTES, effort, say),
        ),
        _part(
            "shared",
            "One message or shared memory, Unix socket",
            "shared memory",
            "Shared memory is asked for on its socket, whatever the size.",
            _rows(unix, "shared memory", "shm", nullcontext, SHARED_BYTES, effort, say),
        ),
    )


def _part(key: str, title: str, other: str, note: str, rows: list[dict[str, Any]]) -> Part:
    return Part(
        key,
        title,
        f"Cross-entropy, milliseconds, medians. {note}",
        (
            Column("payload_bytes", "bytes", ",d"),
            Column("message_ms", "one message", ".2f"),
            Column("other_ms", other, ".2f"),
            Column("of_message", f"{other} of message", ".2f"),
        ),
        rows,
    )


def _rows(
    target: str, name: str, transport: str, other: Transport, sizes: Sequence[int], effort: Effort, say: Progress
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with LossClient(target, transport="grpc") as messages, LossClient(target, transport=transport) as others:

        def call(client: LossClient, pair: Pair, way: Transport) -> object:
            with way():
                return client.compute(*pair, CrossEntropy())

        for size in sizes:
            (pair,) = Workload.of_bytes(size).inputs(HALF_TRAINED, labels=torch.uint8)
            entered = {
                "one message": Timed(partial(call, messages, pair, client_internals.one_message)),
                name: Timed(partial(call, others, pair, other)),
            }
            race(entered, effort.crossover_turns, CALLS, progress.after(say, f"{name}, {size:,} bytes"))
            message_ms, other_ms = (timed.median_ms for timed in entered.values())
            rows.append(
                {
                    "payload_bytes": size,
                    "message_ms": message_ms,
                    "other_ms": other_ms,
                    "of_message": other_ms / message_ms,
                }
            )
    return rows
