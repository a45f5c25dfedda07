"""Regions of memory that another process shares: checks that one is safe to use, and maps it.

A region is a memfd: it has no name that could be left behind. It must be sealed against shrinking, as a read beyond
the end of a mapped file would kill the server.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from lovasz.spec import InvalidInput


def map_region(descriptor: int) -> memoryview:
    """Maps the memory that a file descriptor stands for.

    Raises:
        InvalidInput: it is not memory that is safe to use.
        OSError: it cannot be mapped.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise InvalidInput("region", "got a file descriptor of another kind; expected a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise InvalidInput("region", "got a memfd that can shrink; expected one sealed with F_SEAL_SHRINK")
    size = os.fstat(descriptor).st_size
    if size < 1:
        raise InvalidInput("region", "got an empty memfd; expected at least one byte")
    return memoryview(mmap.mmap(descriptor, size))


def part_of(region: memoryview, name: str, offset: int, nbytes: int) -> memoryview:
    """The bytes of one tensor.

    Raises:
        InvalidInput: they are not all inside the region.
    """
    if not 0 <= offset <= region.nbytes - nbytes:
        raise InvalidInput(
            f"shared_tensors.{name}_offset",
            f"got {offset} for {nbytes} bytes in a region of {region.nbytes}; expected a place within it",
        )
    return region[offset : offset + nbytes]
