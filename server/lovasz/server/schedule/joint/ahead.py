"""Room for requests that have not come yet, the missing ranks of joint steps: never all that there is.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from lovasz import wire
from lovasz.server.errors import NoBytesLeftError, NoRequestsLeftError, OverloadedError, TooLargeError
from lovasz.server.schedule.admission import Admission, Permit
from lovasz.server.schedule.joint.group import Group, Run, Seat
from lovasz.server.settings import format_bytes

_RETRY_SECONDS = 1.0


class Holder(NamedTuple):
    """Who holds room that is reserved ahead: a run, a caller, or all runs together."""

    kind: Literal["run", "caller", "all runs"]
    name: str = ""
    owner: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind


_ALL = Holder("all runs")


class AheadPermit(Permit):
    """Room for requests that have not come. What :meth:`split` takes out of it belongs to one that has."""

    def __init__(self, room: AheadRoom, admission: Admission, holders: tuple[Holder, ...], name: str) -> None:
        super().__init__(admission, 0, 0, name)
        self._room, self._holders = room, holders

    def resize(self, nbytes: int) -> None:
        """As ``Permit.resize``, also within the limits of :class:`AheadRoom`."""
        self._room.check(nbytes - self._nbytes, 0, self._holders)
        super().resize(nbytes)

    def _hold(self, nbytes: int, requests: int) -> None:
        self._room.count(nbytes - self._nbytes, requests - self._requests, self._holders)
        super()._hold(nbytes, requests)


class AheadRoom:
    """Counts what is reserved ahead. One run, and one caller, may have a share of all room; all together half of the
    rest, too."""

    def __init__(self, admission: Admission, share: float, max_segments: int) -> None:
        """Nothing is reserved yet.

        Args:
            share: of one run, or one caller, in (0, 1].
            max_segments: the most that the ranks of a step have together, if images are scored.
        """
        self._admission, self._share, self._max_segments = admission, share, max_segments
        self._bytes: Counter[Holder] = Counter()
        self._requests: Counter[Holder] = Counter()

    def reserve(self, nbytes: int, requests: int, run: Run, address: str, name: str = "") -> AheadPermit:
        """Takes room for several requests of one size, the first of which is here.

        Args:
            nbytes: of each.
            address: where the first came from; empty: nobody knows.
            name: that of its token, for ``Admission.reserve``.

        Raises:
            TooLargeError: one run may not have that much.
            OverloadedError: there is no such room at the moment.
            StartingError, StoppingError: as ``Admission.reserve``.
        """
        holders: tuple[Holder, ...] = (_ALL, Holder("run", *run))
        if address:
            holders = (*holders, Holder("caller", address))
        missing = requests - 1
        self._check_size(nbytes * requests, requests, nbytes * missing, missing, name)
        self.check(nbytes * missing, missing, holders)
        permit = AheadPermit(self, self._admission, holders, name)
        permit.absorb(self._admission.reserve(nbytes * requests, requests, name))
        return permit

    def seat(
        self,
        group: Group,
        request: wire.Request,
        call: wire.Request | None,
        cancel: Callable[[], object],
        address: str,
    ) -> Seat:
        """``Group.take_seat``.

        Raises:
            TooLargeError: the group can never have room for this rank, or would take too long.
            OverloadedError: the rank needs more than its share, and there is no room at the moment.
        """
        self._check_segments(group, request)
        try:
            return group.take_seat(request, call, cancel, address)
        except OverloadedError as error:
            raise self._never_fits(group, request) or error from None

    def _check_segments(self, group: Group, request: wire.Request) -> None:
        """Each request has no more than ``max_segments``; without ``per_image`` the whole step has as many as one."""
        if not request.loss.scores_images:
            return
        ranks, segments = len(group.seats) + 1, sum(seat.segments for seat in group.seats.values()) + request.segments
        if segments > self._max_segments:
            raise TooLargeError(
                f"{ranks} of {group.ranks} ranks have {segments} segments (classes x images with per_image, over all "
                f"Lovász terms); the server computes {self._max_segments} at most (--max-segments)"
            )

    def _never_fits(self, group: Group, request: wire.Request) -> TooLargeError | None:
        """The refusal if a group with one more request can never have room, also if there is nothing else."""
        here, ahead = group.room_with(request)
        try:
            missing = group.ranks - len(group.seats) - 1
            self._check_size(here + ahead, group.ranks, ahead, missing, group.permit.name)
        except TooLargeError as error:
            return error
        return None

    def _check_size(self, nbytes: int, requests: int, missing_bytes: int, missing: int, name: str) -> None:
        """Whether a step can ever have room.

        Args:
            nbytes: of all its ranks.
            requests: how many they are.
            missing_bytes: of those that have not come.
            missing: how many have not come.

        Raises:
            TooLargeError: it cannot, or one run may not have that much for ranks that are missing.
        """
        self._admission.check_size(nbytes, requests, name)
        budget, most = self._admission.budget_bytes, self._admission.max_requests
        if missing > self._share * most or missing_bytes > self._share * budget:
            ranks, are = ("rank", "is") if missing == 1 else ("ranks", "are")
            raise TooLargeError(
                f"{missing} {ranks} with {format_bytes(missing_bytes)} {are} missing; those of one run may hold "
                f"{self._share:g} (--joint-share) of {most} requests (--max-requests) and of {format_bytes(budget)} "
                "(--memory-budget)"
            )

    def check(self, nbytes: int, requests: int, holders: tuple[Holder, ...]) -> None:
        """Whether so much more may be reserved.

        Raises:
            OverloadedError: it may not at the moment.
        """
        for holder in holders:
            share = (1 + self._share) / 2 if holder is _ALL else self._share
            if self._requests[holder] + requests > share * self._admission.max_requests:
                raise NoRequestsLeftError(
                    f"{self._requests[holder]} missing ranks of {holder} hold a request; {requests} more would be "
                    "needed (--joint-share of --max-requests)",
                    _RETRY_SECONDS,
                )
            if self._bytes[holder] + nbytes > share * self._admission.budget_bytes:
                raise NoBytesLeftError(
                    f"the missing ranks of {holder} hold {format_bytes(self._bytes[holder])}; {format_bytes(nbytes)} "
                    "more would be needed (--joint-share of --memory-budget)",
                    _RETRY_SECONDS,
                )

    def count(self, nbytes: int, requests: int, holders: tuple[Holder, ...]) -> None:
        """So much more is reserved, or less."""
        for holder in holders:
            self._bytes[holder] += nbytes
            self._requests[holder] += requests
            if not self._bytes[holder] and not self._requests[holder]:
                del self._bytes[holder], self._requests[holder]
