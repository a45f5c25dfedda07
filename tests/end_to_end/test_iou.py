"""The IoU of a data set: sums over batches, parts and ranks equal the confusion matrix of all pixels."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.fork_server import Forked

from lovasz.client import Joint, LossClient
from lovasz.core import CrossEntropy, DatasetIoU, InvalidInput, LovaszHinge, LovaszSoftmax, Result, compute
from lovasz.server.launch import ServerProcess

CLASSES, VOID = 5, 255
Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Batches of different sizes with void pixels; class 3 is rare, class 4 is neither label nor arg-max."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        shape = (1 + i % 3, 6 + i, 7)
        labels = random.choice([0, 1, 2, 3, VOID], shape, p=[0.5, 0.2, 0.1, 0.02, 0.18])
        logits = random.normal(size=(shape[0], CLASSES, *shape[1:])).astype(np.float32)
        logits[:, 4] = -9
        made.append((logits, labels))
    return made


def from_confusion(made: list[Batch]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Intersection and union of all pixels that are not void, from one confusion matrix."""
    labels = np.concatenate([labels.ravel() for _, labels in made])
    predicted = np.concatenate([logits.argmax(1).ravel() for logits, _ in made])
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(confusion, (labels[labels != VOID], predicted[labels != VOID]), 1)
    intersection = np.diag(confusion)
    return intersection, confusion.sum(0) + confusion.sum(1) - intersection


def results(made: list[Batch]) -> list[Result[object]]:
    loss = [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(ignore_index=VOID))]
    with LossClient("inprocess") as client:
        return [client.compute(*batch, loss, want_grad=False) for batch in made]


def summed(parts: list[Result[object]]) -> DatasetIoU:
    iou = DatasetIoU()
    for part in parts:
        iou.add(part)
    return iou


def test_sums_are_those_of_one_confusion_matrix() -> None:
    made = batches(7)
    iou = summed(results(made))
    intersection, union = from_confusion(made)
    np.testing.assert_array_equal(iou.intersection, intersection)
    np.testing.assert_array_equal(iou.union, union)
    assert iou.intersection.dtype == iou.union.dtype == np.int64
    np.testing.assert_array_equal(iou.class_iou[:4], intersection[:4] / union[:4])
    assert math.isnan(iou.class_iou[4])
    assert iou.mean_iou == (intersection[:4] / union[:4]).mean()


def test_the_mean_of_the_batches_is_another_number() -> None:
    parts = results(batches(7))
    assert abs(np.mean([part.mean_iou for part in parts]) - summed(parts).mean_iou) > 1e-3


def test_parts_add_up_however_they_are_grouped() -> None:
    parts = results(batches(6))
    whole, left, right = summed(parts), summed(parts[:2]), pickle.loads(pickle.dumps(summed(parts[2:])))
    right.add(left)
    right.add(DatasetIoU())
    np.testing.assert_array_equal(right.intersection, whole.intersection)
    np.testing.assert_array_equal(right.union, whole.union)


def test_adding_changes_neither_the_result_nor_the_other_sum() -> None:
    first, second = results(batches(2))
    before, iou, copy = first.union.copy(), DatasetIoU(), DatasetIoU()
    iou.add(first)
    copy.add(iou)
    iou.add(second)
    np.testing.assert_array_equal(first.union, before)
    np.testing.assert_array_equal(copy.union, before)


def test_a_result_of_logits_that_are_not_finite_is_left_out_and_says_so() -> None:
    logits, labels = batches(1)[0]
    bad = logits.copy()
    bad.reshape(-1)[3] = np.inf
    good, without_counts = results([(logits, labels), (bad, labels)])
    iou = summed([good])
    with pytest.warns(UserWarning, match="counts: a result has none, as its logits were not all finite"):
        iou.add(without_counts)
    assert (iou.left_out, iou.mean_iou) == (1, good.mean_iou)
    other = DatasetIoU()
    other.add(iou)
    assert other.left_out == 1
    iou.reset()
    assert iou.left_out == 0


