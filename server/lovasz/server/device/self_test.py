"""Checks that a device computes: losses whose values are known."""

from __future__ import annotations

import math

import torch

from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import LovaszHinge, LovaszSoftmax, Result, weighted_sum


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
