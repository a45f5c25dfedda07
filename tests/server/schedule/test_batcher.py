"""The batcher: what shares a batch, when a batch closes, and who is left out."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lovasz.core.batch import Request
from lovasz.server.errors import ExpiredError, StoppingError
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Caller, Job, cost_of
from lovasz.spec import CrossEntropy, LossLike, LovaszHinge, LovaszSoftmax, weighted_sum

SOFTMAX = LovaszSoftmax()


def job(
    side: int = 2,
    *,
    classes: int = 3,
    loss: LossLike = SOFTMAX,
    want_grad: bool = True,
    dtype: torch.dtype = torch.float32,
    deadline: float | None = None,
) -> Job:
    parsed = weighted_sum(loss)
    shape = (1, side, side) if parsed.is_binary else (1, classes, side, side)
    labels = torch.zeros(1, side, side, dtype=torch.uint8)
    request = Request.checked(torch.zeros(shape, dtype=dtype), labels, parsed)
    return Job(
        (Caller(request, cost_of(request.layout.elements, parsed.segments(request.layout)), deadline),),
        parsed,
        want_grad,
    )


def job_at(seconds: float, side: int = 1, *, classes: int = 3) -> Job:
    """One that came so long after some moment."""
    one = job(side, classes=classes)
    one.queued = 1000.0 + seconds
    return one


LARGE = 1000
"""The side of an image whose 3 million logits step back behind what comes within 15 ms."""


def batcher(max_elements: int = 10_000, max_requests: int = 100, max_delay_seconds: float = 3600.0) -> Batcher:
    return Batcher(max_elements, max_requests, max_delay_seconds)


def take_all(queue: Batcher) -> list[list[Job]]:
    batches = []
    while batch := queue.take(idle=True):
        batches.append(batch)
    return batches


def test_an_idle_device_takes_what_there_is_at_once() -> None:
    queue = batcher()
    first, second = job(2), job(5)
    queue.put(first)
    queue.put(second)
    assert queue.take(idle=True) == [first, second]
    assert len(queue) == 0


def test_requests_that_differ_in_what_is_computed_do_not_share_a_batch() -> None:
    queue = batcher()
    jobs = [
        job(),
        job(classes=4),
        job(loss=LovaszSoftmax(per_image=True)),
        job(loss=LovaszHinge()),
        job(want_grad=False),
        job(dtype=torch.float16),
    ]
    for one in jobs:
        queue.put(one)
    assert take_all(queue) == [[one] for one in jobs]


def test_image_sizes_and_equal_descriptions_do_share_one() -> None:
    queue = batcher()
    jobs = [job(side, loss=LovaszSoftmax(class_weights=[1, 2, 3])) for side in (1, 7, 3)]
    for one in jobs:
        queue.put(one)
    assert take_all(queue) == [jobs]


def test_a_batch_is_cut_at_its_cost() -> None:
    queue = batcher(max_elements=340)
    jobs = [job(4), job(4), job(4), job(10), job(1)]  # 48, 48, 48, 300 and 3 logits; each 3 segments, which cost 120
    for one in jobs:
        queue.put(one)
    assert take_all(queue) == [jobs[:2], jobs[2:3], jobs[3:4], jobs[4:]]


def test_segments_cost_too() -> None:
    one = job(
        1, classes=1000, loss=[(1.0, LovaszSoftmax()), (1.0, LovaszSoftmax(classes=[0, 1])), (1.0, CrossEntropy())]
    )
    assert one.elements == 1000
    assert one.cost == 1000 + 40 * (1000 + 2)
    assert one.due == one.queued + 5e-9 * one.cost


def test_a_batch_is_cut_at_its_number_of_requests() -> None:
    queue = batcher(max_requests=2)
    jobs = [job() for _ in range(5)]
    for one in jobs:
        queue.put(one)
    assert [len(batch) for batch in take_all(queue)] == [2, 2, 1]


def test_each_rank_of_a_step_counts_as_a_request() -> None:
    queue = batcher(max_requests=4)
    steps = [Job(tuple(job().callers[0] for _ in range(ranks)), weighted_sum(SOFTMAX), True) for ranks in (3, 2, 2, 5)]
    for one in steps:
        queue.put(one)
    assert take_all(queue) == [steps[:1], steps[1:3], steps[3:]]


def test_whoever_waited_longest_comes_first() -> None:
    queue = batcher()
    older, younger, third = job(classes=4), job(classes=5), job(classes=4)
    for one in (older, younger, third):
        queue.put(one)
    assert queue.take(idle=True) == [older, third]
    assert queue.take(idle=True) == [younger]


@pytest.mark.parametrize("classes", [3, 4], ids=["of one kind", "of two kinds"])
def test_a_small_request_goes_before_a_large_one_that_came_shortly_before(classes: int) -> None:
    queue = batcher(max_requests=1)
    large, soon, late = job_at(0, LARGE), job_at(0.01, classes=classes), job_at(0.02, classes=classes)
    for one in (large, soon, late):
        queue.put(one)
    assert take_all(queue) == [[soon], [large], [late]]


def test_requests_of_one_size_are_taken_as_they_came() -> None:
    queue = batcher(max_requests=1)
    jobs = [job_at(seconds, LARGE if large else 1) for large in (True, False) for seconds in (0, 0.001, 0.002)]
    for one in jobs:
        queue.put(one)
    assert take_all(queue) == [[one] for one in (*jobs[3:], *jobs[:3])]


@pytest.mark.parametrize("classes", [3, 4], ids=["of one kind", "of two kinds"])
def test_a_large_request_is_not_overtaken_forever(classes: int) -> None:
    """A small one comes every millisecond, and one is taken."""
    queue, taken = batcher(max_requests=1), list[Job]()
    large = job_at(0, LARGE)
    queue.put(large)
    for milliseconds in range(1, 30):
        queue.put(job_at(milliseconds / 1000, classes=classes))
        taken += queue.take(idle=True)
    assert 13 <= taken.index(large) <= 16


def test_a_batch_is_open_since_its_first_request_came_also_if_that_is_due_last() -> None:
    queue = batcher(max_elements=10**9, max_delay_seconds=60.0)
    large, small = job(LARGE), job()
    large.queued -= 60.0
    small.queued -= 59.99
    for one in (large, small):
        queue.put(one)
    assert queue.take(idle=False) == [small, large]


def test_a_busy_device_is_handed_full_batches_only() -> None:
    queue = batcher(max_elements=264)
    queue.put(job(2))  # 12 logits and 3 segments, which cost 120
    assert queue.take(idle=False) == []
    queue.put(job(2))
    assert len(queue.take(idle=False)) == 2


def test_a_busy_device_is_handed_a_batch_that_was_open_for_the_delay() -> None:
    queue = batcher(max_delay_seconds=0.01)
    one = job()
    queue.put(one)
    time.sleep(0.02)
    assert queue.take(idle=False) == [one]


def test_an_idle_device_waits_for_a_request() -> None:
    queue = batcher()
    one = job()
    threading.Timer(0.05, queue.put, [one]).start()
    queue.wait(30)
    assert queue.take(idle=True) == [one]


def test_a_job_passes_by_an_empty_queue_only() -> None:
    queue = batcher()
    assert queue.pass_by(job())
    assert len(queue) == 0
    queue.put(job())
    assert not queue.pass_by(job())
    queue.close()
    with pytest.raises(StoppingError):
        queue.pass_by(job())


def test_a_caller_that_has_gone_is_left_out() -> None:
    queue = batcher()
    gone, here = job(), job()
    queue.put(gone)
    queue.put(here)
    gone.leave(gone.callers[0])
    assert queue.take(idle=True) == [here]


def test_a_discarded_request_is_held_no_more() -> None:
    queue = batcher()
    gone, here, other = job(), job(), job(classes=4)
    for one in (gone, here, other):
        queue.put(one)
    queue.discard(gone)
    queue.discard(other)
    queue.discard(other)
    assert len(queue) == 1
    assert take_all(queue) == [[here]]
    queue.discard(here)


def test_work_whose_deadline_has_passed_is_not_started() -> None:
    queue = batcher()
    late, in_time = job(deadline=time.monotonic() - 1), job(deadline=time.monotonic() + 3600)
    queue.put(late)
    queue.put(in_time)
    assert queue.take(idle=True) == [in_time]
    with pytest.raises(ExpiredError):
        late.callers[0].wait(timeout_seconds=0)


def test_closed_takes_no_more_and_hands_out_what_waits() -> None:
    queue = batcher()
    one = job()
    queue.put(one)
    queue.close()
    with pytest.raises(StoppingError):
        queue.put(job())
    assert not queue.finished
    queue.wait(3600)
    assert queue.take(idle=True) == [one]
    queue.wait(3600)
    assert queue.take(idle=True) == []
    assert queue.finished
