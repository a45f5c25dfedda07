"""The C library keeps what is freed and gives it back when told; in a process of its own, as it holds for all of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

KEEPING = """
from lovasz.server.allocator import give_back_freed_memory, keep_freed_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

keep_freed_memory()
before = resident_mib()
buffers = [bytearray(b"x") * (1 << 20) for _ in range(50)]
full = resident_mib()
del buffers
kept = resident_mib()
give_back_freed_memory()
print(full - before, kept - before, resident_mib() - before)
"""


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", KEEPING], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    full, kept, left = map(int, ran.stdout.split())
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library does as it likes; that both functions run there was seen")
    assert full >= 49
    assert kept >= 40
    assert left <= 10
