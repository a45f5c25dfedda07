"""The losses inside torch.compile: one graph, and the values and gradients of eager mode to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import normal, random_labels
from torch import Tensor

from lovasz.core import (
    CrossEntropy,
    InvalidInput,
    LocalLoss,
    LovaszSoftmax,
    LovaszSoftmaxLoss,
    compiling,
    lovasz_hinge,
    lovasz_softmax,
)
from lovasz.core.compiling import key_of_options, loss_operator

Criterion = Callable[[Tensor, Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

CRITERIA: dict[str, Criterion] = {
    "sum": LocalLoss([(1.0, CrossEntropy()), (1.0, LovaszSoftmax(ignore_index=1))]),
    "unpickled": pickle.loads(pickle.dumps(LovaszSoftmaxLoss(per_image=True))),
    "function": lambda logits, labels: lovasz_softmax(logits, labels, [0, 2], [1.0, 2.0, 1.0, 1.0], ignore_index=3),
    "hinge": lambda logits, labels: lovasz_hinge(logits[:, 0], (labels > 1).long()),
    "twice": lambda logits, labels: lovasz_softmax(logits, labels) + lovasz_softmax(logits, labels),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step_of(criterion: Criterion, dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """A training step, and the weight whose gradient it makes."""
    model = torch.nn.Conv2d(3, 4, 3, padding=1).to(dtype)
    return lambda images, labels: 0.5 * criterion(model(images), labels), model.weight


def run(step: Callable[[Tensor, Tensor], Tensor], weight: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    images, labels = normal(2, 3, 9, 8, seed=1, dtype=torch.float32).to(dtype), random_labels(2, 9, 8, values=4, seed=2)
    weight.grad = None
    loss = step(images, labels)
    loss.backward()
    assert weight.grad is not None
    return loss.item(), weight.grad.clone()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_losses_are_those_of_eager_mode(name: str, backend: str) -> None:
    step, weight = step_of(CRITERIA[name], torch.float32)
    expected, expected_grad = run(step, weight, torch.float32)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    loss, grad = run(compiled, weight, torch.float32)
    assert loss == expected
    assert torch.equal(grad, expected_grad)
    with torch.no_grad():
        images, labels = normal(2, 3, 9, 8, seed=1, dtype=torch.float32), random_labels(2, 9, 8, values=4, seed=2)
        assert compiled(images, labels).item() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_element_types_and_dynamic_shapes(dtype: torch.dtype) -> None:
    step, weight = step_of(CRITERIA["sum"], dtype)
    expected, expected_grad = run(step, weight, dtype)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    loss, grad = run(compiled, weight, dtype)
    assert loss == expected
    assert torch.equal(grad, expected_grad)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda logits: logits,
    "channels_last": lambda logits: logits.contiguous(memory_format=torch.channels_last),
    "channels_last, few pixels": lambda logits: logits[..., :3, :3].contiguous(memory_format=torch.channels_last),
    "channels_last, volume": lambda logits: logits[:, :, None].contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda logits: logits.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_have_the_memory_format_of_eager_mode(name: str, dtype: torch.dtype) -> None:
    logits = FORMATS[name](normal(2, 4, 9, 8, seed=1, dtype=torch.float32)).to(dtype).requires_grad_()
    labels = random_labels(2, *logits.shape[2:], values=4, seed=2)
    criterion = CRITERIA["sum"]
    (expected,) = torch.autograd.grad(criterion(logits, labels), logits)
    assert (expected.stride() == logits.stride()) == (name != "transposed")
    for dynamic in (False, True):
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        (grad,) = torch.autograd.grad(compiled(logits, labels), logits)
        assert torch.equal(grad, expected)
        assert grad.stride() == expected.stride()


@pytest.mark.parametrize("name", FORMATS)
def test_the_compiler_knows_the_memory_format_of_gradients(name: str) -> None:
    logits = FORMATS[name](normal(2, 4, 9, 8, seed=1, dtype=torch.float32)).requires_grad_()
    labels, key = random_labels(2, *logits.shape[2:], values=4, seed=2), key_of_options("LovaszSoftmax")
    _, grad = torch.ops.lovasz.loss(logits, labels, key, 0, True)
    assert (grad.stride() == logits.stride()) == (name != "transposed")
    torch.library.opcheck(torch.ops.lovasz.loss.default, (logits, labels, key, 0, True))
    torch.library.opcheck(torch.ops.lovasz.loss.default, (logits.detach(), labels, key, 0, False))


def test_another_loss_of_a_module_is_the_compiled_one_too() -> None:
    logits, labels = normal(2, 4, 8, 8, seed=1), random_labels(2, 8, 8, values=4, seed=2)
    module = LocalLoss(LovaszSoftmax())
    compiled = torch.compile(module, backend="eager")
    assert compiled(logits, labels) == module(logits, labels)
    with pytest.raises(InvalidInput, match=r"^loss: got"):
        module.loss = torch.nn.CrossEntropyLoss()
    module.loss = [(2.0, CrossEntropy())]
    assert module(logits, labels) == LocalLoss([(2.0, CrossEntropy())])(logits, labels)
    assert compiled(logits, labels) == module(logits, labels)
    assert copy.deepcopy(module)(logits, labels) == module(logits, labels)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_class_weights_that_change_after_compilation(kind: Callable[[list[float]], Any]) -> None:
    """The compiler does not compare the elements of arrays from call to call."""
    logits, labels = normal(2, 4, 8, 8, seed=1), random_labels(2, 8, 8, values=4, seed=2)
    weights = kind([1.0, 2.0, 3.0, 4.0])
    compiled = torch.compile(lambda z, y, w: lovasz_softmax(z, y, class_weights=w), backend="eager")
    first = compiled(logits, labels, weights)
    assert first == lovasz_softmax(logits, labels, class_weights=weights)
    weights[0] = 10.0
    second = compiled(logits, labels, weights)
    assert second == lovasz_softmax(logits, labels, class_weights=weights) > first


def test_a_graph_whose_loss_is_gone_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"does not know the loss .*; make the same loss first"):
        loss_operator(normal(1, 2, 3, seed=1), torch.zeros(1, 3).long(), "((7.0, LovaszSoftmax()),)", 0, True)


def test_modules_do_not_leave_their_losses_behind() -> None:
    """A weight that changes from step to step makes a loss of its own each time."""
    logits, labels = normal(2, 3, 9, seed=1, dtype=torch.float32), random_labels(2, 9, values=3, seed=2)
    first, second = (LocalLoss([(0.123, LovaszSoftmax())]) for _ in range(2))
    before = len(compiling._known)
    for step in range(50):
        LocalLoss([(1 + step / 7, LovaszSoftmax())])(logits, labels)
    gc.collect()
    assert len(compiling._known) == before
    expected, key = first(logits, labels), second._key
    del first
    gc.collect()
    assert loss_operator(logits, labels, key, 0, False).item() == expected.item()
    again = pickle.loads(pickle.dumps(copy.deepcopy(second)))
    del second
    gc.collect()
    assert again._key == key
    assert loss_operator(logits, labels, key, 0, False).item() == expected.item()


INDUCTOR = """
import torch
from lovasz.core import LovaszSoftmax, LocalLoss
torch.manual_seed(0)
model, criterion = torch.nn.Conv2d(3, 4, 1), LocalLoss(LovaszSoftmax())
images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
def step():
    model.weight.grad = None
    loss = criterion(model(images), labels)
    loss.backward()
    return loss.item(), model.weight.grad.clone()
