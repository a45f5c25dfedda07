"""A small U-Net."""

from __future__ import annotations

from itertools import pairwise

import torch
from digit_scenes import CLASSES
from torch import Tensor, nn
from torch.nn import functional


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., 2015): images (N, 1, H, W) to logits (N, CLASSES, H, W).

    It works at half the resolution, which loses little on digits enlarged from 8x8, and enlarges its logits.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96)) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        self.stem = nn.Sequential(convolution(1, widths[0], stride=2), convolutions(widths[0], widths[0]))
        self.down = nn.ModuleList(convolutions(fine, coarse) for fine, coarse in levels)
        self.up = nn.ModuleList(convolutions(coarse + fine, fine) for fine, coarse in reversed(levels))
        self.head = nn.Conv2d(widths[0], CLASSES, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        features = [self.stem(images)]
        for block in self.down:
            features.append(block(functional.max_pool2d(features[-1], 2)))
        x = features.pop()
        for block in self.up:
            x = block(torch.cat([functional.interpolate(x, scale_factor=2.0), features.pop()], dim=1))
        return functional.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")
