"""Prints what Numba compiles after the warm-up: a line ``LOOP: LOSS, WHAT WAS COMPUTED`` for each.

A process of its own, ``python -m support.late_compilation``, since tests before this one compile more than a server.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from typing import Any

import torch
from numba.core.dispatcher import Dispatcher
from support.comparison import normal, random_labels

import lovasz.core.backends.numba as package
from lovasz.core import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax, dispatch
from lovasz.core.backends.numba import extension
from lovasz.core.batch import Request
from lovasz.spec import LossLike, Result, WeightedSum, weighted_sum

CPU = torch.device("cpu")
LOSSES: dict[str, LossLike] = {
    "softmax": LovaszSoftmax(per_image=True, ignore_index=255, class_weights=[1.0, 2.0]),
    "softmax beside cross-entropy": [(1.0, CrossEntropy(ignore_index=1)), (0.5, LovaszSoftmax(classes="all"))],
    "probabilities": LovaszSoftmax(input="probabilities"),
    "hinge": LovaszHinge(multilabel=True),
    "sigmoid": [
        (1.0, BinaryCrossEntropy([1, 2], multilabel=True)),
        (1.0, LovaszSigmoid(multilabel=True, per_image=True)),
    ],
}
BATCHES: dict[str, tuple[list[tuple[int, ...]], list[int] | None]] = {
    "alone": ([(2, 2, 5, 6)], None),
    "three": ([(2, 2, 5, 6), (1, 2, 7), (30, 2)], None),
    "joined": ([(2, 2, 5, 6)] * 6, [3, 2, 1]),
    "many": ([(1, 2, 16, 16)] * 64, None),
}
"""The shapes of the logits, and the number of requests of each joint."""
TYPES = [(torch.float32, torch.uint8), (torch.float32, torch.int64), (torch.float16, torch.bool)]
THRESHOLDS = {
    "as chosen": extension.THRESHOLDS,
    "sorted": extension.SORT_ALL,
    "counted": extension.COUNT_ALL,
    "divided": extension.COUNT_ALL._replace(positive=1.0),
}


def loops() -> dict[str, Any]:
    """All compiled functions of the backend."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Dispatcher):
                found[f"{value.__module__.rpartition('.')[2]}.{name}"] = value
    return found


def request(shape: tuple[int, ...], total: WeightedSum, dtype: torch.dtype, label_dtype: torch.dtype) -> Request:
    images, channels, *spatial = shape
    logits = normal(*shape, seed=1, dtype=torch.float32).abs().clamp(max=1).to(dtype)
    of_labels = shape if total.is_binary else (images, *spatial)
    return Request.checked(logits, random_labels(*of_labels, values=channels, seed=2).to(label_dtype), total)


def main() -> None:
    dispatch.warm_up(CPU)
    counted = loops()
    assert len(counted) > 40
    known = {name: len(loop.signatures) for name, loop in counted.items()}
    for (thresholds, chosen), (what, loss) in itertools.product(THRESHOLDS.items(), LOSSES.items()):
        extension.THRESHOLDS = chosen
        total = weighted_sum(loss)
        for (batch, (shapes, joined)), (dtype, label_dtype), want_grad in itertools.product(
            BATCHES.items(), TYPES, (True, False)
        ):
            requests = [request(shape, total, dtype, label_dtype) for shape in shapes]
            answers = dispatch.submit(requests, total, CPU, joined=joined, want_grad=want_grad).collect()
            assert all(isinstance(answer, Result) for answer in answers)
            for name, loop in counted.items():
                if len(loop.signatures) > known[name]:
                    known[name] = len(loop.signatures)
                    print(f"{name}: {what}, {batch}, {thresholds}, {dtype}, labels {label_dtype}, {want_grad=}")
    print("ended")


if __name__ == "__main__":
    main()
