"""Answers that are kept for a while, for ranks that lost theirs and ask again.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from lovasz import wire
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.server.schedule.admission import Permit
from lovasz.server.schedule.job import Answer
from lovasz.server.schedule.joint.group import Run

KEPT_SECONDS = 15.0
"""How long an answer is kept after it was sent, unless its rank comes with another call before."""
ASK_AGAIN_SECONDS = 2.0
"""After this, a rank that lost its answer with its connection has asked for it again: clients do within 1.2 s."""
LOOK_SECONDS = 0.05
"""How often a server that stops looks whether answers are still expected to be asked for."""


@dataclass(eq=False)
class Kept:
    """An answer that its rank may ask for again, with the memory that holds its gradient.

    Attributes:
        users: calls that are being answered with it.
        sent: when a call was last answered with it (``time.monotonic``).
        dropped: nobody can ask for it any more; its memory is given back with its last user.
    """

    joint: wire.Joint
    answer: Answer
    staging: AnyStaging
    permit: Permit
    users: int = 1
    sent: float = 0.0
    dropped: bool = False

    @property
    def expected_until(self) -> float:
        """How long its rank may be expected to ask for it (``time.monotonic``)."""
        return math.inf if self.users else self.sent + ASK_AGAIN_SECONDS

    def leave(self) -> None:
        """A call was answered with it."""
        self.users -= 1
        self.sent = time.monotonic()
        self.permit.release_request()
        self._release_if_unused()

    def drop(self) -> None:
        self.dropped = True
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self.dropped and not self.users:
            self.staging.release()
            self.permit.release()


class KeptAnswers:
    """The answers that can be asked for, by the call that they answer."""

    def __init__(self) -> None:
        self._answers: dict[wire.Request, Kept] = {}
        self._calls: dict[tuple[Run, int], set[wire.Request]] = {}
        """The calls of each rank, by run and rank."""

    def __len__(self) -> int:
        return len(self._answers)

    def take(self, call: wire.Request) -> Kept | None:
        """The answer to a call that comes again, to be given back by :meth:`Kept.leave`; None if there is none."""
        kept = self._answers.get(call)
        if kept is not None:
            kept.users += 1
        return kept

    def keep(self, call: wire.Request | None, kept: Kept) -> None:
        """Keeps an answer; that of a call without a name only as long as it is sent, as nobody can ask for it."""
        if call is None:
            kept.drop()
        else:
            self._answers[call] = kept
            self._calls.setdefault(_rank_of(kept.joint), set()).add(call)

    def acknowledge(self, joint: wire.Joint, *, leaves: bool = False) -> None:
        """Drops the answers to earlier calls of a rank that comes with another call.

        It has received them if it makes one call after the other (``joint.blocking``). If several at a time, it may
        still ask for those that were sent a moment ago.

        Args:
            leaves: it has no further calls.
        """
        now = time.monotonic()
        for call in list(self._calls.get(_rank_of(joint), ())):
            if leaves or joint.blocking or self._answers[call].expected_until < now:
                self._drop(call)

    @property
    def expected_until(self) -> float:
        """How long ranks may be expected to ask for their answers (``time.monotonic``); -inf: none is kept."""
        return max((kept.expected_until for kept in self._answers.values()), default=-math.inf)

    def drop_old(self) -> None:
        """Drops the answers that were kept for long enough."""
        since = time.monotonic() - KEPT_SECONDS
        for call in [call for call, kept in self._answers.items() if not kept.users and kept.sent < since]:
            self._drop(call)

    def drop_unused(self, name: str | None) -> bool:
        """Drops the answers that are not being sent; says whether there were any.

        Args:
            name: only those whose room counts for this name; None: all.
        """
        unused = [
            call
            for call, kept in self._answers.items()
            if not kept.users and (name is None or kept.permit.name == name)
        ]
        for call in unused:
            self._drop(call)
        return bool(unused)

    def _drop(self, call: wire.Request) -> None:
        kept = self._answers.pop(call)
        rank = _rank_of(kept.joint)
        self._calls[rank].discard(call)
        if not self._calls[rank]:
            del self._calls[rank]
        kept.drop()


def _rank_of(joint: wire.Joint) -> tuple[Run, int]:
    return Run.of(joint), joint.rank
