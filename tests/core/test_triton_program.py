"""What a batch costs on a GPU beside its pixels, by its plan and by a profiler: launches, copies, tables."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels
from support.ways import INTERPRETED, Way
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lovasz.core import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax
from lovasz.core.backends.torch import compute as torch_compute
from lovasz.core.backends.triton import limits
from lovasz.core.batch import Batch, Request
from lovasz.core.computed import Computed
from lovasz.core.dispatch import Backend, submit
from lovasz.core.plan import Plan
from lovasz.spec import LossLike, Result, weighted_sum

pytest.importorskip("triton")

VOID = 255
WEIGHTS = [1.0, 2.0, 0.0, 0.5]
SMALL, MIDDLE, LARGE = (1, 4, 8, 9), (1, 4, 100, 90), (1, 4, 800, 700)
COMPOSITIONS: dict[str, tuple[LossLike, list[tuple[int, ...]]]] = {
    "one large image": (LovaszSoftmax(), [LARGE]),
    "one small image": (LovaszSoftmax(ignore_index=VOID), [SMALL]),
    "all sizes": (LovaszSoftmax(classes="all", ignore_index=VOID), [SMALL, MIDDLE, LARGE, SMALL]),
    "point cloud": (LovaszSoftmax(class_weights=WEIGHTS), [(5000, 4)]),
    "with cross-entropy": ([(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax())], [SMALL, MIDDLE]),
    "three terms": (
        [
            (0.5, CrossEntropy(class_weights=WEIGHTS)),
            (1.0, LovaszSoftmax(per_image=True)),
            (-0.5, LovaszSoftmax(classes=[1, 2], ignore_index=0)),
        ],
        [(3, 4, 70, 70), SMALL],
    ),
    "cross-entropy alone": (CrossEntropy(), [MIDDLE]),
    "probabilities": (LovaszSoftmax(input="probabilities"), [SMALL, MIDDLE]),
    "hinge": (LovaszHinge(ignore_index=VOID), [(2, 90, 90), (600, 500)]),
    "multilabel hinge, per image": (LovaszHinge(per_image=True, multilabel=True), [(3, 4, 80, 80), SMALL]),
    "sigmoid": (LovaszSigmoid(ignore_index=VOID), [(2, 90, 90), (600, 500)]),
    "hinge with cross-entropy": ([(1.0, BinaryCrossEntropy(pos_weight=2.0)), (1.0, LovaszHinge())], [(90, 90)]),
    "multilabel, three terms": (
        [
            (1.0, BinaryCrossEntropy(pos_weight=WEIGHTS, multilabel=True)),
            (1.0, LovaszSigmoid(per_image=True, multilabel=True)),
            (-0.5, LovaszSigmoid(ignore_index=0, multilabel=True)),
        ],
        [(3, 4, 80, 80), SMALL],
    ),
    "binary cross-entropy alone": (BinaryCrossEntropy(ignore_index=VOID), [(2, 90, 90), (8, 9)]),
}
compositions = pytest.mark.parametrize("name", COMPOSITIONS)
MOST_LAUNCHES = 10


def requests_of(name: str, device: torch.device) -> tuple[list[Request], LossLike]:
    loss, shapes = COMPOSITIONS[name]
    total = weighted_sum(loss)
    requests = []
    for seed, shape in enumerate(shapes):
        logits = normal(*shape, seed=seed, dtype=torch.float32)
        logits = logits.softmax(1) if total.probabilities else logits
        label_shape = shape if total.is_binary else (shape[0], *shape[2:])
        labels = random_labels(*label_shape, values=2 if total.is_binary else 4, seed=seed)
        requests.append(Request.checked(logits.to(device), labels.to(device), total))
    return requests, loss


@compositions
@pytest.mark.parametrize("want_grad", [False, True])
def test_a_batch_of_any_composition_takes_a_handful_of_launches(name: str, want_grad: bool) -> None:
    from lovasz.core.backends.triton.layout import Kind
    from lovasz.core.backends.triton.program import Program

    requests, loss = requests_of(name, torch.device("cpu"))
    plan = Plan.of(Batch.of(requests), weighted_sum(loss), torch.device("cuda"))
    program = Program(Kind(plan, torch.float32, torch.int64, want_grad))
    assert len(program.launches) <= MOST_LAUNCHES
    assert all(launch.grid[0] > 0 for launch in program.launches)


@compositions
def test_tables_take_the_memory_that_the_limits_count(name: str) -> None:
    from lovasz.core.backends.triton.layout import Kind, Layout

    requests, loss = requests_of(name, torch.device("cpu"))
    total = weighted_sum(loss)
    rooms = Layout(Kind(Plan.of(Batch.of(requests), total, torch.device("cuda")), torch.float32, torch.int64, True))
    nbytes = sum(rooms.zeroed.rooms[table].size * size for table, size in (("words", 8), ("cells", 4)))
    assert nbytes == sum(limits.table_bytes([request], total) for request in requests)


@pytest.mark.parametrize("loss", [LovaszSoftmax(), LovaszHinge(), LovaszSigmoid(per_image=True)])
def test_tables_of_one_pixel_more_than_are_sorted_are_the_largest(loss: LossLike) -> None:
    """Relative to their logits; the limits of a batch are counted in full only if they might be exceeded."""
    total = weighted_sum(loss)

    def ratio(pixels: int) -> float:
        shape = (1, 1, 1, pixels) if total.is_binary else (1, 2, 1, pixels)
        logits, labels = torch.zeros(1).expand(shape), torch.zeros(1).int().expand(1, *shape[2 - total.is_binary :])
        request = Request.checked(logits, labels, total)
        return limits.table_bytes([request], total) / request.layout.elements

    assert ratio(4096) == 0
    assert max(map(ratio, (8192, 8193, 16385, 1 << 18, 1 << 24))) < ratio(4097) <= limits._MOST_TABLE_BYTES


@pytest.mark.gpu
@compositions
def test_device_sees_only_these_launches_one_fill_and_one_copy_back(name: str, cuda: torch.device) -> None:
    requests, loss = requests_of(name, cuda)
    total = weighted_sum(loss)
    for _ in range(4):  # compiles, brings the plan to the device, and records it
        submit(requests, total, cuda).collect()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        submit(requests, total, cuda).collect()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    names = Counter("copy back" if "DtoH" in e.name else "copy" if "HtoD" in e.name else e.name for e in on_device)
    assert names.pop("copy back") == 1
    assert names.pop("copy") == 1
    fills = [kernel for kernel in names if "Memset" in kernel or "elementwise" in kernel]
    assert sum(names[kernel] for kernel in fills) == 1
    assert sum(names.values()) - 1 <= MOST_LAUNCHES


def test_programs_that_are_kept_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of many images has large static arrays, and its number of images may be another one each time."""
    from lovasz.core.backends.triton import compute
    from lovasz.core.backends.triton.layout import Kind

    loss = weighted_sum([(1.0, LovaszSoftmax(per_image=True)), (1.0, LovaszSoftmax())])

    def kind_of(points: int) -> Kind:
        plan = Plan(loss, (loss.layout((points, 3), (points,)),), (1,), torch.device("cuda"))
        return Kind(plan, torch.float32, torch.int64, True)

    programs: OrderedDict[Kind, compute.Program] = OrderedDict()
    monkeypatch.setattr(compute, "_programs", programs)
    nbytes = compute.program_of(kind_of(600)).static_bytes
    monkeypatch.setattr(compute, "KEPT_BYTES", 3 * nbytes)
    kinds = [kind_of(points) for points in (596, 597, 598, 599, 8)]
    for kind in kinds:
        assert not compute.program_of(kind).layout.static
    assert sum(program.static_bytes for program in programs.values()) <= 3 * nbytes
    assert list(programs) == kinds[-3:]
    kept = list(programs)
    assert compute.program_of(kind_of(2400)).static_bytes > 3 * nbytes
    assert list(programs) == kept


