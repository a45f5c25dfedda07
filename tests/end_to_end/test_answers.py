"""A real server and real clients over real sockets: the answers are right, whoever else is asking."""

from __future__ import annotations

import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support import void_class
from support.fork_server import ForkedServer
from support.scrape import metric
from support.vector_cases import Case, load

from lovasz import core
from lovasz.client import CrossEntropy, LossClient, LovaszHinge, LovaszSoftmax, Result
from lovasz.client import remote as client_remote
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
@pytest.mark.parametrize("way", ["unary", "stream"])
def test_vectors_hold_through_a_server(
    server: ServerProcess, case: Case, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_remote, "UNARY_BYTES", 4 << 20 if way == "unary" else 0)
    method = {"unary": "Compute", "stream": "ComputeStream"}[way]
    answered = metric(server, "lovasz_requests_total", method=method, code="OK")
    with LossClient(server.target) as client:
        result = client.compute(case.logits, case.labels, case.loss_spec)
    case.check(result)
    assert metric(server, "lovasz_requests_total", method=method, code="OK") >= answered + 1


def test_values_known_from_elsewhere(server: ServerProcess) -> None:
    with LossClient(server.target) as client:

        def loss(logits: object, labels: object, description: LossLike) -> float:
            return client.compute(np.asarray(logits, np.float32), np.asarray(labels), description).loss

        probabilities = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.4, 0.5, 0.1]]
        for classes, expected in (("present", 0.4666667), ([0], 0.45), ([1, 2], 0.475)):
            description = LovaszSoftmax(classes=classes, input="probabilities")
            assert loss(probabilities, [0, 1, 2, 0], description) == pytest.approx(expected, abs=1e-6)
        binary = [[[2.0, -1.0]], [[0.5, 1.5]]], [[[0, 0]], [[1, 1]]]
        assert loss(*binary, LovaszHinge(per_image=True)) == pytest.approx(1.625)
        assert loss(*binary, LovaszHinge()) == pytest.approx(7 / 6)
        random = np.random.RandomState(14)
        logits = random.randn(2, 4, 8, 8).astype(np.float32)
        labels = random.randint(0, 4, (2, 8, 8))
        labels[0, 0, 0] = 255
        pooled = client.compute(logits, labels, LovaszSoftmax(ignore_index=255))
        assert pooled.loss == pytest.approx(0.77665639, abs=1e-7)
        assert np.linalg.norm(pooled.grad) == pytest.approx(0.01698170, abs=1e-7)
        assert loss(logits, labels, LovaszSoftmax(ignore_index=255, per_image=True)) == pytest.approx(
            0.78204250, abs=1e-7
        )


@pytest.mark.parametrize("way", ["inprocess", "unary", "stream", "shm"])
def test_a_void_class_has_no_iou_in_answers_and_metrics(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_remote, "UNARY_BYTES", 4 << 20 if way == "unary" else 0)
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)
    loss, inputs = LovaszSoftmax(ignore_index=void_class.IGNORED), (void_class.logits(), void_class.LABELS)
    arguments = ["--device", "cpu", "--listen", f"unix:{tmp_path}/s", "--shared-memory"]
    with ForkedServer(arguments) as server:
        target = "inprocess" if way == "inprocess" else server.target
        with LossClient(target, transport="shm" if way == "shm" else "grpc", run="a") as client:
            result = client.compute(*inputs, loss)
        np.testing.assert_array_equal(result.class_iou, void_class.CLASS_IOU)
        assert result.mean_iou == void_class.MEAN_IOU
        criterion = RemoteLoss(target, loss)
        criterion(*map(torch.from_numpy, inputs))
        assert criterion.result is not None
        assert criterion.result.mean_iou == void_class.MEAN_IOU
        criterion.close()
        if way != "inprocess":
            assert metric(server, "lovasz_run_miou", run="a") == void_class.MEAN_IOU
            assert metric(server, "lovasz_run_class_iou", run="a") == 1.5
            with urllib.request.urlopen(server.metrics_url) as page:
                assert 'lovasz_run_class_iou{class="0"' not in page.read().decode()


Request = tuple[torch.Tensor, torch.Tensor, LossLike]


