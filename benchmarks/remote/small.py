"""Small requests of many clients: our server, beside a bare gRPC server that moves the same bytes."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from benchmarks.child import Child, ask_all
from benchmarks.progress import Progress
from benchmarks.remote.client_internals import encoded, payload
from benchmarks.remote.echo import COMPUTE, ECHO, raw_call
from benchmarks.remote.effort import Effort
from benchmarks.remote.generator import GRPC, MEMORY_ECHO, SHARED_MEMORY
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import CLASSES, HALF_TRAINED, Workload
from lovasz.server.launch import ServerProcess

SMALL = Workload((4, CLASSES, 64, 64))
GENERATORS, GENERATOR_THREADS = 2, 8
"""Processes that send requests, and clients in each."""
START_SECONDS = 0.05
"""After the question, so that all generators have it when they start."""
ECHO_NAME = "bare gRPC echo, ready bytes"
MEMORY_ECHO_NAME = "bare echo, shared-memory socket"


def small_requests(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    progress("small requests: starting the clients")
    with ExitStack() as stack:
        answer_bytes = len(raw_call(server.target, COMPUTE, encoded(SMALL, HALF_TRAINED), stack)())
        echo: str = stack.enter_context(Child("benchmarks.remote.echo:EchoServer", answer_bytes)).ask("target")
        ((logits, labels),) = SMALL.inputs(HALF_TRAINED)
        sizes = sum(part.nbytes for part in payload(logits, labels)), logits.nbytes, answer_bytes - logits.nbytes
        memory_echo = stack.enter_context(Child("benchmarks.remote.memory_echo:MemoryEchoServer", *sizes)).ask("target")
        arguments = (SMALL, HALF_TRAINED, GENERATOR_THREADS)
        generators = [
            stack.enter_context(Child("benchmarks.remote.generator:Generator", *arguments)) for _ in range(GENERATORS)
        ]
        contenders = {
            "our server, LossClient, shared memory": (server.targets[1], SHARED_MEMORY),
            MEMORY_ECHO_NAME: (memory_echo, MEMORY_ECHO),
            "our server, LossClient, gRPC": (server.target, GRPC),
            "our server, gRPC, ready bytes": (server.target, COMPUTE),
            ECHO_NAME: (echo, ECHO),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for target, method in contenders.values():
            _requests_per_second(generators, target, method, effort.generator_seconds / 4)  # Connects.
        for turn in range(effort.turns):
            for name, (target, method) in contenders.items():
                progress(f"small requests, turn {turn + 1} of {effort.turns}, {name}")
                rates[name].append(_requests_per_second(generators, target, method, effort.generator_seconds))
    bare = {name: statistics.median(rates[ECHO_NAME if "gRPC" in name else MEMORY_ECHO_NAME]) for name in contenders}
    return Part(
        "small",
        f"Small requests, {SMALL.name}, requests a second",
        f"{GENERATORS} client processes of {GENERATOR_THREADS} threads, each with a connection of its own; the same "
        f"for all. The gRPC echo is a threaded grpc.server that answers with {answer_bytes:,} bytes, as our server "
        "does; the other one copies as many bytes through shared memory. Both compute nothing. Of the echo's: of that "
        "on the same carrier. Ready bytes: encoded once, and the answer is not decoded.",
        (
            Column("contender", "contender", ""),
            Column("requests_per_second", "requests/s", ".0f"),
            Column("least", "slowest block", ".0f"),
            Column("most", "fastest block", ".0f"),
            Column("of_echo", "of the echo's", ".2f"),
        ),
        [
            {
                "contender": name,
                "requests_per_second": statistics.median(own),
                "least": min(own),
                "most": max(own),
                "of_echo": statistics.median(own) / bare[name],
                "blocks": own,
            }
            for name, own in rates.items()
        ],
    )


def _requests_per_second(generators: list[Child], target: str, method: str, seconds: float) -> float:
    start = time.perf_counter() + START_SECONDS
    answers = ask_all(generators, "send", target, method, start, seconds)
    return float(sum(count for count, _ in answers) / (max(end for _, end in answers) - start))
