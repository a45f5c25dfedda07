"""``RemoteLoss`` against a real server: the same module as ``LocalLoss``, but for where the loss is computed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import norm_error, normal, random_labels, reference_answer
from support.processes import run_python
from torch import Tensor

from lovasz.client import (
    CrossEntropy,
    InvalidInputError,
    Joint,
    LossClient,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    ServerUnavailableError,
)
from lovasz.client import joint as client_joint
from lovasz.client.joint import CallingThreads
from lovasz.client.load_balancing import LoadBalancing
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss, compute
from lovasz.server.launch import ServerProcess
from lovasz.spec import InvalidInput, LossLike, weighted_sum

LOSSES: list[LossLike] = [
    LovaszSoftmax(),
    LovaszSoftmax(classes="all", per_image=True, ignore_index=1),
    CrossEntropy(class_weights=[0.5, 1.0, 2.0], label_smoothing=0.1),
    LovaszHinge(multilabel=True),
    [(0.5, CrossEntropy()), (2.0, LovaszSoftmax(classes=[2, 0]))],
]


class RecordingClient(LossClient):
    """Keeps every answer that came from the server, and the place in a joint step for which it was asked."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.answers: list[Result[Any]] = []
        self.joints: list[Joint | None] = []

    def compute(self, *args: Any, **options: Any) -> Result[Any]:
        self.answers.append(super().compute(*args, **options))
        self.joints.append(options["joint"])
        return self.answers[-1]


@pytest.fixture(scope="module")
def shared(server: ServerProcess) -> Iterator[LossClient]:
    with LossClient(server.target) as client:
        yield client


@pytest.fixture
def recording(server: ServerProcess) -> Iterator[RecordingClient]:
    with RecordingClient(server.target) as client:
        yield client


def some_input(dtype: torch.dtype = torch.float32, *, hinge: bool = False) -> tuple[Tensor, Tensor]:
    logits = normal(2, 3, 6, 5, seed=1, dtype=dtype).requires_grad_()
    shape = (2, 3, 6, 5) if hinge else (2, 6, 5)
    return logits, random_labels(*shape, values=2 if hinge else 3, seed=2)


