"""The Lovász extension of the Jaccard loss for many segments at once: one class (row) over the pixels of one group.

A closed form gives the gradient g of a pixel from two counts, so there is no loop over pixels, classes or groups; see
docs/mathematics.md, section 7. Sums over pixels are sums of integers: no result depends on the order of pixels in
memory, on the number of threads or on the other requests of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core import plan
from lovasz.core.computed import FIXED_POINT_BITS

_CPU_BLOCK_ELEMENTS = 1 << 22
_CUDA_BLOCK_ELEMENTS = 1 << 27
"""About how many elements a block of rows has. Rows are processed block by block, to limit the memory for sorting."""


def on_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies a short array to the device; to a GPU from pinned memory, since the host would wait for any other copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Groups:
    """The groups of a term, as tensors on the device.

    Attributes:
        sizes: int64, shape (groups,): the number of pixels of each group, at least 1.
        share: float64, shape (groups,): each group's share of its joint's loss.
        of_pixel: int64, shape (P,): the group of each pixel.
        starts: int64, shape (groups,): the first pixel of each group.
    """

    sizes: Tensor
    share: Tensor
    of_pixel: Tensor
    starts: Tensor

    @classmethod
    def of(cls, planned: plan.Groups, device: torch.device) -> Groups:
        """Copies the groups of a plan to the device."""
        return cls.of_sizes(planned.pixels, planned.share, device)

    @classmethod
    def of_sizes(cls, pixels: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], device: torch.device) -> Groups:
        """Makes consecutive groups with these numbers of pixels and shares."""
        sizes, share = on_device(pixels, device), on_device(shares, device)
        total = int(pixels.sum())
        if len(pixels) == 1:
            starts = torch.zeros(1, dtype=torch.int64, device=device)
            return cls(sizes, share, starts.expand(total), starts)
        numbers = torch.arange(len(pixels), device=device).repeat_interleave(sizes, output_size=total)
        return cls(sizes, share, numbers, sizes.cumsum(0) - sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """Sums integers over each group: (rows, P) to (rows, groups), int64, exact in any order."""
        if len(self) == 1:
            return values.sum(1, keepdim=True, dtype=torch.int64)
        sums = torch.zeros(len(values), len(self), dtype=torch.int64, device=values.device)
        return sums.scatter_add_(1, self.of_pixel.expand(values.shape), values.to(torch.int64))

    def max(self, values: Tensor) -> Tensor:
        """The largest value in each group, at least 0: (P,) to (groups,)."""
        if len(self) == 1:
            return values.amax(0, keepdim=True).clamp(min=0)
        return torch.zeros(len(self), dtype=values.dtype, device=values.device).scatter_reduce_(
            0, self.of_pixel, values, "amax"
        )

    def at_pixels(self, values: Tensor) -> Tensor:
        """The group's value at each pixel: (..., groups) to (..., P), or to a view that broadcasts to it."""
        return values if len(self) == 1 else values[..., self.of_pixel]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact; integer exponents outside [-1022, 1023] are clamped to that range."""
    return (exponent.to(torch.int64).clamp(-1022, 1023) + 1023).bitwise_left_shift(52).view(torch.float64)


def exact_sum(values: Tensor, groups: Groups, exponent: Tensor) -> Tensor:
    """Sums values over each group as integers, so that the sum does not depend on the order.

    Args:
        values: float64, shape (rows, P).
        exponent: integers, shape (rows, groups) or (groups,): the sum of the group's absolute values is at most
            2^exponent.

    Returns:
        float64, shape (rows, groups): the sum of the values, each rounded to a multiple of 2^(exponent - 60).
    """
    scale = power_of_two(FIXED_POINT_BITS - exponent)
    terms = (values * groups.at_pixels(scale)).round_().to(torch.int64)
    return groups.sum(terms).to(torch.float64) / scale


def lovasz_extension(
    errors: Tensor,
    foreground: Callable[[slice], Tensor],
    valid: Tensor,
    foreground_counts: Tensor,
    groups: Groups,
    weights: Tensor,
    grad: Tensor | None,
    rows: Sequence[int] | None = None,
    largest_error: float | None = None,
) -> Tensor:
    """Computes the Lovász extension of every segment, and its gradient with respect to the errors.

    Args:
        errors: float32 or float64, shape (K, P): m, one row per class.
        foreground: takes a slice of rows and returns bool, shape (rows, P): the pixels whose label is the row's class.
        valid: bool, broadcasts to (K, P): pixels that are not void.
        foreground_counts: int64, shape (K, groups): the valid foreground pixels of each segment.
        weights: the errors' dtype, shape (K, groups): the factor of each segment's gradient.
        grad: the errors' dtype, shape (K, P): weights x g is added to it; None if no gradient is wanted.
        rows: the rows to score; None for all.
        largest_error: an upper bound of the errors; None if none is known.

    Returns:
        float64, shape (K, groups): the sum of m x g, before weights; 0 for rows that are not scored.
    """
    pixels = errors.shape[1]
    limit = _CUDA_BLOCK_ELEMENTS if errors.is_cuda else _CPU_BLOCK_ELEMENTS
    losses = torch.zeros(len(errors), len(groups), dtype=torch.float64, device=errors.device)
    for block in _blocks(range(len(errors)) if rows is None else rows, max(1, limit // pixels)):
        is_foreground = foreground(block)
        block_valid = valid[block] if valid.dim() == 2 else valid
        block_errors = errors[block]
        counts = foreground_counts[block]
        order, sorted_foreground = _descending(block_errors, is_foreground & block_valid, block_valid, groups)
        g = torch.empty_like(block_errors)
        g.scatter_(1, order, _gradient_along(sorted_foreground, counts, groups, errors.dtype))
        block_errors = torch.where(block_valid, block_errors, 0)
        if largest_error is None:
            largest = block_errors.gather(1, order[:, groups.starts])
        else:
            largest = errors.new_full((len(groups),), largest_error)
        exponent = torch.frexp(largest).exponent + 1
        losses[block] = exact_sum(block_errors.to(torch.float64) * g, groups, exponent)
        if grad is not None:
            grad[block] += torch.where(block_valid, g, 0).mul_(groups.at_pixels(weights[block]))
    return losses


def _blocks(rows: Sequence[int], at_most: int) -> list[slice]:
    """Splits ``rows`` into runs of consecutive rows, each of at most ``at_most`` rows."""
    blocks: list[slice] = []
    for row in rows:
        if blocks and blocks[-1].stop == row and row - blocks[-1].start < at_most:
            blocks[-1] = slice(blocks[-1].start, row + 1)
        else:
            blocks.append(slice(row, row + 1))
    return blocks


def _descending(errors: Tensor, foreground: Tensor, valid: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Sorts each segment by descending error. Among equal errors foreground comes first; void pixels come last.

    One stable sort of 64-bit keys: group (30 bits), error (33 bits), background (1 bit).

    Returns:
        (order, foreground in that order), each of shape (rows, P).
    """
    if errors.dtype == torch.float32:
        bits = errors.contiguous().view(torch.int32)
        ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    else:
        ascending = torch.unique(errors, return_inverse=True)[1]
    key = (1 << 31) - 1 - ascending
    key = torch.where(valid, key, (1 << 32) - 1).mul_(2).add_(~foreground)
    if len(groups) > 1:
        key += groups.of_pixel << 33
    key, order = torch.sort(key, dim=1, stable=True)
    return order, key.bitwise_and_(1) == 0


