"""What ``test_process_group.py`` runs in processes of their own: the ranks of a process group, and their joint losses.

``python -m support.group_ranks --process P --store FILE`` runs the checks of the teams in ``PHASES`` that this process
is in (with ``--ending``, of those in ``ENDING``), and prints the name of each as it ends; a check that fails ends the
process. Each rank knows the data of all, and compares its results with those of one process that has all images.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.imports import REPOSITORY
from support.snippets import Snippet, snippets_of
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    DatasetIoU,
    InvalidInput,
    LocalLoss,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    LovaszSoftmaxLoss,
    compute,
    dispatch,
    lovasz_hinge,
    lovasz_sigmoid,
    lovasz_softmax,
)
from lovasz.core.backends.numba import extension
from lovasz.core.batch import Request
from lovasz.core.distributed import joint, pixels
from lovasz.core.distributed.joint import compute_joint
from lovasz.core.functional import _prepared
from lovasz.spec import LossLike, Result, WeightedSum, weighted_sum

TIMEOUT = timedelta(seconds=200)
VOID = 255


@dataclass(frozen=True)
class Case:
    """A loss, and the input of one rank."""

    loss: LossLike
    logits: Tensor
    labels: Tensor
    valid: Tensor | None = None
    offsets: Sequence[int] | None = None

    def request(self) -> Request:
        return _prepared(self.logits, self.labels, self.loss, self.valid, self.offsets)[0]


def a_case(
    loss: LossLike,
    channels: int,
    images: int,
    spatial: tuple[int, ...],
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    present: int | None = None,
    void: float = 0.2,
) -> Case:
    """Random logits and labels; ``present``: only the first classes occur; ``void``: the share of void pixels."""
    total = weighted_sum(loss)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(images, channels, *spatial, generator=generator) * 2).to(dtype)
    shape = logits.shape if total.multilabel else (images, *spatial)
    # Few of many classes: a table takes 3 MB.
    labels = torch.randint(0, present or (2 if total.is_binary else min(channels, 12)), shape, generator=generator)
    ignored = sorted({term.ignore_index for _, term in total.terms} - {None, -100})
    if ignored:
        labels[torch.rand(shape, generator=generator) < void] = ignored[0]
    return Case(loss, logits, labels)


def in_one_process(cases: Sequence[Case]) -> list[Any]:
    """The answers to all ranks' requests, computed as one here."""
    loss = _prepared(cases[0].logits, cases[0].labels, cases[0].loss, cases[0].valid, cases[0].offsets)[1]
    requests = [case.request() for case in cases]
    return dispatch.submit(requests, loss, torch.device("cpu"), joined=[len(requests)]).collect()


def assert_same(got: Result[Tensor], expected: Result[Tensor], world: int) -> None:
    """To the bit, also where both are NaN."""
    assert np.array_equal(got.loss, expected.loss, equal_nan=True), (got.loss, expected.loss)
    assert got.ranks == world
    for a, b in zip(got.terms, expected.terms, strict=True):
        assert np.array_equal(a.loss, b.loss, equal_nan=True)
        np.testing.assert_array_equal(a.per_class_loss, b.per_class_loss)
        np.testing.assert_array_equal(a.per_image_loss, b.per_image_loss)
    np.testing.assert_array_equal(got.intersection, expected.intersection)
    np.testing.assert_array_equal(got.union, expected.union)
    assert got.grad is not None
    assert expected.grad is not None
    assert got.grad.dtype == expected.grad.dtype
    assert torch.equal(got.grad.nan_to_num(7.0), expected.grad.nan_to_num(7.0))


def check_case(cases: Sequence[Case], rank: int) -> Result[Tensor]:
    """The result of this rank, after comparing it with one process; what each rank has is ``cases``."""
    own, world = cases[rank], len(cases)
    got = compute(own.logits, own.labels, own.loss, valid=own.valid, offsets=own.offsets, group="world")
    assert_same(got, in_one_process(cases)[rank], world)
    return got


