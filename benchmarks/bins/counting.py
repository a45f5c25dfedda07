"""The loss by counting, in NumPy and float64, with any number of bins.

A second implementation of docs/mathematics.md, section 11. Section numbers below are those of that page.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import bins
from lovasz.core.word import REST_BITS

Floats = npt.NDArray[np.float64]

MANTISSA_BITS = 23


class Layout:
    """The bins of :mod:`lovasz.core.backends.numba.bins` with another ``MAX_BITS``.

    Attributes:
        upper: for each bin, the mean error of pixels whose rest is 0.
        unit: for each bin, the width of a rest of 1.
    """

    def __init__(self, max_bits: int) -> None:
        octaves = np.arange(bins.OCTAVES)
        bits = np.maximum(bins.MIN_BITS, max_bits - octaves // bins.OCTAVES_PER_BIT)
        sizes = 1 << bits
        first = np.append(0, np.cumsum(sizes))
        # For each octave; all errors below the last octave share one bin.
        self._first, self._shift = first.astype(np.int32), np.append(MANTISSA_BITS - bits, 0).astype(np.int32)
        lower = 2.0 ** (bins.FINE_TOP - octaves)
        ulp, width = lower / (1 << MANTISSA_BITS), np.repeat(lower / sizes, sizes)
        floats_in_a_rest = 1 << np.maximum(MANTISSA_BITS - bits - REST_BITS, 0)
        largest = np.repeat(2 * lower - ulp - (floats_in_a_rest - 1) / 2 * ulp, sizes)
        self.upper = np.append(largest - (np.arange(first[-1]) - np.repeat(first[:-1], sizes)) * width, 0.0)
        self.unit = np.append(width / (1 << REST_BITS), 0.0)

    def places(self, errors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The bin and the rest of each error."""
        largest = np.int32(((bins.FINE_TOP + 128) << MANTISSA_BITS) - 1)
        # Errors below the last octave share the last bin, with a rest of 0.
        distance = np.minimum(largest - errors.view(np.int32), np.int32(bins.OCTAVES << MANTISSA_BITS))
        octave, inside = distance >> MANTISSA_BITS, distance & ((1 << MANTISSA_BITS) - 1)
        shift = self._shift[octave]
        below = inside & ((np.int32(1) << shift) - np.int32(1))
        return self._first[octave] + (inside >> shift), (below << REST_BITS) >> shift


class Segment:
    """The pixels of one class that can have g > 0: its foreground, and background down to half its smallest error."""

    def __init__(self, errors: npt.NDArray[np.float32], foreground: npt.NDArray[np.bool_]) -> None:
        least = float(errors[foreground].min()) / 2
        self.pixels = np.flatnonzero(foreground | (errors >= (least if least >= 2.0**-60 else 0.0)))
        self._errors, self._foreground = errors[self.pixels], foreground[self.pixels]
        self.sign = np.where(self._foreground, -1.0, 1.0)
        # In a tie, foreground comes first, then the order of the pixels.
        order = np.lexsort((~self._foreground, -self._errors))
        ranked = self._foreground[order].astype(np.float64)
        left, union = ranked.sum() - np.cumsum(ranked) + ranked, ranked.sum() + np.cumsum(1 - ranked)
        self.g = np.empty(len(order))
        self.g[order] = np.where(ranked > 0, 1 / union, left / (union * np.maximum(union - 1, 1)))
        self.loss = float(self._errors.astype(np.float64) @ self.g)

    def counted(self, layout: Layout) -> tuple[Floats, Floats, float]:
        """By counting: g of each pixel, the mean g of its bin, and the loss."""
        n = len(layout.upper)
        place, rest = layout.places(self._errors)
        place += np.int32(n) * self._foreground
        counts = np.bincount(place, minlength=2 * n).reshape(2, n).astype(np.float64)
        rests = np.bincount(place, rest, minlength=2 * n).reshape(2, n)
        background, foreground = counts
        total = foreground.sum()
        left, union = total - np.cumsum(foreground) + foreground, total + np.cumsum(background) - background
        x, y = 1 / union, 1 / (union + background)
        mean = np.stack([(left - foreground / 2) * x * y, (x + y) / 2])
        mean_rests = rests / np.maximum(counts, 1)
        drop = np.stack([left * x**2 - (left - foreground) * y**2, x - y])
        drop = np.minimum(drop, mean / (1 - mean_rests / (1 << REST_BITS)))
        loss = float((mean * (counts * layout.upper - rests * layout.unit)).sum())
        slope, mean_rest = (drop / (1 << REST_BITS)).ravel(), mean_rests.ravel()
        means = mean.ravel()[place]
        return means + slope[place] * (mean_rest[place] - rest), means, loss


def norm_in_logits(errors: Floats, labels: npt.NDArray[np.int64], h: Floats) -> float:
    """The norm of the gradient in the logits (section 8), from ``h``, that in the probabilities. Overwrites ``h``."""
    if not h.any():
        return 0.0
    own, wrong = np.take_along_axis(h, labels, 0), np.take_along_axis(errors, labels, 0)
    np.put_along_axis(h, labels, 0.0, 0)
    others = np.einsum("cp,cp->p", errors, h)[None]
    h -= others + (1 - wrong) * own
    h *= errors
    np.put_along_axis(h, labels, (1 - wrong) * (own * wrong - others), 0)
    return float(np.linalg.norm(h))
