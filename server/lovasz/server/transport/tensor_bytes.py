"""Where the tensors of a request are in a region that its caller shares."""

from __future__ import annotations

from typing import NamedTuple

from lovasz import wire
from lovasz.server.memory.device_staging import DeviceBytes
from lovasz.server.transport.device_region import DeviceRegion
from lovasz.server.transport.regions import Region
from lovasz.spec import InvalidInput


class TensorBytes(NamedTuple):
    """The tensors of one request in shared memory; ``grad`` is the room for the gradient, empty if none is wanted."""

    logits: memoryview | DeviceBytes
    labels: memoryview | DeviceBytes
    grad: memoryview | DeviceBytes

    @classmethod
    def of(cls, request: wire.Request, region: Region | DeviceRegion | None) -> TensorBytes:
        """The tensors of a request in its region; None: there is no such region.

        Raises:
            InvalidInput: there is none, it has lost memory since, or a tensor is not inside it.
        """
        shared = request.shared
        assert shared is not None
        if region is None:
            raise InvalidInput(
                "shared_tensors.region", f"got {shared.region}; expected the number of a region that is shared"
            )
        region.check_allocated()
        return cls(
            logits=region.part("logits", shared.logits_offset, request.logits.nbytes),
            labels=region.part("labels", shared.labels_offset, request.labels.nbytes),
            grad=region.part("grad", shared.grad_offset, request.grad_bytes),
        )