# --- Every option -------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[LossLike, int]] = {
    "softmax": (LovaszSoftmax(ignore_index=VOID), 5),
    "all classes": (LovaszSoftmax(classes="all"), 5),
    "listed, weighted": (LovaszSoftmax(class_weights=(1, 2, 0, 3, 0.5), classes=(0, 3, 4), ignore_index=1), 5),
    "per image": (LovaszSoftmax(per_image=True, classes="all", ignore_index=VOID), 5),
    "terms": (
        [
            (0.5, CrossEntropy(label_smoothing=0.1, ignore_index=VOID)),
            (1.0, LovaszSoftmax(ignore_index=VOID)),
            (2.0, LovaszSoftmax(per_image=True, ignore_index=VOID)),
        ],
        5,
    ),
    "two rules": ([(0.5, CrossEntropy(class_weights=(1, 2, 0, 3, 0.5))), (1.0, LovaszSoftmax(ignore_index=2))], 5),
    "hinge": (LovaszHinge(ignore_index=VOID), 1),
    "hinge per image": (LovaszHinge(per_image=True), 1),
    "hinges of two rules": ([(1.0, LovaszHinge()), (0.5, LovaszHinge(ignore_index=0))], 1),
    "multilabel": ([(1.0, LovaszHinge(multilabel=True)), (0.5, LovaszHinge(True, None, True))], 3),
    "sigmoid": ([(1.0, LovaszSigmoid(ignore_index=7)), (1.0, BinaryCrossEntropy(pos_weight=3.0, ignore_index=7))], 1),
    "many classes": (LovaszSoftmax(ignore_index=-1), 300),
}


def check_options(rank: int, world: int) -> None:
    """Every option with every element type; ranks differ in images, sizes and classes; one is void, or one is empty."""
    for number, (loss, channels) in enumerate(LOSSES.values()):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            ranks = [
                a_case(
                    loss,
                    channels,
                    0 if dtype == torch.float16 and r == world - 1 else 1 + (r + number) % 3,
                    (9, 7) if r % 2 else (70, 3),
                    100 * number + r,
                    dtype=dtype,
                    present=2 if r else None,
                    void=1.0 if dtype == torch.float32 and r == 0 else 0.2,
                )
                for r in range(world)
            ]
            check_case(ranks, rank)


def check_probabilities(rank: int, world: int) -> None:
    cases = [a_case(LovaszSoftmax(input="probabilities"), 4, 1, (6, 5), r) for r in range(world)]
    cases = [replace(case, logits=case.logits.softmax(1)) for case in cases]
    check_case(cases, rank)
    cases[1].logits[0, 2, 3, 4] = 1.5
    with_fault(lambda: check_case(cases, rank), "rank 1: logits: got 1.5 at index [0, 2, 3, 4]")


def check_masks_and_offsets(rank: int, world: int) -> None:
    loss = [(1.0, LovaszSoftmax(per_image=True)), (1.0, CrossEntropy(ignore_index=None)), (0.3, LovaszSoftmax())]
    clouds = []
    for r in range(world):
        case = a_case(loss, 6, 10 + 5 * r, (), r)
        valid = torch.rand(len(case.labels), generator=torch.Generator().manual_seed(r)) < 0.8
        clouds.append(replace(case, valid=valid, offsets=(3, 4 + r, 10 + 5 * r) if r else None))
    result = check_case(clouds, rank)
    assert len(result.terms[0].per_image_loss) == (3 if rank else 10)


def check_all_are_empty(rank: int, world: int) -> None:
    result = check_case([a_case(LovaszSoftmax(), 5, 0, (4, 4), r) for r in range(world)], rank)
    assert result.loss == 0