(loss, grad), compiled = step(), torch.compile(model)
model, eager = compiled, model
criterion = torch.compile(criterion, fullgraph=True)
images.requires_grad_(False)
again = criterion(model(images), labels)
eager.weight.grad = None
again.backward()
assert abs(again.item() - loss) < 1e-6, (again.item(), loss)
assert torch.allclose(eager.weight.grad, grad, atol=1e-6)
print("done")
"""


def test_double_backward_is_refused_where_the_backend_does_not() -> None:
    logits, labels = normal(2, 4, 9, 8, seed=1).requires_grad_(), random_labels(2, 9, 8, values=4, seed=2)
    loss = torch.compile(lovasz_softmax, backend="eager", fullgraph=True)(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through this loss is not supported"):
        (loss + grad.norm()).backward()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda loss, logits: torch.func.grad(loss)(logits),
    "jvp": lambda loss, logits: torch.func.jvp(loss, (logits,), (logits,)),
    "vmap": lambda loss, logits: torch.func.vmap(loss)(logits[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_are_refused_in_graphs_too(name: str, backend: str) -> None:
    """In a graph, a tangent would be taken for zero."""
    logits, labels = normal(2, 4, 9, 8, seed=1), random_labels(2, 9, 8, values=4, seed=2)
    for criterion in (lovasz_softmax, CRITERIA["sum"]):

        def step(values: Tensor, criterion: Criterion = criterion) -> object:
            return TRANSFORMS[name](lambda one: criterion(one, labels), values)

        with pytest.raises(InvalidInput, match=r"^logits: got a tensor without memory, as inside torch\.func\.grad"):
            torch.compile(step, backend=backend)(logits)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"not supported inside torch\.func or forward-mode"):
            torch.compile(step, backend=backend, fullgraph=True)(logits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tangents_are_refused_by_graphs(backend: str) -> None:
    logits, labels = normal(2, 4, 9, 8, seed=1), random_labels(2, 9, 8, values=4, seed=2)
    compiled = torch.compile(lovasz_softmax, backend=backend)
    expected = lovasz_softmax(logits, labels)
    for _ in range(2):  # The second time there is a graph, which was compiled outside.
        with torch.autograd.forward_ad.dual_level():
            assert compiled(logits, labels) == expected, "without a tangent"
            with pytest.raises(InvalidInput, match=r"^logits: got a tensor with a tangent \(forward-mode"):
                compiled(torch.autograd.forward_ad.make_dual(logits, logits), labels)
        torch._dynamo.reset()
        assert compiled(logits, labels) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_model_and_loss(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR], capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "done", done.stderr


def test_operator_is_kept_out_of_cuda_graphs() -> None:
    """It waits for the device until it knows whether the request has a fault, which a graph that is recorded cannot."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.lovasz.loss.default.tags