def _gradient_along(foreground: Tensor, foreground_counts: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """The gradient g of the Lovász extension along the descending order, in closed form.

    Let G be the foreground pixels of the segment, n its foreground and b its background pixels up to and including
    this one. On foreground g = 1 / (G + b); on background g = (G - n) / ((G + b) (G + b - 1)). If G = 0, g is 1 at the
    first pixel and 0 elsewhere.

    Args:
        foreground: bool, shape (rows, P), in sorted order; each group keeps its range of positions.
        foreground_counts: int64, shape (rows, groups): G.
    """
    position = torch.arange(foreground.shape[1], device=foreground.device)
    n = foreground.cumsum(1)
    if len(groups) > 1:
        before = n[:, groups.starts] - foreground[:, groups.starts].to(torch.int64)
        n = n - groups.at_pixels(before)
        position = position - groups.at_pixels(groups.starts)
    total = groups.at_pixels(foreground_counts)
    background_left = (total - n).to(dtype)
    union = (total - n).add_(position + 1).to(dtype)  # G + b, as b = position + 1 - n
    g = torch.where(foreground, union, background_left.div_(union - 1)).div_(union)
    g = torch.where(foreground, g.new_ones(()) / union, g)
    return torch.where(total == 0, (position == 0).to(dtype), g)
