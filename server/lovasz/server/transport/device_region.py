"""A region of device memory that another process shares."""

from __future__ import annotations

from lovasz.device_memory.mapping import Mapping
from lovasz.server.memory.device_staging import DeviceBytes
from lovasz.server.memory.shared_devices import SharedDevices
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb


class DeviceRegion:
    """Device memory that a file descriptor stands for, mapped until nothing refers to it.

    Attributes:
        nbytes: its size.
        mapping: what the tensors in it refer to, so that it stays mapped.
    """

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.nbytes = mapping.nbytes

    @classmethod
    def imported(
        cls, memory: pb.DeviceMemory, descriptor: int, devices: SharedDevices | None, max_bytes: int
    ) -> DeviceRegion:
        """The memory that a descriptor stands for, which can be closed afterwards.

        Args:
            memory: what its caller says of it.
            devices: those whose memory is taken; None: none.
            max_bytes: the most that is taken.

        Raises:
            InvalidInput: it is not what its caller says, or is not taken.
        """
        if devices is None:
            raise InvalidInput("region", "got device memory; expected a memfd, as this server takes nothing else")
        return cls(devices.load(descriptor, memory.device, memory.nbytes, max_bytes))

    def check_allocated(self) -> None:
        """Nothing to check: the device has all of it, and it cannot be given back."""

    def part(self, name: str, offset: int, nbytes: int) -> DeviceBytes:
        """The bytes of one tensor.

        Raises:
            InvalidInput: they are not all inside the region, or do not begin at a multiple of 64 bytes.
        """
        return DeviceBytes(self.mapping, f"shared_tensors.{name}_offset", offset, nbytes)
