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
    "smoothed cross-entropy": CrossEntropy(ignore_index=255, label_smoothing=0.1),
    "probabilities": LovaszSoftmax(input="probabilities"),
    "hinge": LovaszHinge(multilabel=True),
    "hinges": [
        (1.0, LovaszHinge(multilabel=True, ignore_index=0)),
        (1.0, LovaszHinge(multilabel=True, per_image=True)),
    ],
    "sigmoid": [
        (1.0, BinaryCrossEntropy([1, 2], multilabel=True)),
        (1.0, LovaszSigmoid(multilabel=True, per_image=True)),
    ],
}
MANY_CLASSES = 300
"""Their labels do not fit in a byte."""
BATCHES: dict[str, tuple[list[tuple[int, int, tuple[int, ...]]], list[int] | None]] = {
    "alone": ([(2, 2, (5, 6))], None),
    "three": ([(2, 2, (5, 6)), (1, 2, (7,)), (30, 2, ())], None),
    "joined": ([(2, 2, (5, 6))] * 4 + [(0, 2, (5, 6)), (1, 2, (5, 6))], [3, 2, 1]),
    "many": ([(1, 2, (16, 16))] * 64, None),
    "many as one": ([(1, 2, (16, 16))] * 64, [64]),
    "many classes": ([(1, MANY_CLASSES, (16, 16))], None),
    "many classes, three": ([(2, MANY_CLASSES, (5, 6)), (1, MANY_CLASSES, (7,)), (30, MANY_CLASSES, ())], None),
}
"""Images, classes and pixels of each request, and the number of requests of each joint."""
TYPES = [
    (torch.float32, torch.uint8),
    (torch.float32, torch.int64),
    (torch.float16, torch.bool),
    (torch.float16, torch.int32),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.int16),
]
THRESHOLDS = {
    "as chosen": extension.THRESHOLDS,
    "by two threads": extension.THRESHOLDS._replace(thread=1),
    "sorted": extension.SORT_ALL,
    "counted": extension.COUNT_ALL,
    "divided": extension.AS_LARGE,
    "in ranges": extension.COUNT_ALL._replace(positive=1.0),
}


def loops() -> dict[str, Any]:
    """All compiled functions of the backend."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Dispatcher):
                found[f"{value.__module__.rpartition('.')[2]}.{name}"] = value
    return found


def request(
    images: int, channels: int, spatial: tuple[int, ...], loss: WeightedSum, dtype: torch.dtype, of_labels: torch.dtype
) -> Request:
    shape = images, channels, *spatial
    logits = normal(*shape, seed=1, dtype=torch.float32).abs().clamp(max=1).to(dtype)
    # Few of many classes have pixels, so that threads divide those of each.
    labels = random_labels(*(shape if loss.is_binary else (images, *spatial)), values=2, seed=2)
    return Request.checked(logits, labels.to(of_labels), loss, may_be_empty=True)


def fits(loss: WeightedSum, channels: int) -> bool:
    """Whether there is a loss of so many classes."""
    return channels == 2 or not (loss.is_binary or any(getattr(term, "class_weights", None) for _, term in loss.terms))


def main() -> None:
    torch.set_num_threads(2)
    dispatch.warm_up(CPU)
    counted = loops()
    assert len(counted) > 40
    known = {name: len(loop.signatures) for name, loop in counted.items()}
    for (what, loss), (batch, (shapes, joined)) in itertools.product(LOSSES.items(), BATCHES.items()):
        total = weighted_sum(loss)
        for dtype, label_dtype in TYPES if fits(total, shapes[0][1]) else ():
            requests = [request(*shape, total, dtype, label_dtype) for shape in shapes]
            for (thresholds, chosen), want_grad in itertools.product(THRESHOLDS.items(), (True, False)):
                extension.THRESHOLDS = chosen
                answers = dispatch.submit(requests, total, CPU, joined=joined, want_grad=want_grad).collect()
                assert all(isinstance(answer, Result) for answer in answers)
                for name, loop in counted.items():
                    if len(loop.signatures) > known[name]:
                        known[name] = len(loop.signatures)
                        print(f"{name}: {what}, {batch}, {thresholds}, {dtype}, labels {label_dtype}, {want_grad=}")
    print("ended")


if __name__ == "__main__":
    main()
