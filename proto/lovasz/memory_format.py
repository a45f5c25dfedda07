"""Tensors on the host in another memory format, such as ``channels_last``: torch's own copies take far longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.spec.arrays import parts


def contiguous(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor on the host, shape (N, C, *spatial)."""
    words = _words(tensor)
    copy = np.empty(words.shape, words.dtype)  # By NumPy, as it asks the system for large pages.
    for target, source in parts(copy, words):
        target[...] = source
    return torch.from_numpy(copy).view(tensor.dtype)


def has_classes_last(logits: Tensor) -> bool:
    """Whether logits on the host, shape (N, C, *spatial), have the classes last in memory."""
    if logits.is_contiguous() or logits.dim() < 4 or logits.device.type != "cpu":
        return False
    return logits.movedim(1, -1).is_contiguous()


def in_format_of(logits: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the classes last in memory if those of the logits are; else as it is.

    In another format the backward pass of a network in ``channels_last`` would copy it, which takes longer.

    Args:
        logits: shape (N, C, *spatial).
        grad: contiguous, of the same shape and on the same device.
    """
    if not has_classes_last(logits):
        return grad
    words = _words(grad)
    copy = np.empty(np.moveaxis(words, 1, -1).shape, words.dtype)
    for source, target in parts(words, np.moveaxis(copy, -1, 1)):
        target[...] = source
    return torch.from_numpy(copy).view(grad.dtype).movedim(-1, 1)


def _words(tensor: Tensor) -> npt.NDArray[Any]:
    """The elements as an array; NumPy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
