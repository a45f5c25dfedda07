"""What people are told about joint steps: in errors, in the log, and on the status page."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import fields

from lovasz import wire
from lovasz.server.observe.waiting_steps import WaitingStep
from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import Group, Step
from lovasz.spec import Loss, WeightedSum

_NAMED_RANKS = 20
_NAMED_GROUPS = 3
_SAME_CALLS = "; all ranks must make the same calls: one has left out a call, or made one more"
_OR_NO_EVALUATION = ", or not all of them evaluate"
"""From where the ranks wait alone, one cannot tell which of the two it is."""
_SHORT = reprlib.Repr()
_SHORT.maxtuple = 30


def ranks(numbers: list[int]) -> str:
    """The numbers of ranks, the first ones if there are many."""
    more = len(numbers) - _NAMED_RANKS
    return ", ".join(map(str, numbers[:_NAMED_RANKS])) + (f" and {more} more" if more > 0 else "")


def waiting_step(group: Group, now: float, attendance: Attendance) -> WaitingStep:
    """Describes a group that waits for ranks."""
    missing = group.missing
    is_evaluation = not group.step.want_grad
    never_evaluated = attendance.never_evaluated(group.step.run, missing) if is_evaluation else []
    return WaitingStep(
        run=group.step.run.name,
        step=group.step.number,
        seconds=now - group.since,
        world_size=group.world_size,
        missing=ranks(missing),
        missing_ranks=len(missing),
        first_missing_rank=missing[0],
        evaluation=is_evaluation,
        never_evaluated=ranks(never_evaluated),
    )


def where(group: Group, joint: wire.Joint) -> str:
    """Names a rank, its step and its run."""
    return f"joint: rank {joint.rank} at {_step(group.step)} of run {joint.run!r}"


def missing_ranks(group: Group) -> str:
    """Says which ranks did not arrive."""
    run = group.step.run.name
    return f"{_named(group.missing)} of {group.world_size} did not arrive at {_step(group.step)} of run {run!r}"


def stopping(group: Group) -> str:
    """Says that the server takes no more ranks, and which did not arrive."""
    return f"the server is stopping, and {missing_ranks(group)}"


def timed_out(group: Group, timeout_seconds: float, waiting: Iterable[Group], attendance: Attendance) -> str:
    """Says which ranks did not arrive in time, and where other ranks of the same run wait.

    Args:
        waiting: all groups that wait.
    """
    text = f"{missing_ranks(group)} within {timeout_seconds:g} s (--joint-timeout)"
    elsewhere = [_place(other) for other in waiting if other is not group and other.step.run == group.step.run]
    if elsewhere:
        text += f"; other ranks of this run wait: {', '.join(elsewhere[:_NAMED_GROUPS])}"
    run = group.step.run
    strangers = [other for other in waiting if other.step.run.name == run.name and other.step.run != run]
    if strangers:
        text += f"; ranks with another secret or token wait in a run of this name: {_place(strangers[0])}"
    advice = _advice_on_evaluation(group, attendance)
    if advice and elsewhere:
        return text + _SAME_CALLS + _OR_NO_EVALUATION + advice
    if advice or elsewhere or strangers:
        return text + advice
    return f"{text}; they have stopped, are late, or reached another server (see load_balancing)"


def out_of_step(groups: list[Group], attendance: Attendance) -> str:
    """Says at which steps the ranks of a run wait for each other."""
    groups = sorted(groups, key=lambda group: min(group.seats))
    places = ", ".join(_place(group) for group in groups[:_NAMED_GROUPS])
    text = f"the ranks of run {groups[0].step.run.name!r} wait for each other at different steps: {places}"
    advice = next(filter(None, (_advice_on_evaluation(group, attendance) for group in groups)), "")
    return text + _SAME_CALLS + (f"{_OR_NO_EVALUATION}{advice}" if advice else "")


def _advice_on_evaluation(group: Group, attendance: Attendance) -> str:
    """What to do if ranks do not evaluate; empty if the group is none of an evaluation, or they do."""
    never = [] if group.step.want_grad else attendance.never_evaluated(group.step.run, group.missing)
    if not never:
        return ""
    return (
        f"; {_named(never)} made no evaluation step (a call without a gradient) in this run: evaluate on all ranks, or "
        "with a RemoteLoss without joint"
    )


def _place(group: Group) -> str:
    """Who waits where."""
    round_text = f" of round {group.step.round}" if group.step.round else ""
    return f"{_named(sorted(group.seats))} at {_step(group.step)}{round_text}"


def _step(step: Step) -> str:
    return f"step {step.number}" if step.want_grad else f"evaluation step {step.number}"


def _named(numbers: list[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {ranks(numbers)}"


def option(value: object) -> str:
    """A loss, or another option of a request."""
    if isinstance(value, WeightedSum):
        return " + ".join(f"{weight} * {_described(term)}" for weight, term in value.terms)
    return str(value)


def _described(term: Loss) -> str:
    """As ``repr``, but with the first class weights only if there are many: texts are made under the table's lock."""
    options = (f"{option.name}={_SHORT.repr(getattr(term, option.name))}" for option in fields(term))
    return f"{type(term).__name__}({', '.join(options)})"
