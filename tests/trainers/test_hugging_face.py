"""Hugging Face's Trainer and accelerate with the lines of docs/trainers.md, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import recipes
from support.recipe_ranks import dataset

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_trainer_steps_as_the_textbook_says(
    micro_batches: int, lines: Callable[..., None], namespace: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from support.recipe_models import LogitsModel, hugging_face_arguments, hugging_face_dataset

    model = LogitsModel(recipes.new_model())
    arguments = hugging_face_arguments(
        str(tmp_path),
        per_device_train_batch_size=recipes.IMAGES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    namespace |= {"torch": torch, "Trainer": transformers.Trainer, "model": model, "arguments": arguments}
    namespace["dataset"] = hugging_face_dataset()
    lines("Hugging Face Trainer", 0, namespace)
    namespace["trainer"].train()
    assert recipes.distance(recipes.weights(model.network), recipes.trained(2, micro_batches)) < 1e-4


def test_the_trainer_takes_a_segformer_and_evaluates_it(
    lines: Callable[..., None], namespace: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from support.recipe_models import hugging_face_arguments, hugging_face_dataset

    config = transformers.SegformerConfig(
        num_labels=recipes.CLASSES,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    arguments = hugging_face_arguments(str(tmp_path), per_device_eval_batch_size=recipes.IMAGES, max_steps=1)
    namespace |= {"torch": torch, "Trainer": transformers.Trainer, "model": model, "arguments": arguments}
    namespace["dataset"] = hugging_face_dataset()
    lines("Hugging Face Trainer", 0, namespace)
    namespace["trainer"].train()
    lines("Hugging Face Trainer", 1, namespace)
    namespace["trainer"].compute_metrics = namespace["compute_metrics"]
    metrics = namespace["trainer"].evaluate(namespace["dataset"])
    evaluated = metrics["eval_loss"]
    images, labels = recipes.batch()
    with torch.no_grad():
        logits = model.eval()(pixel_values=images).logits
        logits = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear")
    assert evaluated == pytest.approx(
        recipes.reference.compute(logits.double(), labels, recipes.TERMS).item(), rel=1e-5
    )

    def predicted(images: torch.Tensor) -> torch.Tensor:
        small = model(pixel_values=images).logits
        return torch.nn.functional.interpolate(small, images.shape[-2:], mode="bilinear")

    assert metrics["eval_miou"] == pytest.approx(recipes.mean_iou(predicted), rel=1e-6)


def test_accelerate(lines: Callable[..., None], namespace: dict[str, Any]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = recipes.new_model()
    namespace |= {"Accelerator": accelerate.Accelerator, "model": model}
    namespace["loader"] = torch.utils.data.DataLoader(dataset() * 2, batch_size=2)  # type: ignore[arg-type]
    namespace["optimizer"] = torch.optim.SGD(model.parameters(), lr=recipes.RATE)
    lines("accelerate", 0, namespace)
    assert recipes.distance(recipes.weights(model), recipes.trained(2, 2)) < 1e-4
