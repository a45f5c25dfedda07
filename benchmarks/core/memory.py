"""The peak memory of a piece of code, beyond what was in use before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): "reset the peak resident set size to the process's current resident set size value"


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc: later buffers are warm pages."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class Meter:
    """Measures from its construction on.

    On a GPU it counts what torch's allocator hands out. On a CPU it counts resident pages, so new memory that an
    implementation keeps between calls counts, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _start_resident()

    def peak_bytes(self) -> int | None:
        """None where the system does not tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return status_bytes("VmHWM") - self._before


def _start_resident() -> int | None:
    """Resets the peak. Returns freed memory to the system first, as it would hide what is allocated next."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text(RESET_PEAK)
    except (OSError, AttributeError):  # Not Linux, not glibc, or not allowed.
        return None
    return status_bytes("VmRSS")


def status_bytes(field: str, process: int | str = "self") -> int:
    """What Linux tells of the memory of a process, such as VmRSS."""
    status = Path(f"/proc/{process}/status")
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