def requests_of(seed: int, count: int) -> list[Request]:
    """Requests that differ in everything: shapes, classes, losses, element types, size."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    requests: list[Request] = []
    for _ in range(count):
        images, classes, side = pick(1, 2, 3), pick(2, 5, 19), pick(3, 16, 40, 72)
        labels = torch.randint(0, classes, (images, side, side), generator=generator)
        logits = torch.randn(images, classes, side, side, generator=generator)
        kind = pick(0, 1, 2, 3)
        if kind == 0:
            requests.append((logits, labels, LovaszSoftmax()))
        elif kind == 1:
            labels[0, 0] = 255
            requests.append((logits.half(), labels, LovaszSoftmax(per_image=True, ignore_index=255)))
        elif kind == 2:
            requests.append((logits[:, 0], labels % 2, LovaszHinge()))
        else:
            requests.append((logits, labels, [(0.5, CrossEntropy()), (1.0, LovaszSoftmax(classes="all"))]))
    return requests


def assert_same(remote: Result[torch.Tensor], local: Result[torch.Tensor], dtype: torch.dtype) -> None:
    assert remote.loss == local.loss
    for ours, theirs in zip(remote.terms, local.terms, strict=True):
        np.testing.assert_array_equal(ours.per_class_loss, theirs.per_class_loss)
    np.testing.assert_array_equal(remote.union, local.union)
    assert remote.grad is not None
    assert local.grad is not None
    if dtype == torch.float16:
        assert torch.allclose(remote.grad, local.grad, rtol=2**-11, atol=float(local.grad.abs().max()) * 2**-25)
    else:
        assert torch.equal(remote.grad, local.grad)


def test_sixteen_clients_at_once_each_get_their_own_answer_bit_for_bit() -> None:
    """Every answer equals that of the core to the request alone, though batches are shared with strangers."""
    work = [requests_of(seed, 8) for seed in range(16)]
    truth = [[core.compute(*request) for request in requests] for requests in work]
    with ForkedServer(["--device", "cpu"]) as server:

        def client(requests: list[Request]) -> list[Result[torch.Tensor]]:
            with LossClient(server.target) as connection:
                return [connection.compute(*request) for request in requests]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(client, work))
        batches = metric(server, "lovasz_batch_requests_count")
        assert metric(server, "lovasz_batch_requests_sum") == 16 * 8
        assert batches < 16 * 8, "no batch held more than one request"
        assert metric(server, "lovasz_requests_total", code="OK") == 16 * 8
        assert metric(server, "lovasz_in_flight_bytes") == 0
        assert metric(server, "lovasz_queue_requests") == 0
    for requests, remote, local in zip(work, answers, truth, strict=True):
        for (logits, _, _), ours, theirs in zip(requests, remote, local, strict=True):
            assert_same(ours, theirs, logits.dtype)


def test_a_request_of_40_mib_is_streamed_and_answered(server: ServerProcess) -> None:
    logits = torch.randn(2, 2, 1600, 1600, generator=torch.Generator().manual_seed(0))
    labels = (logits[:, 0] > 0.3).to(torch.uint8)
    with LossClient(server.target) as client:
        result = client.compute(logits, labels, CrossEntropy())
    expected = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected, labels.long()).backward()
    assert expected.grad is not None
    assert float((result.grad - expected.grad).norm() / expected.grad.norm()) < 1e-5


def test_training_steps_in_threads_share_one_server(server: ServerProcess) -> None:
    """Two trainers, each with its own model and criterion, train at the same time as each would alone."""

    def train(seed: int, target: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 3, 1, 1, generator=generator).requires_grad_()
        criterion = RemoteLoss(target, LovaszSoftmax(ignore_index=255))
        for _ in range(10):
            images = torch.randn(2, 3, 12, 12, generator=generator)
            labels = torch.randint(0, 6, (2, 12, 12), generator=generator)
            criterion(torch.nn.functional.conv2d(images, weight), labels).backward()
            with torch.no_grad():
                weight -= 0.5 * weight.grad
                weight.grad = None
        criterion.close()
        return [weight.detach()]

    alone = [train(seed, "inprocess") for seed in (1, 2)]
    results: dict[int, list[torch.Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: train(seed, server.target)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed][0], alone[i][0]) for i, seed in enumerate((1, 2)))
