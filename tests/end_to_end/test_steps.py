"""How many functions of this project a small call passes through: most of its fixed cost, and the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType

import pytest
import torch
from support.counted_server import CountedServer, is_own

from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss, LovaszSoftmax

CALLS = 50
LOGITS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
LABELS = torch.zeros(1, 32, 32, dtype=torch.int64)


def step(criterion: torch.nn.Module) -> None:
    LOGITS.grad = None
    criterion(LOGITS, LABELS).backward()


def steps_here(work: Callable[[], None]) -> int:
    """How many of this project's functions a call has this thread call."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and is_own(frame)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def test_a_small_loss_in_process_takes_few_steps() -> None:
    criterion = LocalLoss(LovaszSoftmax())
    for _ in range(3):
        step(criterion)
    assert 30 <= steps_here(lambda: step(criterion)) <= 70


@pytest.mark.parametrize("place", [0, 1], ids=["socket", "gRPC"])
def test_a_small_call_takes_few_steps(place: int, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 's'},127.0.0.1:0"
    with (
        CountedServer(["--listen", listen, "--shared-memory", "--device", "cpu"]) as server,
        closing(RemoteLoss(server.targets[place], LovaszSoftmax())) as criterion,
    ):
        for _ in range(CALLS):
            step(criterion)
        before = server.steps()
        in_client = sum(steps_here(lambda: step(criterion)) for _ in range(CALLS)) / CALLS
        in_server = (server.steps() - before) / CALLS
        assert 40 <= in_client <= 95
        assert 100 <= in_server <= 240
