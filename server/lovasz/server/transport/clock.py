"""Times a call, phase by phase."""

from __future__ import annotations

import time

from lovasz.server.observe.metrics import Phase
from lovasz.server.schedule.job import Answer
from lovasz.spec import Timing


class CallClock:
    """Knows which phase a call is in, and how long each phase before it took.

    Attributes:
        phase: the current one.
        started: when the call began (``time.monotonic``).
        seconds: of the phases that have ended.
        began: when each phase began (``time.monotonic``).
    """

    def __init__(self, began: float | None = None) -> None:
        """Begins to receive.

        Args:
            began: when the call began (``time.monotonic``); None: now.
        """
        self.phase = Phase.RECEIVE
        self.started = self._since = time.monotonic() if began is None else began
        self.seconds: dict[Phase, float] = {}
        self.began = {self.phase: self.started}

    def enter(self, phase: Phase, at: float | None = None) -> None:
        """Ends the current phase and begins another.

        Args:
            at: when that was (``time.monotonic``); None: now.
        """
        at = time.monotonic() if at is None else max(self._since, at)
        self.seconds[self.phase] = at - self._since
        self.phase = phase
        self._since = self.began[phase] = at

    def skip_to(self, phase: Phase) -> None:
        """Begins another phase; the time of the current one does not count."""
        self.phase = phase
        self._since = self.began[phase] = time.monotonic()

    def failed(self, batch_started: float | None) -> None:
        """Waiting for the device, or its computation, failed.

        Args:
            batch_started: when the request's batch was started; None if it was not.
        """
        if self.phase is Phase.QUEUE and batch_started is not None:
            self.enter(Phase.COMPUTE, batch_started)

    def answered(self, answer: Answer) -> None:
        """The device has answered; sending begins."""
        self.enter(Phase.COMPUTE, answer.started)
        self.seconds[Phase.COMPUTE], self.seconds[Phase.COPY] = answer.compute_seconds, answer.copy_seconds
        self.began[Phase.COPY] = self._since + answer.compute_seconds
        self.skip_to(Phase.SEND)

    def stop(self) -> float:
        """Ends the last phase; returns the seconds that the call took."""
        now = time.monotonic()
        self.seconds[self.phase] = now - self._since
        return now - self.started

    def timing(self, answer: Answer) -> Timing:
        """What the caller is told."""
        return Timing(
            receive_seconds=self.seconds.get(Phase.RECEIVE, 0.0),
            queue_seconds=self.seconds.get(Phase.QUEUE, 0.0),
            compute_seconds=answer.compute_seconds,
            batch_requests=answer.batch_requests,
            joint_wait_seconds=self.seconds.get(Phase.JOINT, 0.0),
            copy_seconds=answer.copy_seconds,
        )
