"""The joint loss of the ranks of a process group: processes of their own, which run the checks of ``group_ranks``."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support import group_ranks

from lovasz.core import InvalidInput, LovaszSoftmax, compute

SECONDS = 250
"""More than what the ranks need where Numba has compiled nothing yet, on a busy machine."""

CHECKS = {
    2: (
        *("one_request", "one_request:torch", "one_request:mixed"),
        *("options", "options:torch", "options:tables", "options:sorted", "options:mixed"),
        *("probabilities", "probabilities:torch", "probabilities:mixed"),
        *("masks_and_offsets", "masks_and_offsets:tables", "masks_and_offsets:mixed"),
        *("not_finite", "not_finite:torch", "not_finite:mixed"),
        *(
            "all_are_empty",
            "faults",
            "faults:mixed",
            "other_failures",
            "group_arguments",
            "copies",
            "trainings",
            "page",
        ),
    ),
    3: (
        *("options:mixed", "at_random", "at_random:torch", "at_random:tables", "at_random:mixed"),
        *("faults", "faults:mixed", "parts_of_the_ranks", "parts_of_the_ranks:mixed", "trainings"),
    ),
    4: ("one_request:mixed", "at_random", "at_random:mixed", "at_random:sorted", "not_finite:mixed", "large"),
}
"""Checks of so many ranks, with the way in which the loss is computed."""


def run_ranks(store: Path, world: int, *checks: str) -> list[list[str]]:
    """What each rank prints: the checks that it has ended."""
    command = [sys.executable, group_ranks.__file__, "--world", str(world), "--store", str(store), *checks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(group_ranks.__file__).parents[1])
    with ExitStack() as stack:
        ranks = []
        for rank in range(world):
            given = [*command, "--rank", str(rank)]
            process = subprocess.Popen(
                given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        outputs = [rank.communicate(timeout=SECONDS) for rank in ranks]
    # The rank that fails first has the reason; the others lose their peer.
    failed = [
        f"rank {number}:\n{said}{errors}"
        for number, (rank, (said, errors)) in enumerate(zip(ranks, outputs, strict=True))
        if rank.returncode != 0
    ]
    assert not failed, "\n".join(failed)
    return [said.splitlines() for said, _ in outputs]


@pytest.mark.timeout(SECONDS + 50)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_have_the_loss_and_the_gradient_of_one_process(world: int, tmp_path: Path) -> None:
    printed = run_ranks(tmp_path / "store", world, *CHECKS[world])
    assert printed == [list(CHECKS[world])] * world


def test_no_rank_waits_for_one_that_has_ended(tmp_path: Path) -> None:
    printed = run_ranks(tmp_path / "store", 3, "a_rank_that_ends")
    assert printed[2] == ["ended"]
    for told in printed[:2]:
        assert len(told) == 1
        assert told[0].startswith("told: ")


def test_the_default_group_has_to_exist() -> None:
    with pytest.raises(InvalidInput, match="group: got 'world', and there is no default group"):
        compute(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), LovaszSoftmax(), group="world")
