"""Times contenders in turn, in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.progress import Progress

SETTLE_SECONDS = 0.02
"""Pause before each block, or threads that still spin for the last contender would use the cores of the next one."""


@dataclass
class Timed:
    """One contender of a race.

    Attributes:
        call: what is timed.
        computed: after a call, the seconds that its server computed; None if there is no server.
        calls: in a block; 0 for as many as the race says, after an untimed one.
        max_turns: in how many turns it takes part.
        seconds: of its calls.
        answer: of its last call.
    """

    call: Callable[[], Any]
    computed: Callable[[], float] | None = None
    calls: int = 0
    max_turns: int = 1 << 30
    seconds: list[float] = field(default_factory=list)
    computed_seconds: list[float] = field(default_factory=list)
    answer: Any = None

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def block(self, calls: int) -> None:
        """Consecutive calls, after an untimed one: caches and threads are cold after the other contenders."""
        time.sleep(SETTLE_SECONDS)
        if not self.calls:
            self.answer = self.call()
        for _ in range(self.calls or calls):
            self.answer = None  # A training step, too, frees the last gradient before it computes the next.
            start = time.perf_counter()
            self.answer = self.call()
            self.seconds.append(time.perf_counter() - start)
            if self.computed is not None:
                self.computed_seconds.append(self.computed())


def race(entered: dict[str, Timed], turns: int, calls: int, progress: Progress) -> None:
    """Lets the contenders take turns in blocks, so that a slow moment of the machine affects all of them."""
    for turn in range(turns):
        for name, timed in entered.items():
            if turn < timed.max_turns:
                progress(f"turn {turn + 1} of {turns}, {name}")
                timed.block(calls)
