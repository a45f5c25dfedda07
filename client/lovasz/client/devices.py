"""Whether a trainer's tensors can stay on its GPU: the first choice of the three ways to a server on the same host."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING

import grpc

from lovasz.client.errors import LossError
from lovasz.client.shared_memory import SharedMemory
from lovasz.client.tensors import AnyArray
from lovasz.device_memory.driver import DriverError
from lovasz.spec.arrays import is_torch

if TYPE_CHECKING:
    from lovasz.client.device_memory import DeviceMemory, DeviceRegion

_log = logging.getLogger(__name__)

DEVICE_TYPE = "cuda"
"""Torch's name for the devices whose memory can be shared."""
_PAUSE_SECONDS = 30.0
"""How long a client does without device memory that its server has refused, or that its GPU has no more of."""


class Devices:
    """Finds device memory for requests. Says in the log why there is none, each reason once."""

    def __init__(self, shared: SharedMemory) -> None:
        """Opens no driver before the first tensor on a GPU.

        Args:
            shared: what is shared with the server.
        """
        self._shared = shared
        self._closed = False
        self._paused_until = -math.inf
        self._lock = threading.Lock()
        self._memory: DeviceMemory | None = None
        self._reason = ""
        """Why this process can share no device memory; empty as long as it is not known that it cannot."""
        self._told: set[str] = set()

    def pause(self, why: Exception) -> None:
        """Does without device memory for a while; says why, once."""
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if not self._closed:
            self._tell(str(why))

    def may_take(self, logits: AnyArray) -> bool:
        """Whether the logits are on a device whose memory the server may take; not for a while after it refused."""
        if not is_torch(logits) or logits.device.type != DEVICE_TYPE:
            return False
        return not self._reason and time.monotonic() >= self._paused_until

    def region(self, logits: AnyArray, nbytes: int, timeout: float) -> DeviceRegion | None:
        """Memory of the logits' device, of at least ``nbytes`` bytes; None if the server or the device has none.

        Args:
            timeout: seconds to ask the server whether it takes device memory.
        """
        memory = self._opened()
        if memory is None:
            return None
        try:
            return memory.take(logits.device, nbytes, timeout)
        except (grpc.RpcError, ValueError):
            return None  # No server answers, the time is up, or the client was closed: the call itself says so.
        except DriverError as error:
            self.pause(error)  # To look for memory that is not there takes time, and frees what torch keeps.
            return None
        except LossError as error:
            self._tell(str(error))
            return None

    def close(self) -> None:
        """Frees the memory that is idle."""
        self._closed = True
        if self._memory is not None:
            self._memory.close()

    def _opened(self) -> DeviceMemory | None:
        with self._lock:
            if self._memory is None and not self._reason:
                from lovasz.client.device_memory import DeviceMemory

                try:
                    self._memory = DeviceMemory(self._shared)
                except DriverError as error:
                    self._reason = str(error)
                    self._tell(self._reason)
            return self._memory

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("device memory is not used (%s): tensors go through the host's memory", reason)