def check_one_request(rank: int, world: int) -> None:
    """The joint loss is that of the concatenated images, also by the functions and through modules."""
    for function, options, channels in (
        (lovasz_softmax, LovaszSoftmax, 5),
        (lovasz_hinge, LovaszHinge, 1),
        (lovasz_sigmoid, LovaszSigmoid, 1),
    ):
        cases = [a_case(options(), channels, 1 + r, (8, 9), r) for r in range(world)]
        whole = torch.cat([case.logits for case in cases]).requires_grad_()
        expected: Tensor = function(whole, torch.cat([case.labels for case in cases]))  # type: ignore[operator]
        expected.backward()
        assert whole.grad is not None
        own_part = whole.grad.split([1 + r for r in range(world)])[rank]
        for reduction, factor in (("sum", 1), ("mean", world)):
            logits = cases[rank].logits.clone().requires_grad_()
            loss = function(  # type: ignore[operator]
                logits, cases[rank].labels, group=distributed.group.WORLD, gradient_reduction=reduction
            )
            module = LocalLoss(options(), group="world", gradient_reduction=reduction)
            assert torch.equal(module(logits, cases[rank].labels), loss)
            assert module.result is not None
            assert module.result.grad is None
            loss.backward()
            assert torch.equal(loss, expected)
            assert logits.grad is not None
            assert torch.equal(logits.grad, own_part * factor)


# --- Trainings ----------------------------------------------------------------------------------------------------


def check_trainings(rank: int, world: int) -> None:
    """DistributedDataParallel with accumulation and an evaluation; the gradient is that of one process."""
    torch.manual_seed(0)
    alone = nn.Conv2d(3, 4, 3, padding=1).double()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    criterion = LovaszSoftmaxLoss(group="world")
    own = LovaszSoftmaxLoss()
    batches = [[torch.randn(1 + r % 2, 3, 6, 7).double() for r in range(world)] for _ in range(3)]
    labels = [[(images.sum(1).abs()).long().clamp(max=3) for images in batch] for batch in batches]
    for batch, targets in zip(batches[:2], labels[:2], strict=True):
        criterion(model(batch[rank]), targets[rank]).backward()
        own(alone(torch.cat(batch)), torch.cat(targets)).backward()
    for got, expected in zip(model.module.parameters(), alone.parameters(), strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-13)
    iou = DatasetIoU()
    with torch.no_grad():
        loss = criterion(model(batches[2][rank]), labels[2][rank])
        whole = compute(alone(torch.cat(batches[2])), torch.cat(labels[2]), LovaszSoftmax(), want_grad=False)
    assert not loss.requires_grad
    assert criterion.result is not None
    iou.add(criterion.result)
    assert iou.mean_iou == whole.mean_iou
    # The counts are of all ranks already, and say so.
    with_fault(lambda: iou.all_reduce(), f"counts: got those of {world} ranks")