def backward(criterion: torch.nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient that it leaves."""
    loss = criterion(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad


# --- Values and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)
def test_it_equals_the_local_loss_bit_for_bit(shared: LossClient, loss: LossLike) -> None:
    logits, labels = some_input(hinge=weighted_sum(loss).is_binary)
    remote, local = (backward(criterion, logits, labels) for criterion in (RemoteLoss(shared, loss), LocalLoss(loss)))
    assert remote[0].dtype == local[0].dtype == torch.float32
    assert remote[0].shape == ()
    assert torch.equal(remote[0], local[0])
    assert torch.equal(remote[1], local[1])
    assert local[1].norm() > 0


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_and_devices(
    shared: LossClient, dtype: torch.dtype, loss_dtype: torch.dtype, torch_device: torch.device
) -> None:
    logits, labels = some_input(dtype)
    logits = logits.detach().to(torch_device).requires_grad_()
    loss, grad = backward(RemoteLoss(shared, LovaszSoftmax()), logits, labels.to(torch_device))
    expected = compute(logits.cpu().float(), labels, LovaszSoftmax())
    assert expected.grad is not None
    assert (loss.dtype, loss.device) == (loss_dtype, logits.device)
    assert (grad.dtype, grad.device) == (dtype, logits.device)
    assert torch.equal(loss.cpu(), torch.tensor(expected.loss, dtype=loss_dtype))
    assert norm_error(grad, expected.grad.double()) < (1e-6 if loss_dtype == dtype else torch.finfo(dtype).eps)


def test_channels_last_logits(shared: LossClient) -> None:
    logits, labels = some_input()
    strided = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert not strided.is_contiguous()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    assert torch.equal(backward(criterion, strided, labels)[1], backward(criterion, logits, labels)[1])


def test_a_training_step_under_autocast(shared: LossClient, torch_device: torch.device) -> None:
    images = normal(2, 1, 16, 16, seed=3, dtype=torch.float32).to(torch_device)
    labels = random_labels(2, 16, 16, values=3, seed=4).to(torch_device)
    mix: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]

    def step(criterion: torch.nn.Module) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3, padding=2))
        model.to(torch_device)
        with torch.autocast(torch_device.type, dtype=torch.bfloat16):
            logits = model(images)
            assert logits.dtype == torch.bfloat16
            loss = criterion(logits, labels)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    loss, grads = step(RemoteLoss(shared, mix))
    local, expected = step(LocalLoss(mix))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(local.item(), rel=1e-5)
    assert len(grads) == 4
    for grad, true in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert grad.norm() > 0
        assert norm_error(grad, true.cpu().double()) < 1e-2


def test_with_a_gradient_scale_float16_does_not_underflow(shared: LossClient) -> None:
    scale = 65536.0
    logits = normal(1, 4, 200, 200, seed=6, dtype=torch.float16).requires_grad_()
    labels = random_labels(1, 200, 200, values=4, seed=7)
    value, expected = reference_answer(logits, labels, LovaszSoftmax())
    loss = RemoteLoss(shared, LovaszSoftmax())(logits, labels)
    (loss * scale).backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad is not None
    assert norm_error(expected.half(), expected) > 0.005  # what float16 makes of the gradient without the scale
    assert norm_error(logits.grad, expected * scale) < 2 * torch.finfo(torch.float16).eps


def test_the_gradient_follows_what_is_done_with_the_loss(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    value, plain = backward(criterion, logits, labels)
    (grad,) = torch.autograd.grad(3 * criterion(logits, labels) ** 2, logits)
    torch.testing.assert_close(grad, 6 * value * plain)


def test_retain_graph_gives_the_same_again(recording: RecordingClient) -> None:
    logits, labels = some_input()
    loss = RemoteLoss(recording, LovaszSoftmax())(logits, labels)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, 2 * once)
    assert len(recording.answers) == 1


def test_the_loss_is_changed_in_place(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    value, plain = backward(criterion, logits, labels)
    loss = criterion(logits, labels)
    loss *= 6
    loss /= 2
    loss += logits.sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(grad, 3 * plain + 1)
    torch.testing.assert_close(loss.detach(), 3 * value + logits.detach().sum())
    assert torch.equal(torch.autograd.grad(loss, logits)[0], grad)
    with torch.no_grad():
        loss = criterion(logits, labels)
        loss *= 2
    assert loss.item() == 2 * value.item()


def test_double_backward_is_refused(shared: LossClient) -> None:
    logits, labels = some_input()
    loss = RemoteLoss(shared, LovaszSoftmax())(logits, labels)
    (grad,) = torch.autograd.grad(loss**2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through this loss is not supported"):
        torch.autograd.grad(grad.sum(), logits)


def test_torch_func_is_refused(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    with pytest.raises(InvalidInputError, match=r"^logits: got a tensor without memory, as inside torch\.func\.grad"):
        torch.func.grad(lambda logits: criterion(logits, labels))(logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_or_script_of_torch_jit_is_refused(shared: LossClient) -> None:
    criterion = RemoteLoss(shared, LovaszSoftmax())
    with pytest.raises(InvalidInputError, match=r"^logits: got a tensor inside torch\.jit\.trace, which"):
        torch.jit.trace(criterion, some_input())
    with pytest.raises(TypeError, match=r"^RemoteLoss: torch\.jit\.script does not support this loss"):
        torch.jit.script(criterion)


# --- When a gradient is asked for ---------------------------------------------------------------------------------


def test_a_gradient_is_asked_for_in_training(recording: RecordingClient) -> None:
    loss = RemoteLoss(recording, LovaszSoftmax())(*some_input())
    assert loss.requires_grad
    assert recording.answers[0].grad is not None


def test_eval_mode_keeps_the_gradient(recording: RecordingClient) -> None:
    """Frozen batch norm, attacks and saliency maps need it."""
    logits, labels = some_input()
    expected = backward(LocalLoss(LovaszSoftmax()).eval(), logits, labels)
    for target in (recording, "inprocess"):
        value, grad = backward(RemoteLoss(target, LovaszSoftmax()).eval(), logits, labels)
        assert torch.equal(value, expected[0])
        assert torch.equal(grad, expected[1])
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), torch.nn.BatchNorm2d(3)).eval()
    images = normal(2, 1, 6, 5, seed=9, dtype=torch.float32).requires_grad_()
    RemoteLoss(recording, LovaszSoftmax()).eval()(model(images), labels).backward()
    assert images.grad is not None
    assert images.grad.norm() > 0


def test_steps_are_counted_by_whether_they_have_a_gradient() -> None:
    logits, labels = some_input()
    recording = RecordingClient("inprocess")
    criterion = RemoteLoss(recording, LovaszSoftmax(), joint=Joint("counting", 0, 1, step=5))
    for _ in range(2):
        criterion.train()(logits, labels)
        criterion.eval()(logits, labels)
        with torch.no_grad():
            criterion(logits, labels)
    assert [joint.step for joint in recording.joints if joint is not None] == [5, 6, 5, 7, 8, 6]
    assert [answer.grad is None for answer in recording.answers] == [False, False, True] * 2


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached"])
def test_no_gradient_is_asked_for_where_none_is_needed(recording: RecordingClient, how: str) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(recording, LovaszSoftmax())
    if how == "detached":
        loss = criterion(logits.detach(), labels)
    else:
        with getattr(torch, how)():
            loss = criterion(logits, labels)
    assert not loss.requires_grad
    assert recording.answers[0].grad is None
    assert loss.item() == LocalLoss(LovaszSoftmax())(logits, labels).item()


# --- The module ---------------------------------------------------------------------------------------------------


def test_result_is_the_last_answer_without_its_gradient(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    assert criterion.result is None
    loss = criterion(logits, labels)
    result = criterion.result
    assert result is not None
    assert result.grad is None
    assert torch.tensor(result.loss) == loss
    assert result.per_class_loss.shape == result.class_iou.shape == (3,)
    assert result.timing is not None
    criterion(-logits, labels)
    assert criterion.result is not result


def test_as_a_part_of_a_model_it_adds_no_state(shared: LossClient) -> None:
    model = torch.nn.ModuleDict({"net": torch.nn.Conv2d(1, 3, 1), "criterion": RemoteLoss(shared, LovaszSoftmax())})
    model["criterion"](*some_input())
    assert set(model.state_dict()) == {"net.weight", "net.bias"}
    assert list(model["criterion"].parameters()) == []
    assert not model.eval()["criterion"].training


def pickled(module: RemoteLoss) -> RemoteLoss:
    copied = pickle.loads(pickle.dumps(module))
    assert isinstance(copied, RemoteLoss)
    return copied


def saved(module: RemoteLoss) -> RemoteLoss:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, RemoteLoss)
    return loaded


@pytest.mark.parametrize("copying", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("with_client", [False, True], ids=["own connection", "given client"])
def test_a_copy_opens_its_own_connection(
    server: ServerProcess, shared: LossClient, copying: Callable[[RemoteLoss], RemoteLoss], with_client: bool
) -> None:
    logits, labels = some_input()
    mix: LossLike = [(0.5, CrossEntropy()), (2.0, LovaszSoftmax(ignore_index=2))]
    criterion = RemoteLoss(shared if with_client else server.target, mix)
    expected = criterion(logits, labels)
    copied = copying(criterion)
    assert copied.result is None
    criterion.close()
    assert torch.equal(copied(logits, labels), expected)
    assert copied.client is not criterion.client
    assert copied.loss == criterion.loss
    copied.close()
    criterion.close()


@pytest.mark.parametrize("copying", [copy.deepcopy, pickled])
def test_load_balancing_is_that_of_the_module_or_of_its_client(copying: Callable[[RemoteLoss], RemoteLoss]) -> None:
    target = "ipv4:127.0.0.1:1,127.0.0.1:2"
    own = RemoteLoss(target, LovaszSoftmax(), load_balancing="round_robin")
    with LossClient(target, load_balancing="ring_hash") as client:
        given = RemoteLoss(client, LovaszSoftmax())
        for criterion, expected in ((own, LoadBalancing.ROUND_ROBIN), (given, LoadBalancing.RING_HASH)):
            copied = copying(criterion)
            assert copied.client.options.load_balancing is expected
            copied.close()


def test_close_can_be_called_at_any_time(server: ServerProcess) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(server.target, LovaszSoftmax())
    criterion.close()
    before = criterion(logits, labels)
    criterion.close()
    criterion.close()
    assert torch.equal(criterion(logits, labels), before)  # opened again
    criterion.close()


def test_close_leaves_a_client_that_was_given_open(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    assert criterion.client is shared
    criterion.close()
    assert criterion(logits, labels).item() > 0


def test_an_error_leaves_nothing_broken(shared: LossClient) -> None:
    logits, labels = some_input()
    criterion = RemoteLoss(shared, LovaszSoftmax())
    before = criterion(logits, labels)
    result = criterion.result
    with pytest.raises(InvalidInputError, match="labels: got shape"):
        criterion(logits, labels[:1])  # seen here
    with pytest.raises(InvalidInputError, match="77"):
        criterion(logits, labels.clone().fill_(77))  # seen by the server
    assert criterion.result is result
    assert logits.grad is None
    after = criterion(logits, labels)
    assert torch.equal(after, before)
    after.backward()
    assert logits.grad is not None


def test_weights_of_pixels_are_refused(recording: RecordingClient) -> None:
    """They were once taken for the number of a joint step, and so had no effect."""
    logits, labels = some_input()
    criterion = RemoteLoss(recording, LovaszSoftmax())
    for others in ((torch.ones(2, 6, 5),), (None,), (7,), (torch.ones(3), 255)):
        text = rf"RemoteLoss: got {2 + len(others)} positional arguments; expected logits and labels\. .* valid="
        with pytest.raises(TypeError, match=text):
            criterion(logits, labels, *others)
    assert recording.answers == []
    here = RecordingClient("inprocess")
    RemoteLoss(here, LovaszSoftmax(), joint=Joint("by name", 0, 1))(logits, labels, step=7)
    assert here.joints == [Joint("by name", 0, 1, step=7)]


def test_what_cannot_be_is_refused_when_it_is_built() -> None:
    with pytest.raises(InvalidInput, match="loss: LovaszHinge is combined with a softmax loss"):
        RemoteLoss("localhost:1", [(1.0, LovaszHinge()), (1.0, CrossEntropy())])
    with pytest.raises(ValueError, match="load_balancing: got 'random'; expected None or one of round_robin, ring_"):
        RemoteLoss("localhost:1", LovaszSoftmax(), load_balancing="random")
    number: Any = 7
    nothing: Any = None
    with pytest.raises(InvalidInputError, match=r"^joint: got 7; expected a lovasz.client.Joint"):
        RemoteLoss("localhost:1", LovaszSoftmax(), joint=number)
    with pytest.raises(ValueError, match=r"^target: got None; expected HOST:PORT"):
        RemoteLoss(nothing, LovaszSoftmax())


def test_the_server_is_needed_at_the_first_call_and_not_before() -> None:
    criterion = RemoteLoss("unix:/nowhere/at/all", LovaszSoftmax())
    with pytest.raises(ServerUnavailableError, match="unix:/nowhere/at/all"):
        criterion.client.server_info()
    criterion.close()


def test_it_says_what_it_computes_and_where() -> None:
    text = repr(RemoteLoss("localhost:1", [(0.5, CrossEntropy()), (2, LovaszSoftmax(ignore_index=255))]))
    assert text.startswith("RemoteLoss(localhost:1, 0.5 * CrossEntropy(")
    assert "+ 2 * LovaszSoftmax(classes='present', " in text


def test_inprocess() -> None:
    logits, labels = some_input(torch.float64)
    criterion = RemoteLoss("inprocess", LovaszSoftmax())
    remote, local = backward(criterion, logits, labels), backward(LocalLoss(LovaszSoftmax()), logits, labels)
    assert torch.equal(remote[0], local[0])
    assert torch.equal(remote[1], local[1])
    criterion.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_one_operator_in_graphs_of_torch_compile(recording: RecordingClient, backend: str) -> None:
    """One graph, and a call each time that it runs, also for a step number that changes."""
    torch._dynamo.reset()
    criterion, (logits, labels) = RemoteLoss(recording, LOSSES[0]), some_input()
    expected, expected_grad = backward(criterion, logits, labels)
    compiled = torch.compile(lambda z, y, step: criterion(2 * z, y, step=step), backend=backend, fullgraph=True)
    before = len(recording.answers)
    for step in (None, 3, 4, 5):
        leaf = (0.5 * logits.detach()).requires_grad_()
        loss = compiled(leaf, labels, step)
        loss.backward()
        assert loss.item() == expected.item()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * expected_grad)
    assert len(recording.answers) == before + 4
    assert criterion.result is not None
    assert criterion.result.loss == pytest.approx(expected.item(), rel=1e-6)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_forward_mode_is_refused_in_graphs_too() -> None:
    """In a graph, a tangent would be taken for zero."""
    torch._dynamo.reset()
    criterion, (logits, labels) = RemoteLoss("inprocess", LOSSES[0]), some_input()
    values = logits.detach()

    @torch.compile(backend="eager")
    def tangent() -> object:
        return torch.func.jvp(lambda one: criterion(one, labels), (values,), (values,))

    with pytest.raises(InvalidInputError, match=r"^logits: got a tensor without memory, as inside torch\.func\.grad"):
        tangent()
    compiled = torch.compile(criterion, backend="eager")
    assert compiled(values, labels) == criterion(values, labels)
    forward = torch.autograd.forward_ad
    with (
        forward.dual_level(),
        pytest.raises(InvalidInputError, match=r"^logits: got a tensor with a tangent \(forward-mode"),
    ):
        compiled(forward.make_dual(values, values), labels)
    torch._dynamo.reset()


# --- Where a rank's place comes from ------------------------------------------------------------------------------


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Initializes torch's default group, when the test says so."""

    def initialize() -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    yield initialize
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("copying", [lambda module: module, copy.deepcopy, pickled], ids=["itself", "copy", "pickle"])
@pytest.mark.parametrize(
    "joint", ["run-7", Joint.from_distributed("run-7"), Joint("run-7")], ids=["name", "from", "no rank"]
)
def test_rank_and_world_size_are_those_of_the_default_group_at_the_first_call(
    recording: RecordingClient,
    group_of_one: Callable[[], None],
    joint: Joint | str,
    copying: Callable[[RemoteLoss], RemoteLoss],
) -> None:
    logits, labels = some_input()
    criterion = copying(RemoteLoss(recording, LovaszSoftmax(), joint=joint))
    with pytest.raises(InvalidInputError, match=r"joint.rank: got None, and torch.distributed's default group is not"):
        criterion(logits, labels)
    group_of_one()
    criterion(logits, labels)
    assert criterion.joint == Joint.from_distributed("run-7")
    assert replace(criterion.joint, secret=None) == Joint("run-7", 0, 1)
    assert isinstance(criterion.joint.secret, bytes)
    assert criterion.joint.secret != Joint.from_distributed("run-8").secret
    assert repr(criterion.joint.secret) not in repr(criterion.joint)
    again = copying(criterion)
    again(logits, labels)
    assert again.joint == criterion.joint
    torch.distributed.destroy_process_group()
    again(logits, labels)
    assert again._calls == {True: 3, False: 0}
    for module in (criterion, again):
        module.close()


def test_a_checkpoint_of_one_rank_is_none_of_its_place_and_of_its_secret(
    recording: RecordingClient, group_of_one: Callable[[], None]
) -> None:
    """Any rank may load it, in another training, too."""
    group_of_one()
    criterion = RemoteLoss(recording, LovaszSoftmax(), joint="run-7")
    criterion(*some_input())
    assert criterion.joint is not None
    assert isinstance(criterion.joint.secret, bytes)
    for kept in (criterion, criterion.joint, Joint.from_distributed("run-7")):
        assert criterion.joint.secret not in pickle.dumps(kept)
    assert pickled(criterion).joint == Joint("run-7")
    given = Joint("run-7", 1, 2, step=5, secret=b"12345678")
    assert pickle.loads(pickle.dumps(given)) == copy.deepcopy(given) == given


def test_a_shared_secret_does_not_keep_the_store_of_a_group(
    recording: RecordingClient, group_of_one: Callable[[], None]
) -> None:
    group_of_one()
    RemoteLoss(recording, LovaszSoftmax(), joint="run-7")(*some_input())
    assert len(client_joint._SECRETS) == 1
    torch.distributed.destroy_process_group()
    gc.collect()
    assert len(client_joint._SECRETS) == 0


def test_a_rank_without_a_world_size_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"joint.world_size: got rank 0 and world_size None; expected both, or"):
        Joint("run", 0)
    with pytest.raises(InvalidInputError, match=r"joint.rank: got rank None and world_size 2; expected both, or none"):
        Joint("run", world_size=2)


