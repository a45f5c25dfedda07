"""The ranks of one joint step, the states that a step and its ranks go through, and the room that they hold.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lovasz import wire
from lovasz.server.errors import OverloadedError, ServerError
from lovasz.server.schedule.admission import Permit
from lovasz.server.schedule.job import Caller, Job

STRAGGLER_SECONDS = 5.0
"""A step that waits for longer is logged, with the ranks that it waits for."""


class Run(NamedTuple):
    """A run, as the server knows it: trainings with different owners never meet, also if they have the same name.

    Attributes:
        owner: stands for the secret or the token's name of the training; empty if it has neither.
    """

    name: str
    owner: bytes = b""

    @classmethod
    def of(cls, joint: wire.Joint) -> Run:
        """The run of a rank, whose secret has been replaced by its owner (``Identity.sealed``)."""
        return cls(joint.run, joint.secret)


class Step(NamedTuple):
    """Names a joint step.

    A training and an evaluation count their steps separately: ``want_grad`` tells them apart. ``round`` says how many
    times its ranks have left the run.
    """

    run: Run
    number: int
    want_grad: bool
    round: int = 0

    @classmethod
    def of(cls, joint: wire.Joint, want_grad: bool) -> Step:
        return cls(Run.of(joint), joint.step, want_grad, joint.round)


class GroupState(enum.Enum):
    """What a group waits for, or how it ended."""

    WAITING = enum.auto()
    """For ranks."""
    COMPLETE = enum.auto()
    """All ranks are here; their job is queued, being computed, or done."""
    BROKEN = enum.auto()
    """Its ranks were refused."""
    DESERTED = enum.auto()
    """All its ranks left before it was complete."""


class SeatState(enum.Enum):
    """How far the call of one rank has come."""

    RECEIVING = enum.auto()
    """Its header is here."""
    ARRIVED = enum.auto()
    """Its payload is here, too."""
    LOST = enum.auto()
    """It left, or was replaced, before its group was complete."""
    DONE = enum.auto()
    """Its call needs the seat no more."""


@dataclass(eq=False)
class Seat:
    """One rank's place in a group, from its header to its answer.

    Attributes:
        call: the request that names the call: equal when the same call is retried; None if calls have no name.
        nbytes: bytes of its tensors.
        permit: room for them; until the group is complete, at least for the group's share, so that there is room for a
            rank that leaves and comes again.
        segments: of its request.
        cancel: ends the call.
        address: where the call came from; empty: unknown.
        caller: who waits; set while the state is ARRIVED.
        error: why the seat was lost.
        taken: when it was taken (``time.monotonic``).
    """

    group: Group
    joint: wire.Joint
    call: wire.Request | None
    nbytes: int
    segments: int
    permit: Permit
    cancel: Callable[[], object]
    address: str = ""
    state: SeatState = SeatState.RECEIVING
    caller: Caller | None = None
    error: ServerError | None = None
    taken: float = field(default_factory=time.monotonic)

    @property
    def completed(self) -> float | None:
        """When the group was complete (``time.monotonic``); None before."""
        return self.group.completed


@dataclass(eq=False, kw_only=True)
class Group:
    """The ranks of one step.

    Attributes:
        first: the request of the rank that came first, which those of the others have to fit.
        absent: ranks that have left the run; nobody waits for them.
        share: bytes that are reserved for each rank that has not come: those of the first rank that has images.
        permit: the room that is reserved for those ranks.
        deadline: until when the ranks wait for each other (``time.monotonic``).
        seats: by rank; those that are neither LOST nor DONE.
        job: what is computed once the group is complete, until the last rank is done.
        since: when the first rank came (``time.monotonic``), also if the ranks were asked to call again since then.
        completed: when the group was complete (``time.monotonic``); None before.
        error: why the group is broken.
        logged: whether it was logged that it waits.
    """

    step: Step
    first: wire.Request
    world_size: int
    absent: set[int]
    share: int
    permit: Permit
    deadline: float
    state: GroupState = GroupState.WAITING
    seats: dict[int, Seat] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    completed: float | None = None
    job: Job | None = None
    error: ServerError | None = None
    logged: bool = False

    @classmethod
    def begun_by(
        cls, request: wire.Request, absent: set[int], permit: Permit, since: float, timeout_seconds: float
    ) -> Group:
        """The group of the request that came first, with room for all its ranks; nobody has a seat yet."""
        joint = request.joint
        assert joint is not None
        return cls(
            step=Step.of(joint, request.want_grad),
            first=request,
            world_size=joint.world_size,
            absent=absent,
            share=request.tensor_bytes,
            permit=permit,
            deadline=since + timeout_seconds,
            since=since,
        )

    @property
    def ranks(self) -> int:
        """How many ranks have not left."""
        return self.world_size - len(self.absent)

    @property
    def missing(self) -> list[int]:
        """Ranks whose payload is awaited."""
        return [
            rank
            for rank in range(self.world_size)
            if rank not in self.absent and (rank not in self.seats or self.seats[rank].state is not SeatState.ARRIVED)
        ]

    def begins_to_straggle(self, now: float) -> bool:
        """Whether it has waited for long; true once."""
        if self.logged or now - self.since <= STRAGGLER_SECONDS:
            return False
        self.logged = True
        return True

    @property
    def is_full(self) -> bool:
        """Whether all ranks that have not left have come, with their payloads."""
        return len(self.seats) == self.ranks and not self.missing

    def take_seat(
        self, request: wire.Request, call: wire.Request | None, cancel: Callable[[], object], address: str = ""
    ) -> Seat:
        """Gives a rank its seat.

        Raises:
            OverloadedError: the rank needs more than its share, and there is no room.
        """
        joint = request.joint
        assert joint is not None
        nbytes = request.tensor_bytes
        permit = self.permit.split(self.share)
        try:
            if not self.share:
                self._share_out(nbytes)
            permit.resize(max(nbytes, self.share))
        except OverloadedError:
            self.permit.absorb(permit)
            raise
        seat = self.seats[joint.rank] = Seat(self, joint, call, nbytes, request.segments, permit, cancel, address)
        return seat

    def _share_out(self, nbytes: int) -> None:
        """All ranks before had no images: takes room of this many bytes for them, and for each rank that comes later.

        Raises:
            OverloadedError: there is no room; some may have been taken.
        """
        self.permit.resize(nbytes * (self.ranks - len(self.seats) - 1))
        for seat in self.seats.values():
            seat.permit.resize(nbytes)
        self.share = nbytes

    def room_with(self, request: wire.Request) -> tuple[int, int]:
        """The bytes that the group needs with one more request: for the ranks that are here, and for those missing."""
        share = self.share or request.tensor_bytes
        held = [max(seat.nbytes, share) for seat in self.seats.values()]
        held.append(request.tensor_bytes)
        return sum(held), share * (self.ranks - len(held))

    def leave(self, rank: int) -> None:
        """A rank that has not come has left the run."""
        self.absent.add(rank)
        self.permit.split(self.share).release()

    def take_back(self, rank: int, permit: Permit) -> None:
        """A rank that had left the run comes again.

        Args:
            permit: room for its share.
        """
        self.absent.remove(rank)
        self.permit.absorb(permit)

    def lose(self, seat: Seat, error: ServerError) -> None:
        """A rank leaves before the group is complete: its share waits for it to come again."""
        del self.seats[seat.joint.rank]
        seat.state, seat.error = SeatState.LOST, error
        if seat.caller is not None:
            seat.caller.refuse(error)
        if self.state is GroupState.WAITING:
            seat.permit.resize(self.share)
            self.permit.absorb(seat.permit)

    def complete(self) -> Job:
        """All ranks are here: returns what is to be computed. Each rank now holds no more room than it needs."""
        seats = [self.seats[rank] for rank in sorted(self.seats)]
        for seat in seats:
            seat.permit.resize(seat.nbytes)
        self.state, self.completed = GroupState.COMPLETE, time.monotonic()
        callers = tuple(seat.caller for seat in seats if seat.caller is not None)
        self.job = Job(callers, self.first.loss, self.first.want_grad)
        return self.job

    def refuse(self, error: ServerError) -> None:
        """Answers all ranks with an error, those that still send as soon as they have sent."""
        self.state, self.error = GroupState.BROKEN, error
        for seat in self.seats.values():
            if seat.caller is not None:
                seat.caller.refuse(error)

    def vacate(self, seat: Seat) -> None:
        """A call needs its seat no more; with the last one, the group lets go of the job and its tensors."""
        if self.seats.get(seat.joint.rank) is seat:
            del self.seats[seat.joint.rank]
            seat.state = SeatState.DONE
        seat.caller = None
        if not self.seats:
            self.job = None
