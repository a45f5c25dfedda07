"""The inputs of all benchmarks: shapes, and logits in three regimes of training.

Every process that asks for the same inputs gets the same ones: they come from one seed.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""The logits and the labels of one request."""

CPU = torch.device("cpu")
CLASSES = 19
"""As in Cityscapes."""
REGIONS = 1024
"""About how many regions of one class an image has: few enough to look like one, enough for all classes to occur."""
SMALL_PIXELS = 1 << 16
"""Enough to be computed like large inputs."""


class Problem(enum.Enum):
    """Which loss, and with it the layout of the logits."""

    SOFTMAX = "softmax"
    """Logits (N, C, *spatial), labels (N, *spatial)."""
    HINGE = "hinge"
    """Logits (N, *spatial), labels 0 and 1 of the same shape."""


@dataclass(frozen=True)
class Regime:
    """Logits as they are at one stage of a training: noise, and a margin on the class that the network predicts.

    Attributes:
        noise: standard deviation.
        margin: added to the logit of the predicted class; for the hinge, with the sign of the prediction.
        right: the share of pixels whose prediction is the label; the other pixels have a random one.
    """

    name: str
    noise: float
    margin: float
    right: float


FRESH = Regime("fresh", 0.1, 0.0, 1.0)
HALF_TRAINED = Regime("half-trained", 1.0, 3.0, 0.8)
TRAINED = Regime("trained", 1.0, 10.0, 0.97)
REGIMES = (FRESH, HALF_TRAINED, TRAINED)


@dataclass(frozen=True)
class Workload:
    """One or more requests whose logits have the same shape.

    Attributes:
        logits: the shape of the logits of a request.
        growth: whether it is a point of the plots over the number of pixels.
    """

    logits: tuple[int, ...]
    problem: Problem = Problem.SOFTMAX
    requests: int = 1
    growth: bool = False

    @classmethod
    def of_bytes(cls, nbytes: int) -> Workload:
        """One request of about ``nbytes`` bytes: float32 logits, and a byte for each label."""
        return cls((1, CLASSES, 1, nbytes // (4 * CLASSES + 1)))

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.logits))

    @property
    def name(self) -> str:
        shape = self.shape
        if self.growth:
            return f"growth, 2^{int(math.log2(self.pixels))} pixels: {shape}"
        if self.problem is Problem.HINGE:
            return f"hinge {shape}"
        if len(self.logits) == 2:
            return f"point cloud {shape}"
        return shape if self.requests == 1 else f"{self.requests} requests of {shape}"

    @property
    def classes(self) -> int:
        """How many values a label can have."""
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
        """A small workload of the same kind, with two classes: to compile code and start threads with."""
        pixels = min(self.pixels, SMALL_PIXELS)
        if self.problem is Problem.HINGE:
            return replace(self, logits=(1, 1, pixels), requests=1)
        return replace(self, logits=(pixels, 2) if len(self.logits) == 2 else (1, 2, 1, pixels), requests=1)

    def inputs(self, regime: Regime, device: torch.device = CPU, *, labels: torch.dtype = torch.int64) -> list[Pair]:
        """Logits in float32 and labels, one pair for each request."""
        generator = torch.Generator().manual_seed(0)
        pairs = (self._pair(regime, generator) for _ in range(self.requests))
        return [(logits.to(device), targets.to(device, labels)) for logits, targets in pairs]

    def _pair(self, regime: Regime, generator: torch.Generator) -> Pair:
        labels = self._regions(generator)
        logits = torch.randn(self.logits, generator=generator).mul_(regime.noise)
        if regime.margin:
            wrong = torch.rand(self.labels, generator=generator) >= regime.right
            predicted = torch.randint(0, self.classes, self.labels, generator=generator)
            predicted = torch.where(wrong, predicted, labels)
            if self.problem is Problem.HINGE:
                logits += torch.where(predicted == 1, regime.margin, -regime.margin)
            else:
                index = predicted.unsqueeze(1)
                logits.scatter_add_(1, index, torch.full_like(index, regime.margin, dtype=logits.dtype))
        return logits, labels

    def _regions(self, generator: torch.Generator) -> Tensor:
        """Labels in blocks, each of one random class. All images are divided into the same blocks."""
        # A point cloud is one image with one axis.
        images, *spatial = self.labels if len(self.labels) > 1 else (1, *self.labels)
        blocks = [max(1, size // round(REGIONS ** (1 / len(spatial)))) for size in spatial]
        coarse = [math.ceil(size / block) for size, block in zip(spatial, blocks, strict=True)]
        labels = torch.randint(0, self.classes, (images, *coarse), generator=generator)
        for axis, (size, block) in enumerate(zip(spatial, blocks, strict=True), start=1):
            labels = labels.repeat_interleave(block, axis).narrow(axis, 0, size)
        return labels.reshape(self.labels).contiguous()


HEADLINE = (Workload((1, 19, 512, 1024)), Workload((4, 21, 512, 512)))
"""The workloads that the targets of speed are about."""
