"""What the remote call costs: our transports, and peers that move the same bytes, in one run and in turn, on loopback.

    python benchmarks/data_plane.py --json benchmarks/results/data_plane.json --plot docs/figures

--triton PYTHON compares with NVIDIA's Triton Inference Server, too: PYTHON is that of an environment of its own (``make
.venv-triton/.installed``). A few minutes in all. Servers are processes of their own; --quick only shows that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transports
import truth
from contenders import Answers, Contender, Truth, bind, label
from core_loss import ProgressLine
from data_plane_report import Column, Part, draw, markdown
from report import setting
from torch import Tensor
from transports import COMPUTE, ECHO, Child, SocketPeer, own_connections
from workloads import REGIMES, Pair, Problem, Workload, regime_named

from lovasz import core, wire
from lovasz.client import CrossEntropy, LossClient, LovaszSoftmax, remote
from lovasz.client.tensors import encode_labels
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

CPU = torch.device("cpu")
CLASSES = 19
LARGE = Workload((1, CLASSES, 512, 1024))
SMALL = Workload((4, CLASSES, 64, 64))
HALF_TRAINED = "half-trained"
SHORT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SETTLE_SECONDS = 0.02
"""Between two blocks: threads that still spin for the one would take the other's cores."""
USUAL_TURNS = 3
"""The usual implementation takes seconds, is timed for a call a turn, and no oftener than this."""
NEVER = 1 << 62
MESSAGE_BYTES = 4 << 20
"""What a server takes in one message."""
CROSSOVER_BYTES = (250_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000)
SHARED_BYTES = (16_000, 32_000, 64_000, 128_000, 256_000, 512_000, 1_000_000, 2_000_000)
GENERATORS, GENERATOR_THREADS = 2, 8
"""Processes that send small requests, and clients in each."""
CONNECTIONS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4))
"""Threads that send at once, and connections among them."""
FAIR_BYTES = 100_000
FAIR_LARGE = 3
"""At least so many large requests pass meanwhile: a part of one is its way in only, or its computation."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How often all is done."""

    turns: int
    calls: int
    other_turns: int
    """In the regimes that are not half-trained."""
    crossover_turns: int
    generator_seconds: float
    stream_calls: int
    fair_samples: int
    fair_seconds: float
    fair_bytes: int
    triton_turns: int


FULL = Effort(5, 5, 2, 6, 1.5, 3, 400, 20.0, 256 << 20, 2)
QUICK = Effort(1, 2, 1, 1, 0.5, 2, 40, 3.0, 64 << 20, 1)


@dataclass
class Timed:
    """One contender of a race.

    Attributes:
        call: what is timed.
        computed: after a call, the seconds that its server computed; None where there is no server.
        calls: a block; 0 for the race's.
        most_turns: it takes part in.
        seconds: of its calls.
    """

    call: Callable[[], Any]
    computed: Callable[[], float] | None = None
    calls: int = 0
    most_turns: int = 1 << 30
    seconds: list[float] = field(default_factory=list)
    computed_seconds: list[float] = field(default_factory=list)
    answer: Any = None

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def block(self, calls: int) -> None:
        """Calls behind one another, after one that is not timed: caches and threads are cold after the others."""
        time.sleep(SETTLE_SECONDS)
        if not self.calls:
            self.answer = self.call()
        for _ in range(self.calls or calls):
            self.answer = None  # a training step, too, drops the last gradient before it computes the next
            start = time.perf_counter()
            self.answer = self.call()
            self.seconds.append(time.perf_counter() - start)
            if self.computed is not None:
                self.computed_seconds.append(self.computed())


def race(entered: dict[str, Timed], turns: int, calls: int, progress: Progress) -> None:
    """Lets them take turns, in blocks, so that a slow moment of the machine meets all."""
    for turn in range(turns):
        for name, timed in entered.items():
            if turn < timed.most_turns:
                progress(f"turn {turn + 1} of {turns}, {name}")
                timed.block(calls)


def _say(progress: Progress, prefix: str, text: str) -> None:
    progress(f"{prefix}, {text}")


