"""What client and server need of the driver of a GPU to share its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from uuid import UUID

if TYPE_CHECKING:
    import torch

UUID_BYTES = 16

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
INVALID_VALUE = "CUDA_ERROR_INVALID_VALUE"


def name_of(uuid: bytes) -> str:
    """A device's UUID as ``nvidia-smi -L`` writes it; anything else in hexadecimal."""
    return f"GPU-{UUID(bytes=uuid)}" if len(uuid) == UUID_BYTES else f"GPU {uuid.hex()}"


class DriverError(Exception):
    """The driver refused a call.

    Attributes:
        call: the call's name.
        code: the driver's name for the problem.
    """

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call}: {code}")
        self.call = call
        self.code = code


class Driver(Protocol):
    """The driver of the GPUs that this process sees. Threads can share it. A device is its number, as torch counts.

    Every method raises DriverError where the driver refuses.
    """

    @property
    def count(self) -> int:
        """The devices that this process sees."""

    def uuid(self, device: int) -> bytes:
        """What names a device in all processes of a host, 16 bytes."""

    def can_access(self, device: int, owner: int) -> bool:
        """Whether a device can read and write memory of another one; True for its own."""

    def granularity(self, device: int) -> int:
        """The number of bytes of which sizes of memory are multiples."""

    def create(self, device: int, nbytes: int) -> int:
        """Makes memory that can be shared; returns its handle. The size is a multiple of the granularity."""

    def export(self, handle: int) -> int:
        """A new file descriptor that stands for the memory."""

    def load(self, descriptor: int) -> int:
        """The handle of memory that a file descriptor stands for. The descriptor can be closed afterwards."""

    def owner(self, handle: int) -> int:
        """The device that has the memory."""

    def map(self, handle: int, nbytes: int, device: int) -> int:
        """Maps memory for a device; returns its address. It stays until :meth:`unmap`, also when the handle is gone."""

    def extent(self, address: int, device: int) -> int:
        """The bytes of memory at an address that :meth:`map` returned for a device, as the driver knows them."""

    def unmap(self, address: int, nbytes: int) -> None:
        """Undoes :meth:`map`. Nothing may use the memory any more."""

    def release(self, handle: int) -> None:
        """Gives a handle back. The memory is freed once it is mapped nowhere and no process has a handle of it."""

    def copy(self, target: int, source: int, nbytes: int, device: int, stream: int) -> None:
        """Queues a copy from address to address on a stream of a device; 0 is its default stream."""

    def tensor(self, address: int, nbytes: int, device: int, owner: object) -> torch.Tensor:
        """The memory as a tensor, uint8, of shape (nbytes,). The tensor and its views keep ``owner`` alive."""
