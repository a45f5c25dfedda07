"""CUDA's driver, through ``cuda-bindings``: its calls for virtual memory, which export memory as a file descriptor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lovasz.device_memory.driver import DriverError

if TYPE_CHECKING:
    import torch


class CudaDriver:
    """The driver of NVIDIA's GPUs."""

    def __init__(self) -> None:
        """Loads the driver.

        Raises:
            DriverError: there is no driver, no GPU, or no ``cuda-bindings``.
        """
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverError("cuda-bindings", f"not installed ({error}); pip install 'lovasz[gpu]'") from None
        self._cuda: Any = driver
        self._lock = threading.Lock()
        self._contexts: dict[int, Any] = {}
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # cuda-bindings finds no libcuda.
            raise DriverError("cuInit", str(error)) from None

    @property
    def count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def uuid(self, device: int) -> bytes:
        return bytes(self._call("cuDeviceGetUuid", self._device(device)).bytes)

    def can_access(self, device: int, owner: int) -> bool:
        if device == owner:
            return True
        return bool(self._call("cuDeviceCanAccessPeer", self._device(device), self._device(owner)))

    def granularity(self, device: int) -> int:
        kind = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(device), kind))

    def create(self, device: int, nbytes: int) -> int:
        return int(self._call("cuMemCreate", nbytes, self._properties(device), 0))

    def export(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", self._handle(handle), self._descriptor_kind, 0))

    def load(self, descriptor: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", descriptor, self._descriptor_kind))

    def owner(self, handle: int) -> int:
        properties = self._call("cuMemGetAllocationPropertiesFromHandle", self._handle(handle))
        location = properties.location  # Points into their memory, which cuda-bindings before 13.5 frees with them.
        if location.type != self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE:
            raise DriverError("cuMemGetAllocationPropertiesFromHandle", "the memory is not on a device")
        return int(location.id)

    def map(self, handle: int, nbytes: int, device: int) -> int:
        cuda = self._cuda
        access = cuda.CUmemAccessDesc()
        access.location = self._location(device)
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        with self._current(device):
            address = self._call("cuMemAddressReserve", nbytes, 0, cuda.CUdeviceptr(0), 0)
            try:
                self._call("cuMemMap", address, nbytes, 0, self._handle(handle), 0)
                try:
                    self._call("cuMemSetAccess", address, nbytes, [access], 1)
                except BaseException:
                    self._call("cuMemUnmap", address, nbytes)
                    raise
            except BaseException:
                self._call("cuMemAddressFree", address, nbytes)
                raise
        return int(address)

    def extent(self, address: int, device: int) -> int:
        with self._current(device):
            base, nbytes = self._call("cuMemGetAddressRange", self._cuda.CUdeviceptr(address))
        return int(nbytes) - (address - int(base))

    def unmap(self, address: int, nbytes: int) -> None:
        pointer = self._cuda.CUdeviceptr(address)
        self._call("cuMemUnmap", pointer, nbytes)
        self._call("cuMemAddressFree", pointer, nbytes)

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", self._handle(handle))

    def copy(self, target: int, source: int, nbytes: int, device: int, stream: int) -> None:
        cuda = self._cuda
        with self._current(device):
            self._call(
                "cuMemcpyAsync", cuda.CUdeviceptr(target), cuda.CUdeviceptr(source), nbytes, cuda.CUstream(stream)
            )

    def tensor(self, address: int, nbytes: int, device: int, owner: object) -> torch.Tensor:
        import torch

        return torch.as_tensor(_Memory(address, nbytes, owner), device=torch.device("cuda", device))

    def _call(self, name: str, *arguments: object) -> Any:
        """Calls the driver; returns what it returns beside its status: nothing, one value or a tuple."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            raise DriverError(name, str(getattr(status, "name", status)))
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def _descriptor_kind(self) -> Any:
        return self._cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _handle(self, handle: int) -> Any:
        return self._cuda.CUmemGenericAllocationHandle(handle)

    def _device(self, device: int) -> Any:
        return self._call("cuDeviceGet", device)

    def _location(self, device: int) -> Any:
        location = self._cuda.CUmemLocation()
        location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        return location

    def _properties(self, device: int) -> Any:
        properties = self._cuda.CUmemAllocationProp()
        properties.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._descriptor_kind
        properties.location = self._location(device)
        return properties

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """The device's primary context, which torch uses too, is this thread's current one inside."""
        with self._lock:
            if device not in self._contexts:  # Kept for the life of the process, as torch keeps it.
                self._contexts[device] = self._call("cuDevicePrimaryCtxRetain", self._device(device))
        self._call("cuCtxPushCurrent", self._contexts[device])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")


class _Memory:
    """Device memory, described to torch."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        self._owner = owner
