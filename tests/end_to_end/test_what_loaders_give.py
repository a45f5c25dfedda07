"""Labels and arrays as data loaders give them: the same answer in every way to call, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.comparison import normal, random_labels
from support.foreign import FOREIGN, Unreadable
from support.fork_server import ForkedServer

from lovasz import core
from lovasz.client import CrossEntropy, LossClient, LovaszHinge, LovaszSoftmax
from lovasz.client import remote as client_remote
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss
from lovasz.server.launch import ServerProcess
from lovasz.spec import InvalidInput, LossLike

Answer = tuple[float, npt.NDArray[Any]]
Way = Callable[[Any, Any, LossLike], Answer]

CLIENTS = ("client in process", "unary", "stream", "shared memory")
MODULES = ("LocalLoss", "RemoteLoss in process", "RemoteLoss")


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("loaders") / "s"
    with ForkedServer(["--device", "cpu", "--listen", f"unix:{path}", "--shared-memory"]) as server:
        yield server


def client_way(name: str, sharing: ServerProcess, patch: pytest.MonkeyPatch) -> Way:
    patch.setattr(client_remote, "UNARY_BYTES", 0 if name == "stream" else 4 << 20)
    patch.setattr(client_remote, "SHARED_BYTES", 0)
    transport = "shm" if name == "shared memory" else "grpc"
    target = "inprocess" if name == "client in process" else sharing.target

    def compute(logits: Any, labels: Any, loss: LossLike) -> Answer:
        with LossClient(target, transport=transport) as client:
            result = client.compute(logits, labels, loss)
        assert isinstance(result.grad, type(logits) if isinstance(logits, torch.Tensor) else np.ndarray)
        return result.loss, np.asarray(result.grad)

    return compute


def module_way(name: str, sharing: ServerProcess) -> Way:
    def compute(logits: Any, labels: Any, loss: LossLike) -> Answer:
        criterion: torch.nn.Module = LocalLoss(loss)
        if name != "LocalLoss":
            criterion = RemoteLoss("inprocess" if name == "RemoteLoss in process" else sharing.target, loss)
        leaf = logits.detach().clone().requires_grad_() if isinstance(logits, torch.Tensor) else logits
        value = criterion(leaf, labels)
        value.backward()
        return value.item(), leaf.grad.numpy()

    return compute


def core_way(logits: Any, labels: Any, loss: LossLike) -> Answer:
    result = core.compute(logits, labels, loss)
    assert result.grad is not None
    return result.loss, result.grad.numpy()


@pytest.fixture(params=["core.compute", *CLIENTS, *MODULES])
def way(request: pytest.FixtureRequest, sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Every way to call."""
    if request.param == "core.compute":
        return core_way
    if request.param in MODULES:
        return module_way(request.param, sharing)
    return client_way(request.param, sharing, monkeypatch)