# --- One large request ------------------------------------------------------------------------------------------------


def step(criterion: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Forward and backward."""
    loss = criterion(leaf, labels)
    loss.backward()
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    return loss.item(), grad


def wire_bytes(logits: Tensor, labels: Tensor) -> list[memoryview]:
    """What a call sends for them."""
    words = logits.view(torch.uint8).numpy()
    return [wire.as_bytes(array) for array in (words, encode_labels(labels).array())]


class LargeRequest:
    """Forward and backward of one large request, by all transports."""

    def __init__(self, server: ServerProcess, sockets_port: int, effort: Effort, progress: Progress) -> None:
        self._tcp, self._unix = server.targets
        self._port = sockets_port
        self._effort = effort
        self._progress = progress
        self.ratios: dict[str, float] = {}

    def part(self) -> Part:
        rows: list[dict[str, Any]] = []
        for regime in sorted(REGIMES, key=lambda regime: regime.name != HALF_TRAINED):
            rows += self._regime(regime.name)
        ratios = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in self.ratios.items())
        return Part(
            "large",
            f"A large request, {LARGE.name}, forward and backward, milliseconds",
            "Transport is the median less lovasz.core's in float32. Of sockets: in multiples of plain TCP sockets that "
            "move as many bytes. Errors of the gradient are relative to its norm, against float64 from float32 logits. "
            f"Transport of 16 bits over that of float32, {HALF_TRAINED}: {ratios}.",
            (
                Column("regime", "regime", ""),
                Column("contender", "contender", ""),
                Column("median_ms", "median", ".1f"),
                Column("lower_quartile_ms", "lower quartile", ".1f"),
                Column("upper_quartile_ms", "upper quartile", ".1f"),
                Column("server_computed_ms", "server computed", ".1f"),
                Column("transport_ms", "transport", ".1f"),
                Column("of_sockets", "of sockets", ".2f"),
                Column("faster_than_usual", "x usual", ".1f"),
                Column("grad_error", "gradient error", ".0e"),
            ),
            rows,
            {"transport_of_float32": self.ratios},
        )

    def _regime(self, regime: str) -> list[dict[str, Any]]:
        say = partial(_say, self._progress, f"large request, {regime}")
        say("inputs and true answers")
        pairs = LARGE.inputs(regime_named(regime), CPU)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            file = Path(folder, "truth.npz")
            truth.keep(file, Truth.LOVASZ, Problem.SOFTMAX, pairs)
            entered = self._contenders(pairs[0], stack)
            main = regime == HALF_TRAINED
            for name, timed in entered.items():
                say(f"first call of {name}")
                timed.call()
            race(entered, self._effort.turns if main else self._effort.other_turns, self._effort.calls, say)
            errors = {name: _grad_error(file, timed.answer) for name, timed in entered.items()}
            for dtype in (torch.float16, torch.bfloat16):
                errors[f"lovasz.core, {SHORT[dtype]} logits"] = _grad_error(file, _in_float32(pairs[0], dtype))
        rows = [self._row(regime, name, timed, entered, errors[name]) for name, timed in entered.items()]
        if main:
            cost = {row["contender"]: row["transport_ms"] for row in rows}
            pairs_of_names = {
                "TCP, float16": ("RemoteLoss, TCP, wire float16", "RemoteLoss, TCP"),
                "TCP, bfloat16": ("RemoteLoss, TCP, wire bfloat16", "RemoteLoss, TCP"),
                "shared memory, float16": ("RemoteLoss, shared memory, wire float16", "RemoteLoss, shared memory"),
            }
            self.ratios = {name: cost[half] / cost[whole] for name, (half, whole) in pairs_of_names.items()}
        return rows

    def _contenders(self, pair: Pair, stack: ExitStack) -> dict[str, Timed]:
        logits, labels = pair
        entered = {
            label(Contender.USUAL): Timed(
                bind(Contender.USUAL, Problem.SOFTMAX, [pair]), calls=1, most_turns=USUAL_TURNS
            )
        }
        local = core.LocalLoss(LovaszSoftmax())
        for dtype, short in SHORT.items():
            leaf = logits.to(dtype, copy=True).requires_grad_()
            entered[f"lovasz.core, {short} logits"] = Timed(partial(step, local, leaf, labels))
        leaf = logits.clone().requires_grad_()
        for name, target, transport, wire_dtype in (
            ("TCP", self._tcp, "grpc", None),
            ("TCP, wire float16", self._tcp, "grpc", "float16"),
            ("TCP, wire bfloat16", self._tcp, "grpc", "bfloat16"),
            ("Unix socket", self._unix, "grpc", None),
            ("shared memory", self._unix, "shm", None),
            ("shared memory, wire float16", self._unix, "shm", "float16"),
        ):
            criterion = RemoteLoss(target, LovaszSoftmax(), transport=transport, wire_dtype=wire_dtype)
            stack.enter_context(closing(criterion))
            entered[f"RemoteLoss, {name}"] = Timed(
                partial(step, criterion, leaf, labels), partial(_computed, criterion)
            )
        for dtype, name in ((torch.float32, "sockets"), (torch.float16, "sockets, 16 bits")):
            parts = wire_bytes(logits.to(dtype), labels)
            entered[name] = Timed(stack.enter_context(closing(SocketPeer(self._port, parts, parts[0].nbytes))))
        return entered

    def _row(
        self, regime: str, name: str, timed: Timed, entered: dict[str, Timed], error: float | None
    ) -> dict[str, Any]:
        median, remote_call = timed.median_ms, name.startswith("RemoteLoss")
        transport = median - entered["lovasz.core, float32 logits"].median_ms if remote_call else None
        sockets = entered["sockets, 16 bits" if name.endswith("float16") else "sockets"]
        computes = not name.startswith("sockets")
        return {
            "regime": regime,
            "contender": name,
            "median_ms": median,
            "lower_quartile_ms": 1e3 * float(np.quantile(timed.seconds, 0.25)),
            "upper_quartile_ms": 1e3 * float(np.quantile(timed.seconds, 0.75)),
            "server_computed_ms": 1e3 * statistics.median(timed.computed_seconds) if timed.computed_seconds else None,
            "transport_ms": transport,
            "of_sockets": transport / sockets.median_ms if transport is not None else None,
            "faster_than_usual": entered[label(Contender.USUAL)].median_ms / median if computes else None,
            "grad_error": error,
            "calls_ms": [1e3 * seconds for seconds in timed.seconds],
        }


def _computed(criterion: RemoteLoss) -> float:
    assert criterion.result is not None
    assert criterion.result.timing is not None
    return criterion.result.timing.compute_seconds


def _in_float32(pair: Pair, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Of 16-bit logits, as a gradient scaler would let it out of autograd, whose 16 bits alone would underflow."""
    result = core.compute(pair[0].to(dtype), pair[1], LovaszSoftmax())
    assert result.grad is not None
    return result.loss, result.grad


def _grad_error(file: Path, answer: Any) -> float | None:
    if answer is None:
        return None
    answers: Answers = answer if isinstance(answer, list) else [answer]
    return truth.worst_errors(file, answers)[1]


# --- Where one way gets faster than the other -------------------------------------------------------------------------


def request_of(nbytes: int) -> Pair:
    """One of about so many bytes, labels (a byte each) included."""
    workload = Workload((1, CLASSES, 1, nbytes // (4 * CLASSES + 1)))
    ((logits, labels),) = workload.inputs(regime_named(HALF_TRAINED), CPU)
    return logits, labels.to(torch.uint8)


def crossover(server: ServerProcess, effort: Effort, progress: Progress) -> tuple[Part, Part]:
    """One message against a stream, and against shared memory; cross-entropy, which computes least."""
    tcp, unix = server.targets
    streams = _crossover(tcp, "UNARY_BYTES", CROSSOVER_BYTES, effort, progress)
    shared = _crossover(unix, "SHARED_BYTES", SHARED_BYTES, effort, progress)
    columns = (
        Column("payload_bytes", "bytes", ",d"),
        Column("message_ms", "one message", ".2f"),
        Column("other_ms", "stream", ".2f"),
        Column("of_message", "stream of message", ".2f"),
    )
    of_shared = (
        *columns[:2],
        Column("other_ms", "shared memory", ".2f"),
        Column("of_message", "shared memory of message", ".2f"),
    )
    note = "Cross-entropy, milliseconds, medians. The client changes over above {} bytes."
    return (
        Part("unary", "One message or a stream, TCP", note.format(f"{remote.UNARY_BYTES:,}"), columns, streams),
        Part(
            "shared",
            "One message or shared memory, Unix socket",
            note.format(f"{remote.SHARED_BYTES:,}"),
            of_shared,
            shared,
        ),
    )


def _crossover(
    target: str, limit: str, sizes: Sequence[int], effort: Effort, progress: Progress
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    unary = MESSAGE_BYTES
    with LossClient(target) as client:

        def call(pair: Pair, above: int) -> object:
            with mock.patch.object(remote, "UNARY_BYTES", unary), mock.patch.object(remote, limit, above):
                return client.compute(*pair, CrossEntropy())

        for size in sizes:
            pair = request_of(size)
            entered = {"one message": Timed(partial(call, pair, unary)), "the other": Timed(partial(call, pair, 0))}
            race(entered, effort.crossover_turns, 10, partial(_say, progress, f"{limit}, {size:,} bytes"))
            message, other = (timed.median_ms for timed in entered.values())
            rows.append(
                {"payload_bytes": size, "message_ms": message, "other_ms": other, "of_message": other / message}
            )
    return rows


# --- Small requests of many clients -----------------------------------------------------------------------------------


def small_requests(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    progress("small requests: starting the clients")
    request = transports.encoded(SMALL, HALF_TRAINED)
    answer_bytes = len(transports.ask_raw(server.target, COMPUTE, request))
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        echo = stack.enter_context(Child(transports.serve_echo, answer_bytes)).receive()
        arguments = (SMALL, HALF_TRAINED, GENERATOR_THREADS)
        generators = [stack.enter_context(Child(transports.generate, *arguments)) for _ in range(GENERATORS)]
        for generator in generators:
            generator.receive()
        contenders = {
            "our server, LossClient": (server.target, ""),
            "our server, ready bytes": (server.target, COMPUTE),
            "bare gRPC echo, ready bytes": (echo, ECHO),
        }

        def block(target: str, method: str, seconds: float) -> float:
            start = time.perf_counter() + 0.05
            for generator in generators:
                generator.send((target, method, start, seconds))
            answers = [generator.receive() for generator in generators]
            return float(sum(count for count, _ in answers) / (max(end for _, end in answers) - start))

        for target, method in contenders.values():
            block(target, method, effort.generator_seconds / 4)  # connects
        for turn in range(effort.turns):
            for name, (target, method) in contenders.items():
                progress(f"small requests, turn {turn + 1} of {effort.turns}, {name}")
                rates.setdefault(name, []).append(block(target, method, effort.generator_seconds))
    bare = statistics.median(rates["bare gRPC echo, ready bytes"])
    return Part(
        "small",
        f"Small requests, {SMALL.name}, requests a second",
        f"{GENERATORS} client processes of {GENERATOR_THREADS} threads, each with a connection of its own; the same "
        f"for all. The echo is a threaded grpc.server that answers {answer_bytes:,} bytes as ours does, and computes "
        "nothing. Ready bytes: encoded once, and the answer is not decoded.",
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
                "of_echo": statistics.median(own) / bare,
                "blocks": own,
            }
            for name, own in rates.items()
        ],
    )


# --- Several connections ----------------------------------------------------------------------------------------------


def connections(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    ((logits, labels),) = LARGE.inputs(regime_named(HALF_TRAINED), CPU)
    labels = labels.to(torch.uint8)
    most = max(threads for threads, _ in CONNECTIONS)
    rates: dict[tuple[int, int], list[float]] = {pair: [] for pair in CONNECTIONS}
    with ExitStack() as stack, own_connections():
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
        "Cross-entropy, float32 over TCP: some 40 MB each way a request.",
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


# --- Fairness ---------------------------------------------------------------------------------------------------------


def fairness(server: ServerProcess, effort: Effort, progress: Progress) -> Part:
    """The latency of small requests while a large one of the same client is under way."""
    small, large = request_of(FAIR_BYTES), request_of(effort.fair_bytes)
    with LossClient(server.target) as client:

        def sample() -> tuple[float, float, float]:
            """The start, the seconds, and those that the server had it in its queue and in work."""
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
                    if len(beside) >= effort.fair_samples and len(spans) >= FAIR_LARGE:
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
        f"Latency of a request of {FAIR_BYTES // 1000} KB, milliseconds",
        f"Cross-entropy over TCP, one client. The large request has {effort.fair_bytes >> 20} MiB and takes "
        f"{large_ms:.0f} ms. On the way: without the server's queue and computation, which the large one holds, too.",
        (
            Column("beside", "small requests", ""),
            Column("samples", "calls", "d"),
            Column("p50_ms", "p50", ".2f"),
            Column("p99_ms", "p99", ".2f"),
            Column("way_p50_ms", "on the way, p50", ".2f"),
            Column("way_p99_ms", "on the way, p99", ".2f"),
        ),
        [{"beside": "alone", **quiet}, {"beside": "while a large one is in transit", **loaded}],
        {"large_ms": large_ms},
    )


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


# --- Triton -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What is asked of both.

    Attributes:
        ours, theirs: timed calls of each client.
    """

    shape: tuple[int, ...]
    clients: int
    ours: int
    theirs: int
    untimed: int = 1
    most_turns: int = 1 << 30


LOADS = (
    Load((1, CLASSES, 512, 1024), 1, 10, 2),
    Load((1, CLASSES, 64, 64), 1, 200, 50),
    Load((1, CLASSES, 64, 64), 16, 50, 8),
    Load((4, CLASSES, 64, 64), 16, 30, 2),
)
FULL_LOADS = (*LOADS, Load((1, CLASSES, 512, 1024), 16, 1, 1, untimed=0, most_turns=1))


class AgainstTriton:
    """Our server and Triton's, asked in turn by clients of the same form."""

    def __init__(self, python: Path, server: ServerProcess, quick: bool, effort: Effort, progress: Progress) -> None:
        self._python = python
        self._target = server.target
        self._loads = LOADS if quick else FULL_LOADS
        self._effort = effort
        self._progress = progress
        self._threads = torch.get_num_threads()

    def part(self) -> Part:
        ours: dict[Load, list[dict[str, Any]]] = {load: [] for load in self._loads}
        theirs: dict[str, dict[Load, list[dict[str, Any]]]] = {}
        with Child(transports.serve_clients) as child:
            child.receive()
            for name, instances, threads in (
                ("one instance", 1, self._threads),
                ("two instances of one thread", 2, 1),
            ):
                theirs[name] = {load: [] for load in self._loads}
                self._progress(f"Triton, {name}: starting")
                with transports.triton_server(self._python, instances, threads) as target:
                    for load, turn in self._turns():
                        self._progress(f"Triton, {name}, turn {turn + 1}, {load.clients} clients of {load.shape}")
                        workload = Workload(load.shape, requests=load.clients)
                        child.send((self._target, workload, HALF_TRAINED, load.ours, load.untimed))
                        ours[load].append(child.receive())
                        theirs[name][load].append(self._ask_triton(target, load))
        rows = [self._row(load, ours[load], {name: own[load] for name, own in theirs.items()}) for load in self._loads]
        return Part(
            "triton",
            "Our server and Triton Inference Server with the usual implementation",
            f"Clients are threads of one process, each with a connection; latencies are medians. Both servers have "
            f"{self._threads} threads; Triton is shown with one instance of the model, or two of one thread each, "
            "whichever answered more requests a second.",
            (
                Column("shape", "shape", ""),
                Column("clients", "clients", "d"),
                Column("ours_ms", "ours, ms", ".1f"),
                Column("triton_ms", "Triton, ms", ".1f"),
                Column("ours_per_second", "ours, requests/s", ".1f"),
                Column("triton_per_second", "Triton, requests/s", ".1f"),
                Column("ratio", "ours of Triton's", ".1f"),
                Column("triton_setting", "Triton with", ""),
            ),
            rows,
        )

    def _turns(self) -> Iterator[tuple[Load, int]]:
        for turn in range(self._effort.triton_turns):
            yield from ((load, turn) for load in self._loads if turn < load.most_turns)

    def _ask_triton(self, target: str, load: Load) -> dict[str, Any]:
        arguments = {
            "--url": target,
            "--shape": "x".join(map(str, load.shape)),
            "--clients": load.clients,
            "--requests": load.theirs,
            "--untimed": load.untimed,
            "--regime": HALF_TRAINED,
        }
        script = str(Path(__file__).with_name("triton_client.py"))
        command = [str(self._python), script, *(str(word) for pair in arguments.items() for word in pair)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=transports.ANSWER_SECONDS)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _row(self, load: Load, ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        rates = {name: _rate(own) for name, own in theirs.items()}
        best = max(rates, key=lambda name: rates[name])
        return {
            "shape": "x".join(map(str, load.shape)),
            "clients": load.clients,
            "ours_ms": _median_latency_ms(ours),
            "triton_ms": _median_latency_ms(theirs[best]),
            "ours_per_second": _rate(ours),
            "triton_per_second": rates[best],
            "ratio": _rate(ours) / rates[best],
            "triton_setting": best,
            "triton_per_second_each": rates,
        }


def _rate(blocks: list[dict[str, Any]]) -> float:
    return float(statistics.median(sum(map(len, block["latencies_s"])) / block["wall_s"] for block in blocks))


def _median_latency_ms(blocks: list[dict[str, Any]]) -> float:
    return 1e3 * float(np.median([call for block in blocks for client in block["latencies_s"] for call in client]))


# --- All of it --------------------------------------------------------------------------------------------------------

TERMINATED = 128 + signal.SIGTERM
PARTS = ("large", "crossover", "small", "connections", "fairness", "triton")


def measure(args: argparse.Namespace, progress: Progress) -> Iterator[Part]:
    """Part by part, all with one server of ours."""
    effort = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        listen = f"127.0.0.1:0,unix:{folder}/lovasz"
        with ServerProcess(["--device", "cpu", "--listen", listen, "--shared-memory"]) as server:
            if "large" in args.only:
                with Child(transports.serve_sockets) as sockets:
                    yield LargeRequest(server, sockets.receive(), effort, progress).part()
            if "crossover" in args.only:
                yield from crossover(server, effort, progress)
            for name, part in (("small", small_requests), ("connections", connections), ("fairness", fairness)):
                if name in args.only:
                    yield part(server, effort, progress)
            if "triton" in args.only and args.triton:
                yield AgainstTriton(args.triton, server, args.quick, effort, progress).part()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that it runs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="only these parts")
    parser.add_argument("--triton", type=Path, metavar="PYTHON", help="compare with Triton, which this Python has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there, too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw data_plane.png there")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if args.triton and not os.access(args.triton, os.X_OK):
        parser.error(f"--triton: {args.triton} cannot be run")
    return args


def main() -> int:
    args, progress = parsed(), ProgressLine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # through every ``with``, which ends the servers
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(threads)  # for the servers
    results: dict[str, Any] = {"setting": setting(CPU, (QUICK if args.quick else FULL).turns, None), "parts": {}}
    results["setting"]["quick"] = args.quick
    print("\n".join(f"{name}: {value}" for name, value in results["setting"].items() if value is not None), flush=True)
    for part in measure(args, progress):
        progress.clear()
        print(markdown(part), flush=True)
        results["parts"][part.key] = part.as_json()
        if args.json:  # after each part, so that a run that is cut off leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    progress.clear()
    if not args.triton:
        print("\nTriton was left out: --triton PYTHON was not given.")
    if args.plot and "large" in results["parts"]:
        print(f"\ndrawn: {draw(results, args.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
