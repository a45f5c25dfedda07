"""The C library's memory: kept for the next message instead of being mapped anew, given back once it is not in use."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT_BYTES = 256 << 20
_STEP_BYTES = 16 << 20
_LEAST_BYTES = 16 << 20
_LARGEST_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Makes glibc keep what gRPC frees. For the entry point: it holds for the whole process.

    Each message of a stream is a few buffers of a MiB. By default these are mapped and unmapped again and again, which
    takes longer than to copy them; measured on loopback, that is a quarter of the time of a 40 MiB request.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, _STEP_BYTES)


class MemoryReturner:
    """Gives memory back when much less of it has been in use for a while than before."""

    def __init__(self, take_peak_bytes: Callable[[], int], periods: int) -> None:
        """
        Args:
            take_peak_bytes: the most bytes in use at a time since it was last called.
            periods: how many calls of :meth:`check` a fall has to last.
        """
        self._take_peak_bytes = take_peak_bytes
        self._recent: deque[int] = deque(maxlen=periods)
        self._kept = 0

    def check(self) -> None:
        """A chore."""
        self._recent.append(self._take_peak_bytes())
        in_use = max(self._recent)
        if self._kept - in_use > max(in_use, _LEAST_BYTES):
            give_back_freed_memory()
            self._kept = 0
        self._kept = max(self._kept, in_use)


def give_back_freed_memory() -> None:
    """Returns to the system what is kept."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