def check_uneven_data(rank: int, world: int) -> None:
    """The lines of joint.md for data that end at different times: a step has the gradient of the images left."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).double()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    criterion = LovaszSoftmaxLoss(group="world")
    loaders = []
    for r in range(world):
        images = [torch.randn(1, 3, 6, 7).double() for _ in range(1 + r)]
        loaders.append([(one, one.sum(1).abs().long().clamp(max=3)) for one in images])
    names: dict[str, Any] = {"model": model, "criterion": criterion, "loader": loaders[rank], "torch": torch}
    # Without steps, the gradients of all batches add up.
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.0)
    names["optimizer"].zero_grad = lambda: None
    page = snippet_of_page("Data that end at different times")
    page = page.changed("torch.empty(0, 3, 512, 512)", "torch.empty(0, 3, 6, 7, dtype=torch.float64)")
    page.changed("torch.empty(0, 512, 512,", "torch.empty(0, 6, 7,").run(names)
    own = LovaszSoftmaxLoss()
    for number in range(world):
        left = [loader[number] for loader in loaders if number < len(loader)]
        own(alone(torch.cat([one for one, _ in left])), torch.cat([labels for _, labels in left])).backward()
    for got, expected in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-13)


JOIN_COUNTS = ((2, 0, 1), (0, 1, 2), (1, 1, 1))
"""The batches in each epoch, by rank."""


def check_join(rank: int, world: int) -> None:
    """The lines of joint.md for ``join()``: a step has the gradient of the images left; all meet in each epoch."""
    loss: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax(per_image=True))]

    def batch(epoch: int, r: int, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * epoch + 10 * r + number)
        images = torch.randn(1 + r, 3, 6, 7, generator=generator).double()
        return images, images.sum(1).abs().long().clamp(max=3)

    group = distributed.new_group(backend="gloo")
    training = snippet_of_page("Inside `join()`")
    made = next(line for line in training.code.splitlines() if line.startswith("criterion = "))
    for reduction in ("mean", "active_mean"):
        torch.manual_seed(0)
        alone, own = nn.Conv2d(3, 4, 3, padding=1).double(), LocalLoss(loss)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        criterion = LocalLoss(loss, group=group, gradient_reduction=reduction)  # type: ignore[arg-type]
        names: dict[str, Any] = {"model": model, "criterion": criterion, "epochs": 1, "distributed": distributed}
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        lines = training.changed(made, "")
        if reduction == "active_mean":
            lines = lines.changed("model.join()", "model.join(divide_by_initial_world_size=False)")
        for epoch, counts in enumerate(JOIN_COUNTS):
            names["loader"] = [batch(epoch, rank, number) for number in range(counts[rank])]
            lines.run(names)
            for number in range(max(counts[:world])):
                left = [batch(epoch, r, number) for r in range(world) if number < counts[r]]
                optimizer.zero_grad()
                own(alone(torch.cat([one for one, _ in left])), torch.cat([labels for _, labels in left])).backward()
                optimizer.step()
        for got, expected in zip(model.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def check_sharded(rank: int, world: int) -> None:
    """Parameters divided among the ranks (FSDP2): their gradient is that of one process, also after an evaluation."""
    # Here: it takes almost a second, and the test imports this module for the names of the checks.
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    model = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    images = torch.randn(2 * world, 3, 6, 7).double()
    labels = images.sum(1).abs().long().clamp(max=3)
    share = slice(2 * rank, 2 * rank + 2)
    criterion, own = LovaszSoftmaxLoss(group=mesh.get_group()), LovaszSoftmaxLoss()
    with torch.no_grad():
        assert torch.equal(criterion(model(images[share]), labels[share]), own(alone(images), labels))
    for factor in (1.0, 0.5):
        (factor * criterion(model(images[share]), labels[share])).backward()
        (factor * own(alone(images), labels)).backward()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(got.grad, DTensor)
        torch.testing.assert_close(got.grad.full_tensor(), expected.grad, rtol=1e-10, atol=1e-13)


def check_copies(rank: int, world: int) -> None:
    """A module with the default group can be copied and pickled; the copy joins, too."""
    criterion = LocalLoss(LovaszSoftmax(), group="world", gradient_reduction="sum")
    case = a_case(LovaszSoftmax(), 3, 1, (4, 5), rank)
    losses = [
        one(case.logits, case.labels) for one in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)))
    ]
    assert torch.equal(*losses)
    assert torch.equal(losses[0], criterion(case.logits, case.labels))


# --- Faults -------------------------------------------------------------------------------------------------------


def with_fault(call: Callable[[], object], text: str) -> None:
    """Calls something that has to fail with this text, as it does on every rank."""
    with pytest.raises((InvalidInput, RuntimeError)) as raised:
        call()
    assert str(raised.value).startswith(text), f"{raised.value} is not {text}"


def check_faults(rank: int, world: int) -> None:
    """A fault of one rank is raised on all, in the same words; the next call is right."""
    good, bad = a_case(LovaszSoftmax(), 5, 2, (6, 7), rank), world - 1
    is_bad = rank == bad
    wrong = good.labels.clone()
    wrong[1, 2, 3] = 9
    faults: list[tuple[dict[str, Any], str]] = [
        ({"labels": wrong}, "labels: got 9 at index [1, 2, 3]; expected a value in [0, 5) (1 such pixels)"),
        ({"labels": good.labels + 2**40}, "labels: got 10995"),
        ({"labels": good.labels[:, 1:]}, "labels: got shape (2, 5, 7) for logits (2, 5, 6, 7)"),
        ({"logits": good.logits.long()}, "logits: got element type int64"),
        ({"logits": good.logits.numpy()}, "logits: got ndarray; expected a torch tensor"),
        ({"valid": torch.ones(3, 3)}, "valid: "),
        ({"offsets": (1,)}, "offsets: got 1 as the last one; expected"),
        ({"labels": good.labels + 0.5}, "labels: "),
        ({"reduction": "none"}, "reduction: got 'none' with group"),
        ({"gradient_reduction": "median"}, "gradient_reduction: got 'median'"),
        ({"classes": (1, 1)}, "classes: got [1, 1]; expected each class once"),
        ({"classes": (0, 1)}, "loss: got 1.0 * LovaszSoftmax(classes=(0, 1), class"),
        (
            {"logits": good.logits.double()},
            "logits: got element type float64; expected element type float32, like rank 0",
        ),
        (
            {"logits": torch.zeros(2, 6, 6, 7)},
            "channels: got 6; expected 5, like rank 0",
        ),
        (
            {"logits": good.logits.clone().requires_grad_()},
            "gradient: got with a gradient; expected without a gradient, like rank 0",
        ),
    ]
    for changed, text in faults:
        arguments: dict[str, Any] = {"logits": good.logits, "labels": good.labels, **(changed if is_bad else {})}
        with_fault(lambda arguments=arguments: lovasz_softmax(**arguments, group="world"), f"rank {bad}: {text}")
        check_case([a_case(LovaszSoftmax(), 5, 2, (6, 7), r) for r in range(world)], rank)
    weight = 1.0 + 3e-7 * is_bad
    with_fault(
        lambda: compute(good.logits, good.labels, [(weight, LovaszSoftmax())], group="world"),
        f"rank {bad}: loss: got 1.0000003 * LovaszSoftmax(",
    )
    criterion = LocalLoss(LovaszSoftmax(), group="world", gradient_reduction="sum" if is_bad else "mean")
    with_fault(
        lambda: criterion(good.logits.clone().requires_grad_(), good.labels),
        f"rank {bad}: gradient_reduction: got 'sum'; expected 'mean', like rank 0",
    )
    with torch.no_grad():
        criterion(good.logits, good.labels)  # There is no gradient to be reduced.


def check_other_failures(rank: int, world: int) -> None:
    """What is no fault of the input, as memory that runs out, is told, too; the rank has its own error as the cause."""

    case = a_case(LovaszSoftmax(), 5, 2, (6, 7), rank)

    def prepare() -> tuple[Request, WeightedSum]:
        if rank == 0:
            raise MemoryError("no room for labels")
        return case.request(), weighted_sum(case.loss)

    with pytest.raises(
        RuntimeError, match=r"^the joint loss failed on rank 0: MemoryError: no room for labels$"
    ) as raised:
        compute_joint(prepare, "world", want_grad=True)
    assert isinstance(raised.value.__cause__, MemoryError) == (rank == 0)


def check_not_finite(rank: int, world: int) -> None:
    cases = [a_case([(1.0, LovaszSoftmax()), (1.0, CrossEntropy())], 5, 2, (6, 7), r) for r in range(world)]
    cases[0].logits[1, 3, 2, 2] = float("nan")
    result = check_case(cases, rank)
    assert np.isnan(result.loss)
    assert result.grad is not None
    assert result.grad.isnan().all()


def check_parts_of_the_ranks(rank: int, world: int) -> None:
    """A group of some ranks; the others are told that they are not in it."""
    if world < 3:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of torch: this rank is not in the group.
        some = distributed.new_group([1, 2])
    cases = [a_case(LovaszSoftmax(), 5, 1, (6, 7), r) for r in (1, 2)]
    if rank not in (1, 2):
        own = a_case(LovaszSoftmax(), 5, 1, (6, 7), 9)
        with_fault(lambda: lovasz_softmax(own.logits, own.labels, group=some), "group: got a process group without")
        return
    own = cases[rank - 1]
    assert_same(compute(own.logits, own.labels, own.loss, group=some), in_one_process(cases)[rank - 1], 2)


def check_group_arguments(rank: int, world: int) -> None:
    case = a_case(LovaszSoftmax(), 5, 1, (6, 7), 0)
    with_fault(
        lambda: compute(case.logits, case.labels, case.loss, group="all"), "group: got 'all'; expected a process"
    )
    with_fault(lambda: compute(case.logits, case.labels, case.loss, group=[0, 1]), "group: got [0, 1]; expected")
    with_fault(
        lambda: compute(case.logits, case.labels, case.loss, group="world", backend=dispatch.Backend.TORCH),
        "backend: got Backend.TORCH with group; expected None",
    )
    with_fault(lambda: LocalLoss(case.loss, group="world", reduction="none"), "reduction: got 'none' with group")


# --- Ranks that leave ---------------------------------------------------------------------------------------------


def check_leaving(rank: int, world: int) -> None:
    """Those that go on have what they would have if the others passed empty batches; they meet in the next round."""
    group = distributed.new_group(backend="gloo")
    criterion = LocalLoss(LovaszSoftmax(), group=group)
    for number, name in enumerate(("terms", "softmax", "per image")):
        loss, channels = LOSSES[name]
        dtype = (torch.float32, torch.float64, torch.float16)[number]
        for step in range(world):
            # In each round, another rank leaves first.
            ranks = [r for r in range(world) if (r + number) % world >= step]
            cases = [
                a_case(loss, channels, (r in ranks) * (1 + r), (9, 7 + r), r + step, dtype=dtype) for r in range(world)
            ]
            if rank not in ranks:
                break
            own = cases[rank]
            got = compute(own.logits, own.labels, own.loss, group=group)
            assert_same(got, in_one_process(cases)[rank], len(ranks))
            with torch.no_grad():
                assert torch.isfinite(LocalLoss(loss, group=group)(own.logits, own.labels))
        criterion.leave()
    criterion.leave()  # A rank may leave without a call.
    criterion.close()
    criterion.close()
    check_case([a_case(LovaszSoftmax(), 5, 1, (6, 7), r) for r in range(world)], rank)


def check_faults_of_others(rank: int, world: int) -> None:
    """A step that fails on the ranks that go on leaves a rank that has left as it is."""
    group = distributed.new_group(backend="gloo")
    criterion = LocalLoss(LovaszSoftmax(), group=group, gradient_reduction="active_mean")
    case = a_case(LovaszSoftmax(), 5, 1, (6, 7), rank)
    if rank > 0:
        with_fault(lambda: criterion(case.logits.long(), case.labels), "rank 1: logits: got element type int64")
        with_fault(lambda: criterion(case.logits, case.labels + 9), "rank 1: labels: got ")
        if world > 2:
            wide = a_case(LovaszSoftmax(), 4 + rank, 1, (6, 7), rank)
            with_fault(lambda: criterion(wide.logits, wide.labels), "rank 2: channels: got 6; expected 5, like rank 1")
        logits = case.logits.clone().requires_grad_()
        criterion(logits, case.labels).backward()
        cases = [a_case(LovaszSoftmax(), 5, int(r > 0), (6, 7), r) for r in range(world)]
        expected = in_one_process(cases)[rank].grad
        assert torch.equal(logits.grad, expected * (world - 1))  # type: ignore[arg-type]
    criterion.leave()
    criterion.close()


def check_leave_arguments(rank: int, world: int) -> None:
    """A group that is not for the loss alone is refused, as far as a rank can see it."""
    case = a_case(LovaszSoftmax(), 5, 1, (6, 7), rank)
    LocalLoss(case.loss).leave()
    LocalLoss(case.loss).close()
    for group in ("world", distributed.group.WORLD):
        criterion = LocalLoss(case.loss, group=group)
        with_fault(criterion.leave, "group: got the default group for a loss that leaves; expected a gloo group for")
        criterion.close()
    group = distributed.new_group(backend="gloo")
    criterion, other = LocalLoss(case.loss, group=group), LocalLoss(case.loss, group=group)
    criterion(case.logits, case.labels)
    distributed.barrier(group)
    with_fault(criterion.leave, "group: got a group in which others communicate, too; expected a gloo group")
    criterion(case.logits, case.labels)
    criterion.leave()
    with_fault(other.leave, "group: got a group in which another loss has left; expected a gloo group")
    other(case.logits, case.labels)  # Waits until all have left.
    other.leave()
    other.close()


# --- At random ----------------------------------------------------------------------------------------------------


def check_at_random(rank: int, world: int) -> None:
    """Shapes, images, voids, element types and losses by chance; every rank draws the same."""
    dice = random.Random(world)
    for trial in range(25):
        loss, channels = dice.choice(list(LOSSES.values()))
        dtype = dice.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
        binary = weighted_sum(loss).is_binary
        cases = []
        for r in range(world):
            axes = dice.randrange(0, 3)
            spatial = tuple(dice.choice([1, 2, 5, 13, 40]) for _ in range(axes))
            images, void = dice.choice([0, 1, 1, 2, 5]), dice.choice([0.0, 0.3, 1.0])
            present = dice.choice([1, 2, None]) if binary else dice.randrange(1, min(channels, 12) + 1)
            cases.append(
                a_case(loss, channels, images, spatial, 1000 * trial + r, dtype=dtype, present=present, void=void)
            )
        check_case(cases, rank)


def check_page(rank: int, world: int) -> None:
    """The lines of joint.md train a model and check its joint loss."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 3, 8, 6, generator=generator) for _ in range(2)]
    loader = [(images, images.sum(1).abs().long().clamp(max=3)) for images in batches]
    model = nn.Conv2d(3, 4, 3, padding=1)
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": loader,
        "images": torch.randn(5, 3, 8, 6, generator=generator),
        "labels": torch.randint(0, 4, (5, 8, 6), generator=generator),
    }
    training, check = snippet_of_page("With a process group"), snippet_of_page("Check it")
    training.changed('torch.distributed.init_process_group("gloo")', "pass").run(names)
    check.run(names)
    assert names["joint"].ranks == world