def test_it_is_empty_at_first_and_after_a_reset() -> None:
    iou = summed(results(batches(2)))
    iou.reset()
    for empty in (iou, DatasetIoU()):
        assert empty.intersection.shape == empty.union.shape == empty.class_iou.shape == (0,)
        assert math.isnan(empty.mean_iou)
        empty.add(DatasetIoU())
        assert math.isnan(empty.mean_iou)


def test_another_number_of_classes_is_refused_and_changes_nothing() -> None:
    iou = summed(results(batches(2)))
    before = iou.union
    with pytest.raises(InvalidInput, match="counts: got parts with 1 and 5 classes; expected the same number"):
        iou.add(compute(np.ones((1, 4, 4), np.float32), np.ones((1, 4, 4), int), LovaszHinge()))
    np.testing.assert_array_equal(iou.union, before)


RANK = """
import os
import warnings
warnings.simplefilter("error")
import numpy as np
from torch import distributed
from lovasz.core import DatasetIoU, InvalidInput, LovaszHinge, compute

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
rank, held = {rank}, {held}
distributed.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=3)
iou = DatasetIoU()
for labels in held:
    iou.add(compute(np.ones((1, 1, 4), np.float32), np.array([[labels]]), LovaszHinge()))
of_some, of_all = DatasetIoU(), DatasetIoU()
of_some.add(iou)
of_all.add(iou)
some = distributed.new_group([0, 1])
with warnings.catch_warnings():
    if rank == 2:
        warnings.simplefilter("ignore")  # Of torch: this rank is not in the group.
    of_some.all_reduce(some)
print(of_some.intersection.tolist(), of_some.union.tolist(), of_some.ranks)
of_all.all_reduce()
print(of_all.intersection.tolist(), of_all.union.tolist(), of_all.ranks)
again = iou if rank else of_all
try:
    again.all_reduce()
except InvalidInput as error:
    print(error)
other = DatasetIoU()
other.intersection = other.union = np.ones(1 + (rank == 2), np.int64)
try:
    other.all_reduce()
except InvalidInput as error:
    print(error)
distributed.destroy_process_group()
"""


def output_of(code: str) -> str:
    with Forked([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    return str(output)


def test_ranks_add_up_even_if_one_has_no_batch(tmp_path: Path) -> None:
    """Three processes. The network predicts foreground everywhere; a rank's labels are rows of four pixels."""
    held = [[[1, 1, 0, 0], [1, 0, 0, 0]], [], [[1, 1, 1, 1]]]
    with ThreadPoolExecutor(3) as pool:
        codes = [RANK.format(rank=rank, held=held[rank], store=tmp_path / "store") for rank in range(3)]
        printed = [output.splitlines() for output in pool.map(output_of, codes)]
    refusals = [
        "counts: got those of 3 ranks, already added; expected one rank's",
        "counts: got parts with 1 and 2 classes; expected the same number",
    ]
    assert printed == [
        ["[3] [8] 2", "[7] [12] 3", *refusals],
        ["[3] [8] 2", "[7] [12] 3", *refusals],
        ["[4] [4] 1", "[7] [12] 3", *refusals],
    ]


def test_the_counts_of_a_joint_step_are_known_to_be_those_of_all_ranks(server: ServerProcess) -> None:
    made = batches(2)
    with LossClient(server.target) as client, ThreadPoolExecutor(2) as pool:

        def call(rank: int) -> Result[object]:
            joint = Joint("iou", rank, 2, step=0)
            return client.compute(*made[rank], LovaszSoftmax(ignore_index=VOID), want_grad=False, joint=joint)

        for result in pool.map(call, range(2)):
            iou = summed([result])
            np.testing.assert_array_equal(iou.union, from_confusion(made)[1])
            assert iou.ranks == 2


def test_without_a_process_group_torch_says_so() -> None:
    with pytest.raises(ValueError, match="process group has not been initialized"):
        DatasetIoU().all_reduce()


def test_what_is_no_result_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^counts: got float; expected a result "):
        DatasetIoU().add(0.5)  # type: ignore[arg-type]