def test_numbers_of_a_place_may_be_those_of_arrays() -> None:
    place = Joint("run", np.int64(1), torch.tensor(2), step=np.array(7), round=np.uint8(3))
    assert place == Joint("run", 1, 2, step=7, round=3)
    assert all(type(value) is int for value in (place.rank, place.world_size, place.step, place.round))
    with pytest.raises(InvalidInputError, match=r"joint.step: got 1.5; expected an integer"):
        Joint("run", 1, 2, step=1.5)
    with pytest.raises(InvalidInputError, match=r"joint.secret: got int; expected bytes or a text"):
        Joint("run", 1, 2, secret=12345678)


def test_a_process_is_named_anew_after_a_fork() -> None:
    code = (
        "import os; from lovasz.client import Joint; name = lambda: Joint('run', 0, 1).at(0).process.hex()\n"
        "first, second = name(), name()\n"
        "if os.fork(): os.wait(); print(first, second)\n"
        "else: print(name())"
    )
    child, first, second = run_python(code).split()
    assert first == second != child


# --- Which ranks make one call at a time --------------------------------------------------------------------------


def blocking(run: str, *calls: bool | None) -> list[bool]:
    return [Joint(run, 0, 1).at(0, blocking=call).blocking for call in calls]


def test_a_rank_whose_calls_all_come_from_one_thread_makes_one_at_a_time() -> None:
    assert blocking("one thread", True, None, True) == [True, False, True]


def test_a_rank_that_has_submitted_a_call_or_called_from_another_thread_may_make_several() -> None:
    assert blocking("submitted", True, False, True) == [True, False, False]
    assert blocking("two threads", True) == [True]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(blocking, "two threads", True).result() == [False]
    assert blocking("two threads", True) == [False]
    assert blocking("another run", True) == [True]


def test_the_ranks_that_are_remembered_for_it_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CallingThreads, "MAX_RANKS", 3)
    threads = CallingThreads()
    for rank in range(10):
        assert threads.is_only_one("run", rank, 1)
    assert len(threads._threads) == 3
