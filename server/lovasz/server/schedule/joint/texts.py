"""What people are told about joint steps: in errors, in the log, and on the status page."""

from __future__ import annotations

from collections.abc import Iterable

from lovasz import wire
from lovasz.server.config import format_bytes
from lovasz.server.observe.waiting_steps import WaitingStep
from lovasz.server.schedule.joint.group import Group
from lovasz.spec import WeightedSum

_NAMED_RANKS = 20
_NAMED_GROUPS = 3


def ranks(numbers: list[int]) -> str:
    """The numbers of ranks, the first ones if there are many."""
    more = len(numbers) - _NAMED_RANKS
    return ", ".join(map(str, numbers[:_NAMED_RANKS])) + (f" and {more} more" if more > 0 else "")


def waiting_step(group: Group, now: float) -> WaitingStep:
    """Describes a group that waits for ranks."""
    missing = group.missing
    return WaitingStep(
        run=group.step.run,
        step=group.step.number,
        seconds=now - group.since,
        world_size=group.world_size,
        missing=ranks(missing),
        missing_ranks=len(missing),
        first_missing_rank=missing[0],
    )


def mismatch(group: Group, request: wire.Request) -> str | None:
    """Says why a request does not fit those of the other ranks; None if it does."""
    joint, first = request.joint, group.first
    assert joint is not None
    where = f"joint: rank {joint.rank} at step {joint.step} of run {joint.run!r}"
    compared: list[tuple[str, object, object]] = [
        ("world_size", joint.world_size, group.world_size),
        ("loss", request.loss, first.loss),
        ("channels", request.layout.channels, first.layout.channels),
        ("element type of the logits", request.logits.dtype.name, first.logits.dtype.name),
    ]
    for name, got, expected in compared:
        if got != expected:
            return f"{where}: {name} is {_text(got)}; the waiting ranks have {_text(expected)}"
    if joint.rank in group.seats:
        return f"{where} is there already, from another call; expected each rank once"
    return None


def too_large(group: Group, needed: int, budget: int) -> str:
    """Says that the group needs more bytes than there will ever be."""
    return (
        f"the tensors of {group.world_size} ranks take {format_bytes(needed)} with their gradients; the server's "
        f"whole budget is {format_bytes(budget)} (--memory-budget)"
    )


def missing_ranks(group: Group) -> str:
    """Says which ranks did not arrive."""
    step = group.step
    return f"{_named(group.missing)} of {group.world_size} did not arrive at step {step.number} of run {step.run!r}"


def timed_out(group: Group, timeout_seconds: float, waiting: Iterable[Group]) -> str:
    """Says which ranks did not arrive in time, and where other ranks of the same run wait.

    Args:
        waiting: all groups that wait.
    """
    text = f"{missing_ranks(group)} within {timeout_seconds:g} s (--joint-timeout)"
    elsewhere = [
        _elsewhere(other, group) for other in waiting if other is not group and other.step.run == group.step.run
    ]
    if elsewhere:
        return f"{text}; other ranks of this run wait: {', '.join(elsewhere[:_NAMED_GROUPS])}"
    return f"{text}; they have stopped, are late, or reached another server (see load_balancing)"


def _elsewhere(other: Group, group: Group) -> str:
    step = other.step
    mode = "" if step.want_grad == group.step.want_grad else f" {'with' if step.want_grad else 'without'} a gradient"
    return f"{_named(sorted(other.seats))} at step {step.number}{mode}"


def _named(numbers: list[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {ranks(numbers)}"


def _text(value: object) -> str:
    if isinstance(value, WeightedSum):
        return " + ".join(f"{weight} * {term}" for weight, term in value.terms)
    return str(value)
