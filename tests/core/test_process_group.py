"""The joint loss of the ranks of a process group: processes of their own, which run the checks of ``group_ranks``.

All checks run in the same few processes: to start one takes longer than most of the checks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import group_ranks
from support.comparison import normal, random_labels
from support.fork_server import Forked
from torch import Tensor

from lovasz.core import InvalidInput, LovaszSoftmax, compute
from lovasz.core.batch import Request
from lovasz.core.dispatch import warm_up
from lovasz.core.distributed import joint
from lovasz.core.distributed.group import Group
from lovasz.spec import weighted_sum

SECONDS = 400
"""More than what the ranks need on a busy machine."""


def run_processes(folder: Path, count: int, *options: str) -> list[list[str]]:
    """What each process prints: the checks that it has ended."""
    command = [sys.executable, "-m", "support.group_ranks", "--store", str(folder / "store"), *options]
    with ExitStack() as stack:
        processes, files = [], []
        for number in range(count):
            files.append(stack.enter_context((folder / f"said-{number}").open("w+")))
            given = [*command, "--process", str(number)]
            process = Forked(given, cwd=Path(__file__).parents[1], stdout=files[-1], stderr=subprocess.STDOUT)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        # The others may wait for one that has failed.
        until = time.monotonic() + SECONDS
        while any(one.poll() is None for one in processes) and not any(one.returncode for one in processes):
            assert time.monotonic() < until, "the processes take too long"
            time.sleep(0.05)
        failed = [number for number, one in enumerate(processes) if one.returncode]
        said = [(folder / f"said-{number}").read_text() for number in range(count)]
    assert not failed, "\n".join(f"process {number}:\n{said[number]}" for number in failed)
    return [text.splitlines() for text in said]


@pytest.mark.timeout(SECONDS + 200)
def test_ranks_have_the_loss_and_the_gradient_of_one_process(tmp_path: Path) -> None:
    """On 2, 3 and 4 ranks. At last a rank ends before its call: no other rank waits for it."""
    warm_up(torch.device("cpu"))  # Else each rank compiles the same, all at once.
    count = 1 + max(process for teams in group_ranks.PHASES for team in teams for process in team)
    printed = run_processes(tmp_path, count)
    *phases, (last_team,) = group_ranks.PHASES
    for process, lines in enumerate(printed):
        expected = [check for teams in phases for team, checks in teams.items() if process in team for check in checks]
        assert lines[: len(expected)] == expected
        if process == last_team[-1]:
            assert lines[len(expected) :] == ["ended"]
        elif process in last_team:
            (told,) = lines[len(expected) :]
            assert told.startswith("told: ")


@pytest.mark.timeout(SECONDS + 200)
def test_a_program_ends_after_it_has_left_while_others_go_on(tmp_path: Path) -> None:
    """In seconds, without an abort: ``run_processes`` checks the exit codes."""
    warm_up(torch.device("cpu"))
    assert run_processes(tmp_path, 2, "--ending") == [[], ["told"]]


class OnGpusAlone:
    """Two ranks with the same pixels, in a group of NCCL alone."""

    rank, size = 0, 2
    device = torch.device("cuda")

    def device_for(self, logits: Tensor) -> torch.device:
        return logits.device  # In place of its own device, which is not here.

    def numbers(self, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.stack([own, own])

    def bytes(self, own: Tensor) -> list[Tensor]:
        return [own, own]


def refuse(*_: object) -> None:
    raise RuntimeError("No backend type associated with device type cpu")


def test_logits_on_the_host_and_ranks_that_send_from_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large joints, too, are computed from all pixels then."""
    monkeypatch.setattr(joint, "TABLES_FROM_PIXELS", 1)
    monkeypatch.setattr(joint, "Parts", refuse)  # What it sends is on the CPU.
    loss = weighted_sum(LovaszSoftmax())
    logits, labels = normal(1, 3, 20, 20, seed=1, dtype=torch.float32), random_labels(1, 20, 20, values=3, seed=2)
    request = Request.checked(logits, labels, loss)
    result = joint._computed(cast("Group", OnGpusAlone()), lambda: (request, loss), want_grad=True)
    expected = compute(torch.cat([logits, logits]), torch.cat([labels, labels]), loss)
    assert result.loss == expected.loss
    assert result.grad is not None
    assert expected.grad is not None
    assert torch.equal(result.grad, expected.grad[:1])


def test_the_default_group_has_to_exist() -> None:
    with pytest.raises(InvalidInput, match="group: got 'world', and there is no default group"):
        compute(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), LovaszSoftmax(), group="world")
