"""Times the core on a GPU, beside cross-entropy and the usual implementation, and shows where its time goes.

    python -m benchmarks.core.gpu [--quick] [--json FILE]

Forward and backward of one request (or of a batch of requests), as a user calls it, and as a CUDA graph. The usual
implementation is timed where it is installed (benchmarks/requirements.txt). Contenders take turns; times are medians.
Errors are against the reference implementation in float64; memory is the peak beyond the inputs, gradient included.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks import setting, usual
from benchmarks.contenders import Contender, bind
from benchmarks.core.memory import Meter
from benchmarks.workloads import HEADLINE, REGIMES, Pair, Problem, Regime, Workload
from lovasz.core import LovaszHinge, LovaszSoftmax, reference
from lovasz.core.batch import Batch, Request
from lovasz.core.dispatch import submit
from lovasz.core.plan import Plan
from lovasz.spec import Result, weighted_sum

try:
    import triton

    from lovasz.core.backends.triton import compute as triton_compute
    from lovasz.core.backends.triton.graphs import GRAPHS
    from lovasz.core.backends.triton.program import Program
except ModuleNotFoundError as error:
    sys.exit(f"{error}: this needs Triton, which comes with PyTorch for CUDA")

WORKLOADS = (
    *HEADLINE,
    Workload((1, 19, 1024, 2048)),
    Workload((1, 150, 512, 512)),
    Workload((1, 19, 64, 64), requests=64),
    Workload((1, 19, 64, 64)),
    Workload((1, 19, 256, 256), requests=16),
    Workload((8, 512, 512), Problem.HINGE),
    Workload((120_000, 20)),
)
QUICK = (Workload((1, 19, 64, 128)), Workload((1, 19, 32, 32), requests=4), Workload((2, 80, 80), Problem.HINGE))
NEVER_RECORDED = 1 << 30
PROFILED = 3
"""How many calls are profiled."""
BLOCK_SECONDS = 0.06
"""About how long a contender's turn takes."""
TURNS = 2
SLOWEST_CALLS = 1


def one_batch(pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge, device: torch.device) -> list[Result[Tensor]]:
    total = weighted_sum(loss)
    results = []
    for answer in submit([Request.checked(*pair, total) for pair in pairs], total, device).collect():
        assert isinstance(answer, Result)
        results.append(answer)
    return results


