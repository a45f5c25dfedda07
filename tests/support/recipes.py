"""The lines of docs/trainers.md, and a small training in which they are run and whose right outcome is known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from support.imports import REPOSITORY
from torch import Tensor

from lovasz.core import CrossEntropy, LovaszSoftmax, reference
from lovasz.spec import LossLike

PAGE = REPOSITORY / "docs" / "trainers.md"
TERMS: LossLike = [(1.0, CrossEntropy(ignore_index=255)), (1.0, LovaszSoftmax(ignore_index=255))]
CRITERIA = {"in this process": 0, "of a process group": 1, "on a server": 2, "of all ranks on a server": 3}
"""The ways to create the criterion, and the block that each one is in the page's first section."""
CLASSES = 4
IMAGES = 4
RATE = 0.1


def sections() -> dict[str, list[str]]:
    """The blocks of Python code under each heading of the page."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = zip(parts[::2], parts[1::2], strict=True)
    return {heading: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for heading, text in found}


def run_lines(section: str, block: int, namespace: dict[str, Any], target: str = "localhost:50051") -> None:
    """Executes a block of the page as it stands there, but for the server's address."""
    code = sections()[section][block].replace("localhost:50051", target)
    # Lines before, so that a traceback shows the line's number inside the block.
    exec(compile(code, f"{PAGE.name}, {section}, block {block}", "exec"), namespace)


def criterion(way: str, target: str) -> dict[str, Any]:
    """What the block of the page's first section makes that shows this way.

    Args:
        way: one of ``CRITERIA``.
        target: the server's address.
    """
    names: dict[str, Any] = {}
    run_lines("The criterion", CRITERIA[way], names, target)
    return names


def batch() -> tuple[Tensor, Tensor]:
    """Images (4, 3, 6, 8) and labels (4, 6, 8), some void. Each image has two of the four classes."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(IMAGES, 3, 6, 8, generator=generator)
    labels = (torch.arange(IMAGES)[:, None, None] + (images.sum(1) > 1)) % CLASSES
    labels[:, 0, :3] = 255
    return images, labels


def new_model() -> torch.nn.Module:
    """A network without batch statistics: its outcome does not depend on how a batch is split."""
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(5, CLASSES, 1))


def weights(model: torch.nn.Module) -> Tensor:
    """All parameters, as one vector."""
    return torch.cat([parameter.detach().cpu().double().reshape(-1) for parameter in model.parameters()])


def trained(steps: int = 2, micro_batches: int = 1) -> Tensor:
    """The weights after steps of SGD in float64, by the textbook's loss.

    Args:
        steps: each on the whole batch.
        micro_batches: into how many the batch is split; the gradient is the mean of theirs.
    """
    model = new_model().double()
    images, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(steps):
        parts = zip(images.double().chunk(micro_batches), labels.chunk(micro_batches), strict=True)
        for some, of_them in parts:
            (reference.compute(model(some), of_them, TERMS) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def distance(got: Tensor, expected: Tensor) -> float:
    """How far weights are from the expected ones, relative to the way from the start to these."""
    return float((got - expected).norm() / (expected - weights(new_model())).norm())


def mean_iou(model: Callable[[Tensor], Tensor]) -> float:
    """The mean IoU of the whole batch, void pixels left out, by its definition."""
    images, labels = batch()
    with torch.no_grad():
        predictions = model(images).argmax(1)
    valid, ious = labels != 255, []
    for one in range(CLASSES):
        label, predicted = valid & (labels == one), valid & (predictions == one)
        if (union := int((label | predicted).sum())) > 0:
            ious.append(int((label & predicted).sum()) / union)
    return sum(ious) / len(ious)
