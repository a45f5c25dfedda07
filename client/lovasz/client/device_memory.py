"""Device memory that is shared with a server on this host: a trainer's tensors stay on its GPU.

Imported where a tensor on a GPU is to be sent through a Unix socket; needs torch.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial

import torch

from lovasz import wire
from lovasz.client.errors import LossError
from lovasz.client.memory import Pool
from lovasz.client.options import IN_DEVICE_MEMORY
from lovasz.client.regions import Shared
from lovasz.client.shared_memory import SharedMemory
from lovasz.client.tensors import Outgoing
from lovasz.device_memory.driver import OUT_OF_MEMORY, Driver, DriverError, name_of
from lovasz.device_memory.mapping import create
from lovasz.v1 import loss_pb2 as pb


def open_driver() -> Driver:
    """The driver of this host's GPUs.

    Raises:
        DriverError: there is none that can share memory.
    """
    from lovasz.device_memory.cuda import CudaDriver

    return CudaDriver()


class DeviceRegion(Shared):
    """A block of device memory that can be shared with another process.

    Attributes:
        nbytes: its size.
    """

    kind = IN_DEVICE_MEMORY

    def __init__(self, driver: Driver, device: int, nbytes: int, pool: Pool[DeviceRegion]) -> None:
        """Allocates the block.

        Raises:
            DriverError: the device has no memory left, or its memory cannot be shared.
        """
        self._mapping, descriptor = create(driver, device, nbytes)
        super().__init__(descriptor)
        self.nbytes = self._mapping.nbytes
        self._uuid, self._pool = driver.uuid(device), pool
        self._stream: torch.cuda.Stream | None = None
        self._written: torch.cuda.Event | None = None

    def write_tensors(self, places: wire.Places, logits: Outgoing, labels: Outgoing) -> None:
        """Queues copies on this thread's stream."""
        stream = torch.cuda.current_stream(self._mapping.device) if torch.cuda.is_initialized() else None
        if stream is not None:
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)  # The last gradient may still be read there.
            self._stream = stream
            self._mapping.used_on(stream)
        logits.write_tensor(self._part(places.logits, logits.spec, self))
        labels.write_tensor(self._part(places.labels, labels.spec, self))
        if stream is not None:
            self._written = stream.record_event()

    def complete(self) -> None:
        if self._written is not None:
            self._written.synchronize()

    def renew(self) -> None:
        """Nothing to do: a server takes memory of a GPU again."""

    def description(self) -> pb.DeviceMemory:
        return pb.DeviceMemory(device=self._uuid, nbytes=self.nbytes)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        part = self._part(offset, wire.TensorSpec(wire.dtype_named("uint8"), (nbytes,)), self)
        return memoryview(part.cpu().numpy().tobytes())

    def take_gradient(self, offset: int, spec: wire.TensorSpec, *, copied: bool) -> torch.Tensor:
        owner = _Owner()
        # Takes no lock, as the garbage collector may call it at any point of any thread.
        weakref.finalize(owner, self._pool.give, self).atexit = False
        return self._part(offset, spec, owner)

    def give_back(self) -> None:
        self._pool.give(self)

    def _part(self, offset: int, spec: wire.TensorSpec, owner: object) -> torch.Tensor:
        """A part of the block as a tensor that keeps ``owner`` alive."""
        mapping, dtype = self._mapping, getattr(torch, spec.dtype.name)
        if not spec.nbytes:
            offset = 0  # The driver has no tensors without bytes.
        memory = mapping.driver.tensor(mapping.address + offset, max(spec.nbytes, 1), mapping.device, owner)
        return memory[: spec.nbytes].view(dtype).view(spec.shape)


class DeviceMemory:
    """The blocks of all devices of this process that are shared with one server."""

    def __init__(self, shared: SharedMemory) -> None:
        """Opens the driver.

        Raises:
            DriverError: this process cannot share device memory.
        """
        self._shared = shared
        self._driver = open_driver()
        self._lock = threading.Lock()
        self._pools: dict[int, Pool[DeviceRegion]] = {}

    def take(self, device: torch.device, nbytes: int, timeout: float) -> DeviceRegion:
        """A block of at least ``nbytes`` bytes of a device whose memory the server takes.

        Args:
            timeout: seconds to ask the server.

        Raises:
            DriverError: the device has no memory left.
            LossError: the server does not take its memory.
            grpc.RpcError, ValueError: as ``SharedMemory.share``.
        """
        number = device.index or 0
        uuid = self._driver.uuid(number)
        if uuid not in self._shared.session(timeout).devices:
            raise LossError(f"the server cannot reach {device}, {name_of(uuid)}")
        step = self._driver.granularity(number)
        return self._pool(number).take(-(-nbytes // step) * step)

    def close(self) -> None:
        """Frees the idle blocks."""
        with self._lock:
            for pool in self._pools.values():
                pool.close()

    def _pool(self, device: int) -> Pool[DeviceRegion]:
        with self._lock:
            if device not in self._pools:
                self._pools[device] = Pool(partial(self._make, device))
            return self._pools[device]

    def _make(self, device: int, nbytes: int) -> DeviceRegion:
        pool = self._pool(device)
        try:
            return DeviceRegion(self._driver, device, nbytes, pool)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
        # What was freed is still kept: here, by the server until it knows, and by torch.
        pool.clear()
        self._shared.settle()
        torch.cuda.empty_cache()
        return DeviceRegion(self._driver, device, nbytes, pool)


class _Owner:
    """Refers to nothing: a tensor that keeps it alive says by this that it is in use."""
