"""The losses of ``lovasz.core`` against cross-entropy and the textbook implementation, in one run and in turn.

    PYTHONPATH=proto:client:server python benchmarks/core_loss.py --repeats 5 --json out.json

Forward and backward together. Needs torch and numpy. Errors are taken against the reference in float64: of the loss
relative to it, of the gradient relative to its norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lovasz.core import CrossEntropy, LovaszSoftmax, lovasz_softmax, reference
from lovasz.core.batch import launch
from lovasz.core.ragged import Request
from lovasz.spec import Loss, Result, weighted_sum

REGIMES = {"fresh": (0.1, 0.0), "half-trained": (1.0, 3.0), "trained": (1.0, 10.0)}
"""Factor of the noise, and what is added to the label's logit."""

Pair = tuple[Tensor, Tensor]
Answers = list[tuple[float, Tensor]]
"""Loss and gradient of each request."""


@dataclass(frozen=True)
class Workload:
    """``requests`` requests of one shape."""

    images: int
    classes: int
    height: int
    width: int
    requests: int = 1

    def __str__(self) -> str:
        shape = f"{self.images}x{self.classes}x{self.height}x{self.width}"
        return shape if self.requests == 1 else f"{self.requests} requests of {shape}"

    def inputs(self, regime: str, device: torch.device) -> list[Pair]:
        """Noise as logits; as labels blocky regions of random classes."""
        noise, margin = REGIMES[regime]
        generator = torch.Generator().manual_seed(0)
        pairs = []
        for _ in range(self.requests):
            block = max(1, min(self.height, self.width) // 8)
            coarse = (self.images, math.ceil(self.height / block), math.ceil(self.width / block))
            regions = torch.randint(0, self.classes, coarse, generator=generator)
            labels = regions.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : self.height, : self.width]
            logits = noise * torch.randn(self.images, self.classes, self.height, self.width, generator=generator)
            logits.scatter_add_(1, labels.unsqueeze(1), torch.full((self.images, 1, *labels.shape[1:]), margin))
            pairs.append((logits.to(device), labels.contiguous().to(device)))
        return pairs


FULL = [Workload(1, 19, 512, 1024), Workload(4, 21, 512, 512), Workload(1, 19, 64, 64, requests=64)]
QUICK = [Workload(1, 19, 64, 128), Workload(2, 21, 64, 64), Workload(1, 19, 32, 32, requests=8)]


