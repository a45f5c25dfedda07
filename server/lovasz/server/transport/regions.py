"""Regions of memory that another process shares: checks that one is safe to use, and maps it.

A region is a memfd: it has no name that could be left behind. It must be sealed against shrinking, as a read beyond
the end of a mapped file would kill the server. All its pages must be allocated, as a page that the server touches first
would count as the server's own memory; sealed against growing, its blocks say so. Once it is mapped, the server seals
it against being mapped for writing again: with this seal, Linux refuses to free its pages. It must be of ordinary
pages: a huge page that its owner frees during a call cannot be replaced if the system has no other, which would kill
the server, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import queue
import socket
import struct
import threading
import weakref

from lovasz import wire
from lovasz.spec import InvalidInput

_BLOCK_BYTES = 512
"""In which ``st_blocks`` counts."""
_SPARE_BYTES = 2 << 20
"""The last page may be a large one; so many bytes beyond the end could hide as large a hole."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEAL_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE (Linux 5.1), for which Python has no name."""


class Region:
    """Memory that a file descriptor stands for, mapped.

    Attributes:
        nbytes: its size.
        mapping: what the tensors in it refer to, so that it stays mapped.
    """

    def __init__(self, descriptor: int, max_bytes: int) -> None:
        """Checks the memory and maps it. The descriptor can be closed afterwards.

        Raises:
            InvalidInput: it is not memory that is safe to use, or there is too much of it.
            OSError: it cannot be mapped.
        """
        seals = _seals(descriptor)
        if seals is None:
            raise InvalidInput("region", "got a file descriptor of another kind; expected a memfd")
        if seals & _SEALS != _SEALS:
            raise InvalidInput(
                "region", "got a memfd that can change its size; expected one sealed with F_SEAL_SHRINK and F_SEAL_GROW"
            )
        page_bytes = os.fstatvfs(descriptor).f_bsize
        if page_bytes != mmap.PAGESIZE:
            raise InvalidInput(
                "region", f"got a memfd of pages of {page_bytes} bytes; expected {mmap.PAGESIZE} (no MFD_HUGETLB)"
            )
        self.nbytes = os.fstat(descriptor).st_size
        if not self.nbytes:
            raise InvalidInput("region", "got an empty memfd; expected at least one byte")
        if self.nbytes > max_bytes:
            raise InvalidInput(
                "region", f"got a memfd of {self.nbytes} bytes; expected at most {max_bytes} (--memory-budget)"
            )
        if seals & _SEAL_FUTURE_WRITE:
            raise InvalidInput("region", "got a memfd that was shared with a server before; expected a new one")
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self.check_allocated()
        if self._allocated() > self.nbytes + _SPARE_BYTES:
            raise InvalidInput("region", "got a memfd with pages beyond its end; expected none")
        self.mapping = mmap.mmap(descriptor, self.nbytes)

    def keep_pages(self) -> None:
        """Lets nobody give pages back from now on.

        Raises:
            InvalidInput: that cannot be, or some are missing already.
        """
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
        except PermissionError:
            raise InvalidInput("region", "got a memfd sealed with F_SEAL_SEAL; expected one without") from None
        except OSError:
            pass  # Linux before 5.1: pages that are given back are noticed at the next call.
        self.check_allocated()

    def check_allocated(self) -> None:
        """Checks that no page was given back since.

        Raises:
            InvalidInput: one was.
        """
        allocated = self._allocated()
        if allocated < self.nbytes:
            raise InvalidInput(
                "region",
                f"got a memfd with {allocated} of {self.nbytes} bytes allocated; expected all (posix_fallocate)",
            )

    def _allocated(self) -> int:
        return os.fstat(self._descriptor).st_blocks * _BLOCK_BYTES

    def part(self, name: str, offset: int, nbytes: int) -> memoryview:
        """The bytes of one tensor.

        Raises:
            InvalidInput: they are not all inside the region.
        """
        wire.check_inside(f"shared_tensors.{name}_offset", offset, nbytes, self.nbytes)
        return memoryview(self.mapping)[offset : offset + nbytes]


class Closer:
    """Closes file descriptors of other processes: what is no memfd in a thread of its own, as that may wait."""

    def __init__(self) -> None:
        self._foreign: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def close(self, descriptor: int) -> None:
        """Closes a descriptor, at once or soon. Asks no file system about it, as that may not answer."""
        if _seals(descriptor) is not None:
            os.close(descriptor)
            return
        with contextlib.suppress(OSError):  # It is no socket.
            copy = socket.socket(fileno=descriptor)
            try:  # Its SO_LINGER could make the thread wait for minutes.
                copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            finally:
                copy.detach()
        self._foreign.put(descriptor)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="closer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # Of a file whose system fails. It is closed all the same.
                os.close(self._foreign.get())


def _seals(descriptor: int) -> int | None:
    """The seals of a memfd; None for anything else."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return None
