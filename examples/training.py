"""Trains a U-Net on scenes of digits, and scores it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from digit_scenes import CLASSES, VOID, Scenes, batches
from torch import Tensor
from tqdm import tqdm
from unet import UNet

PEAK_LEARNING_RATE = 6e-3

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Training:
    """A trained model, the seconds of each step, and the part of them that its criterion took."""

    name: str
    model: UNet
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """A model on the test set: its ``predictions`` (N, H, W), and the IoU of each class over all pixels that count."""

    predictions: Tensor
    class_iou: npt.NDArray[np.float64]

    @property
    def mean_iou(self) -> float:
        return float(np.nanmean(self.class_iou))


def train(name: str, criterion: Criterion, scenes: Scenes, steps: int, seed: int) -> Training:
    """Trains a new U-Net. The seed fixes its first weights and its batches, with any criterion."""
    device = scenes.images.device
    torch.manual_seed(seed)
    model = UNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps)
    training = Training(name, model)
    # disable=None: no bar if the output is not a terminal.
    progress = tqdm(batches(scenes, steps, seed), name, total=steps, unit="step", leave=False, disable=None)
    for images, labels in progress:
        started = now(device)
        logits = model(images)
        asked = now(device)
        loss = criterion(logits, labels)
        answered = now(device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        training.loss_seconds.append(answered - asked)
        training.step_seconds.append(now(device) - started)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    print(f"trained with {name}: {steps:,} steps in {sum(training.step_seconds):.0f} s", flush=True)
    return training


def now(device: torch.device) -> float:
    """The time in seconds, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def evaluate(model: UNet, scenes: Scenes) -> Score:
    model.eval()
    predictions = torch.cat([model(images).argmax(dim=1) for images in torch.split(scenes.images, 50)])
    counts = scenes.labels != VOID
    pairs = scenes.labels[counts] * CLASSES + predictions[counts]
    confusion = pairs.bincount(minlength=CLASSES**2).reshape(CLASSES, CLASSES).double()
    intersection = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return Score(predictions.cpu(), (intersection / union).cpu().numpy())
