"""Two ranks with the lines of docs/trainers.md end with the weights of one process that has the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import recipe_ranks, recipes
from torch import Tensor

from lovasz.server.launch import ServerProcess

BLOCKS = {
    "DistributedDataParallel": [("DistributedDataParallel", 0)],
    "DistributedDataParallel, process group": [("DistributedDataParallel", 0)],
    "FSDP": [("FSDP", 0)],
    "FSDP 1": [("FSDP", 1)],
    "Lightning": [("Lightning", 0), ("Lightning", 1)],
    "accelerate": [("accelerate", 0)],
    "Hugging Face Trainer": [("Hugging Face Trainer", 0)],
}
PACKAGES = {"Lightning": "lightning", "accelerate": "accelerate", "Hugging Face Trainer": "transformers"}


def weights_of_two_ranks(training: str, target: str, folder: Path) -> Tensor:
    """Runs a training of ``recipe_ranks`` with torchrun."""
    saved = folder / "weights.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "support.recipe_ranks", training, target, str(saved)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    # accelerate joins ranks on CPUs only if it is told to, by this or by cpu=True.
    environment["ACCELERATE_USE_CPU"] = "true"
    environment["PYTHONPATH"] = os.pathsep.join([str(recipes.REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    weights: Tensor = torch.load(saved)
    return weights


@pytest.mark.parametrize("training", BLOCKS)
def test_two_ranks_train_as_one_process(
    training: str, ran: Callable[[str, int], None], server: ServerProcess, tmp_path: Path
) -> None:
    if training in PACKAGES:
        pytest.importorskip(PACKAGES[training])
    for section, block in BLOCKS[training]:
        ran(section, block)
    trained = weights_of_two_ranks(training, server.target, tmp_path)
    assert recipes.distance(trained, recipes.trained(recipe_ranks.STEPS)) < 1e-4


def test_compute_loss_func_makes_the_step_of_two_ranks_and_two_batches_four_times_as_long(
    server: ServerProcess, tmp_path: Path
) -> None:
    """What the page warns of; if this fails, transformers has changed, and the page must, too."""
    pytest.importorskip("transformers")
    start = recipes.weights(recipes.new_model())
    step = weights_of_two_ranks("compute_loss_func", server.target, tmp_path) - start
    right = recipes.trained(1, micro_batches=recipes.IMAGES) - start
    assert float((step - 4 * right).norm() / right.norm()) < 1e-3
