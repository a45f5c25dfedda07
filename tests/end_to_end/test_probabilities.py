"""The warning about logits that look like probabilities: in every way to call, once in a process, never for logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import normal, random_labels
from support.processes import run_python

from lovasz.client import CrossEntropy, LossClient, LovaszHinge, LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss, compute, lovasz_softmax
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike, weighted_sum
from lovasz.spec.probabilities import LOOKS, LOOKS_OF_PROCESS, Looks

TEXT = 'logits: they look like probabilities .* set input="probabilities"'
SHAPES = [(2, 3, 6, 8), (300, 3), (2, 5, 400), (1, 2, 3, 4, 50), (1, 19, 64, 64)]


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOOKS_OF_PROCESS, "left", LOOKS)


def some_input(shape: tuple[int, ...] = (2, 3, 6, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    logits = normal(*shape, seed=1, dtype=torch.float32)
    return logits, random_labels(shape[0], *shape[2:], values=shape[1], seed=2)


def through_a_client(target: str, convert: Callable[[torch.Tensor], Any]) -> Callable[..., object]:
    def call(logits: torch.Tensor, labels: torch.Tensor, loss: LossLike) -> object:
        with LossClient(target) as client:
            return client.compute(convert(logits), convert(labels), loss)

    return call


@pytest.fixture(params=["function", "module", "compute", "in process", "client", "client of NumPy", "RemoteLoss"])
def call(request: pytest.FixtureRequest, server: ServerProcess) -> Callable[..., object]:
    ways: dict[str, Callable[..., object]] = {
        "function": lambda x, y, loss: lovasz_softmax(x, y, input=loss.input),
        "module": lambda x, y, loss: LocalLoss(loss)(x.requires_grad_(), y),
        "compute": compute,
        "in process": through_a_client("inprocess", lambda tensor: tensor),
        "client": through_a_client(server.target, lambda tensor: tensor),
        "client of NumPy": through_a_client(server.target, np.asarray),
        "RemoteLoss": lambda x, y, loss: RemoteLoss(server.target, loss)(x, y),
    }
    return ways[request.param]


def test_in_every_way_to_call_and_once(call: Callable[..., object]) -> None:
    logits, labels = some_input()
    call(logits.clone(), labels, LovaszSoftmax())
    call(logits.softmax(1), labels, LovaszSoftmax(input="probabilities"))
    with pytest.warns(UserWarning, match=TEXT) as caught:
        call(logits.softmax(1), labels, LovaszSoftmax())
    assert len(caught) == 1
    call(logits.softmax(1), labels, LovaszSoftmax())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = some_input(shape)
    lovasz_softmax(logits.to(dtype), labels)
    with pytest.warns(UserWarning, match=TEXT):
        lovasz_softmax((8 * logits).softmax(1).to(dtype), labels)


def test_sharp_predictions_and_sums_of_losses() -> None:
    logits, labels = some_input()
    with pytest.warns(UserWarning, match=TEXT):
        compute((1000 * logits).softmax(1), labels, [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())])


@pytest.mark.parametrize(
    "like",
    [
        lambda x: x.sigmoid(),  # in [0, 1], with other sums
        lambda x: x.log_softmax(1),
        lambda x: torch.zeros_like(x),
        lambda x: x / x.sum(1, keepdim=True),  # sums of 1, but not in [0, 1]
        lambda x: x.softmax(1).mul(2),
        lambda x: x.softmax(1)[:, :, :1, :1],  # too few pixels to tell
    ],
)
def test_what_does_not_look_so(like: Callable[[torch.Tensor], torch.Tensor]) -> None:
    logits = like(some_input()[0])
    labels = random_labels(2, *logits.shape[2:], values=3, seed=2)
    for _ in range(LOOKS):
        lovasz_softmax(logits, labels)
    assert LOOKS_OF_PROCESS.left == 0


@pytest.mark.parametrize("loss", [CrossEntropy(), LovaszSoftmax(input="probabilities"), LovaszHinge(multilabel=True)])
def test_losses_that_take_no_softmax_of_them(loss: LossLike) -> None:
    logits, labels = some_input()
    hinge = weighted_sum(loss).is_binary
    compute(logits.softmax(1), torch.zeros_like(logits, dtype=torch.uint8) if hinge else labels, loss)
    assert LOOKS_OF_PROCESS.left == LOOKS


def test_only_the_first_calls_are_looked_at() -> None:
    logits, labels = some_input()
    for _ in range(LOOKS):
        lovasz_softmax(logits, labels)
    lovasz_softmax(logits.softmax(1), labels)


def test_many_classes_are_not_looked_at() -> None:
    logits, labels = some_input((2, 2000, 40))
    lovasz_softmax(logits.softmax(1), labels)


class OnGpu:
    """Stands for a tensor on a GPU, and counts what would wait for it."""

    is_cuda = True

    def __init__(self) -> None:
        self.shape, self.waits = (1, 3, 64, 64), 0

    def __getitem__(self, part: object) -> np.ndarray[Any, Any]:
        self.waits += 1
        return np.zeros((1, 3, 16, 16))


def test_a_gpu_is_waited_for_in_the_first_call_alone() -> None:
    first, later, looks = OnGpu(), OnGpu(), Looks()
    for logits in (first, later, later, later):
        looks.warn_of_probabilities(logits, weighted_sum(LovaszSoftmax()))
    assert (first.waits, later.waits) == (1, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_traced_is_not_looked_at() -> None:
    logits, labels = some_input()
    torch.compile(lovasz_softmax, backend="eager", fullgraph=True)(logits.softmax(1), labels)
    assert LOOKS_OF_PROCESS.left == LOOKS
    torch._dynamo.reset()


def test_a_filter_of_warnings_has_its_way() -> None:
    logits, labels = some_input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lovasz_softmax(logits.softmax(1), labels)
    assert LOOKS_OF_PROCESS.left == 0


def test_a_process_is_told_once() -> None:
    code = (
        "import torch, warnings; from lovasz.core import lovasz_softmax; warnings.simplefilter('always')\n"
        "p, y = torch.randn(1, 3, 16, 16).softmax(1), torch.zeros(1, 16, 16, dtype=torch.int64)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    [lovasz_softmax(p, y) for _ in range(20)]\n"
        "print(len(caught))"
    )
    assert run_python(code).strip() == "1"
