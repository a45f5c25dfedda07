"""Finds runs whose ranks wait for each other at different steps, so that none of these steps can be completed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import Group, Run, Seat, SeatState

GRACE_SECONDS = 1.0
"""How long they must have waited: calls of a process that has just ended may not be gone yet."""


def out_of_step(waiting: Iterable[Group], attendance: Attendance, now: float) -> Iterator[list[Group]]:
    """The groups of each such run.

    Each rank must have said that it makes no other call while it waits. Of several calls of a rank the last one counts,
    and none from before its training was restarted: the server may not know yet that the host of such a call is gone.

    Args:
        waiting: all groups that wait.
        now: ``time.monotonic()``.
    """
    groups_of: defaultdict[tuple[Run, int], list[Group]] = defaultdict(list)
    for group in waiting:
        groups_of[group.step.run, group.world_size].append(group)
    for (run, world_size), groups in groups_of.items():
        if len(groups) < 2:
            continue
        seats: dict[int, Seat] = {}
        for seat in sorted((seat for group in groups for seat in group.seats.values()), key=lambda seat: seat.taken):
            if seat.taken >= attendance.since(run):
                seats[seat.joint.rank] = seat
        absent = set.intersection(*(group.absent for group in groups))
        is_certain = all(
            seat.joint.blocking and seat.state is SeatState.ARRIVED and now - seat.taken >= GRACE_SECONDS
            for seat in seats.values()
        )
        if is_certain and len(seats.keys() | absent) == world_size:
            yield [group for group in groups if any(seat.group is group for seat in seats.values())]
