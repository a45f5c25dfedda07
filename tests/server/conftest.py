"""A server whose calls are made in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.desk import Desk


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()
