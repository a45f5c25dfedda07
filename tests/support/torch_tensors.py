"""Random tensors of PyTorch."""

from __future__ import annotations

import torch


def tensors(side: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, classes, side, side) and labels (1, side, side); the same ones for each seed."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, classes, side, side, generator=generator)
    return logits, torch.randint(0, classes, (1, side, side), generator=generator)
