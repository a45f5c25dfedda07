"""Skips what needs a GPU."""

from __future__ import annotations

import pytest
import torch


def require_gpu() -> None:
    """Skips the test where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch.cuda.is_available() is False")
