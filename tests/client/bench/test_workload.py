"""Workloads: synthetic requests for every loss, and the bytes that they say they send."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lovasz.client import BinaryCrossEntropy, CrossEntropy, LossClient, LovaszHinge, LovaszSigmoid, LovaszSoftmax
from lovasz.client.bench.workload import Workload, loss_for
from lovasz.spec import LOSS_KINDS, BinaryLoss, InvalidInput, Loss

SHAPE = (2, 3, 8, 8)
SOFTMAX = LovaszSoftmax()


@pytest.mark.parametrize(
    ("loss", "shape", "label_shape"),
    [
        (SOFTMAX, (2, 5, 64, 64), (2, 64, 64)),
        (CrossEntropy(), (4000, 3), (4000,)),
        (LovaszHinge(), (2, 1, 64, 64), (2, 64, 64)),
        (LovaszHinge(multilabel=True), (2, 4, 64, 64), (2, 4, 64, 64)),
        (LovaszSigmoid(), (2, 1, 64, 64), (2, 64, 64)),
        (BinaryCrossEntropy(multilabel=True), (2, 4, 64, 64), (2, 4, 64, 64)),
    ],
)
def test_tensors_are_those_of_a_network_half_trained(
    loss: Loss, shape: tuple[int, ...], label_shape: tuple[int, ...]
) -> None:
    logits, labels = Workload(shape, loss).tensors()
    assert (logits.dtype, logits.shape, labels.dtype, labels.shape) == (np.float32, shape, np.uint8, label_shape)
    again = Workload(shape, loss, concurrency=3).tensors()
    assert np.array_equal(again[0], logits)
    assert np.array_equal(again[1], labels)
    if isinstance(loss, BinaryLoss):
        right = (logits.reshape(label_shape) > 0) == labels
        assert set(np.unique(labels)) == {0, 1}
    else:
        right = logits.argmax(axis=1) == labels
        assert set(np.unique(labels)) == set(range(shape[1]))
    assert 0.75 < right.mean() < 0.95
    with LossClient("inprocess") as client:
        assert 0 < client.compute(logits, labels, loss).loss < math.inf


def test_labels_beyond_a_byte() -> None:
    _, labels = Workload((1, 300, 4), SOFTMAX).tensors()
    assert labels.dtype == np.int16


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 1, 16, 16)])
def test_a_loss_of_every_kind_for_a_shape(kind: str, shape: tuple[int, ...]) -> None:
    loss = loss_for(kind, shape)
    assert loss.kind == kind
    if isinstance(loss, BinaryLoss):
        assert loss.multilabel == (shape[1] > 1)
    elif shape[1] == 1:
        with pytest.raises(InvalidInput, match="single class"):
            Workload(shape, loss)
        return
    assert Workload(shape, loss).payload_bytes > 0


def test_no_loss_of_that_kind() -> None:
    with pytest.raises(InvalidInput, match=r"^loss: got 'l2'; expected one of lovasz_softmax, "):
        loss_for("l2", SHAPE)
