"""The device that a server computes on: which one, what it is called, and how much of it is taken."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from lovasz.server.errors import DeviceError

_log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device that a configuration names.

    Raises:
        DeviceError: there is none such here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = torch.device(name).index or 0
        if index >= count:
            raise DeviceError(f"--device {name}: torch sees {count} CUDA devices here; expected cpu or auto, or a GPU")
        return torch.device("cuda", index)
    return torch.device(name)


def hardware_name(device: torch.device) -> str:
    """The device's own name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are taken, and bytes in all: of the GPU, or of the host; 0 and 0 where the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    except OSError:
        return 0, 0
    total = kilobytes["MemTotal"] << 10
    return total - (kilobytes["MemAvailable"] << 10), total


class Utilization:
    """How much of a device was at work lately, whoever it worked for.

    Attributes:
        ratio: of the GPU, as its driver counts; or of the host's processors, between the last two samples. NaN where
            that is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self.ratio = math.nan
        self._device = device
        self._read: Callable[[], float] | None = self._of_gpu if device.type == "cuda" else self._of_host
        self._before = (0, 0)

    def sample(self) -> None:
        """A chore: reads it. What cannot be read is not tried again."""
        if self._read is None:
            return
        try:
            self.ratio = self._read()
        except (
            Exception
        ) as error:  # Of many kinds: no nvidia-ml-py, no driver that it knows, a part of a GPU, no /proc.
            _log.warning("the device's utilization is not known", extra={"error": str(error)})
            self._read, self.ratio = None, math.nan

    def _of_gpu(self) -> float:
        return torch.cuda.utilization(self._device) / 100  # Needs nvidia-ml-py, and finds the GPU as torch counts them.

    def _of_host(self) -> float:
        with open("/proc/stat") as file:
            _, user, nice, system, idle, waiting, *others = file.readline().split()[:9]
        busy = sum(map(int, (user, nice, system, *others)))
        total = busy + int(idle) + int(waiting)
        busy_before, total_before = self._before
        self._before = busy, total
        return (busy - busy_before) / max(1, total - total_before)
