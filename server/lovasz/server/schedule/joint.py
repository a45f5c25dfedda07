"""Brings the requests of all ranks of a step together, and keeps their answers for a while; does not compute them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from lovasz import wire
from lovasz.server.config import format_bytes
from lovasz.server.errors import (
    AbandonedError,
    JointBrokenError,
    JointMismatchError,
    OverloadedError,
    ServerError,
    StoppingError,
    TooLargeError,
    fresh,
)
from lovasz.server.memory.staging import Staging
from lovasz.server.observe.metrics import Metrics
from lovasz.server.observe.waiting_steps import WaitingStep
from lovasz.server.schedule.admission import Admission, Permit
from lovasz.server.schedule.batcher import Answer, Batcher, Entry
from lovasz.spec import WeightedSum

_log = logging.getLogger(__name__)

KEPT_SECONDS = 15.0
"""An answer is kept for so long after it was sent, for a rank that has lost it; or until that rank comes with its next
step."""
STRAGGLER_SECONDS = 5.0
"""A step that waits for longer is logged, with the ranks that it waits for."""
_NAMED_RANKS = 20

Key: TypeAlias = tuple[str, int, bool]
"""Run, step, and whether gradients are wanted: a training and an evaluation count their steps apart."""


@dataclass(eq=False)
class Kept:
    """An answer that its rank may ask for again, with the memory that its gradient lies in.

    Attributes:
        users: calls that are being answered with it.
        dropped: it cannot be asked for; its memory goes with its last user.
    """

    joint: wire.Joint
    answer: Answer
    staging: Staging
    permit: Permit
    users: int = 0
    until: float = 0.0
    dropped: bool = False

    def drop_if_unused(self) -> None:
        if self.dropped and not self.users:
            self.staging.release()
            self.permit.release()


@dataclass(eq=False)
class Seat:
    """One rank's place in a group, from its header to its answer.

    Attributes:
        call: as it was asked for, the same when that is tried again; None if it cannot be told from another one.
        nbytes: what its tensors take.
        permit: room for them; until its group is complete, for the share at least, so that the room is there for a rank
            that comes again.
        cancel: ends the call.
        entry: its request; None until its payload has come, and once it has left.
    """

    group: Group
    joint: wire.Joint
    call: wire.Request | None
    nbytes: int
    permit: Permit
    cancel: Callable[[], object]
    entry: Entry | None = None
    lost: ServerError | None = None


@dataclass(eq=False)
class Group:
    """The ranks of one step.

    Attributes:
        share: bytes that are reserved for each rank that has not come.
        permit: the room that is reserved for those.
        broken: why it will not be completed.
        logged: that it waits.
    """

    first: wire.Request
    key: Key
    world_size: int
    share: int
    permit: Permit
    deadline: float
    seats: dict[int, Seat] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    complete: float | None = None
    broken: ServerError | None = None
    logged: bool = False

    @property
    def is_there(self) -> bool:
        """All ranks have come, with their payloads."""
        return len(self.seats) == self.world_size and all(seat.entry is not None for seat in self.seats.values())

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.seats or self.seats[rank].entry is None]

    def waits(self, now: float) -> WaitingStep:
        run, step, _ = self.key
        missing = self.missing
        text = _ranks_text(missing)
        return WaitingStep(run, step, now - self.since, self.world_size, text, len(missing), missing[0])


class JointTable:
    """The groups that wait for ranks.

    The first arrival reserves room for all ranks, so that groups never wait for each other's room. A rank that leaves
    before its group is complete frees its seat; a group that all have left is gone.
    """

    def __init__(self, admission: Admission, batcher: Batcher, metrics: Metrics, timeout_seconds: float) -> None:
        self._admission, self._batcher, self._metrics = admission, batcher, metrics
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._waiting: dict[Key, Group] = {}
        self._seats: dict[wire.Request, Seat] = {}
        self._kept: dict[wire.Request, Kept] = {}
        admission.reclaim = self._reclaim

    @property
    def groups(self) -> int:
        """Groups that wait for ranks."""
        return len(self._waiting)

    @property
    def waiting_ranks(self) -> int:
        """Ranks that wait for others."""
        with self._changed:
            return sum(len(group.seats) for group in self._waiting.values())

    def waiting_steps(self) -> list[WaitingStep]:
        """The groups that wait, the longest first."""
        now = time.monotonic()
        with self._changed:
            groups = sorted(self._waiting.values(), key=lambda group: group.since)
            return [group.waits(now) for group in groups]

    @property
    def kept(self) -> int:
        """Answers that are kept."""
        return len(self._kept)

    def join(self, request: wire.Request, cancel: Callable[[], object]) -> Seat | Kept:
        """Takes a seat; or the answer, if the call was answered before. Both are to be given back by :meth:`leave`.

        Args:
            cancel: ends this call, which may still be receiving, when the same call has come again.

        Raises:
            JointMismatchError: it does not fit the ranks that wait.
            OverloadedError, TooLargeError, StoppingError: as ``Admission.reserve``, for all ranks together.
        """
        joint = request.joint
        assert joint is not None
        call = replace(request, shared=None) if joint.call else None
        with self._changed:
            until = time.monotonic() + self._timeout_seconds
            while call is not None and (before := self._seats.get(call)) is not None:
                if before.group.complete is None:  # The group stays, also if it has no other rank.
                    self._lose(before, AbandonedError("the same call came again"), closing=False)
                    if before.entry is None:  # Its payload may stall.
                        before.cancel()
                elif not self._changed.wait(until - time.monotonic()):
                    raise JointBrokenError("the same call is still being computed")
            kept = None if call is None else self._kept.get(call)
            if kept is not None:
                kept.users += 1
                return kept
            key = joint.run, joint.step, request.want_grad
            group = self._waiting.get(key)
            if group is None:
                group = self._open(key, request)
            else:
                _check_fits(group, request)
            nbytes = request.payload_bytes + request.grad_bytes
            seat = Seat(group, joint, call, nbytes, group.permit.split(group.share), cancel)
            try:
                seat.permit.resize(max(nbytes, group.share))
            except OverloadedError as error:
                group.permit.absorb(seat.permit)
                refusal = self._never_fits(group, nbytes) or error
                self._break(group, refusal, "overloaded")
                raise refusal from None
            group.seats[joint.rank] = seat
            if call is not None:
                self._seats[call] = seat
            self._acknowledge(joint)
            return seat

    def arrive(self, seat: Seat, entry: Entry) -> None:
        """The payload is there; with the last one, the group is queued.

        Raises:
            JointBrokenError, AbandonedError, StoppingError: the group, or the seat, is gone.
        """
        with self._changed:
            group = seat.group
            lost = seat.lost or group.broken
            if lost is not None:
                raise fresh(lost)
            seat.entry = entry
            if not group.is_there:
                return
            del self._waiting[group.key]
            group.complete = time.monotonic()
            seats = [group.seats[rank] for rank in range(group.world_size)]
            joined = tuple(one.entry for one in seats if one.entry is not None)
            for one, member in zip(seats, joined, strict=True):
                one.permit.resize(one.nbytes)
                member.joined = joined
            self._metrics.joint_groups.labels("completed").inc()
            if group.complete - group.since > STRAGGLER_SECONDS:
                self._log_wait("a joint step waited", group, last_rank=seat.joint.rank)
        joined[0].queued = time.monotonic()
        try:
            self._batcher.put(joined[0])
        except StoppingError as error:
            for member in joined:
                if member.future.set_running_or_notify_cancel():
                    member.future.set_exception(error)

    def wait(self, seat: Seat, staging: Staging) -> Kept:
        """Waits for the other ranks and the computation, and gives the seat back.

        Args:
            staging: the tensors; from now on they belong to the answer, unless an error is raised.

        Returns:
            The answer, to be given back by :meth:`leave` in place of the seat.

        Raises:
            JointBrokenError: a rank is missing after the timeout, or cannot be computed with.
            CancelledError: all callers have left.
        """
        group, entry = seat.group, seat.entry
        assert entry is not None
        try:
            answer = entry.wait(max(0.0, group.deadline - time.monotonic()))
        except FutureTimeoutError:
            with self._changed:
                if group.complete is None and group.broken is None and seat.lost is None:
                    self._break(group, JointBrokenError(self._missing_text(group)), "timeout")
            answer = entry.wait()
        with self._changed:
            kept = Kept(seat.joint, answer, staging, seat.permit, users=1, dropped=seat.call is None)
            if seat.call is not None:
                self._kept[seat.call] = kept
            self._vacate(seat)
        return kept

    def give_up(self, seat: Seat) -> None:
        """The caller of a seat has gone."""
        with self._changed:
            complete, entry = seat.group.complete is not None, seat.entry
            if not complete:
                self._lose(seat, AbandonedError("the caller went away"))
        if complete and entry is not None:
            entry.cancel()

    def leave(self, place: Seat | Kept) -> None:
        """The call has ended; the tensors of a seat are held no more."""
        with self._changed:
            if isinstance(place, Kept):
                place.users -= 1
                place.until = time.monotonic() + KEPT_SECONDS
                place.permit.release_request()
                place.drop_if_unused()
                return
            if place.group.complete is None:
                self._lose(place, AbandonedError("the caller went away"))
            self._vacate(place)
            place.permit.release()

    def stop(self) -> None:
        """The missing ranks will not come any more."""
        with self._changed:
            for group in list(self._waiting.values()):
                text = f"the server is stopping, and {self._missing_text(group, waited=False)}"
                self._break(group, StoppingError(text), "stopping")

    def check(self) -> None:
        """A chore: drops answers that were kept for long enough, and logs whom steps wait for."""
        now = time.monotonic()
        with self._changed:
            for call in [call for call, kept in self._kept.items() if not kept.users and kept.until < now]:
                self._drop(call)
            for group in self._waiting.values():
                if not group.logged and now - group.since > STRAGGLER_SECONDS:
                    group.logged = True
                    self._log_wait("a joint step waits", group, missing=_ranks_text(group.missing))

    def _open(self, key: Key, request: wire.Request) -> Group:
        assert request.joint is not None
        share, world_size = request.payload_bytes + request.grad_bytes, request.joint.world_size
        permit = self._admission.reserve(world_size * share, world_size)
        group = Group(request, key, world_size, share, permit, time.monotonic() + self._timeout_seconds)
        self._waiting[key] = group
        return group

    def _never_fits(self, group: Group, nbytes: int) -> TooLargeError | None:
        """Says so if the group with one more seat of so many bytes is larger than the whole budget."""
        others = [max(seat.nbytes, group.share) for seat in group.seats.values()]
        needed = nbytes + sum(others) + group.share * (group.world_size - len(others) - 1)
        if needed <= self._admission.budget_bytes:
            return None
        return TooLargeError(
            f"the tensors of {group.world_size} ranks take {format_bytes(needed)} with their gradients; the server's "
            f"whole budget is {format_bytes(self._admission.budget_bytes)} (--memory-budget)"
        )

    def _lose(self, seat: Seat, error: ServerError, *, closing: bool = True) -> None:
        """Frees a seat of a group that is not complete; does so once.

        Args:
            closing: if it was the last one, the group is gone.
        """
        group, rank = seat.group, seat.joint.rank
        if seat.call is not None and self._seats.get(seat.call) is seat:
            del self._seats[seat.call]
        if group.seats.get(rank) is not seat:
            return
        del group.seats[rank]
        seat.lost = error
        if seat.entry is not None and not seat.entry.future.done():
            seat.entry.future.set_exception(error)
        if group.broken is not None:
            return
        seat.permit.resize(group.share)
        group.permit.absorb(seat.permit)
        if closing and not group.seats:
            self._close(group, "left")

    def _vacate(self, seat: Seat) -> None:
        """The call of a seat needs it no more. The last one of a group cuts what leads in circles, which would keep the
        tensors alive."""
        group, rank = seat.group, seat.joint.rank
        if seat.call is not None and self._seats.get(seat.call) is seat:
            del self._seats[seat.call]
        if group.seats.get(rank) is seat:
            del group.seats[rank]
        entry, seat.entry = seat.entry, None
        if entry is not None and not group.seats:
            for member in entry.members:
                member.joined = ()
        self._changed.notify_all()

    def _break(self, group: Group, error: ServerError, outcome: str) -> None:
        """Answers all who wait with the error."""
        if group.broken is not None:
            return
        group.broken = error
        self._log_wait("a joint step is broken", group, reason=str(error))
        for seat in group.seats.values():
            if seat.entry is not None and not seat.entry.future.done():
                seat.entry.future.set_exception(error)
        self._close(group, outcome)

    def _close(self, group: Group, outcome: str) -> None:
        if self._waiting.get(group.key) is group:
            del self._waiting[group.key]
        group.permit.release()
        self._metrics.joint_groups.labels(outcome).inc()
        self._changed.notify_all()

    def _acknowledge(self, joint: wire.Joint) -> None:
        """A rank that comes with another call has got its answers before."""
        for call, kept in list(self._kept.items()):
            if (kept.joint.run, kept.joint.rank) == (joint.run, joint.rank):
                self._drop(call)

    def _drop(self, call: wire.Request) -> None:
        kept = self._kept.pop(call)
        kept.dropped = True
        kept.drop_if_unused()

    def _reclaim(self) -> bool:
        with self._changed:
            idle = [call for call, kept in self._kept.items() if not kept.users]
            for call in idle:
                self._drop(call)
            return bool(idle)

    def _missing_text(self, group: Group, *, waited: bool = True) -> str:
        run, step, _ = group.key
        missing = group.missing
        text = (
            f"{'rank' if len(missing) == 1 else 'ranks'} {_ranks_text(missing)} of {group.world_size} did not come to "
            f"step {step} of run {run!r}"
        )
        if not waited:
            return text
        text += f" within {self._timeout_seconds:g} s (--joint-timeout)"
        elsewhere = [
            f"{'rank' if len(other.seats) == 1 else 'ranks'} {_ranks_text(sorted(other.seats))} at step {other.key[1]}"
            + ("" if other.key[2] == group.key[2] else f" {'with' if other.key[2] else 'without'} a gradient")
            for other in self._waiting.values()
            if other is not group and other.key[0] == run
        ]
        if elsewhere:
            return f"{text}; of this run there wait {', '.join(elsewhere[:3])}"
        return f"{text}; they have stopped, are late, or reached another server (see load_balancing)"

    def _log_wait(self, text: str, group: Group, **fields: object) -> None:
        run, step, _ = group.key
        waited = round(time.monotonic() - group.since, 1)
        level = logging.WARNING if "broken" in text else logging.INFO
        _log.log(level, text, extra={"run": run, "step": step, "seconds": waited, **fields})


def _check_fits(group: Group, request: wire.Request) -> None:
    """Raises:
    JointMismatchError: the request does not fit those that wait.
    """
    joint, first = request.joint, group.first
    assert joint is not None
    pairs: list[tuple[str, object, object]] = [
        ("world_size", joint.world_size, group.world_size),
        ("loss", request.loss, first.loss),
        ("channels", request.layout.channels, first.layout.channels),
        ("element type of the logits", request.logits.dtype.name, first.logits.dtype.name),
    ]
    where = f"joint: rank {joint.rank} at step {joint.step} of run {joint.run!r}"
    for name, came, expected in pairs:
        if came != expected:
            raise JointMismatchError(
                f"{where} differs from the ranks that wait in {name}: got {_text(came)}; expected {_text(expected)}"
            )
    if joint.rank in group.seats:
        raise JointMismatchError(f"{where} is there already, from another call; expected each rank once")


def _text(value: object) -> str:
    if isinstance(value, WeightedSum):
        return " + ".join(f"{weight} * {term}" for weight, term in value.terms)
    return str(value)


def _ranks_text(ranks: list[int]) -> str:
    more = len(ranks) - _NAMED_RANKS
    return ", ".join(map(str, ranks[:_NAMED_RANKS])) + (f" and {more} more" if more > 0 else "")
