"""A stand-in for the driver of GPUs: devices whose memory is host memory (memfds). It refuses what a driver refuses."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import threading

import torch

from lovasz.device_memory.driver import INVALID_VALUE, OUT_OF_MEMORY, UUID_BYTES, DriverError

GRANULARITY = 1 << 16
NAME = "lovasz-device"
"""What the memory of a device is called in /proc; its number follows."""


class HostDriver:
    """Some devices. Every process with such a driver sees the same, so that they can share memory.

    Attributes:
        copies: the sizes of the copies that were queued, in bytes.
        made: how often memory was made.
    """

    def __init__(
        self,
        count: int = 1,
        *,
        strangers: frozenset[tuple[int, int]] = frozenset(),
        memory_bytes: int = 1 << 30,
        first: int = 0,
    ) -> None:
        """Nothing is allocated.

        Args:
            count: the number of devices.
            strangers: pairs (device, owner) that cannot access each other's memory.
            memory_bytes: the memory of all devices together, as far as this process uses it.
            first: the UUID of the first device ends with it; other processes may see other devices.
        """
        self.count = count
        self.copies: list[int] = []
        self.made = 0
        self._strangers, self._memory_bytes, self._first = strangers, memory_bytes, first
        self._lock = threading.RLock()  # The garbage collector may unmap memory while a thread holds it.
        self._numbers = itertools.count(1)
        self._handles: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def in_use(self) -> tuple[int, int]:
        """Handles and mappings that were not given back."""
        return len(self._handles), len(self._maps)

    def uuid(self, device: int) -> bytes:
        self._check_device("cuDeviceGetUuid", device)
        return (self._first + device).to_bytes(UUID_BYTES, "big")

    def can_access(self, device: int, owner: int) -> bool:
        return (device, owner) not in self._strangers

    def granularity(self, device: int) -> int:
        self._check_device("cuMemGetAllocationGranularity", device)
        return GRANULARITY

    def create(self, device: int, nbytes: int) -> int:
        self._check_device("cuMemCreate", device)
        if nbytes <= 0 or nbytes % GRANULARITY:
            raise DriverError("cuMemCreate", INVALID_VALUE)
        with self._lock:
            if nbytes > self._memory_bytes - sum(map(len, self._maps.values())):
                raise DriverError("cuMemCreate", OUT_OF_MEMORY)
        descriptor = os.memfd_create(f"{NAME}-{self._first + device}-", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, nbytes)
        self.made += 1
        return self._new_handle(descriptor)

    def export(self, handle: int) -> int:
        return os.dup(self._descriptor("cuMemExportToShareableHandle", handle))

    def load(self, descriptor: int) -> int:
        if not re.match(rf"/memfd:{NAME}-\d+- ", os.readlink(f"/proc/self/fd/{descriptor}")):
            raise DriverError("cuMemImportFromShareableHandle", INVALID_VALUE)
        return self._new_handle(os.dup(descriptor))

    def owner(self, handle: int) -> int:
        link = os.readlink(f"/proc/self/fd/{self._descriptor('cuMemGetAllocationPropertiesFromHandle', handle)}")
        device = int(link.split("-")[2]) - self._first
        self._check_device("cuMemGetAllocationPropertiesFromHandle", device)
        return device

    def map(self, handle: int, nbytes: int, device: int) -> int:
        descriptor = self._descriptor("cuMemMap", handle)
        if nbytes % GRANULARITY or nbytes > os.fstat(descriptor).st_size:
            raise DriverError("cuMemMap", INVALID_VALUE)
        if not self.can_access(device, self.owner(handle)):
            raise DriverError("cuMemSetAccess", "CUDA_ERROR_INVALID_DEVICE")
        mapped = mmap.mmap(descriptor, nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        with self._lock:
            self._maps[address] = mapped
        return address

    def extent(self, address: int, device: int) -> int:
        return len(self._maps[address])

    def unmap(self, address: int, nbytes: int) -> None:
        with self._lock:
            mapped = self._maps.pop(address, None)
        if mapped is None or len(mapped) != nbytes:
            raise DriverError("cuMemUnmap", INVALID_VALUE)
        mapped.close()

    def release(self, handle: int) -> None:
        with self._lock:
            descriptor = self._handles.pop(handle, None)
        if descriptor is None:
            raise DriverError("cuMemRelease", INVALID_VALUE)
        os.close(descriptor)

    def copy(self, target: int, source: int, nbytes: int, device: int, stream: int) -> None:
        self.copies.append(nbytes)
        ctypes.memmove(target, source, nbytes)

    def tensor(self, address: int, nbytes: int, device: int, owner: object) -> torch.Tensor:
        memory = (ctypes.c_char * nbytes).from_address(address)
        memory.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _new_handle(self, descriptor: int) -> int:
        with self._lock:
            handle = next(self._numbers)
            self._handles[handle] = descriptor
        return handle

    def _descriptor(self, call: str, handle: int) -> int:
        descriptor = self._handles.get(handle)
        if descriptor is None:
            raise DriverError(call, INVALID_VALUE)
        return descriptor

    def _check_device(self, call: str, device: int) -> None:
        if not 0 <= device < self.count:
            raise DriverError(call, "CUDA_ERROR_INVALID_DEVICE")
