"""How busy the device is, how much of its memory is in use, and whether the memory is enough for the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from lovasz.server.device.host_memory import budget_warning, host_memory

_log = logging.getLogger(__name__)

ReadT = TypeVar("ReadT")


class DeviceWatch:
    """The load of a device by all processes, as last read; NaN if it cannot be read.

    Attributes:
        utilization: share of the time in which the GPU (by its driver's count) or the host's processors had work.
        used_bytes: used memory of the GPU; for a CPU, of the host, or of the container if that has a limit.
        memory_bytes: total memory of the GPU; for a CPU, of the host, or the container's limit.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._before: tuple[int, int] | None = None
        self._told: set[str] = set()
        self.utilization = self.used_bytes = self.memory_bytes = math.nan

    def check_budget(self, budget_bytes: int) -> None:
        """Logs a warning if this budget may need more memory than the host or the container has."""
        if warning := budget_warning(budget_bytes, self._on_gpu):
            _log.warning(warning)

    def sample(self) -> None:
        """A chore: reads the load. It asks the device, and so it can hang if the device does."""
        utilization = self._gpu_utilization if self._on_gpu else self._host_utilization
        memory: Callable[[], tuple[float, float]] = self._gpu_memory if self._on_gpu else host_memory
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
