"""A rank whose data have ended: a thread takes part in the exchanges of its group, without data, until all have left.

The main thread may wait for something else meanwhile, such as the gradients of the other ranks in the ``join()`` of
DistributedDataParallel. Two threads never use a process group at the same time: the group is for the loss alone, and
the next call of this rank waits until the thread has ended.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, distributed

from lovasz.core.distributed import pixels
from lovasz.core.distributed.group import Group
from lovasz.core.distributed.header import exchange_without_data
from lovasz.spec import InvalidInput

SECONDS_AT_EXIT = 5
"""How long the interpreter waits for the other ranks to leave: the last exchange takes milliseconds."""

_TURN = timedelta(seconds=0.2)
"""How long the thread waits at a time inside torch; a thread that returns from there while the interpreter ends aborts
the process."""

_SETTLE_SECONDS = 0.1
"""How long gloo's own threads have at the exit to let go of the tensors of exchanges that are over. They need the
interpreter for it: one that asks for it while the interpreter ends aborts the process."""

_EXPECTED = "expected a gloo group for this loss alone: torch.distributed.new_group(backend='gloo')"

_ENDING = threading.Event()
"""Set where the interpreter ends and other ranks have not left: the threads stop."""


class _GroupOfThread(Group):
    """The group to the thread of a rank that has left, which the end of the interpreter may stop while it waits.

    Attributes:
        over: set once the thread has ended or stopped.
    """

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.over = threading.Event()

    def _all_gather(self, received: list[Tensor], own: Tensor) -> None:
        work = distributed.all_gather(received, own, group=self.process_group, async_op=True)
        while not work.is_completed():
            if _ENDING.is_set():
                self.over.set()
                threading.Event().wait()  # Keeps the process group: as it is freed, it would wait for the other ranks.
            with suppress(RuntimeError):  # Not yet completed; or failed, which the last wait raises.
                work.wait(_TURN)
        work.wait()


class _Absence:
    """The thread that stands in for this rank."""

    def __init__(self, given: Any, owner: object) -> None:
        group = _GroupOfThread(given)
        self.owner = ref(owner)
        self._over = group.over
        self._error: Exception | None = None
        # A daemon, so that a program that ends early does not wait for the other ranks.
        self._thread = threading.Thread(target=self._run, args=(group,), name="lovasz-left", daemon=True)
        self._thread.start()

    def _run(self, group: _GroupOfThread) -> None:
        try:
            while _follow(group):
                pass
        except Exception as error:
            self._error = error.with_traceback(None)  # Its frames keep the group.
        finally:
            group.over.set()

    def wait(self) -> None:
        """Waits until all ranks have left, or the exchange has failed."""
        self._thread.join()

    def is_over(self, until: float) -> bool:
        """Waits at most until a time for the thread to end or to stop."""
        return self._over.wait(max(0.0, until - time.monotonic()))

    def check(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"the joint loss failed after this rank had left: {self._error}") from self._error


_ABSENCES: WeakKeyDictionary[Any, _Absence] = WeakKeyDictionary()
"""By process group; of a rank that has left, until its next call."""

_AFTER_CALL: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()
"""By process group: how many collective calls it had seen at the end of this rank's last call."""


def leave(given: Any, owner: object) -> None:
    """Takes no part in further steps of the other ranks.

    Returns at once, unless this rank has left before and made no call since: then it first waits until all others have
    left, too.

    Args:
        given: the process group.
        owner: the loss that leaves.

    Raises:
        InvalidInput: the group is not for this loss alone, or its backend cannot be used by two threads.
        RuntimeError: the exchange failed while this rank was away the last time.
    """
    group = Group(given)
    if group.is_default:
        raise InvalidInput("group", f"got the default group for a loss that leaves; {_EXPECTED}")
    if not group.is_gloo:
        raise InvalidInput("group", f"got a group that is not of gloo alone for a loss that leaves; {_EXPECTED}")
    absence = _ABSENCES.get(group.process_group)
    if absence is not None and absence.owner() not in (None, owner):
        raise InvalidInput("group", f"got a group in which another loss has left; {_EXPECTED}")
    collectives = group.collectives
    if absence is None and _AFTER_CALL.get(group.process_group, collectives) != collectives:
        raise InvalidInput("group", f"got a group in which others communicate, too; {_EXPECTED}")
    finish(group.process_group)
    if not _ABSENCES:  # Registered once, however often ranks leave.
        atexit.unregister(_wait_at_exit)
        atexit.register(_wait_at_exit)
    _ABSENCES[group.process_group] = _Absence(given, owner)


def finish(process_group: Any) -> None:
    """If this rank has left a process group, waits until the others have, too.

    Raises:
        RuntimeError: the exchange failed meanwhile.
    """
    absence = _ABSENCES.get(process_group)
    if absence is not None:
        absence.wait()
        del _ABSENCES[process_group]
        _AFTER_CALL.pop(process_group, None)  # The thread made calls, too.
        absence.check()


@contextmanager
def present(group: Group) -> Iterator[None]:
    """Around a call in which this rank takes part."""
    finish(group.process_group)
    try:
        yield
    finally:
        _AFTER_CALL[group.process_group] = group.collectives


def _follow(group: Group) -> bool:
    """Takes part in a step of the other ranks; returns False if all have left."""
    sizes = exchange_without_data(group)
    if sizes:
        pixels.pass_on(group, sizes)
    return sizes != {}


def _wait_at_exit() -> None:
    """Gives the threads time to end; then stops them."""
    absences = list(_ABSENCES.values())
    for _ in range(2):
        until = time.monotonic() + SECONDS_AT_EXIT
        if all(absence.is_over(until) for absence in absences):
            break
        _ENDING.set()
    time.sleep(_SETTLE_SECONDS)
