"""Lightning with the lines of docs/trainers.md, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import recipes
from support.recipe_ranks import dataset, quiet_lightning

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_training_steps_as_the_textbook_says(
    micro_batches: int, lines: Callable[..., None], namespace: dict[str, Any]
) -> None:
    lightning = pytest.importorskip("lightning")
    namespace |= {"torch": torch, "LightningModule": lightning.LightningModule}
    lines("Lightning", 0, namespace)
    segmenter = namespace["Segmenter"](recipes.new_model())
    loader = torch.utils.data.DataLoader(dataset(), batch_size=recipes.IMAGES // micro_batches)  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=micro_batches, **quiet_lightning()
    )
    trainer.fit(segmenter, loader)
    assert recipes.distance(recipes.weights(segmenter.model), recipes.trained(2, micro_batches)) < 1e-4


def test_the_iou_of_a_validation(lines: Callable[..., None], namespace: dict[str, Any]) -> None:
    lightning = pytest.importorskip("lightning")
    namespace |= {"torch": torch, "LightningModule": lightning.LightningModule}
    lines("Lightning", 0, namespace)
    lines("Lightning", 2, namespace)
    segmenter = namespace["ValidatedSegmenter"](recipes.new_model())
    loader = torch.utils.data.DataLoader(dataset(), batch_size=2)  # type: ignore[arg-type]
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet_lightning())
    trainer.fit(segmenter, loader, loader)
    assert trainer.callback_metrics["miou"] == pytest.approx(recipes.mean_iou(segmenter.model), rel=1e-6)
