"""A region of device memory that another process shares."""

from __future__ import annotations

from lovasz.device_memory.mapping import Mapping
from lovasz.server.memory.device_staging import DeviceBytes


class DeviceRegion:
    """Device memory that a file descriptor stands for, mapped until nothing refers to it.

    Attributes:
        nbytes: its size.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.nbytes = mapping.nbytes

    def check_allocated(self) -> None:
        """Nothing to check: the device has all of it, and it cannot be given back."""

    def part(self, name: str, offset: int, nbytes: int) -> DeviceBytes:
        """The bytes of one tensor.

        Raises:
            InvalidInput: they are not all inside the region, or do not begin at a multiple of 64 bytes.
        """
        return DeviceBytes(self._mapping, f"shared_tensors.{name}_offset", offset, nbytes)
