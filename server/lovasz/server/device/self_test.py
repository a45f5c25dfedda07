"""Checks that a device computes: losses whose values are known."""

from __future__ import annotations

import logging
import math
import time

import torch

from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.server.memory.exhaustion import is_out_of_memory
from lovasz.spec import LovaszHinge, LovaszSoftmax, Result, weighted_sum

_log = logging.getLogger(__name__)


class SelfTest:
    """Lets a device compute losses that are known, and keeps the verdict.

    Attributes:
        passed: whether the device gave the right answers when it last had the memory for them.
        ended: when it was last checked (``time.monotonic``).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.passed = False
        self.ended = -math.inf
        self._lacked_memory = False

    def run(self) -> None:
        """Checks the device. Never raises, but hangs where the device does.

        A device without memory left, which other processes may hold, is no broken one: the verdict stays.
        """
        passed_before, device = self.passed, {"device": str(self._device)}
        try:
            self.passed = computes_known_losses(self._device)
            self._lacked_memory = False
            if not self.passed:
                _log.error("the device computes wrongly", extra=device)
        except Exception as error:
            if is_out_of_memory(error):
                if not self._lacked_memory:
                    _log.warning("the device has no memory left for its check", extra={**device, "error": str(error)})
                self._lacked_memory = True
            else:
                self.passed = False
                _log.exception("the device does not answer", extra=device)
        if self.passed and not passed_before:
            _log.info("the device answers", extra=device)
        self.ended = time.monotonic()


def computes_known_losses(device: torch.device) -> bool:
    """Whether the device gives the right answers. Raises whatever the device raises."""
    logits = torch.tensor([[[2.0, -1.0]], [[0.5, 1.5]]])
    hinge, softmax = weighted_sum(LovaszHinge()), weighted_sum(LovaszSoftmax(classes="all"))
    known = (
        (hinge, logits, torch.tensor([[[0, 0]], [[1, 1]]]), 7 / 6),
        # Equal logits: every error is 1/2. Class 0 has one of the two pixels: its loss is (1 + 0) / 2. So has class 1.
        (softmax, torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), 0.5),
    )
    for loss, scores, labels, expected in known:
        (answer,) = submit([Request.checked(scores, labels, loss)], loss, device).collect()
        if not isinstance(answer, Result) or not math.isclose(answer.loss, expected, rel_tol=1e-6):
            return False
    return True
