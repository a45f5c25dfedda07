"""Logits and gradient in memory that another process changes meanwhile: a wrong answer at worst, never an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lovasz.core import BinaryCrossEntropy, CrossEntropy, InvalidInput, LovaszHinge, LovaszSigmoid, LovaszSoftmax
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.spec import LossLike, Result, weighted_sum

LOSSES: list[LossLike] = [
    LovaszSoftmax(),
    LovaszSoftmax(input="probabilities"),
    [(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax(classes="all", per_image=True))],
    LovaszHinge(multilabel=True),
    [(1.0, BinaryCrossEntropy(multilabel=True)), (1.0, LovaszSigmoid(multilabel=True))],
]
SORTED, COUNTED = (2, 3, 40, 40), (1, 3, 520, 520)


@contextmanager
def overwritten(*tensors: Tensor) -> Iterator[None]:
    """Fills the tensors with random bytes, and some plausible numbers, again and again."""
    stop = threading.Event()

    def run() -> None:
        random = np.random.default_rng(0)
        while not stop.is_set():
            for tensor in tensors:
                data = tensor.numpy().reshape(-1).view(np.uint8)
                size = min(data.size, 1 << 20)
                first = int(random.integers(0, data.size - size + 1))
                data[first : first + size] = random.integers(0, 256, size, np.uint8)
                tensor.view(-1)[::7] = 0.5

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.NUMBA])
@pytest.mark.parametrize("shape", [SORTED, COUNTED])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)
def test_no_index_that_is_read_leaves_its_table(loss: LossLike, shape: tuple[int, ...], backend: Backend) -> None:
    parsed = weighted_sum(loss)
    logits, grad = torch.randn(shape), torch.empty(shape)
    images, classes, *pixels = shape
    of_labels, values = (shape, 2) if parsed.is_binary else ((images, *pixels), classes)
    labels = torch.randint(0, values, of_labels, dtype=torch.uint8)
    request = replace(Request.checked(logits, labels, parsed, None), grad=grad)
    with overwritten(logits, grad):
        for _ in range(20 if shape is SORTED else 3):
            (answer,) = submit([request], parsed, torch.device("cpu"), backend=backend).collect()
            assert isinstance(answer, Result | InvalidInput)