@pytest.mark.skipif(not INTERPRETED, reason="counts steps of the interpreter")
def test_sorted_pixels_find_their_planes_without_a_loop_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term with ``per_image`` keeps the images of a joint apart, for the term without it, too."""
    from lovasz.core.backends.triton import sorting

    Way("cpu", Backend.TRITON).force(monkeypatch)
    handed_out, first_elements = [], sorting.first_elements

    def noted(plane: Any, pixels: Any, channels: Any) -> Any:
        handed_out.append(plane)
        return first_elements(plane, pixels, channels)

    monkeypatch.setattr(sorting, "first_elements", noted)
    images, loss = 60, weighted_sum([(1.0, LovaszSoftmax(per_image=True)), (1.0, LovaszSoftmax())])
    logits = normal(images, 2, 3, seed=3, dtype=torch.float32)
    request = Request.checked(logits, random_labels(images, 3, values=2, seed=4), loss)
    sorted_, expected = (
        submit([request], loss, torch.device("cpu"), backend=backend).collect()[0]
        for backend in (Backend.TRITON, Backend.TORCH)
    )
    assert isinstance(sorted_, Result)
    assert isinstance(expected, Result)
    assert norm_error(sorted_.grad, expected.grad) < 1e-6
    assert 0 < len(handed_out) <= 2 * (images + 1)  # Once for each segment.


def test_memory_on_the_host_is_there_whatever_the_default_device() -> None:
    from lovasz.core.backends.triton.program import host_bytes

    with torch.device("meta"):
        memory = host_bytes(8, torch.device("cpu"))
    assert memory.device.type == "cpu"


def test_a_batch_of_too_many_pixels_is_computed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels number pixels by 31 bits; a portion has fewer, and each request its own bits all the same."""
    requests, loss = requests_of("multilabel hinge, per image", torch.device("cpu"))
    total, requests = weighted_sum(loss), requests[1:] * 3
    whole = submit(requests, total, torch.device("cpu"), backend=Backend.TORCH).collect()
    computed = []

    def noted(backend: Backend, plan: Plan, batch: Batch, **options: object) -> Computed:
        computed.append(len(batch.requests))
        return torch_compute.compute(plan, batch, want_grad=True)

    monkeypatch.setattr("lovasz.core.dispatch.checked", lambda backend, joint, loss, device: backend)
    monkeypatch.setattr("lovasz.core.dispatch.compute", noted)
    monkeypatch.setattr("lovasz.core.backends.triton.limits.NUMBERED_PIXELS", 2 * 4 * 72 + 1)
    portions = submit(requests, total, torch.device("cpu"), backend=Backend.TRITON).collect()
    assert computed == [2, 1]
    assert [bits(answer) for answer in portions] == [bits(answer) for answer in whole]


