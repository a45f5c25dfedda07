"""The attacks. Each returns its row of the table: what was tried, what came of it, and whether it held."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import grpc
import numpy as np

from benchmarks.faults.load import LOSS, Counts, callers, resident_mib
from benchmarks.progress import Progress
from lovasz import wire
from lovasz.server.launch import ServerProcess
from lovasz.spec import weighted_sum
from lovasz.v1 import loss_pb2 as pb

MAX_REQUESTS = 32
ARGUMENTS = ["--device", "cpu", "--max-requests", f"{MAX_REQUESTS}", "--memory-budget", "256MiB"]
CALLERS = 6
_METHODS = ("Compute", "AbortStep", "LeaveRun", "GetServerInfo")
_FUZZ_MESSAGES = 20_000
"""Messages for each minute that a scenario is given."""
_SOAK_MIB = 32.0
"""What memory may grow by in the second half of a soak: the noise of pools and arenas."""
_STOPPED_SECONDS = 20.0
_FULL = "ServerOverloadedError"
_LOSS = 0.03


@dataclass
class Outcome:
    """What a scenario found.

    Attributes:
        held: whether it went as promised; None: skipped.
        curve: times in seconds and memory in MiB, for the plot.
    """

    name: str
    tried: str
    found: str
    held: bool | None
    curve: list[tuple[float, float]] = field(default_factory=list)


Scenario = Callable[[float, Progress], Outcome]


def fuzz(minutes: float, progress: Progress) -> Outcome:
    """Random bytes, and right messages with bytes changed, to each method: 100,000 if there are five minutes."""
    dice, codes, messages = random.Random(0), dict[str, int](), int(_FUZZ_MESSAGES * minutes)
    with ServerProcess(ARGUMENTS) as server, grpc.insecure_channel(server.target) as channel:
        calls: list[Any] = [channel.unary_unary(f"/lovasz.v1.LossService/{method}") for method in _METHODS]
        before, sent = resident_mib(server), 0
        while sent < messages:
            progress(f"fuzz: {sent} messages")
            batch = [dice.choice(calls).future(_malformed(dice), timeout=60) for _ in range(MAX_REQUESTS // 2)]
            for call in batch:
                code = call.code().name
                codes[code] = codes.get(code, 0) + 1
            sent += len(batch)
        with callers(server.target, 1) as counts:
            _until_answered(counts, 10)
        grown = resident_mib(server) - before
    bad = codes.get("INTERNAL", 0) + codes.get("UNKNOWN", 0)
    told = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
    found = f"{told}; memory grew by {grown:.0f} MiB; {counts.wrong} of {counts.answered} answers after it wrong"
    return Outcome("fuzz", f"{sent} malformed messages", found, not bad and not counts.wrong)


def _malformed(dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        return dice.randbytes(dice.randrange(200))
    data = bytearray(_message())
    for _ in range(dice.randrange(1, 6)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data[: dice.randrange(len(data)) if dice.random() < 0.2 else None])


@cache
def _message() -> bytes:
    """A right message of a rank, small enough that each changed byte counts."""
    logits, labels = wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 4)), (1, 4)
    request = wire.Request.checked(
        weighted_sum(LOSS),
        logits,
        wire.TensorSpec(wire.dtype_named("uint8"), labels),
        want_grad=True,
        joint=wire.Joint("fuzz", 0, 0, 1),
    )
    return pb.ComputeRequest(header=request.to_proto(), logits=bytes(48), labels=bytes(4)).SerializeToString()


def soak(minutes: float, progress: Progress) -> Outcome:
    """Mixed load, with client processes that are killed in the middle of calls; the slope of the server's memory."""
    killed, curve = 0, list[tuple[float, float]]()
    with ServerProcess(ARGUMENTS) as server, callers(server.target, CALLERS) as counts:
        start = time.monotonic()
        while (now := time.monotonic() - start) < 60 * minutes:
            progress(f"soak: {now:.0f} s, {counts.answered} answers")
            curve.append((now, resident_mib(server)))
            command = [sys.executable, "-m", "benchmarks.faults.victim", server.target]
            victim = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert victim.stdout is not None
            victim.stdout.readline()  # It makes calls.
            victim.kill()
            victim.wait()
            victim.stdout.close()
            killed += 1
    later = np.array(curve[len(curve) // 2 :])
    slope = float(np.polyfit(later[:, 0], later[:, 1], 1)[0]) if len(later) > 2 else float("nan")
    grown = slope * (later[-1, 0] - later[0, 0])
    found = (
        f"{counts.answered} answers, {counts.wrong} wrong, {counts.failed} failed; memory {curve[-1][1]:.0f} MiB, "
        f"{grown:+.1f} MiB over the second half ({60 * slope:+.2f} MiB a minute)"
    )
    tried = f"{minutes:g} min of {CALLERS} callers, and {killed} client processes killed while they call"
    return Outcome("soak", tried, found, not counts.wrong and not counts.failed and not grown > _SOAK_MIB, curve)


def overload(minutes: float, progress: Progress) -> Outcome:
    """Four times as many callers as the server takes requests."""
    curve, number = list[tuple[float, float]](), 4 * MAX_REQUESTS
    with ServerProcess(ARGUMENTS) as server, callers(server.target, number, timeout=120.0) as counts:
        start = time.monotonic()
        while (now := time.monotonic() - start) < 60 * minutes:
            progress(f"overload: {now:.0f} s, {counts.answered} answers")
            curve.append((now, resident_mib(server)))
            time.sleep(1.0)
    p50, p99 = np.quantile(counts.seconds or [float("nan")], [0.5, 0.99])
    most = max(mib for _, mib in curve)
    found = (
        f"{counts.answered} answers, {counts.wrong} wrong; failed: {counts.errors or 'none'} (a client that has had no "
        f"answer yet tries for ten seconds); p50 {p50:.1f} s, p99 {p99:.1f} s with all retries; memory at most "
        f"{most:.0f} MiB"
    )
    tried = f"{minutes:g} min of {number} callers with --max-requests {MAX_REQUESTS}"
    return Outcome("overload", tried, found, not counts.wrong and counts.errors.keys() <= {_FULL}, curve)


def stopped(minutes: float, progress: Progress) -> Outcome:
    """The server's process is stopped under load (SIGSTOP), and goes on."""
    progress(f"SIGSTOP: {_STOPPED_SECONDS:g} s")
    with ServerProcess([*ARGUMENTS, "--device-stall", "5"]) as server, callers(server.target, CALLERS) as counts:
        _until_answered(counts, 50)
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(_STOPPED_SECONDS)
        os.kill(server.pid, signal.SIGCONT)
        since, before = time.monotonic(), counts.answered
        _until_answered(counts, before + 50)
        first = next((ended - since for ended in counts.ended if ended > since), float("nan"))
    found = f"first answer {first:.2f} s later; {counts.wrong} of {counts.answered} wrong, {counts.failed} failed"
    tried = f"{_STOPPED_SECONDS:g} s stopped, with --device-stall 5"
    return Outcome("SIGSTOP", tried, found, not counts.wrong and not counts.failed and first == first)


def lossy(minutes: float, progress: Progress) -> Outcome:
    """A network that loses packets: a namespace of its own, whose loopback does."""
    tried = f"{minutes:g} min over a loopback that loses {_LOSS:.0%} of its packets"
    rules = (
        f"tc qdisc add dev lo root netem loss {100 * _LOSS:g}%",
        f"iptables -A INPUT -i lo -m statistic --mode random --probability {_LOSS:g} -j DROP",
    )
    progress("packet loss")
    for rule in rules:
        namespace = ["unshare", "--net", "sh", "-c", f"ip link set lo up && {rule}"]
        if shutil.which("unshare") is None or subprocess.run(namespace, capture_output=True).returncode:
            continue
        namespace[-1] += f' && exec "$0" -m benchmarks.faults.lossy {minutes}'
        done = subprocess.run([*namespace, sys.executable], capture_output=True, text=True, timeout=60 * minutes + 300)
        return Outcome("packet loss", tried, done.stdout.strip() or done.stderr[-200:], done.returncode == 0)
    return Outcome("packet loss", tried, "skipped: no network namespace that loses packets can be made here", None)


def _until_answered(counts: Counts, number: int) -> None:
    """Waits for so many answers, for two minutes at most."""
    until = time.monotonic() + 120
    while counts.answered < number and time.monotonic() < until:
        time.sleep(0.05)


SCENARIOS: dict[str, Scenario] = {
    "fuzz": fuzz,
    "soak": soak,
    "overload": overload,
    "SIGSTOP": stopped,
    "packet loss": lossy,
}
