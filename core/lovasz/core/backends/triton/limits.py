"""The limits of the Triton backend: which joints it takes, as ``dispatch`` asks it. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

from lovasz.core.backends.triton import bins
from lovasz.core.batch import Request
from lovasz.core.word import MAX_PIXELS
from lovasz.spec import LovaszLoss, WeightedSum

CLASSES = 512
"""The most classes: in large groups the table of each class takes 1.4 MB."""

SEGMENTS = 1 << 20
"""The most segments of a joint; terms with the same ``per_image`` share theirs."""

LOVASZ_TERMS = 4
"""The most Lovász terms. The sweeps have code for each: with 4, those of softmax compile in 11 s on one core; with 5 in
15 s, and those of binary losses spill registers; with 8 in some 50 s. Meanwhile a server's device does not answer."""

EXCESS_BYTES = 1 << 32
"""The most memory that the tables of a batch take beyond twice its logits in float32. Tables of groups of little more
than 4096 pixels are up to 26 times as large as their logits: each has bins for errors of any scale."""
_MOST_TABLE_BYTES = 26 * 4
"""The most bytes of tables for one logit and Lovász term."""

NUMBERED_PIXELS = 1 << 31
"""The kernels number the pixels of a batch with 32-bit integers: all numbers are below this."""


def fits(joint: Sequence[Request], loss: WeightedSum) -> bool:
    """Whether a loss has few enough terms, and a joint few enough classes, segments and pixels."""
    lovasz = [term for _, term in loss.terms if isinstance(term, LovaszLoss)]
    images, channels = sum([request.layout.images for request in joint]), joint[0].layout.channels
    pixels = sum([request.layout.images * request.layout.pixels for request in joint])
    segments = channels * sum(images if per_image else 1 for per_image in {term.per_image for term in lovasz})
    if len(lovasz) > LOVASZ_TERMS or (channels > CLASSES and not loss.is_binary):
        return False
    are_numbered = pixels < MAX_PIXELS and numbered_pixels(joint, loss) < NUMBERED_PIXELS
    return segments <= SEGMENTS and are_numbered and tables_fit([joint], loss)


def tables_fit(joints: Sequence[Sequence[Request]], loss: WeightedSum) -> bool:
    """Whether the tables of a batch of joints are small enough. If so, those of fewer joints are, too."""
    elements = sum([request.layout.elements for joint in joints for request in joint])
    if elements * len(loss.terms) * _MOST_TABLE_BYTES <= EXCESS_BYTES:  # Most batches; the sum below takes longer.
        return True
    return sum([excess_bytes(joint, loss) for joint in joints]) <= EXCESS_BYTES


def excess_bytes(joint: Sequence[Request], loss: WeightedSum) -> int:
    """The memory that the tables of a joint take beyond twice its logits in float32."""
    return max(0, table_bytes(joint, loss) - 2 * 4 * sum([request.layout.elements for request in joint]))


def table_bytes(joint: Sequence[Request], loss: WeightedSum) -> int:
    """The memory of a joint's tables, for binary losses with their maps."""
    pixels = sum([request.layout.images * request.layout.pixels for request in joint])
    nbytes = 0
    for _, term in loss.terms:
        if isinstance(term, LovaszLoss) and term.per_image:
            nbytes += sum([request.layout.images * _segment_bytes(request.layout.pixels, loss) for request in joint])
        elif isinstance(term, LovaszLoss):
            nbytes += _segment_bytes(pixels, loss)
    return joint[0].layout.channels * nbytes


def _segment_bytes(pixels: int, loss: WeightedSum) -> int:
    if pixels <= bins.SORTED_PIXELS:
        return 0
    coarser = bins.coarser_by(pixels)
    if not loss.is_binary:
        return 2 * 8 * bins.softmax_bins(coarser)
    _, cells = bins.binary_cells(is_sigmoid=loss.is_sigmoid)
    return 2 * 8 * bins.binary_bins(coarser) + 4 * cells


def numbered_pixels(requests: Sequence[Request], loss: WeightedSum) -> int:
    """The number of pixels as the kernels count them: for binary losses, once for each binary label."""
    pixels = sum([request.layout.images * request.layout.pixels for request in requests])
    return pixels * requests[0].layout.channels if loss.is_binary else pixels
