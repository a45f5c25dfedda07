"""Device memory in this process: made here to be shared, or imported from another process."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol

from lovasz.device_memory.driver import Driver, DriverError


class Stream(Protocol):
    """A stream of a device, as torch's."""

    def synchronize(self) -> None:
        """Waits for all work that is queued on it."""


class Mapping:
    """Device memory that is mapped until nothing refers to this object any more.

    Attributes:
        driver: its driver.
        device: the device that it is mapped for.
        owner: the device that has the memory.
        address: where it is.
        nbytes: its size.
    """

    def __init__(self, driver: Driver, handle: int, nbytes: int, device: int, owner: int) -> None:
        """Maps memory and gives its handle back, also if that fails.

        Raises:
            DriverError: the driver refuses, or the memory is smaller.
        """
        self.driver, self.device, self.owner, self.nbytes = driver, device, owner, nbytes
        try:
            self.address = driver.map(handle, nbytes, device)
        finally:
            driver.release(handle)
        self._streams: list[Stream] = []
        self._unmap = weakref.finalize(self, _unmap, driver, self.address, nbytes, self._streams)
        # At the process's end its memory goes anyway, and the driver may have gone before.
        self._unmap.atexit = False
        try:
            measured = driver.extent(self.address, device)
        except BaseException:
            self._unmap()
            raise
        if measured < nbytes:
            self._unmap()
            raise DriverError("cuMemGetAddressRange", f"the memory has {measured} bytes, not {nbytes}")

    def used_on(self, stream: Stream) -> None:
        """From now on work is queued on this stream that uses the memory. It is unmapped after that work.

        The stream waits for the one before: the last one alone counts.
        """
        self._streams[:] = [stream]


def create(driver: Driver, device: int, nbytes: int) -> tuple[Mapping, int]:
    """Makes memory on a device, of at least ``nbytes`` bytes.

    Returns:
        The memory, mapped, and a file descriptor that stands for it.

    Raises:
        DriverError: the driver refuses; with ``OUT_OF_MEMORY``, the device has not enough memory left.
    """
    step = driver.granularity(device)
    nbytes = -(-max(nbytes, 1) // step) * step
    handle = driver.create(device, nbytes)
    try:
        descriptor = driver.export(handle)
    except BaseException:
        driver.release(handle)
        raise
    try:
        return Mapping(driver, handle, nbytes, device, owner=device), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def load(driver: Driver, descriptor: int, nbytes: int, device: int) -> Mapping:
    """Imports another process's memory and maps it for a device.

    Args:
        descriptor: stands for the memory; can be closed afterwards.
        nbytes: the size, as the other process says; the driver measures it.

    Raises:
        DriverError: the descriptor stands for something else, the memory is smaller, or the device cannot reach it.
    """
    handle = driver.load(descriptor)
    try:
        owner = driver.owner(handle)
        if not driver.can_access(device, owner):
            raise DriverError("cuDeviceCanAccessPeer", f"device {device} cannot access device {owner}")
    except BaseException:
        driver.release(handle)
        raise
    return Mapping(driver, handle, nbytes, device, owner)


def _unmap(driver: Driver, address: int, nbytes: int, streams: list[Stream]) -> None:
    for stream in streams:
        # Unlike cudaFree, cuMemUnmap need not wait: work would then fault, and so all further work of the process.
        with suppress(RuntimeError):  # As below.
            stream.synchronize()
    with suppress(DriverError):  # A device that has failed; its process can do nothing about it.
        driver.unmap(address, nbytes)