def textbook(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present, as it is commonly written: a sort a class, differences, autograd."""
    probabilities = logits.softmax(dim=1).movedim(1, -1).reshape(-1, logits.shape[1])
    labels = labels.reshape(-1)
    losses = []
    for c in range(logits.shape[1]):
        foreground = (labels == c).float()
        if foreground.sum() == 0:
            continue
        errors = (foreground - probabilities[:, c]).abs()
        errors_sorted, order = torch.sort(errors, 0, descending=True)
        foreground_sorted = foreground[order]
        total = foreground_sorted.sum()
        intersection = total - foreground_sorted.cumsum(0)
        union = total + (1 - foreground_sorted).cumsum(0)
        jaccard = 1.0 - intersection / union
        jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
        losses.append(torch.dot(errors_sorted, jaccard))
    return torch.stack(losses).mean()


def each(criterion: Callable[[Tensor, Tensor], Tensor], pairs: Sequence[Pair]) -> Answers:
    """One request after the other, through autograd."""
    answers = []
    for logits, labels in pairs:
        leaf = logits.detach().requires_grad_()
        loss = criterion(leaf, labels)
        (grad,) = torch.autograd.grad(loss, leaf)
        answers.append((loss.detach(), grad))
    return [(loss.item(), grad) for loss, grad in answers]


def in_one_batch(pairs: Sequence[Pair]) -> Answers:
    total = weighted_sum(LovaszSoftmax())
    requests = [Request.checked(logits, labels, total) for logits, labels in pairs]
    answers: Answers = []
    for answer in launch(requests, total, pairs[0][0].device).collect():
        assert isinstance(answer, Result)
        assert answer.grad is not None
        answers.append((answer.loss, answer.grad))
    return answers


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[Sequence[Pair]], Answers]
    truth: Loss


OURS = Contender("lovasz.core", lambda pairs: each(lovasz_softmax, pairs), LovaszSoftmax())
OURS_BATCHED = Contender("lovasz.core, one batch", in_one_batch, LovaszSoftmax())
TEXTBOOK = Contender("textbook", lambda pairs: each(textbook, pairs), LovaszSoftmax())
CROSS_ENTROPY = Contender("torch cross-entropy", lambda pairs: each(functional.cross_entropy, pairs), CrossEntropy())


def true_answers(pairs: Sequence[Pair], loss: Loss) -> Answers:
    """The reference in float64, on the CPU."""
    doubles = [(logits.cpu().double(), labels.cpu()) for logits, labels in pairs]
    return each(lambda logits, labels: reference.compute(logits, labels, loss), doubles)


@dataclass(frozen=True)
class Row:
    """Times in milliseconds for all requests of the workload; the largest error over them."""

    workload: str
    regime: str
    contender: str
    median_ms: float
    min_ms: float
    max_ms: float
    loss_error: float
    grad_error: float
    peak_memory_mib: float | None  # beyond the inputs; on a GPU alone


def measure(
    workload: Workload, regime: str, contenders: Sequence[Contender], repeats: int, device: torch.device
) -> list[Row]:
    """The contenders take turns in each repeat, so that a slow moment of the machine meets all of them."""
    pairs = workload.inputs(regime, device)
    truths = {loss: true_answers(pairs, loss) for loss in {contender.truth for contender in contenders}}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    errors, memory = {}, {}
    for contender in contenders:  # also warms up
        before = start_memory(device)
        answers = contender.run(pairs)
        memory[contender.name] = peak_memory(device, before)
        errors[contender.name] = worst_errors(answers, truths[contender.truth])
        del answers
    for _ in range(repeats):
        for contender in contenders:
            synchronise(device)
            start = time.perf_counter()
            contender.run(pairs)
            synchronise(device)
            times[contender.name].append(1e3 * (time.perf_counter() - start))
    return [
        Row(str(workload), regime, name, statistics.median(t), min(t), max(t), *errors[name], memory[name])
        for name, t in times.items()
    ]


def worst_errors(answers: Answers, truths: Answers) -> tuple[float, float]:
    """Largest relative error of a loss, largest norm-relative error of a gradient."""
    loss_error = max(abs(loss / true - 1) for (loss, _), (true, _) in zip(answers, truths, strict=True))
    grad_error = max(
        ((grad.cpu().double() - true).norm() / true.norm()).item()
        for (_, grad), (_, true) in zip(answers, truths, strict=True)
    )
    return loss_error, grad_error


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> float | None:
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None


def chip(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(rows: Sequence[Row]) -> str:
    lines = []
    baseline = {(row.workload, row.regime): row.median_ms for row in rows if row.contender == TEXTBOOK.name}
    for workload in dict.fromkeys(row.workload for row in rows):
        lines.append(f"\n{workload}")
        header = f"  {'regime':<13} {'':<23} {'median':>9} {'min - max':>19}   {'of textbook':>11}"
        lines.append(header + f" {'loss error':>11} {'grad error':>11} {'peak MiB':>9}")
        for row in (row for row in rows if row.workload == workload):
            ratio = row.median_ms / baseline[row.workload, row.regime]
            peak = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:9.0f}"
            times = f"{row.median_ms:>6.1f} ms {row.min_ms:>8.1f} - {row.max_ms:<8.1f}"
            lines.append(
                f"  {row.regime:<13} {row.contender:<23} {times}   {ratio:>11.3f}"
                f" {row.loss_error:>11.1e} {row.grad_error:>11.1e} {peak}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each (default 11)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the measurements there, too")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats has to be at least 1")
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(available if args.device == "auto" else args.device)
    setting = {
        "device": device.type,
        "chip": chip(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    rows: list[Row] = []
    for workload in QUICK if args.quick else FULL:
        contenders = [OURS, TEXTBOOK, CROSS_ENTROPY]
        if workload.requests > 1:
            contenders.insert(1, OURS_BATCHED)
        measured = [row for regime in REGIMES for row in measure(workload, regime, contenders, args.repeats, device)]
        print(table(measured), flush=True)
        rows += measured
    if args.json:
        content = {"setting": setting, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
