"""A rank's place in a data-parallel training whose loss is that of the global batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lovasz import wire
from lovasz.client.errors import InvalidInputError
from lovasz.spec import InvalidInput


@dataclass(frozen=True)
class Joint:
    """Joins the requests of all ranks of a step: each gets the loss of all their pixels, and its part of the gradient.

    The ranks of a step must come to one server with the same loss, number of classes, element type and world_size, in
    any order; images may differ in number and size. A server that misses a rank waits for it (``--joint-timeout``, 45 s
    unless it was told otherwise), and then every rank that came gets CallAbortedError, which names the missing ones.

    Args:
        run: names the training, 1 to 200 characters; two trainings that run at one time need two names.
        rank: this process, in [0, world_size).
        world_size: how many processes there are.
        step: counts the calls of the training, from 0; those without a gradient (evaluation) are counted apart.
            ``RemoteLoss`` counts by itself if this is None.

    Raises:
        InvalidInputError: a value that cannot be.
    """

    run: str
    rank: int
    world_size: int
    step: int | None = None

    def __post_init__(self) -> None:
        self.at(0 if self.step is None else self.step)

    @classmethod
    def from_distributed(cls, run: str) -> Joint:
        """Rank and world size of ``torch.distributed``'s default group, which must be there; no collective call."""
        import torch.distributed

        return cls(run, torch.distributed.get_rank(), torch.distributed.get_world_size())

    def at(self, step: int | None) -> wire.Joint:
        """The place in a step, for one call.

        Raises:
            InvalidInputError: a value that cannot be.
        """
        if step is None:
            raise InvalidInputError("joint.step", "got None; expected a number (RemoteLoss alone counts by itself)")
        try:
            return wire.Joint(self.run, step, self.rank, self.world_size, os.urandom(16))
        except InvalidInput as error:
            raise InvalidInputError(error.field, error.problem) from None
