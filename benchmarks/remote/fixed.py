"""The fixed cost of a call: a request so small that almost nothing is computed or moved, forward and backward."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from benchmarks.child import Child
from benchmarks.progress import Progress, after
from benchmarks.remote.client_internals import encoded, packet_bytes, payload
from benchmarks.remote.echo import COMPUTE, ECHO, raw_call
from benchmarks.remote.effort import Effort
from benchmarks.remote.large import step
from benchmarks.remote.memory_echo import MemoryEchoPeer
from benchmarks.remote.race import Timed, race
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import HALF_TRAINED, Workload
from lovasz import core
from lovasz.client import LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

TINY = Workload((1, 3, 32, 32))
CALLS = 20
"""In a block, for each call in a block of the other parts."""

IN_PROCESS = "lovasz_softmax, in process"
MEMORY_ECHO, GRPC_ECHO = "bare echo, shared-memory socket", "bare gRPC echo, TCP"
OURS = {
    "RemoteLoss, shared-memory socket": (1, "shm", MEMORY_ECHO),
    "RemoteLoss, gRPC, Unix socket": (1, "grpc", GRPC_ECHO),
    "RemoteLoss, gRPC, TCP": (0, "grpc", GRPC_ECHO),
}
"""Each with its place among the server's targets, its transport, and the echo that it is compared with."""


def fixed_cost(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    ((logits, labels),) = TINY.inputs(HALF_TRAINED)
    parts = payload(logits, labels)
    with ExitStack() as stack:
        answer_bytes = len(raw_call(server.targets[0], COMPUTE, encoded(TINY, HALF_TRAINED), stack)())
        grpc_echo = stack.enter_context(Child("benchmarks.remote.echo:EchoServer", answer_bytes)).ask("target")
        sizes = sum(part.nbytes for part in parts), logits.nbytes, answer_bytes - logits.nbytes
        memory_echo = stack.enter_context(Child("benchmarks.remote.memory_echo:MemoryEchoServer", *sizes)).ask("target")
        peer = MemoryEchoPeer(memory_echo, parts, logits.nbytes, packet_bytes(TINY, HALF_TRAINED))
        leaf = logits.clone().requires_grad_()
        entered = {
            IN_PROCESS: Timed(partial(step, core.lovasz_softmax, leaf, labels)),
            MEMORY_ECHO: Timed(stack.enter_context(closing(peer))),
            GRPC_ECHO: Timed(raw_call(grpc_echo, ECHO, encoded(TINY, HALF_TRAINED), stack)),
        }
        for name, (place, transport, _) in OURS.items():
            criterion = RemoteLoss(server.targets[place], LovaszSoftmax(), transport=transport)
            stack.enter_context(closing(criterion))
            entered[name] = Timed(partial(step, criterion, leaf, labels), partial(_computed, criterion))
        race(entered, effort.turns, CALLS * effort.calls, after(progress, "fixed cost"))
    return Part(
        "fixed",
        f"The fixed cost of a call, {TINY.name}, forward and backward, milliseconds",
        "The echoes move the same bytes as our calls and compute nothing. Over: the median minus that in process, or "
        "that of the echo on the same carrier.",
        (
            Column("contender", "contender", ""),
            Column("median_ms", "median", ".3f"),
            Column("fastest_ms", "fastest", ".3f"),
            Column("server_computed_ms", "server computed", ".3f"),
            Column("over_in_process_ms", "over in process", ".3f"),
            Column("over_echo_ms", "over the echo", ".3f"),
        ),
        [_row(name, timed, entered) for name, timed in entered.items()],
    )


def _row(name: str, timed: Timed, entered: dict[str, Timed]) -> dict[str, Any]:
    is_ours = name in OURS
    computed = sorted(timed.computed_seconds)
    return {
        "contender": name,
        "median_ms": timed.median_ms,
        "fastest_ms": 1e3 * min(timed.seconds),
        "server_computed_ms": 1e3 * computed[len(computed) // 2] if computed else None,
        "over_in_process_ms": timed.median_ms - entered[IN_PROCESS].median_ms if is_ours else None,
        "over_echo_ms": timed.median_ms - entered[OURS[name][2]].median_ms if is_ours else None,
        "calls_ms": [1e3 * seconds for seconds in timed.seconds],
    }


def _computed(criterion: RemoteLoss) -> float:
    assert criterion.result is not None
    assert criterion.result.timing is not None
    return criterion.result.timing.compute_seconds
