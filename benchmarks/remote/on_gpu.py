"""Times a remote call whose tensors stay on the GPU: a trainer and a server, two processes on one GPU.

    python -m benchmarks.remote.on_gpu [--quick] [--json FILE]

Forward and backward of one request, as a trainer calls it: through device memory, and over gRPC; beside the loss in the
trainer's own process, the usual implementation (where it is installed) and cross-entropy. Contenders take turns; times
are medians, and ratios are to the usual implementation. Answers are compared with those in process, and the device's
memory with what it was before.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import setting, usual
from benchmarks.contenders import Contender, bind
from benchmarks.workloads import HALF_TRAINED, Problem, Workload
from lovasz.client.torch import RemoteLoss
from lovasz.core import LovaszSoftmax, lovasz_softmax
from lovasz.core.dispatch import give_memory_back
from lovasz.server.launch import ServerProcess

WORKLOADS = (Workload((1, 19, 512, 1024)), Workload((1, 19, 64, 64)))
QUICK = (Workload((1, 19, 64, 64)),)
TURNS = 5
SECONDS = 0.3
"""About how long a contender's turn takes."""
KEPT_BYTES = 64 << 20
"""How much more of the device's memory may be in use afterwards: contexts and modules that stay loaded."""


def seconds_of(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):  # Compiles, records, and fills the pools.
            call()
    for _ in range(TURNS):
        for name, call in calls.items():
            count = max(1, min(200, int(SECONDS / TURNS / seconds_of(call))))
            times[name] += [seconds_of(call) for _ in range(count)]
    return {name: 1e3 * statistics.median(own) for name, own in times.items()}


def trained_by(criterion: Callable[..., torch.Tensor], leaf: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    leaf.grad = None
    criterion(leaf, labels).backward()
    assert leaf.grad is not None
    return leaf.grad


def measured(workload: Workload, target: str, device: torch.device) -> dict[str, Any]:
    ((logits, labels),) = workload.inputs(HALF_TRAINED, device)
    leaf, loss = logits.requires_grad_(), LovaszSoftmax()
    remote = {name: RemoteLoss(target, loss, transport=name) for name in ("auto", "grpc")}
    expected = trained_by(lovasz_softmax, leaf, labels)
    row: dict[str, Any] = {"workload": workload.name}
    for name, criterion in remote.items():
        grad = trained_by(criterion, leaf, labels)
        assert criterion.result is not None
        assert criterion.result.timing is not None
        row[f"{name}_way"] = criterion.result.timing.transport
        row[f"{name}_error"] = ((grad - expected).norm() / expected.norm()).item()
    calls: dict[str, Callable[[], object]] = {
        name: partial(trained_by, criterion, leaf, labels) for name, criterion in remote.items()
    }
    calls["in process"] = bind(Contender.OURS, Problem.SOFTMAX, [(logits, labels)])
    calls["cross-entropy"] = bind(Contender.CROSS_ENTROPY, Problem.SOFTMAX, [(logits, labels)])
    if usual.installed():
        calls["usual"] = bind(Contender.USUAL, Problem.SOFTMAX, [(logits, labels)])
    row |= {f"{name}_ms": milliseconds for name, milliseconds in in_turns(calls).items()}
    for criterion in remote.values():
        criterion.close()
    return row


def printed(row: dict[str, Any]) -> None:
    print(row["workload"])
    usual_ms = row.get("usual_ms")
    for name, milliseconds in ((key[:-3], value) for key, value in row.items() if key.endswith("_ms")):
        ratio = "" if usual_ms is None else f"  usual / this {usual_ms / milliseconds:6.1f}"
        way = ""
        if f"{name}_way" in row:
            way = f"  by {row[f'{name}_way']}, gradient off by {row[f'{name}_error']:.1e}"
        print(f"    {name:<16}{milliseconds:9.3f} ms{ratio}{way}", flush=True)


def used_bytes() -> int:
    """Of the device, by all processes."""
    give_memory_back()
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape alone, to check that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, but torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    known = {
        "chip": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda-bindings": setting.version("cuda-bindings"),
        "usual implementation": setting.usual_implementation(),
    }
    print(setting.lines(known))
    before, rows = used_bytes(), []
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/s"
        with ServerProcess(["--device", "cuda", "--listen", target, "--shared-memory"]):
            for workload in QUICK if args.quick else WORKLOADS:
                rows.append(measured(workload, target, torch.device("cuda")))
                printed(rows[-1])
    more = used_bytes() - before
    print(f"memory of the device that is still in use: {more >> 20} MiB more than before")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"setting": known, "rows": rows, "kept_bytes": more}, indent=1) + "\n")
    right = all(row["auto_way"] == "device" and row["auto_error"] < 2e-5 for row in rows)
    if not right or more > KEPT_BYTES:
        print("NOT as it should be: device memory was not used, an answer is wrong, or memory is left", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
