"""Segmentation data of real handwritten digits, composed into scenes.

The digits are scikit-learn's 1,797 scans of 8x8 pixels: several on a canvas, in many sizes, among fragments of other
digits and under noise. Background is class 0, digit d is class d + 1, and a thin border round each digit is void: label
255, which neither losses nor scores count. Most pixels are background, and some digits are rarer than others, as in
most real segmentation problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

CLASS_NAMES = ("background", *"0123456789")
CLASSES = len(CLASS_NAMES)
VOID = 255
CANVAS = 48  # pixels a side
BATCH = 4  # canvases

Bitmap = npt.NDArray[np.float32]
Place = tuple[slice, slice]


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: ``bitmaps`` (N, 8, 8) with ink in [0, 1], ``values`` (N,) from 0 to 9."""

    bitmaps: Bitmap
    values: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """Segmentation data: ``images`` float32 (N, 1, H, W) and ``labels`` int64 (N, H, W)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Scenes:
        return Scenes(self.images.to(device), self.labels.to(device))


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Digits for the training canvases, and others for the test canvases."""
    bitmaps, values = load_digits(return_X_y=True)
    bitmaps = (bitmaps / 16).astype(np.float32).reshape(-1, 8, 8)
    train, test = train_test_split(np.arange(len(values)), test_size=0.3, stratify=values, random_state=seed)
    return Digits(bitmaps[train], values[train]), Digits(bitmaps[test], values[test])


def compose_scenes(digits: Digits, count: int, seed: int) -> Scenes:
    """``count`` canvases of these digits."""
    rng = np.random.default_rng(seed)
    images, labels = zip(*(compose_canvas(digits, rng) for _ in range(count)), strict=True)
    return Scenes(torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(labels)))


def compose_canvas(digits: Digits, rng: np.random.Generator) -> tuple[Bitmap, npt.NDArray[np.int64]]:
    """One image (H, W) and its labels (H, W): uneven paper, fragments of digits, whole digits, and noise."""
    image = enlarge(rng.uniform(0.0, 0.4, (4, 4)).astype(np.float32), CANVAS)
    labels = np.zeros((CANVAS, CANVAS), np.int64)
    for _ in range(rng.integers(2, 5)):
        side = int(rng.integers(8, 17))
        draw(
            enlarge(random_fragment(digits, rng), side), image, random_place(side, rng), rng
        )  # Labelled as background.
    for _ in range(rng.integers(6, 12)):
        side = int(rng.integers(14, 25))
        place = random_place(side, rng)
        if (labels[place] != 0).mean() > 0.1:
            continue  # It would cover too much of another digit.
        value = random_value(rng)
        ink = enlarge(rng.choice(digits.bitmaps[digits.values == value]), side)
        draw(ink, image, place, rng)
        labels[place] = np.where(ink > 0.5, value + 1, np.where(thicken(ink) > 0.5, VOID, labels[place]))
    image += rng.normal(0.0, 0.08, image.shape).astype(np.float32)
    return image, labels


def random_value(rng: np.random.Generator) -> int:
    """A digit from 0 to 9, each rarer than the one before: a 0 is two and a half times as likely as a 9."""
    frequency = 0.9 ** np.arange(10)
    return int(rng.choice(10, p=frequency / frequency.sum()))


def random_fragment(digits: Digits, rng: np.random.Generator) -> Bitmap:
    """A quarter of a random digit, with a margin that softens its cut edges."""
    top, left = rng.integers(0, 5, size=2)
    return np.pad(rng.choice(digits.bitmaps)[top : top + 4, left : left + 4], 1)


def random_place(side: int, rng: np.random.Generator) -> Place:
    top, left = rng.integers(0, CANVAS - side + 1, size=2)
    return slice(top, top + side), slice(left, left + side)


def draw(ink: Bitmap, image: Bitmap, place: Place, rng: np.random.Generator) -> None:
    """Draws on the image, in a random shade."""
    image[place] += ink * (rng.uniform(0.6, 1.0) - image[place])


def enlarge(bitmap: Bitmap, side: int) -> Bitmap:
    source = torch.from_numpy(bitmap)[None, None]
    enlarged: Bitmap = functional.interpolate(source, (side, side), mode="bilinear")[0, 0].numpy()
    return enlarged


def thicken(ink: Bitmap) -> Bitmap:
    """Grows the ink by one pixel on all sides."""
    thick: Bitmap = functional.max_pool2d(torch.from_numpy(ink)[None], kernel_size=3, stride=1, padding=1)[0].numpy()
    return thick


def batches(scenes: Scenes, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of random canvases, one batch for each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(scenes.images), (BATCH,), generator=generator).to(scenes.images.device)
        yield scenes.images[chosen], scenes.labels[chosen]
