"""One large request, forward and backward: our transports, the losses in process, and plain sockets."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import progress, truth
from benchmarks.child import Child
from benchmarks.contenders import Answers, Contender, Truth, bind
from benchmarks.progress import Progress
from benchmarks.remote.client_internals import payload
from benchmarks.remote.effort import Effort
from benchmarks.remote.race import Timed, race
from benchmarks.remote.report import CORE, Column, Part
from benchmarks.remote.sockets import SocketPeer
from benchmarks.workloads import CLASSES, HALF_TRAINED, REGIMES, Pair, Problem, Regime, Workload
from lovasz import core
from lovasz.client import LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

LARGE = Workload((1, CLASSES, 512, 1024))
SHORT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
USUAL_TURNS = 3
"""The usual implementation takes seconds: it is timed for one call in a turn, and in this many turns."""


def step(criterion: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Forward and backward."""
    loss = criterion(leaf, labels)
    loss.backward()
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    return loss.item(), grad


class LargeRequest:
    """Times all contenders in each regime."""

    def __init__(self, server: ServerProcess, effort: Effort, progress: Progress) -> None:
        self._tcp, self._unix = server.targets
        self._effort = effort
        self._progress = progress

    def part(self) -> Part:
        rows: list[dict[str, Any]] = []
        with Child("benchmarks.remote.sockets:SocketServer") as sockets:
            port: int = sockets.ask("port")
            for regime in sorted(REGIMES, key=lambda regime: regime != HALF_TRAINED):
                rows += self._regime(regime, port)
        found = _of_float32([row for row in rows if row["regime"] == HALF_TRAINED.name])
        ratios = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in found.items())
        return Part(
            "large",
            f"A large request, {LARGE.name}, forward and backward, milliseconds",
            "Transport: the median minus that of lovasz.core in float32. Of sockets: in multiples of plain TCP sockets "
            "that move as many bytes. Errors of the gradient are relative to its norm, against float64 from float32 "
            f"logits. Transport in 16 bits over that in float32, {HALF_TRAINED.name}: {ratios}.",
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
            {"transport_of_float32": found},
        )

    def _regime(self, regime: Regime, port: int) -> list[dict[str, Any]]:
        say = progress.after(self._progress, f"large request, {regime.name}")
        say("inputs and true answers")
        (pair,) = LARGE.inputs(regime)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            file = Path(folder, "truth.npz")
            truth.save(file, Truth.LOVASZ, Problem.SOFTMAX, [pair])
            entered = self._contenders(pair, port, stack)
            for name, timed in entered.items():
                say(f"first call of {name}")
                timed.call()
            turns = self._effort.turns if regime == HALF_TRAINED else self._effort.other_turns
            race(entered, turns, self._effort.calls, say)
            errors = {name: _grad_error(file, timed.answer) for name, timed in entered.items()}
            for dtype in (torch.float16, torch.bfloat16):
                errors[_core(dtype)] = _grad_error(file, _in_float32(pair, dtype))
        return [self._row(regime, name, timed, entered, errors[name]) for name, timed in entered.items()]

    def _contenders(self, pair: Pair, port: int, stack: ExitStack) -> dict[str, Timed]:
        logits, labels = pair
        usual = bind(Contender.USUAL, Problem.SOFTMAX, [pair])
        entered = {Contender.USUAL.value: Timed(usual, calls=1, max_turns=USUAL_TURNS)}
        local = core.LocalLoss(LovaszSoftmax())
        for dtype in SHORT:
            leaf = logits.to(dtype, copy=True).requires_grad_()
            entered[_core(dtype)] = Timed(partial(step, local, leaf, labels))
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
            parts = payload(logits.to(dtype), labels)
            entered[name] = Timed(stack.enter_context(closing(SocketPeer(port, parts, parts[0].nbytes))))
        return entered

    def _row(
        self, regime: Regime, name: str, timed: Timed, entered: dict[str, Timed], error: float | None
    ) -> dict[str, Any]:
        median = timed.median_ms
        transport = median - entered[CORE].median_ms if name.startswith("RemoteLoss") else None
        sockets = entered["sockets, 16 bits" if name.endswith("float16") else "sockets"]
        computes = not name.startswith("sockets")
        return {
            "regime": regime.name,
            "contender": name,
            "median_ms": median,
            "lower_quartile_ms": 1e3 * float(np.quantile(timed.seconds, 0.25)),
            "upper_quartile_ms": 1e3 * float(np.quantile(timed.seconds, 0.75)),
            "server_computed_ms": 1e3 * statistics.median(timed.computed_seconds) if timed.computed_seconds else None,
            "transport_ms": transport,
            "of_sockets": transport / sockets.median_ms if transport is not None else None,
            "faster_than_usual": entered[Contender.USUAL.value].median_ms / median if computes else None,
            "grad_error": error,
            "calls_ms": [1e3 * seconds for seconds in timed.seconds],
        }


def _core(dtype: torch.dtype) -> str:
    return f"lovasz.core, {SHORT[dtype]} logits"


def _of_float32(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The transport of 16-bit logits in multiples of that of float32 logits."""
    cost = {row["contender"]: row["transport_ms"] for row in rows}
    return {
        "TCP, float16": cost["RemoteLoss, TCP, wire float16"] / cost["RemoteLoss, TCP"],
        "TCP, bfloat16": cost["RemoteLoss, TCP, wire bfloat16"] / cost["RemoteLoss, TCP"],
        "shared memory, float16": cost["RemoteLoss, shared memory, wire float16"] / cost["RemoteLoss, shared memory"],
    }


def _computed(criterion: RemoteLoss) -> float:
    assert criterion.result is not None
    assert criterion.result.timing is not None
    return criterion.result.timing.compute_seconds


def _in_float32(pair: Pair, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The gradient for 16-bit logits in float32: in 16 bits it would underflow without a gradient scaler."""
    result = core.compute(pair[0].to(dtype), pair[1], LovaszSoftmax())
    assert result.grad is not None
    return result.loss, result.grad


def _grad_error(file: Path, answer: Any) -> float | None:
    if answer is None:
        return None
    answers: Answers = answer if isinstance(answer, list) else [answer]
    return truth.worst_errors(file, answers)[1]
