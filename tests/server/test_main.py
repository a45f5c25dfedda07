"""What the server's process asks of the system."""

from __future__ import annotations

import resource

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
