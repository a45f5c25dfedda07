"""The C library keeps what is freed and gives it back when told; in a process of its own, as it holds for all of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lovasz.server.memory import allocator
from lovasz.server.memory.allocator import MemoryReturner

KEEPING = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from lovasz.server.memory.allocator import give_back_freed_memory, keep_freed_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

keep_freed_memory()
before = resident_mib()
barrier = Barrier(5)

def new_buffers():
    barrier.wait()
    return [bytearray(b"x") * (1 << 20) for _ in range(10)]

with ThreadPoolExecutor(5) as threads:
    buffers = list(threads.map(lambda _: new_buffers(), range(5)))
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


@pytest.mark.parametrize(
    ("mebibytes", "returned_after"),
    [
        ([0, 0, 500, 0, 0, 0, 0, 0], [6]),
        ([500, 100, 500, 100, 500, 100, 100, 100], [8]),
        ([500, 400, 300, 300, 300, 300, 300], []),
        ([500, 200, 200, 200, 200, 90, 90, 90], [4, 8]),
        ([10, 0, 0, 0, 0, 0], [4]),
        ([1, 0, 0, 0, 0, 0], []),
    ],
    ids=["idle", "a rest between requests", "about as much", "less and less", "little", "too little"],
)
def test_memory_is_given_back_once_much_less_has_been_in_use_for_a_while(
    monkeypatch: pytest.MonkeyPatch, mebibytes: list[int], returned_after: list[int]
) -> None:
    returned: list[int] = []
    peaks = iter(mebibytes)
    returner = MemoryReturner(lambda: next(peaks) << 20, periods=3)
    for number in range(1, len(mebibytes) + 1):
        monkeypatch.setattr(allocator, "give_back_freed_memory", lambda number=number: returned.append(number))
        returner.check()
    assert returned == returned_after
