"""The joint loss of the ranks of a process group: processes of their own, which run the checks of ``group_ranks``.

All checks run in the same few processes: to start one takes longer than most of the checks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support import group_ranks
from support.fork_server import Forked

from lovasz.core import InvalidInput, LovaszSoftmax, compute
from lovasz.core.dispatch import warm_up

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


def test_the_default_group_has_to_exist() -> None:
    with pytest.raises(InvalidInput, match="group: got 'world', and there is no default group"):
        compute(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), LovaszSoftmax(), group="world")
