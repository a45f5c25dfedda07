"""What the server's process asks of the system."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from lovasz.server import __main__ as main

SOFT, HARD = 256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize(("most", "expected"), [(1 << 40, HARD), (300, 300), (100, SOFT)])
def test_the_limit_of_open_files_is_raised_as_far_as_the_system_allows_it(
    most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HARD == resource.RLIM_INFINITY and most > 300:
        pytest.skip("the system has no limit")
    monkeypatch.setattr(main, "_MOST_DESCRIPTORS", most)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
    try:
        main._raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, HARD)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_connection_gets_the_number_of_a_closed_standard_error() -> None:
    code = """
import os, socket, sys
for closed in map(int, sys.argv[1:]):
    os.close(closed)
from lovasz.server.__main__ import _hold_standard_descriptors
_hold_standard_descriptors()
assert socket.socket().fileno() > 2
os.write(2, b"a library's line")
"""
    for closed in ([], ["2"], ["0", "1", "2"], ["0", "2"]):
        ran = subprocess.run([sys.executable, "-c", code, *closed], capture_output=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == (b"" if "2" in closed else b"a library's line")
