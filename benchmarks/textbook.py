"""The Lovász losses as they are commonly written: a sort a class, differences, autograd. Stands in for the libraries
that compute them so, where these are not installed."""

from __future__ import annotations

import torch
from torch import Tensor


def textbook_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present.

    Args:
        logits: shape (N, C, *spatial).
        labels: shape (N, *spatial).
    """
    classes = logits.shape[1]
    probabilities = logits.softmax(dim=1).movedim(1, -1).reshape(-1, classes)
    labels = labels.reshape(-1)
    losses = []
    for c in range(classes):
        foreground = (labels == c).float()
        if foreground.sum() == 0:
            continue
        losses.append(_extension((foreground - probabilities[:, c]).abs(), foreground))
    return torch.stack(losses).mean()


def textbook_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """The Lovász hinge.

    Args:
        logits: any shape.
        labels: 0 and 1, in the same shape.
    """
    foreground = labels.reshape(-1).float()
    return _extension((1 - logits.reshape(-1) * (2 * foreground - 1)).relu(), foreground)


def _extension(errors: Tensor, foreground: Tensor) -> Tensor:
    errors_sorted, order = torch.sort(errors, 0, descending=True)
    foreground_sorted = foreground[order]
    total = foreground_sorted.sum()
    intersection = total - foreground_sorted.cumsum(0)
    union = total + (1 - foreground_sorted).cumsum(0)
    jaccard = 1.0 - intersection / union
    jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
    return torch.dot(errors_sorted, jaccard)