@pytest.mark.parametrize("coarser", range(7))
def test_softmax_map_covers_all_errors_once(coarser: int) -> None:
    """Every float from 1 down to the smallest normal one has a bin; bins are runs of floats, in descending order."""
    from lovasz.core.backends.triton import bins

    cells = bins.softmax_map(coarser)
    stops, low_bits = cells >> bins.STOP_BITS, cells & ((1 << bins.STOP_BITS) - 1)
    widths = np.diff(stops, prepend=0)
    assert (widths == 1 << (bins.SOFTMAX_SHIFT - low_bits)).all()
    assert stops[-1] + 1 == bins.softmax_bins(coarser)
    assert len(cells) == bins.SOFTMAX_CELLS == 127


@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("pixels", [4097, 8191, 8192, 16383, 16384, 32767, 32768, 65535, 65536, 131072, 1 << 24])
def test_binary_tables_have_room_for_any_mix_of_errors(pixels: int, is_sigmoid: bool) -> None:
    """Half of the bins are shared out in proportion; each cell with a pixel gets one more at most."""
    from lovasz.core.backends.triton import bins

    count = bins.binary_bins(bins.coarser_by(pixels))
    _, cells = bins.binary_cells(is_sigmoid=is_sigmoid)
    assert count // 2 + min(pixels, cells) < count