def graph_of_ours(
    pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge, device: torch.device
) -> Callable[[], object]:
    """The launches of a batch as a CUDA graph on these tensors."""
    total = weighted_sum(loss)
    batch = Batch.of([Request.checked(*pair, total) for pair in pairs])
    program, tensors, grads = triton_compute.prepare(Plan.of(batch, total, device), batch, want_grad=True)
    addresses = triton_compute.addresses_of(program, tensors, grads).to(device)
    program.finish(program.begin(addresses, torch.cuda.current_stream()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        workspace = program.begin(addresses, torch.cuda.current_stream())
        program.finish(workspace)
    kept = batch, tensors, grads, addresses, workspace

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def graph_of_cross_entropy(pairs: Sequence[Pair], problem: Problem) -> Callable[[], object]:
    leaves = [(logits.detach().requires_grad_(), labels) for logits, labels in pairs]

    def all_grads() -> list[Tensor]:
        grads: list[Tensor] = []
        for leaf, labels in leaves:
            if problem is Problem.SOFTMAX:
                value = functional.cross_entropy(leaf, labels)
            else:
                value = functional.binary_cross_entropy_with_logits(leaf, labels.to(leaf.dtype))
            grads += torch.autograd.grad(value, leaf)
        return grads

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            all_grads()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = all_grads()
    kept = leaves, grads

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def program_of(pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge, device: torch.device) -> Program:
    total = weighted_sum(loss)
    batch = Batch.of([Request.checked(*pair, total) for pair in pairs])
    return triton_compute.prepare(Plan.of(batch, total, device), batch, want_grad=True)[0]


def seconds_of(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each call."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            once = seconds_of(call)
            count = max(SLOWEST_CALLS, min(100, int(BLOCK_SECONDS / once)))
            times[name] += [seconds_of(call) for _ in range(count)]
    return {name: 1e3 * statistics.median(own) for name, own in times.items()}


def launch_milliseconds(pairs: Sequence[Pair], loss: LovaszSoftmax | LovaszHinge, device: torch.device) -> float:
    """The time until the host has queued a batch, on an idle device."""
    total = weighted_sum(loss)
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        launched = submit([Request.checked(*pair, total) for pair in pairs], total, device)
        times.append(time.perf_counter() - start)
        launched.collect()
    return 1e3 * statistics.median(times)


def errors(
    pairs: Sequence[Pair], results: Sequence[Result[Tensor]], loss: LovaszSoftmax | LovaszHinge
) -> dict[str, float]:
    worst_loss = worst_grad = 0.0
    for (logits, labels), result in list(zip(pairs, results, strict=True))[:4]:
        leaf = logits.double().requires_grad_()
        value = reference.compute(leaf, labels, loss)
        (grad,) = torch.autograd.grad(value, leaf)
        assert result.grad is not None
        worst_loss = max(worst_loss, abs(result.loss - value.item()) / max(abs(value.item()), 1e-30))
        worst_grad = max(worst_grad, ((result.grad.double() - grad).norm() / grad.norm()).item())
    return {"loss_error": worst_loss, "grad_error": worst_grad}


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """The device's microseconds by kernel, and how many kernels and copies to the host a call has."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            name = event.name.split("<")[0].removeprefix("void ").split("::")[-1].split("(")[0]
            if "Memcpy" in event.name or "Memset" in event.name:
                name = event.name
            times[name] += event.device_time
            counts[name] += 1
    return {
        "device_us": {name: round(total / PROFILED, 1) for name, total in times.most_common(14)},
        "counts": {name: count / PROFILED for name, count in counts.items()},
    }


def measured(workload: Workload, regime: Regime, device: torch.device) -> dict[str, Any]:
    pairs = workload.inputs(regime, device)
    loss: LovaszSoftmax | LovaszHinge = LovaszSoftmax() if workload.problem is Problem.SOFTMAX else LovaszHinge()
    who = Contender.OURS if workload.requests == 1 else Contender.BATCHED
    ours = bind(who, workload.problem, pairs)
    GRAPHS.clear()
    program = program_of(pairs, loss, device)
    program.times_seen = NEVER_RECORDED
    results = one_batch(pairs, loss, device)
    row: dict[str, Any] = {"workload": workload.name, "regime": regime.name, **errors(pairs, results, loss)}
    del results
    one_batch(pairs, loss, device)
    meter = Meter(device)
    kept = one_batch(pairs, loss, device)
    peak = meter.peak_bytes()
    assert peak is not None
    row["memory"] = peak / workload.logits_bytes
    del kept
    row["host_eager_ms"] = launch_milliseconds(pairs, loss, device)
    row |= profiled(lambda: one_batch(pairs, loss, device))
    program.times_seen = 0
    row["host_ms"] = launch_milliseconds(pairs, loss, device)
    calls: dict[str, Callable[[], object]] = {
        "ours": ours,
        "graph": graph_of_ours(pairs, loss, device),
        "cross_entropy": bind(Contender.CROSS_ENTROPY, workload.problem, pairs),
        "cross_entropy_graph": graph_of_cross_entropy(pairs, workload.problem),
    }
    if usual.installed():
        calls["usual"] = bind(Contender.USUAL, workload.problem, pairs)
    return row | {"usual_ms": None} | {f"{name}_ms": value for name, value in in_turns(calls).items()}


HEADER = (
    f"{'workload':<26}{'regime':<13}{'ours':>7}{'graph':>7}{'CE':>7}{'CEgr':>7}{'usual':>8}{'xusual':>7}{'xCE':>6}"
    f"{'grCE':>6}{'host':>6}{'hostE':>6}{'dev':>6}{'mem':>6}{'lossE':>9}{'gradE':>9}{'krn':>4}{'d2h':>4}"
)


def line(row: dict[str, Any]) -> str:
    kernels = sum(count for name, count in row["counts"].items() if "Mem" not in name)
    copies = sum(count for name, count in row["counts"].items() if "DtoH" in name)
    usual_ms, usual_ratio = "-", "-"
    if row["usual_ms"] is not None:
        usual_ms, usual_ratio = f"{row['usual_ms']:.2f}", f"{row['usual_ms'] / row['ours_ms']:.1f}"
    return (
        f"{row['workload']:<26}{row['regime']:<13}{row['ours_ms']:7.3f}{row['graph_ms']:7.3f}"
        f"{row['cross_entropy_ms']:7.3f}{row['cross_entropy_graph_ms']:7.3f}{usual_ms:>8}"
        f"{usual_ratio:>7}{row['ours_ms'] / row['cross_entropy_ms']:6.2f}"
        f"{row['graph_ms'] / row['cross_entropy_graph_ms']:6.2f}{row['host_ms']:6.2f}{row['host_eager_ms']:6.2f}"
        f"{sum(row['device_us'].values()) / 1e3:6.2f}{row['memory']:6.2f}"
        f"{row['loss_error']:9.0e}{row['grad_error']:9.1e}"
        f"{kernels:4.0f}{copies:4.0f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, to check that it runs")
    parser.add_argument("--only", metavar="PATTERN", default="", help="only workloads whose names match")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, but torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    known = {
        "chip": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "usual implementation": setting.usual_implementation(),
    }
    print(setting.lines(known))
    print("Milliseconds; gr: as a CUDA graph, host: to queue a batch as a graph, hostE: kernel by kernel,")
    print("dev: of the device; memory in multiples of the logits; krn: kernels, d2h: copies to the host")
    print(HEADER, flush=True)
    rows = []
    for workload in QUICK if args.quick else WORKLOADS:
        if not re.search(args.only, workload.name):
            continue
        for regime in REGIMES:
            row = measured(workload, regime, device)
            rows.append(row)
            print(line(row), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"setting": known, "rows": rows}, indent=1) + "\n")
        for name, value in rows[-1]["device_us"].items():
            print(f"    {name:<40}{value:8.1f} us x{rows[-1]['counts'][name]:.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
