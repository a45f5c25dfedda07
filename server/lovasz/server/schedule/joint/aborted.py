"""Steps in which a rank could not take part: the others are told, each once, also those that come a little later.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from lovasz import wire
from lovasz.server.errors import JointBrokenError
from lovasz.server.schedule.joint.group import Group, Run, Step

ABORTED_SECONDS = 15.0
"""How long ranks that come to an aborted step are told so."""
MAX_ABORTED = 1000
"""Steps that are remembered; those that were aborted last stay."""


@dataclass
class _Aborted:
    """An aborted step.

    Attributes:
        world_size: of its ranks; those of another number are not concerned.
        told: the calls that know it, by their ranks.
        until: when it is forgotten (``time.monotonic``).
    """

    text: str
    world_size: int
    told: dict[int, bytes]
    until: float


class AbortedSteps:
    """The steps that were aborted a short while ago."""

    def __init__(self) -> None:
        self._steps: OrderedDict[Step, _Aborted] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Step, joint: wire.Joint, reason: str, group: Group | None) -> JointBrokenError:
        """A rank cannot take part in a step.

        Args:
            joint: the rank, which knows it.
            group: the ranks that wait; the caller tells them.

        Returns:
            What the other ranks are told.
        """
        told = {joint.rank: joint.call}
        if group is not None:
            told |= {rank: seat.joint.call for rank, seat in group.seats.items()}
        text = f"rank {joint.rank}: {reason}"
        self._steps.pop(step, None)
        self._steps[step] = _Aborted(text, joint.world_size, told, time.monotonic() + ABORTED_SECONDS)
        if len(self._steps) > MAX_ABORTED:
            self._steps.popitem(last=False)
        return JointBrokenError(text)

    def tell(self, step: Step, joint: wire.Joint) -> JointBrokenError | None:
        """What a rank that comes to a step is refused with.

        None if the step was not aborted, or if the rank knows it already: it tries the step again. If it comes with the
        very call that was told, it has lost that answer, and gets it again.
        """
        aborted = self._steps.get(step)
        if aborted is None or aborted.world_size != joint.world_size or aborted.until < time.monotonic():
            return None
        told = aborted.told.get(joint.rank)
        if told is not None and (not told or told != joint.call):
            return None
        aborted.told[joint.rank] = joint.call
        return JointBrokenError(aborted.text)

    def forget_run(self, run: Run) -> None:
        """The run was restarted."""
        for step in [step for step in self._steps if step.run == run]:
            del self._steps[step]

    def forget_old(self) -> None:
        """Forgets the steps that were aborted long enough ago."""
        now = time.monotonic()
        for step in [step for step, aborted in self._steps.items() if aborted.until < now]:
            del self._steps[step]
