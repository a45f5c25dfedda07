"""Turns: one thread at a time, and no interrupt leaves one taken."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lovasz.client.turn import Turn


def in_another_thread(turn: Turn, timeout: float = 0.0) -> tuple[str] | None:
    answers: list[tuple[str] | None] = []
    thread = threading.Thread(target=lambda: answers.append(turn.call(lambda: "done", timeout)))
    thread.start()
    thread.join()
    return answers[0]


def test_another_thread_has_to_wait_for_it() -> None:
    turn, here, others = Turn(), threading.get_ident(), []

    def work() -> int:
        others.append(in_another_thread(turn))
        others.append(in_another_thread(turn, timeout=0.01))
        return threading.get_ident()

    assert turn.call(work, timeout=1.0) == (here,)
    assert others == [None, None]
    assert in_another_thread(turn) == ("done",)
    assert turn.is_free


def test_it_is_free_after_an_error() -> None:
    turn = Turn()
    with pytest.raises(ZeroDivisionError):
        turn.call(lambda: 1 // 0)
    assert in_another_thread(turn) == ("done",)


@pytest.mark.parametrize("timeout", [0.0, 1.0])
def test_it_is_free_after_an_interrupt_that_came_when_it_was_taken(timeout: float) -> None:
    turn = Turn()

    class Interrupted:
        """A lock; Ctrl-C comes after it is taken, before its caller can note that."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.release = lock, lock.release

        def acquire(self, **options: Any) -> bool:
            turn._lock = self.lock
            assert self.lock.acquire(**options)
            raise KeyboardInterrupt

    turn._lock = Interrupted(turn._lock)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        turn.call(lambda: "never called", timeout)
    assert in_another_thread(turn) == ("done",)