def snippet_of_page(heading: str) -> Snippet:
    """The first lines of Python below a heading of joint.md."""
    return next(one for one in snippets_of(REPOSITORY / "docs" / "joint.md") if one.heading == heading)


# --- As it is, without a way ----------------------------------------------------------------------------------------


def check_large(rank: int, world: int) -> None:
    """A joint that is large enough for tables by itself: with rare and absent classes, and ranks of different sizes.

    The last rank has few different logits, so that many of its pixels fall into the same bin.
    """
    loss = [(1.0, LovaszSoftmax(ignore_index=VOID, classes=(0, 1, 2, 5))), (0.5, CrossEntropy(ignore_index=VOID))]
    cases = [a_case(loss, 6, 1, (400 - 90 * r, 500), r, present=2) for r in range(world)]
    cases[-1].logits.round_()
    cases[1].labels[0, 10:12, :100] = 2  # 200 pixels: sorted. No pixel has class 5.
    sent: list[int] = []
    gather = pixels.gather
    with changed(pixels, "gather", lambda *arguments: sent.append(1) or gather(*arguments)):  # type: ignore[func-returns-value]
        result = check_case(cases, rank)
    assert not sent
    assert np.isfinite(result.per_class_loss[[0, 1, 2, 5]]).all()
    hinge = [a_case(LovaszHinge(), 1, 1, (400 - 90 * r, 500), r) for r in range(world)]
    hinge[-1].logits.mul_(1e3)  # Tables begin at the largest error of all ranks.
    check_case(hinge, rank)


