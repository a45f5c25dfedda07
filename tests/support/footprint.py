"""What a process holds of the machine: memory, file descriptors, threads; and what stands in shared memory."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GRPC_THREADS = ("event_engine", "lifeguard", "grpc_")
"""What their names begin with."""


@dataclass(frozen=True)
class Footprint:
    descriptors: Counter[str]
    """How many file descriptors of each kind: socket, pipe, /memfd, ..."""
    threads: int
    """Without those of gRPC's C library, which come and go as it sees fit."""
    resident_bytes: int
    address_bytes: int
    shared_files: frozenset[str]
    """Of the whole machine, without semaphores, which other tests make."""

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = Path(f"/proc/{pid}")
        return cls(
            descriptors=Counter(target.partition(":")[0] for target in _targets(process / "fd")),
            threads=sum(not name.startswith(_GRPC_THREADS) for name in _thread_names(process)),
            resident_bytes=_status_bytes(pid, "VmRSS"),
            address_bytes=_status_bytes(pid, "VmSize"),
            shared_files=frozenset(name for name in os.listdir("/dev/shm") if not name.startswith("sem.")),
        )


def descriptors_of(memory: str) -> int:
    """How many file descriptors of this process lead to memory of this name (memfd_create)."""
    return sum(target.startswith(f"/memfd:{memory} ") for target in _targets(Path("/proc/self/fd")))


def forget_peak(pid: int) -> None:
    """From now on :func:`peak_bytes` counts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """The most memory that the process has held at a time."""
    return _status_bytes(pid, "VmHWM")


def available_bytes() -> int:
    """Memory of the machine that is free."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _thread_names(process: Path) -> Iterator[str]:
    for thread in (process / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            yield (thread / "comm").read_text().rstrip("\n")


def _targets(descriptors: Path) -> Iterator[str]:
    for name in os.listdir(descriptors):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(descriptors / name)


def _status_bytes(pid: int, name: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/status"), name)


def _kilobytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
