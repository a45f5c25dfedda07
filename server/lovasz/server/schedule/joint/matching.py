"""Whether a rank fits the ranks of its step that wait; if not, why."""

from __future__ import annotations

from lovasz import wire
from lovasz.server.schedule.joint import texts
from lovasz.server.schedule.joint.attendance import place
from lovasz.server.schedule.joint.group import Group


def mismatch(group: Group, request: wire.Request) -> str | None:
    """Says why a request does not fit those of the other ranks; None if it does."""
    joint, first = request.joint, group.first
    assert joint is not None
    return misplaced(
        group,
        joint,
        ("loss", request.loss, first.loss),
        ("channels", request.layout.channels, first.layout.channels),
        ("element type of the logits", request.logits.dtype.name, first.logits.dtype.name),
    )


def misplaced(group: Group, joint: wire.Joint, *options: tuple[str, object, object]) -> str | None:
    """Says why a rank has no place in a group; None if it has one.

    Args:
        options: what else has to be the same: names, the rank's values, and those of the ranks that wait.
    """
    where = texts.where(group, joint)
    for name, got, expected in (("world_size", joint.world_size, group.world_size), *options):
        if got != expected:
            return f"{where}: {name} is {texts.option(got)}; the waiting ranks have {texts.option(expected)}"
    if joint.rank in group.seats:
        return (
            f"{where} is there already, from another call{place(group.seats[joint.rank].address)}; expected each rank "
            "once"
        )
    return None