# --- A rank that ends ---------------------------------------------------------------------------------------------


def check_a_rank_that_ends(rank: int, world: int) -> None:
    """The last rank fails before its call, and its process ends: no other waits for it, also not the one that left."""
    group = distributed.new_group(backend="gloo")
    case = a_case(LovaszSoftmax(), 5, 2, (6, 7), rank)
    criterion = LocalLoss(case.loss, group=group)
    criterion(case.logits, case.labels)
    if rank == 0:
        criterion.leave()
    if rank == world - 1:
        print("ended", flush=True)
        os._exit(0)
    try:
        if rank == 0:
            criterion.close()
        else:
            criterion(case.logits, case.labels)
    except RuntimeError as error:
        print("told:", type(error).__name__, flush=True)
    os._exit(0)  # Without a way to take leave of a group that has lost a rank.


def check_an_end_while_others_go_on(rank: int, world: int) -> None:
    """The first rank leaves, and its program ends; the others are told."""
    criterion = LocalLoss(LovaszSoftmax(), group=distributed.new_group(backend="gloo"))
    case = a_case(LovaszSoftmax(), 5, 2, (6, 7), rank)
    criterion(case.logits, case.labels)
    if rank == 0:
        criterion.leave()
        sys.exit()
    with suppress(RuntimeError):
        while True:
            criterion(case.logits, case.labels)
    print("told", flush=True)
    os._exit(0)


