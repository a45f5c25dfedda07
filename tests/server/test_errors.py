"""Errors that several threads raise."""

from __future__ import annotations

import pytest
import torch

from lovasz.server.errors import AbandonedError, JointBrokenError, NoBytesLeftError, TooLargeError, fresh
from lovasz.spec import InvalidInput


@pytest.mark.parametrize(
    "error",
    [
        AbandonedError(),
        NoBytesLeftError("full", 1.5),
        JointBrokenError("broken"),
        InvalidInput("labels", "got 9"),
        TooLargeError("large"),
        RuntimeError("a", 2),
        torch.OutOfMemoryError("none left"),
        OSError(5, "failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_for_many_is_copied_for_each(error: Exception) -> None:
    copied = fresh(error)
    assert copied is not error
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)
