"""Requests that a client keeps: which calls get the same one, and how many there are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lovasz import wire
from lovasz.client import CrossEntropy, InvalidInputError, LossClient, LovaszSoftmax, requests
from lovasz.client.requests import KEPT_REQUESTS, checked_request
from lovasz.client.tensors import encode_labels, encode_logits
from lovasz.spec import InvalidInput, weighted_sum
from lovasz.v1 import loss_pb2 as pb

PLACE = wire.Joint("run", 3, 1, 2)
SHARED = wire.SharedTensors(b"name", 7, 0, 64, 128)
LOSS = weighted_sum(LovaszSoftmax(per_image=True))


def request(shape: tuple[int, ...] = (2, 3, 4), dtype: type = np.float32, largest: int = 2, **changes: Any) -> Any:
    logits, labels = np.zeros(shape, dtype), np.full((shape[0], *shape[2:]), largest)
    options = {"loss": LOSS, "want_grad": True, "run": "", "offsets": None, "may_be_empty": False, **changes}
    loss = options.pop("loss")
    return checked_request(loss, encode_logits(logits), encode_labels(labels), **options)


def test_calls_of_the_same_kind_have_the_same_request() -> None:
    first = request()
    assert request(loss=weighted_sum(LovaszSoftmax(per_image=True))) is first
    of_torch = encode_logits(torch.zeros(2, 3, 4)), encode_labels(torch.zeros(2, 4, dtype=torch.int64))
    assert checked_request(LOSS, *of_torch, True, "", None, may_be_empty=False) is first
    assert type(first.logits.shape) is tuple


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2, 3, 5)},
        {"dtype": np.float16},
        {"largest": 1000},
        {"loss": weighted_sum(CrossEntropy())},
        {"want_grad": False},
        {"run": "digits"},
        {"may_be_empty": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_calls_of_other_kinds_have_another_request(changes: dict[str, Any]) -> None:
    assert request(**changes) is not request()
    assert request(**changes) is request(**changes)


def test_requests_with_offsets_are_not_kept() -> None:
    assert request(offsets=[1, 2]) == request(offsets=np.array([1, 2]))
    assert request(offsets=[1, 2]) is not request(offsets=[1, 2])
    assert request(offsets=[2]).layout.offsets == (2,)


def test_what_is_refused_once_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"logits: got shape \(2, 1, 4\) with a single class"):
            request((2, 1, 4))
    with LossClient("127.0.0.1:1") as client, pytest.raises(InvalidInputError, match="labels: got shape"):
        client.compute(np.zeros((2, 3, 4), np.float32), np.zeros((2, 5), int), LovaszSoftmax())


def test_few_requests_are_kept() -> None:
    first = request((1, 3, 1))
    for pixels in range(1, 2 * KEPT_REQUESTS):
        request((1, 3, pixels))
    assert requests._kept.cache_info().currsize == KEPT_REQUESTS
    assert request((1, 3, 1)) is not first
    assert request((1, 3, 1)) == first


def test_threads_get_equal_requests() -> None:
    requests._kept.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda i: request((1, 3, 1 + i % 5)), range(200)))
    assert all(one == made[i % 5] for i, one in enumerate(made))


def test_a_kept_request_is_written_with_the_places_of_each_call() -> None:
    kept = request()
    for shared, joint in ((SHARED, PLACE), (None, None), (SHARED, None), (None, PLACE)):
        header = pb.RequestHeader()
        kept.write(header, shared, joint)
        assert wire.Request.from_proto(header) == replace(kept, shared=shared, joint=joint)
        assert header == replace(kept, shared=shared, joint=joint).to_proto()
