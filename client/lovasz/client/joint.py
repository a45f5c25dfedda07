"""A rank's place in a data-parallel training whose loss is that of the global batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lovasz import wire
from lovasz.client.errors import InvalidInputError, invalid_input_translated


@dataclass(frozen=True)
class Joint:
    """Joins the requests of all ranks of a step: each rank gets the loss of all pixels and its part of the gradient.

    The ranks of a step must call one server with the same loss, number of classes, element type and world_size, in any
    order. The number and size of their images may differ. If a rank is missing, the server waits for it
    (``--joint-timeout``, 45 s by default); then all ranks that called get CallAbortedError, which names the missing
    ones.

    Args:
        run: names the training, 1 to 200 characters; trainings that run at the same time need different names.
        rank: this process, in [0, world_size).
        world_size: the number of processes.
        step: the number of the step, from 0. Steps without a gradient (evaluation) are numbered separately. None:
            ``RemoteLoss`` counts.

    Raises:
        InvalidInputError: a value is invalid.
    """

    run: str
    rank: int
    world_size: int
    step: int | None = None

    def __post_init__(self) -> None:
        self.at(0 if self.step is None else self.step)

    @classmethod
    def from_distributed(cls, run: str) -> Joint:
        """Takes rank and world size from ``torch.distributed``'s default group, which must be initialized.

        Makes no collective call.
        """
        import torch.distributed

        return cls(run, torch.distributed.get_rank(), torch.distributed.get_world_size())

    def at(self, step: int | None) -> wire.Joint:
        """This rank's place in a step, for one call.

        Raises:
            InvalidInputError: a value is invalid.
        """
        if step is None:
            raise InvalidInputError("joint.step", "got None; expected a number (only RemoteLoss counts steps itself)")
        with invalid_input_translated():
            return wire.Joint(self.run, step, self.rank, self.world_size, os.urandom(16))
