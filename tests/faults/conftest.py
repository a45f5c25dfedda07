"""A server that attacks may be tried on: small, and with little patience."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.audit import Audit

from lovasz.server.launch import ServerProcess

MAX_REQUESTS = 32
BUDGET_BYTES = 64 << 20
JOINT_SECONDS = 3.0
HEADER_SECONDS = 2.0
STALL_SECONDS = 2.0
PAYLOAD_SECONDS = 4.0
MAX_THREADS = 2 * MAX_REQUESTS + 220
ARGUMENTS = [
    *("--device", "cpu", "--max-requests", f"{MAX_REQUESTS}", "--memory-budget", f"{BUDGET_BYTES}B"),
    *("--joint-timeout", f"{JOINT_SECONDS}", "--header-timeout", f"{HEADER_SECONDS}"),
    *("--stall-timeout", f"{STALL_SECONDS}", "--payload-timeout", f"{PAYLOAD_SECONDS}"),
]


@pytest.fixture(scope="session")
def besieged() -> Iterator[ServerProcess]:
    with ServerProcess(ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="session")
def at_rest(besieged: ServerProcess) -> Audit:
    return Audit(besieged, MAX_THREADS)


@pytest.fixture
def audit(at_rest: Audit) -> Iterator[Audit]:
    """Checks, when the test has ended, that the server is as it was."""
    yield at_rest
    at_rest.check()
