"""What Hugging Face's Trainer is given in the tests of its recipe: a model, a dataset, arguments."""

from __future__ import annotations

from typing import Any

import torch
from support import recipes
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import ModelOutput


class LogitsModel(torch.nn.Module):
    """Takes any keyword arguments, as many of transformers' models do: the Trainer then sends it num_items_in_batch."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        return ModelOutput(logits=self.network(pixel_values))


def hugging_face_dataset() -> list[dict[str, Tensor]]:
    images, labels = recipes.batch()
    return [{"pixel_values": image, "labels": of_it} for image, of_it in zip(images, labels, strict=True)]


def hugging_face_arguments(folder: str, **options: Any) -> TrainingArguments:
    """Plain SGD without clipping or schedule, on the CPU."""
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        optim="sgd",
        learning_rate=recipes.RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
