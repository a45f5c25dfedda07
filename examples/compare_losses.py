"""Trains the demo's network with different uses of the loss, and compares their IoU on the test set.

Alone, in a sum with cross-entropy, and after a start with cross-entropy. All trainings of a seed begin with the same
weights, and see the same images in the same order. docs/usage.md has the results of:

    python examples/compare_losses.py --seeds 0 1 2    # twenty minutes on two CPU cores
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from digit_scenes import CLASS_NAMES, VOID, compose_scenes, split_digits
from segment_digits import QUICK, Scale
from torch import Tensor
from training import Criterion, evaluate, train

from lovasz.core import CrossEntropy, LocalLoss, LovaszSoftmax

CE, LOVASZ = CrossEntropy(ignore_index=VOID), LovaszSoftmax(ignore_index=VOID)
START = 0.7
"""The share of the steps that a start with cross-entropy takes."""


class Switched:
    """One criterion for the first ``steps`` calls, then another one."""

    def __init__(self, first: Criterion, then: Criterion, steps: int) -> None:
        self.first, self.then, self.left = first, then, steps

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then)(logits, labels)


def ways(steps: int) -> dict[str, Callable[[], Criterion]]:
    """Each use of the loss: makes the criterion of a training of so many steps."""
    alone, both = LocalLoss(LOVASZ), LocalLoss([(1.0, CE), (1.0, LOVASZ)])
    entropy, start = LocalLoss(CE), round(START * steps)
    return {
        "cross-entropy": lambda: entropy,
        "Lovász alone": lambda: alone,
        "cross-entropy + Lovász": lambda: both,
        "cross-entropy + 3 Lovász": lambda: LocalLoss([(1.0, CE), (3.0, LOVASZ)]),
        "cross-entropy, then Lovász": lambda: Switched(entropy, alone, start),
        "cross-entropy, then the sum": lambda: Switched(entropy, both, start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data, weights and batches (0)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to check that everything works")
    args = parser.parse_args()
    scale = QUICK if args.quick else Scale()
    torch.set_num_threads(1)
    ious: dict[str, list[list[float]]] = {name: [] for name in ways(scale.steps)}
    for seed in args.seeds:
        train_digits, test_digits = split_digits(seed)
        train_scenes = compose_scenes(train_digits, scale.train_canvases, seed=2 * seed)
        test_scenes = compose_scenes(test_digits, scale.test_canvases, seed=2 * seed + 1)
        for name, criterion in ways(scale.steps).items():
            training = train(name, criterion(), train_scenes, scale.steps, seed)
            ious[name].append(evaluate(training.model, test_scenes).class_iou.tolist())
            print(f"seed {seed}: mIoU {np.nanmean(ious[name][-1]):.3f}", flush=True)
    print(f"\n{'mIoU on the test set':<29}{''.join(f'seed {seed:<5}' for seed in args.seeds)}rarest classes, 9 and 7")
    rare = [CLASS_NAMES.index("9"), CLASS_NAMES.index("7")]
    for name, runs in ious.items():
        means = "".join(f"{np.nanmean(run):<10.3f}" for run in runs)
        print(f"{name:<29}{means}{', '.join(f'{np.mean([run[c] for run in runs]):.3f}' for c in rare)}")


if __name__ == "__main__":
    main()
