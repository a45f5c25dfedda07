"""How busy the device is, and how much of its memory is in use, by all processes together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)

ReadT = TypeVar("ReadT")


class DeviceWatch:
    """The load of a device by all processes, as last read; NaN if it cannot be read.

    Attributes:
        utilization: share of the time in which the GPU (by its driver's count) or the host's processors had work.
        used_bytes: used memory of the GPU, or of the host.
        memory_bytes: total memory of the GPU, or of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: tuple[int, int] | None = None
        self._told: set[str] = set()
        self.utilization = self.used_bytes = self.memory_bytes = math.nan

    def sample(self) -> None:
        """A chore: reads the load. It asks the device, and so it can hang if the device does."""
        on_gpu = self._device.type == "cuda"
        utilization = self._gpu_utilization if on_gpu else self._host_utilization
        memory = self._gpu_memory if on_gpu else _host_memory
        self.utilization = self._read("utilization", utilization, math.nan)
        self.used_bytes, self.memory_bytes = self._read("memory", memory, (math.nan, math.nan))

    def _read(self, what: str, read: Callable[[], ReadT], unknown: ReadT) -> ReadT:
        """Reads a value; if that fails, logs it the first time."""
        try:
            return read()
        except Exception as error:  # Of many kinds: no nvidia-ml-py, a driver that fails, no /proc.
            if what not in self._told:
                self._told.add(what)
                _log.warning(f"the {what} of the device cannot be read", extra={"error": str(error)})
            return unknown

    def _gpu_utilization(self) -> float:
        return torch.cuda.utilization(self._device) / 100  # By nvidia-ml-py, for the GPU as torch counts them.

    def _gpu_memory(self) -> tuple[float, float]:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total

    def _host_utilization(self) -> float:
        """Since the last call."""
        with open("/proc/stat") as file:
            _, user, nice, system, idle, waiting, *others = file.readline().split()[:9]
        busy = sum(map(int, (user, nice, system, *others)))
        now = busy, busy + int(idle) + int(waiting)
        before, self._before = self._before, now
        if before is None:
            return math.nan
        return min(1.0, (now[0] - before[0]) / max(1, now[1] - before[1]))


def _host_memory() -> tuple[float, float]:
    with open("/proc/meminfo") as file:
        kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    total = kilobytes["MemTotal"] << 10
    return total - (kilobytes["MemAvailable"] << 10), total
