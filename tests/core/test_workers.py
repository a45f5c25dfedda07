"""The threads of compiled loops: none runs on for a call that has ended, and a call does without them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from lovasz.core.backends.numba.workers import Workers

Tasks = npt.NDArray[np.int64]
COUNT = 40


@pytest.fixture
def workers() -> Workers:
    return Workers()


class Interrupted(BaseException):
    pass


class Loop:
    """Claims numbered tasks as compiled loops do, and notes who did which."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.done: list[int] = []
        self.running = 0
        self._lock = threading.Lock()

    def __call__(self, tasks: Tasks, me: int) -> None:
        with self._lock:
            self.running += 1
        while True:
            with self._lock:
                task = int(tasks[0])
                tasks[0] += 1
                if task >= self.count:
                    self.running -= 1
                    return
                self.done.append(task)
            self.work(task, me)

    def work(self, task: int, me: int) -> None:
        pass


def own(thread: int) -> dict[str, int]:
    return {"me": thread}


def test_all_tasks_are_done_once(workers: Workers) -> None:
    for threads in (1, 2, 4, 3):
        loop = Loop()
        workers.run(loop, threads, own=own)
        assert sorted(loop.done) == list(range(COUNT))
        assert loop.running == 0
    assert workers.size == 3


def test_without_threads_the_caller_does_all(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    loop = Loop()
    workers.run(loop, 4, own=own)
    assert sorted(loop.done) == list(range(COUNT))
    monkeypatch.undo()
    workers.run(Loop(), 4, own=own)
    assert workers.size == 3


@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_ends_all_threads_before_it_is_raised(workers: Workers, who: int) -> None:
    class Fails(Loop):
        both = threading.Barrier(2)

        def work(self, task: int, me: int) -> None:
            if task < 2:
                self.both.wait(60)
                if me == who:
                    with self._lock:
                        self.running -= 1
                    raise Interrupted

    loop = Fails(1 << 60 if who == 0 else COUNT)  # Nobody can do so many: they have to be taken away.
    with pytest.raises(Interrupted):
        workers.run(loop, 2, own=own)
    assert loop.running == 0
    after = Loop()
    workers.run(after, 2, own=own)
    assert sorted(after.done) == list(range(COUNT))


def test_nothing_of_a_call_is_kept(workers: Workers) -> None:
    """Neither by the exception of a helper, nor by a job that no helper has taken."""
    begun, release = threading.Event(), threading.Event()

    def fails(tasks: Tasks, me: int, array: Tasks) -> None:
        if me:
            raise Interrupted

    def waits(tasks: Tasks, me: int, array: Tasks) -> None:
        if me:
            begun.set()
            release.wait(60)

    gc.disable()
    try:
        array = np.zeros(3, np.int64)
        gone = [weakref.ref(array)]
        failed = False
        while not failed:  # Until a helper takes its job in time.
            try:
                workers.run(fails, 2, own=own, array=array)
            except Interrupted:
                failed = True
        slow = threading.Thread(target=workers.run, args=(waits, 2), kwargs={"own": own, "array": None})
        slow.start()
        while not begun.wait(0.01) and slow.is_alive():
            pass
        array = np.zeros(3, np.int64)
        gone.append(weakref.ref(array))
        workers.run(lambda tasks, me, array: None, 2, own=own, array=array)
        del array
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
        release.set()


def test_a_helper_that_is_busy_with_another_call_is_not_waited_for(workers: Workers) -> None:
    begun, release = threading.Event(), threading.Event()

    class Slow(Loop):
        def work(self, task: int, me: int) -> None:
            begun.set()
            release.wait(60)

    slow = threading.Thread(target=workers.run, args=(Slow(), 2), kwargs={"own": own})
    slow.start()
    assert begun.wait(60)
    quick = Loop()
    workers.run(quick, 2, own=own)
    assert sorted(quick.done) == list(range(COUNT))
    release.set()
    slow.join(60)
    assert not slow.is_alive()


INTERRUPTS = """
import random, signal
import torch
from lovasz.core import LovaszSoftmax, compute

torch.set_num_threads(2)
random.seed(1)
generator = torch.Generator().manual_seed(1)
logits, labels = torch.randn(2, 19, 96, 96, generator=generator), torch.randint(0, 19, (2, 96, 96), generator=generator)
expected = compute(logits, labels, LovaszSoftmax())

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = 0
for _ in range(20_000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
        result = compute(logits.clone(), labels.clone(), LovaszSoftmax())
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert result.loss == expected.loss
        assert torch.equal(result.grad, expected.grad)
    except KeyboardInterrupt:
        interrupts += 1
        if interrupts == 500:
            break
signal.setitimer(signal.ITIMER_REAL, 0)
assert compute(logits, labels, LovaszSoftmax()).loss == expected.loss
"""

AFTER_THE_MAIN_THREAD = """
import threading, time
import torch
from lovasz.core import LovaszSoftmax, compute

torch.set_num_threads(2)

def train():
    threading.main_thread().join()
    for _ in range(3):
        print(compute(torch.zeros(2, 3, 300, 300), torch.zeros(2, 300, 300), LovaszSoftmax()).loss)

threading.Thread(target=train).start()
"""


def test_interrupts_at_any_point_leave_nothing_behind() -> None:
    """As of a signal's handler: memory was written to after it had been freed, or the next call waited for ever."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_thread_goes_on_after_the_main_thread_has_ended() -> None:
    command = [sys.executable, "-c", AFTER_THE_MAIN_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.66666") == 3, done.stdout + done.stderr
