"""The places that receive the tensors of one request, all used in the same way."""

from __future__ import annotations

from typing import TypeAlias

from lovasz.server.memory.device_staging import DeviceStaging
from lovasz.server.memory.region_staging import RegionStaging
from lovasz.server.memory.staging import Staging

AnyStaging: TypeAlias = Staging | RegionStaging | DeviceStaging
"""In the server's memory on the host, in the caller's memory on the host, or in the device's memory."""
