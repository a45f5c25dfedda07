"""A device's memory that is kept for further batches: given back when it is needed, or after a while."""

from __future__ import annotations

import math
import time

import torch

from lovasz.core.dispatch import give_memory_back

IDLE_SECONDS = 30.0
"""A GPU that is idle for so long gets its memory back: trainers on it cannot ask for it."""


class KeptMemory:
    """What one device keeps. A CPU keeps nothing here."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._freed = -math.inf

    def free(self) -> None:
        """Gives it back now."""
        if self._is_on_gpu:
            give_memory_back()
            torch.cuda.empty_cache()

    def free_if_idle(self, busy_until: float) -> None:
        """Gives it back if that was not done since the device was last at work, and that is long ago.

        Args:
            busy_until: when it was last at work (``time.monotonic``).
        """
        if self._freed < busy_until <= time.monotonic() - IDLE_SECONDS:
            self._freed = time.monotonic()
            self.free()
