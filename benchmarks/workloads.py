"""What is timed: shapes, and logits in three regimes of training. The same inputs in every process, from one seed."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""The logits and the labels of one request."""

REGIONS = 1024
"""Labels are piecewise constant, in about so many regions an image: few enough to look like one, enough for all
classes to occur."""
SMALL_PIXELS = 1 << 16
"""Enough to take the path of large inputs."""


class Problem(enum.Enum):
    """Which loss, and with it the layout of the logits."""

    SOFTMAX = "softmax"
    """Logits (N, C, *spatial), labels (N, *spatial)."""
    HINGE = "hinge"
    """Logits (N, *spatial), labels 0 and 1 of the same shape."""


@dataclass(frozen=True)
class Regime:
    """Logits as they are at some time of a training: noise, and a margin on the class that the network would choose.

    Attributes:
        noise: standard deviation.
        margin: added to the chosen class's logit; for the hinge, with the sign of the choice.
        right: at this share of the pixels the choice is the label, at the others a class at random.
    """

    name: str
    noise: float
    margin: float
    right: float


REGIMES = (Regime("fresh", 0.1, 0.0, 1.0), Regime("half-trained", 1.0, 3.0, 0.8), Regime("trained", 1.0, 10.0, 0.97))


@dataclass(frozen=True)
class Workload:
    """``requests`` requests whose logits have one shape.

    Attributes:
        growth: whether it is a point of the plots over the number of pixels.
    """

    logits: tuple[int, ...]
    problem: Problem = Problem.SOFTMAX
    requests: int = 1
    growth: bool = False

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.logits))
        if self.growth:
            return f"growth, 2^{int(math.log2(self.pixels))} pixels: {shape}"
        if self.problem is Problem.HINGE:
            return f"hinge {shape}"
        if len(self.logits) == 2:
            return f"point cloud {shape}"
        return shape if self.requests == 1 else f"{self.requests} requests of {shape}"

    @property
    def classes(self) -> int:
        """How many values a label takes."""
        return self.logits[1] if self.problem is Problem.SOFTMAX else 2

    @property
    def labels(self) -> tuple[int, ...]:
        """The shape of the labels of a request."""
        return (self.logits[0], *self.logits[2:]) if self.problem is Problem.SOFTMAX else self.logits

    @property
    def pixels(self) -> int:
        """Of a request."""
        return math.prod(self.labels)

    @property
    def logits_bytes(self) -> int:
        """Of all requests, in float32."""
        return 4 * self.requests * math.prod(self.logits)

    def small(self) -> Workload:
        """One of the same kind with two classes and few pixels, to compile code and to start threads with."""
        pixels = min(self.pixels, SMALL_PIXELS)
        if self.problem is Problem.HINGE:
            return replace(self, logits=(1, 1, pixels), requests=1)
        return replace(self, logits=(pixels, 2) if len(self.logits) == 2 else (1, 2, 1, pixels), requests=1)

    def inputs(self, regime: Regime, device: torch.device) -> list[Pair]:
        """float32 logits and int64 labels, one pair a request."""
        generator = torch.Generator().manual_seed(0)
        pairs = (self._pair(regime, generator) for _ in range(self.requests))
        return [(logits.to(device), labels.to(device)) for logits, labels in pairs]

    def _pair(self, regime: Regime, generator: torch.Generator) -> Pair:
        labels = self._regions(generator)
        logits = torch.randn(self.logits, generator=generator).mul_(regime.noise)
        if regime.margin:
            wrong = torch.rand(self.labels, generator=generator) >= regime.right
            choice = torch.randint(0, self.classes, self.labels, generator=generator)
            choice = torch.where(wrong, choice, labels)
            if self.problem is Problem.HINGE:
                logits += torch.where(choice == 1, regime.margin, -regime.margin)
            else:
                index = choice.unsqueeze(1)
                logits.scatter_add_(1, index, torch.full_like(index, regime.margin, dtype=logits.dtype))
        return logits, labels

    def _regions(self, generator: torch.Generator) -> Tensor:
        """Blocks of random classes, all images alike in their grid."""
        # A point cloud has one axis, and is one image.
        images, *spatial = self.labels if len(self.labels) > 1 else (1, *self.labels)
        blocks = [max(1, size // round(REGIONS ** (1 / len(spatial)))) for size in spatial]
        coarse = [math.ceil(size / block) for size, block in zip(spatial, blocks, strict=True)]
        labels = torch.randint(0, self.classes, (images, *coarse), generator=generator)
        for axis, (size, block) in enumerate(zip(spatial, blocks, strict=True), start=1):
            labels = labels.repeat_interleave(block, axis).narrow(axis, 0, size)
        return labels.reshape(self.labels).contiguous()


HEADLINE = (Workload((1, 19, 512, 1024)), Workload((4, 21, 512, 512)))
"""Those that the targets of speed are set for."""
FULL = (
    *HEADLINE,
    Workload((1, 19, 64, 64), requests=64),
    Workload((1, 19, 1024, 2048)),
    Workload((1, 150, 512, 512)),
    Workload((8, 512, 512), Problem.HINGE),
    Workload((120_000, 20)),
    *(Workload((1, 3, side, side), growth=True) for side in (256, 512, 1024, 2048, 4096)),
)
QUICK = (
    Workload((1, 19, 64, 128)),
    Workload((2, 21, 256, 128)),
    Workload((1, 19, 32, 32), requests=8),
    Workload((2, 64, 64), Problem.HINGE),
    Workload((3000, 20)),
    *(Workload((1, 3, side, side), growth=True) for side in (32, 128)),
)


def workload_named(name: str) -> Workload:
    return next(workload for workload in FULL + QUICK if workload.name == name)


def regime_named(name: str) -> Regime:
    return next(regime for regime in REGIMES if regime.name == name)
