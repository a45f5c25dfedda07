"""Trains one U-Net twice, with cross-entropy and with cross-entropy + Lovász-Softmax, and compares their IoU.

The data are digits among fragments of digits (digit_scenes.py). Both trainings start from the same weights and see the
same images in the same order. The first computes its loss in PyTorch; the second asks a loss server, which this script
starts and stops (or name a running one with --target):

    python examples/segment_digits.py                            # two to three minutes on two CPU cores
    python examples/segment_digits.py --target localhost:50051   # with a running server
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digit_scenes import BATCH, CLASS_NAMES, CLASSES, VOID, Scenes, compose_scenes, split_digits
from segmentation_figure import draw_figure
from server_metrics import Metrics, print_metrics
from torch import Tensor
from torch.nn import functional
from training import Score, Training, evaluate, train

from lovasz.client import CrossEntropy, LossClient, LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess


@dataclass(frozen=True)
class Scale:
    """How much data there is, and how many steps are trained."""

    train_canvases: int = 2500
    test_canvases: int = 500
    steps: int = 1400


QUICK = Scale(train_canvases=64, test_canvases=32, steps=10)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=VOID)


def cross_entropy_and_lovasz(client: LossClient) -> RemoteLoss:
    """The sum of both losses, which the server computes in one call."""
    return RemoteLoss(client, [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(ignore_index=VOID))])


@dataclass(frozen=True)
class Server:
    """Where a server serves gRPC, and where its metrics, if that is known."""

    target: str
    metrics_url: str | None


@contextmanager
def loss_server(target: str | None, metrics_url: str | None) -> Iterator[Server]:
    """The running server at ``target``, or one of our own until the ``with`` block ends."""
    if target is not None:
        yield Server(target, metrics_url)
        return
    print("starting a server: the first time it compiles, for a minute or two", flush=True)
    with ServerProcess(["--device", "auto"]) as own:
        yield Server(own.target, own.metrics_url)


def print_scores(scenes: Scenes, baseline: Score, lovasz: Score) -> None:
    pixels = scenes.labels[scenes.labels != VOID].bincount(minlength=CLASSES).double()
    print("\nIoU on the test set   share of pixels   cross-entropy   + Lovász   difference")
    for name, share, a, b in zip(
        CLASS_NAMES, (pixels / pixels.sum()).tolist(), baseline.class_iou, lovasz.class_iou, strict=True
    ):
        print(f"  {name:<19} {share:>15.1%} {a:>15.3f} {b:>10.3f} {b - a:>+12.3f}")
    a, b = baseline.mean_iou, lovasz.mean_iou
    print(f"  {'mean (mIoU)':<19} {'':>15} {a:>15.3f} {b:>10.3f} {b - a:>+12.3f}")


def print_times(trainings: list[Training]) -> None:
    print("\nMilliseconds a step (the second loss is one remote call, which brings its gradient too)")
    print(f"{'':25}{'the whole step':>22}{'the loss alone':>24}")
    print(f"{'':25}{'median':>12}{'p90':>10}{'median':>14}{'p90':>10}")
    for training in trainings:
        step, step_p90 = 1000 * np.percentile(training.step_seconds, (50, 90))
        loss, loss_p90 = 1000 * np.percentile(training.loss_seconds, (50, 90))
        print(f"  {training.name:<23}{step:>12.1f}{step_p90:>10.1f}{loss:>14.1f}{loss_p90:>10.1f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", metavar="HOST:PORT", help="a running server (default: start one)")
    parser.add_argument(
        "--metrics-url", metavar="URL", help="that server's metrics, such as http://localhost:9095/metrics"
    )
    parser.add_argument("--out", type=Path, default=Path("out/segment_digits.png"), help="the picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to check that everything works")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    scale = QUICK if args.quick else Scale()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # More do not help so small a network, and would take cores from the server.
    started = time.perf_counter()

    train_digits, test_digits = split_digits(args.seed)
    train_scenes = compose_scenes(train_digits, scale.train_canvases, seed=2 * args.seed).to(device)
    test_scenes = compose_scenes(test_digits, scale.test_canvases, seed=2 * args.seed + 1).to(device)
    print(f"{len(train_digits.values):,} digits on {scale.train_canvases:,} canvases to train with, ", end="")
    print(f"{len(test_digits.values):,} other digits on {scale.test_canvases:,} canvases to test with", flush=True)

    with loss_server(args.target, args.metrics_url) as server, LossClient(server.target) as client:
        there = client.server_info()
        print(f"loss server {there.version} at {server.target}, {there.devices[0].hardware}")
        print(f"U-Net on {device}, {scale.steps:,} steps of {BATCH} canvases each", flush=True)
        before = Metrics.scrape(server.metrics_url) if server.metrics_url else None
        baseline = train("cross-entropy", cross_entropy, train_scenes, scale.steps, args.seed)
        lovasz = train("cross-entropy + Lovász", cross_entropy_and_lovasz(client), train_scenes, scale.steps, args.seed)
        counted = Metrics.scrape(server.metrics_url).since(before) if server.metrics_url and before else None

    baseline_score, lovasz_score = (evaluate(training.model, test_scenes) for training in (baseline, lovasz))
    print_scores(test_scenes, baseline_score, lovasz_score)
    print_times([baseline, lovasz])
    if counted:
        print_metrics(counted)
    draw_figure(test_scenes, baseline_score, lovasz_score, args.out)
    print(f"\n{args.out} shows the first test canvases. All this took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
