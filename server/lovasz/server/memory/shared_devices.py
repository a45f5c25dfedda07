"""The GPUs whose memory callers may share with the server, and how their memory gets here."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from lovasz.device_memory.cuda import CudaDriver
from lovasz.device_memory.driver import Driver, DriverError, name_of
from lovasz.device_memory.mapping import Mapping, load
from lovasz.spec import InvalidInput

_log = logging.getLogger(__name__)


class SharedDevices:
    """The device that computes, and those whose memory it can read and write.

    Attributes:
        uuids: their names, 16 bytes each.
    """

    def __init__(self, driver: Driver, device: int) -> None:
        """Asks the driver.

        Args:
            device: the one that computes.

        Raises:
            DriverError: the driver refuses.
        """
        self._driver, self._device = driver, device
        owners = [owner for owner in range(driver.count) if driver.can_access(device, owner)]
        self.uuids = tuple(map(driver.uuid, owners))

    def load(self, descriptor: int, uuid: bytes, nbytes: int, max_bytes: int) -> Mapping:
        """Imports memory. The descriptor can be closed afterwards.

        Args:
            uuid: the device that has it, as its caller says.
            nbytes: its size, as its caller says.
            max_bytes: the most that is taken.

        Raises:
            InvalidInput: it is not memory of that device or size, the device is none of these, or it is too much.
        """
        if uuid not in self.uuids:
            raise InvalidInput("region", f"got memory of {name_of(uuid)}, which this server cannot reach")
        if not 0 < nbytes <= max_bytes:
            raise InvalidInput(
                "region", f"got device memory of {nbytes} bytes; expected 1 to {max_bytes} (--memory-budget)"
            )
        try:
            mapping = load(self._driver, descriptor, nbytes, self._device)
            owner = self._driver.uuid(mapping.owner)
        except DriverError as error:
            raise InvalidInput("region", f"this cannot be used as device memory of {nbytes} bytes: {error}") from None
        if owner != uuid:
            raise InvalidInput(
                "region", f"got memory of {name_of(owner)}; expected {name_of(uuid)}, as its caller said"
            )
        return mapping


def shared_devices(device: torch.device, open_driver: Callable[[], Driver] = CudaDriver) -> SharedDevices | None:
    """Those of a server that computes on a device; None on a CPU, or where the driver cannot share memory."""
    if device.type != "cuda":
        return None
    try:
        return SharedDevices(open_driver(), device.index or 0)
    except DriverError as error:
        _log.warning("device memory cannot be shared; callers share host memory", extra={"reason": str(error)})
        return None