@pytest.fixture(params=["core.compute", *CLIENTS])
def way_of_arrays(request: pytest.FixtureRequest, sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Every way that takes other logits than tensors."""
    return core_way if request.param == "core.compute" else client_way(request.param, sharing, monkeypatch)


def agrees(answer: Answer, expected: Answer) -> bool:
    return answer[0] == pytest.approx(expected[0], rel=1e-6) and np.array_equal(
        answer[1].reshape(expected[1].shape), expected[1]
    )


SOFTMAX = LovaszSoftmax(ignore_index=255)
MIX: LossLike = [(1.0, CrossEntropy(ignore_index=255)), (1.0, SOFTMAX)]
LOGITS = normal(2, 3, 6, 5, seed=1, dtype=torch.float32)
LABELS = random_labels(2, 6, 5, values=3, seed=2, void=255)
MASKS = random_labels(2, 6, 5, values=2, seed=3)

TYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
]


# --- Element types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_labels_of_any_type_with_whole_numbers(dtype: torch.dtype, way: Way) -> None:
    expected = core_way(LOGITS, LABELS, MIX)
    assert agrees(way(LOGITS, LABELS.to(dtype), MIX), expected)
    if dtype != torch.bfloat16:
        assert agrees(way(LOGITS, LABELS.to(dtype).numpy(), MIX), expected)
    strided = LABELS.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert agrees(way(LOGITS, strided, MIX), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint16], ids=str)
def test_masks(dtype: torch.dtype, way: Way) -> None:
    """A mask of one foreground class, for the hinge and for two classes."""
    for logits, loss in ((LOGITS[:, 0], LovaszHinge()), (LOGITS[:, :2], LovaszSoftmax(classes=[1]))):
        assert agrees(way(logits, MASKS.to(dtype), loss), core_way(logits, MASKS, loss))
        assert agrees(way(logits, MASKS.to(dtype).numpy(), loss), core_way(logits, MASKS, loss))


@pytest.mark.parametrize("ignore_index", [-1, -100, 255])
def test_void_pixels_of_float_labels(ignore_index: int, way: Way) -> None:
    labels = LABELS.where(LABELS != 255, ignore_index)
    loss = LovaszSoftmax(ignore_index=ignore_index)
    assert agrees(way(LOGITS, labels.float(), loss), core_way(LOGITS, LABELS, SOFTMAX))


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_labels_that_are_not_whole_are_refused(value: float, text: str, dtype: torch.dtype, way: Way) -> None:
    labels = LABELS.to(dtype)
    labels[1, 2, 3] = value
    for same in (labels, labels.double().numpy()):
        with pytest.raises(InvalidInput) as caught:
            way(LOGITS, same, MIX)
        assert str(caught.value) == (
            f"labels: got {text} at index [1, 2, 3]; expected whole numbers (for class probabilities "
            "labels.argmax(1), for a soft mask labels > 0.5; resize label maps with mode='nearest')"
        )


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_labels_beyond_64_bits_are_refused(value: float, way: Way) -> None:
    labels = LABELS.float()
    labels[0, 0, 0] = value
    with pytest.raises(InvalidInput, match=r"labels: got -?1.*e\+30 at index \[0, 0, 0\]; expected whole numbers"):
        way(LOGITS, labels, MIX)
    wide = LABELS.numpy().astype(np.uint64)
    wide[0, 0, 0] = 2**64 - 1  # which is not the ignore_index -1
    with pytest.raises(InvalidInput, match=f"labels: got a value of {2**64 - 1}; expected 64-bit signed integers"):
        way(LOGITS, torch.from_numpy(wide), LovaszSoftmax(ignore_index=-1))


@pytest.mark.parametrize("labels", [LABELS.to(torch.complex64), LABELS.to(torch.float8_e4m3fn)], ids=str)
def test_labels_of_other_types_are_refused(labels: torch.Tensor, way: Way) -> None:
    name = str(labels.dtype).removeprefix("torch.")
    text = f"labels: got element type {name}; expected integers, bool, or floats that are whole numbers"
    with pytest.raises(InvalidInput, match=text):
        way(LOGITS, labels, MIX)


# --- Shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_labels_with_an_axis_of_one(dtype: torch.dtype, way: Way) -> None:
    """(N, 1, H, W) and (P, 1), as MONAI and nnU-Net have them."""
    assert agrees(way(LOGITS, LABELS.to(dtype)[:, None], MIX), core_way(LOGITS, LABELS, MIX))
    points, of_points = LOGITS.movedim(1, -1).reshape(-1, 3), LABELS.reshape(-1)
    assert agrees(way(points, of_points.to(dtype)[:, None], MIX), core_way(points, of_points, MIX))
    for logits in (LOGITS[:, 0], LOGITS[:, :1]):
        expected = core_way(logits, MASKS, LovaszHinge())
        assert agrees(way(logits, MASKS.to(dtype)[:, None], LovaszHinge()), expected)
        assert agrees(way(logits, MASKS.to(dtype), LovaszHinge()), expected)


def test_probabilities_and_labels_with_an_axis_of_one(way: Way) -> None:
    loss, probabilities = LovaszSoftmax(input="probabilities", ignore_index=255), LOGITS.softmax(1)
    assert agrees(way(probabilities, LABELS[:, None], loss), core_way(probabilities, LABELS, loss))
    wrong = probabilities.clone()
    wrong[1, 2, 3, 4] = 1.5
    labels = LABELS.clone()
    labels[1, 3, 4] = 0
    with pytest.raises(InvalidInput, match=r"logits: got 1.5 at index \[1, 2, 3, 4\] with input='probabilities'"):
        way(wrong, labels[:, None], loss)
    labels[1, 3, 4] = 255
    way(wrong, labels[:, None], loss)


def test_a_label_out_of_range_is_found_where_it_is(way: Way) -> None:
    labels = LABELS.clone()
    labels[1, 2, 3] = 7
    with pytest.raises(InvalidInput, match=r"labels: got 7 at index \[1, 0, 2, 3\]; expected a value in \[0, 3\)"):
        way(LOGITS, labels[:, None].float(), MIX)


# --- Arrays of other frameworks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FOREIGN)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_logits_and_labels_of_other_frameworks(framework: type, dtype: str, way_of_arrays: Way) -> None:
    logits, labels = LOGITS.numpy().astype(dtype), LABELS.numpy()
    expected = way_of_arrays(logits, labels, MIX)
    assert agrees(way_of_arrays(framework(logits), framework(labels), MIX), expected)
    assert agrees(way_of_arrays(LOGITS.to(getattr(torch, dtype)), framework(labels.astype(np.int32)), MIX), expected)
    assert agrees(way_of_arrays(framework(logits), labels[:, None].astype(np.float32), MIX), expected)


@pytest.mark.parametrize("framework", FOREIGN)
def test_modules_take_such_labels(framework: type, way: Way) -> None:
    assert agrees(way(LOGITS, framework(LABELS.numpy()), MIX), core_way(LOGITS, LABELS, MIX))


def test_modules_need_tensors_as_logits() -> None:
    for call, cure in (
        (LocalLoss(MIX), "lovasz.core.compute"),
        (core.lovasz_softmax, "lovasz.core.compute"),
        (RemoteLoss("inprocess", MIX), "LossClient.compute"),
    ):
        with pytest.raises(InvalidInput, match=rf"logits: got ndarray; expected a torch tensor \({cure} takes other"):
            call(LOGITS.numpy(), LABELS)


@pytest.mark.parametrize(
    "value", [Unreadable(), [[1.0, 2.0]], None, np.float32(1), np.ndarray], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_read_is_refused(value: object, way_of_arrays: Way) -> None:
    name = type(value).__name__
    for field, pair in (("logits", (value, LABELS)), ("labels", (LOGITS, value))):
        with pytest.raises(InvalidInput, match=rf"{field}: got {name}.*; expected a numpy array, a torch tensor, or"):
            way_of_arrays(*pair, MIX)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # Of NumPy, for matrices.
def test_a_matrix_of_numpy_is_an_array(way_of_arrays: Way) -> None:
    logits, labels = np.float32(np.random.default_rng(1).normal(size=(30, 3))), np.arange(30) % 3
    expected = way_of_arrays(logits, labels, LovaszSoftmax())
    assert agrees(way_of_arrays(np.asmatrix(logits), labels, LovaszSoftmax()), expected)


def test_a_mask_of_numpy_is_not_dropped(way_of_arrays: Way) -> None:
    masked = np.ma.masked_equal(LABELS.numpy(), 2)
    with pytest.raises(InvalidInput, match=r"labels: got a masked array, .* \(labels.filled\(255\) with ignore_index"):
        way_of_arrays(LOGITS, masked, MIX)
