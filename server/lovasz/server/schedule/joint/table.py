"""Brings the requests of all ranks of a step together, and keeps their answers for a while; does not compute them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress

from lovasz import wire
from lovasz.server.errors import (
    AbandonedError,
    JointBrokenError,
    JointMismatchError,
    OverloadedError,
    RunConflictError,
    ServerError,
    StoppingError,
    TooLargeError,
    fresh,
)
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.server.observe.metrics import JointOutcome, Metrics
from lovasz.server.observe.waiting_steps import WaitingStep
from lovasz.server.schedule.admission import Admission
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Answer, Caller, Job
from lovasz.server.schedule.joint import texts
from lovasz.server.schedule.joint.aborted import AbortedSteps
from lovasz.server.schedule.joint.ahead import AheadRoom
from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import Group, GroupState, Run, Seat, SeatState, Step
from lovasz.server.schedule.joint.kept import LOOK_SECONDS, Kept, KeptAnswers
from lovasz.server.schedule.joint.matching import mismatch, misplaced
from lovasz.server.schedule.joint.regrouping import Regrouping
from lovasz.server.schedule.joint.waiting import WaitingGroups


class JointTable:
    """The groups that wait for ranks.

    The first rank of a step reserves room for all of them, so that no two groups wait for each other's room. A rank
    that leaves before its group is complete frees its seat; a group that all ranks have left is gone.
    """

    def __init__(
        self,
        admission: Admission,
        batcher: Batcher,
        metrics: Metrics,
        timeout_seconds: float,
        max_segments: int,
        share: float = 1.0,
        regroup_seconds: float = 0.0,
    ) -> None:
        """No group waits yet.

        Args:
            max_segments: the most that the ranks of a step have together, if images are scored.
            share: the most of all room that the missing ranks of one run, or of one caller's steps, may hold.
            regroup_seconds: how long ranks wait before they are asked to call again for the first time; 0: never.
        """
        self._ahead = AheadRoom(admission, share, max_segments)
        self._admission, self._batcher = admission, batcher
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        """Guards all below, and the groups, seats and kept answers; notified when a seat is free or a group ends."""
        self._seats: dict[wire.Request, Seat] = {}
        """By call, for calls that have a name."""
        self._kept = KeptAnswers()
        self._attendance = Attendance()
        self._regrouping = Regrouping(regroup_seconds, timeout_seconds)
        self._waiting = WaitingGroups(metrics, self._regrouping, self._changed.notify_all)
        self._aborted = AbortedSteps()
        admission.reclaim = self._reclaim

    @property
    def groups(self) -> int:
        """Groups that wait for ranks."""
        return len(self._waiting)

    @property
    def waiting_ranks(self) -> int:
        """Ranks that wait for others."""
        with self._changed:
            return sum(len(group.seats) for group in self._waiting)

    @property
    def kept(self) -> int:
        """Answers that are kept."""
        return len(self._kept)

    def waiting_steps(self) -> list[WaitingStep]:
        """The groups that wait, the longest first."""
        now = time.monotonic()
        with self._changed:
            groups = sorted(self._waiting, key=lambda group: group.since)
            return [texts.waiting_step(group, now, self._attendance) for group in groups]

    def join(
        self, request: wire.Request, cancel: Callable[[], object], address: str = "", name: str = ""
    ) -> Seat | Kept:
        """Takes a seat, or the kept answer if the call was answered before. Either is given back by :meth:`leave`.

        Args:
            cancel: ends this call. Used if the same call comes again while this one is still receiving.
            address: where the call comes from, and which connection; empty: unknown.
            name: that of its token; the room of the whole step counts for the name of the rank that came first.

        Raises:
            RunConflictError: two trainings have a run of this name.
            JointMismatchError: the request does not fit the ranks that wait.
            JointBrokenError: another rank cannot take part in the step.
            OverloadedError, TooLargeError, StoppingError: as ``Admission.reserve``, for all ranks together.
        """
        joint = request.joint
        assert joint is not None
        call = request.placed(None, request.joint) if joint.call else None
        with self._changed:
            if call is not None:
                self._end_earlier(call)
                kept = self._kept.take(call)
                if kept is not None:
                    return kept
            try:
                group = self._group_of(request, joint, address, name)
            except StoppingError:
                self._kept.acknowledge(joint)
                raise
            try:
                seat = self._ahead.seat(group, request, call, cancel, address)
            except (OverloadedError, TooLargeError) as refusal:
                if isinstance(refusal, TooLargeError):
                    self._aborted.add(group.step, joint, str(refusal), group)
                self._waiting.refuse(group, refusal, JointOutcome.OVERLOADED)
                raise
            if call is not None:
                self._seats[call] = seat
            self._kept.acknowledge(joint)
            return seat

    def arrive(self, seat: Seat, caller: Caller) -> None:
        """The payload of a rank is here. With the last one, the group is queued.

        Raises:
            JointBrokenError, AbandonedError, StoppingError: the group was broken, or the seat was lost.
        """
        with self._changed:
            group = seat.group
            error = seat.error or group.error
            if error is not None:
                raise fresh(error)
            seat.caller, seat.state = caller, SeatState.ARRIVED
            if not group.is_full:
                return
            job = self._waiting.complete(group, last_rank=seat.joint.rank)
        self._queue(job)

    def wait(self, seat: Seat, staging: AnyStaging) -> Kept:
        """Waits for the other ranks and for the computation, and gives the seat back.

        Args:
            staging: the tensors. From now on they belong to the answer, unless an error is raised.

        Returns:
            The answer, to be given back by :meth:`leave` in place of the seat.

        Raises:
            JointBrokenError: a rank is missing after the timeout, or its request is invalid.
            AbandonedError: all callers have left.
        """
        try:
            answer = self._answer(seat)
        except CancelledError:
            assert seat.group.job is not None
            self._batcher.discard(seat.group.job)
            raise AbandonedError from None
        with self._changed:
            kept = Kept(seat.joint, answer, staging, seat.permit)
            self._kept.keep(seat.call, kept)
            self._vacate(seat)
        return kept

    def give_up(self, seat: Seat) -> None:
        """The caller of a seat has gone away."""
        completed: Job | None = None
        with self._changed:
            job, caller = seat.group.job, seat.caller
            if seat.group.state is not GroupState.COMPLETE:
                completed = self._lose(seat, AbandonedError())
        self._queue(completed)
        if job is not None and caller is not None:
            job.leave(caller)

    def leave(self, place: Seat | Kept) -> None:
        """The call has ended. Nothing uses the tensors of a seat any more."""
        completed: Job | None = None
        with self._changed:
            if isinstance(place, Kept):
                place.leave()
                return
            if place.group.state is not GroupState.COMPLETE:
                completed = self._lose(place, AbandonedError())
            self._vacate(place)
            place.permit.release()
        self._queue(completed)

    def abort(self, abort: wire.Abort, seat: Seat | None = None, address: str = "") -> None:
        """A rank cannot take part in a step: the others are refused, those that wait and those that come soon.

        Args:
            seat: its seat, if it has one; nothing is done if the group of the seat waits no more.
            address: as for :meth:`join`.

        Raises:
            RunConflictError: two trainings have a run of this name.
            JointMismatchError: the rank does not fit those that wait, or is among them with another seat.
        """
        joint, step = abort.joint, Step.of(abort.joint, abort.want_grad)
        reason = abort.reason or "it cannot take part"
        with self._changed:
            group = self._waiting.get(step)
            if seat is not None and (seat.group is not group or group.seats.get(joint.rank) is not seat):
                return
            if seat is None and group is not None and (difference := misplaced(group, joint)) is not None:
                raise JointMismatchError(difference)
            self._come(joint, abort.want_grad, address)
            # A rank that was not told of an abort aborts the same attempt, and not the next one, where others may wait.
            is_late = seat is None and self._aborted.tell(step, joint) is not None
            if group is None or is_late:
                self._waiting.tell_of_abort(step, joint.rank, reason)
            if not is_late:
                error = self._aborted.add(step, joint, reason, group)
                if group is not None:
                    self._waiting.refuse(group, error, JointOutcome.ABORTED)

    def leave_run(self, leave: wire.Leave) -> None:
        """A rank takes no part in further steps of a run; those that wait for it go on without it.

        Raises:
            RunConflictError: the ranks of a training of this name have a secret, and this one has none.
        """
        joint, run, jobs = leave.joint, Run.of(leave.joint), list[Job | None]()
        with self._changed:
            if not self._attendance.leave(joint, leave.evaluation_step):
                return
            self._kept.acknowledge(joint, leaves=True)
            for group in self._waiting:
                step = group.step
                is_meant = (step.run, step.round, group.world_size) == (run, joint.round, joint.world_size)
                first = joint.step if step.want_grad else leave.evaluation_step
                if is_meant and step.number >= first and joint.rank not in group.seats.keys() | group.absent:
                    jobs.append(self._go_on_without(group, joint.rank))
        for job in jobs:
            self._queue(job)

    def warning(self, joint: wire.Joint) -> str:
        """What the ranks of a run should know; empty: nothing."""
        with self._changed:
            return self._attendance.warning(Run.of(joint))

    def linger(self, until: float) -> None:
        """Waits while a rank may have lost its answer with its connection, and not yet have asked for it again.

        Elsewhere nobody has it: the other ranks have theirs, and do not come again.

        Args:
            until: the latest end (``time.monotonic``).
        """
        with self._changed:
            while min(self._kept.expected_until, until) > time.monotonic():
                self._changed.wait(LOOK_SECONDS)

    def stop(self) -> None:
        """Refuses all ranks that wait: the missing ones will not be admitted any more."""
        with self._changed:
            for group in self._waiting:
                self._waiting.refuse(group, StoppingError(texts.stopping(group)), JointOutcome.STOPPING)

    def check(self) -> None:
        """A chore: forgets what is old, and ends steps that need not wait any longer."""
        with self._changed:
            self._kept.drop_old()
            self._aborted.forget_old()
            self._attendance.see(group.step.run for group in self._waiting)
            self._attendance.forget_old()
            self._waiting.check(self._timeout_seconds, self._attendance)

    def _end_earlier(self, call: wire.Request) -> None:
        """The same call has come again: ends the earlier one, or waits for it if it is being computed.

        Raises:
            JointBrokenError: it is still being computed after the timeout.
        """
        until = time.monotonic() + self._timeout_seconds
        while (earlier := self._seats.get(call)) is not None:
            if earlier.group.state is not GroupState.COMPLETE:
                receiving = earlier.state is SeatState.RECEIVING
                # The group stays even if it has no other rank: this call takes the seat.
                self._lose(earlier, AbandonedError("the same call came again"), is_final=False)
                if receiving:  # Its payload may have stalled.
                    earlier.cancel()
            elif not self._changed.wait(until - time.monotonic()):
                raise JointBrokenError("the same call is still being computed")

    def _group_of(self, request: wire.Request, joint: wire.Joint, address: str, name: str) -> Group:
        """The group that a request belongs to, a new one if none waits."""
        step = Step.of(joint, request.want_grad)
        group = self._waiting.get(step)
        if group is not None and (difference := mismatch(group, request)) is not None:
            raise JointMismatchError(difference)
        self._come(joint, request.want_grad, address)
        aborted = self._aborted.tell(step, joint)
        if aborted is not None:
            raise aborted
        if group is None:
            absent = self._attendance.absent(step, joint.world_size)
            present = joint.world_size - len(absent)
            try:
                permit = self._ahead.reserve(request.tensor_bytes, present, step.run, address, name)
            except TooLargeError as error:  # The other ranks may fit, and would wait.
                self._aborted.add(step, joint, str(error), None)
                raise
            since = self._regrouping.since(step)
            group = self._waiting.add(Group.begun_by(request, absent, permit, since, self._timeout_seconds))
        elif joint.rank in group.absent:
            group.take_back(joint.rank, self._admission.reserve(group.share, name=group.permit.name))
        return group

    def _come(self, joint: wire.Joint, want_grad: bool, address: str) -> None:
        if self._attendance.come(joint, want_grad, address):
            self._aborted.forget_run(Run.of(joint))
        strangers = Run(joint.run)
        if joint.secret and self._attendance.knows(strangers):  # Those that wait without a secret are told at once.
            for group in [group for group in self._waiting if group.step.run == strangers]:
                self._waiting.refuse(
                    group, RunConflictError(self._attendance.conflict(strangers)), JointOutcome.ABORTED
                )

    def _go_on_without(self, group: Group, rank: int) -> Job | None:
        """A rank that has no seat has left: returns what is to be queued if the group was waiting for it alone."""
        group.leave(rank)
        return self._waiting.complete(group, last_rank=rank) if group.seats and group.is_full else None

    def _queue(self, job: Job | None) -> None:
        if job is None:
            return
        try:
            self._batcher.put(job)
        except StoppingError as stopping:
            job.refuse(stopping)

    def _answer(self, seat: Seat) -> Answer:
        group, caller = seat.group, seat.caller
        assert caller is not None
        with suppress(TimeoutError):
            return caller.wait(max(0.0, group.deadline - time.monotonic()))
        with self._changed:
            if group.state is GroupState.WAITING and seat.state is SeatState.ARRIVED:
                self._waiting.time_out(group, self._timeout_seconds, self._attendance)
        return caller.wait()

    def _lose(self, seat: Seat, error: ServerError, *, is_final: bool = True) -> Job | None:
        """Frees the seat of a group that is not complete, unless that was done before.

        Args:
            is_final: whether the group ends if that was the last seat, or goes on without a rank that has left the run.

        Returns:
            What is to be queued, if the others waited only for a rank that has left.
        """
        self._forget(seat)
        if seat.state not in (SeatState.RECEIVING, SeatState.ARRIVED):
            return None
        group = seat.group
        group.lose(seat, error)
        if is_final and group.state is GroupState.WAITING:
            if not group.seats:
                group.state = GroupState.DESERTED
                self._waiting.end(group, JointOutcome.LEFT)
            elif seat.joint.rank in self._attendance.absent(group.step, group.world_size):
                return self._go_on_without(group, seat.joint.rank)
        return None

    def _vacate(self, seat: Seat) -> None:
        self._forget(seat)
        seat.group.vacate(seat)
        self._changed.notify_all()

    def _forget(self, seat: Seat) -> None:
        if seat.call is not None and self._seats.get(seat.call) is seat:
            del self._seats[seat.call]

    def _reclaim(self, name: str | None) -> bool:
        with self._changed:
            return self._kept.drop_unused(name)