# --- The ways in which the loss is computed -----------------------------------------------------------------------


@contextmanager
def changed(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def way(name: str) -> Iterator[None]:
    """Computes in another way: ``torch``: without Numba; ``tables``: tables are added, however few the pixels are.

    ``sorted``: as ``tables``, but all segments are sorted; ``mixed``: some are sorted, some counted; ``windows``: all
    are counted, but some of their pixels are sorted.
    """
    if name == "torch":
        with changed(dispatch, "installed", lambda package: False):
            yield
        return
    thresholds = {
        "tables": extension.COUNT_ALL,
        "sorted": extension.SORT_ALL,
        "windows": extension.COUNT_ALL._replace(window=40, window_error=1e-3),
        "mixed": extension.COUNT_ALL._replace(positive=0.6, window=20, window_error=3e-3),
    }
    with (
        changed(joint, "TABLES_FROM_PIXELS", 0),
        changed(extension, "THRESHOLDS", thresholds[name]),
        changed(extension, "MOST_JOINT_TABLES", 4),
    ):
        yield


PHASES: tuple[dict[tuple[int, ...], tuple[str, ...]], ...] = (
    {
        (0, 1): (
            *("one_request", "one_request:mixed", "options", "options:sorted", "options:mixed"),
            *("probabilities:torch", "masks_and_offsets", "masks_and_offsets:mixed", "not_finite:torch"),
            *("all_are_empty", "faults", "other_failures", "group_arguments", "trainings", "sharded", "page"),
            *("join", "leaving:tables", "faults_of_others", "leave_arguments"),
        ),
        (2, 3): (
            *("one_request:torch", "options:torch", "options:tables", "options:windows"),
            *("probabilities", "probabilities:mixed", "probabilities:windows"),
            *("masks_and_offsets:tables", "masks_and_offsets:windows"),
            *("not_finite", "not_finite:mixed", "faults:mixed", "copies"),
        ),
    },
    {
        (0, 1, 2): (
            *(
                "options:mixed",
                "at_random",
                "at_random:torch",
                "at_random:tables",
                "at_random:mixed",
                "at_random:windows",
            ),
            *("faults", "faults:mixed", "parts_of_the_ranks", "parts_of_the_ranks:mixed", "trainings", "uneven_data"),
            *("join", "leaving", "leaving:torch", "faults_of_others"),
        ),
    },
    {
        (0, 1, 2, 3): (
            *(
                "one_request:mixed",
                "at_random",
                "at_random:mixed",
                "at_random:sorted",
                "at_random:windows",
                "not_finite:windows",
                "not_finite:mixed",
                "large",
            ),
        ),
    },
    {(0, 1, 2): ("a_rank_that_ends",)},
)
"""One after the other: the checks of each team of processes, with the way in which the loss is computed.

Teams of a phase run at the same time. The processes of a team are the ranks of its default group.
"""

ENDING: tuple[dict[tuple[int, ...], tuple[str, ...]], ...] = ({(0, 1): ("an_end_while_others_go_on",)},)
"""Those of programs that end early."""


def run_checks(checks: Sequence[str], rank: int, world: int, store: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    for name in checks:
        check, _, how = name.partition(":")
        with way(how) if how else nullcontext():
            getattr(sys.modules[__name__], "check_" + check)(rank, world)
        print(name, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--ending", action="store_true", help="the phases of ENDING in place of PHASES")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    for number, teams in enumerate(ENDING if given.ending else PHASES):
        for team, checks in teams.items():
            if given.process in team:
                store = f"{given.store}-{number}-{team[0]}"
                run_checks(checks, team.index(given.process), len(team), store)
