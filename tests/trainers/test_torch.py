"""The plain loop of docs/trainers.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import recipes


def test_plain_loop(lines: Callable[..., None], namespace: dict[str, Any]) -> None:
    model = recipes.new_model()
    namespace |= {"model": model, "loader": [recipes.batch()] * 2}
    namespace["optimizer"] = torch.optim.SGD(model.parameters(), lr=recipes.RATE)
    lines("Plain loop", 0, namespace)
    assert recipes.distance(recipes.weights(model), recipes.trained()) < 1e-4


def test_the_distance_tells_the_loss_of_the_batch_from_the_mean_of_its_parts() -> None:
    """So a test of two ranks would notice if each had the loss of its own images."""
    assert recipes.distance(recipes.trained(micro_batches=2), recipes.trained()) > 1e-2
