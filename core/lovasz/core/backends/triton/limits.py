"""The limits of the Triton backend: which joints it takes, as ``dispatch`` asks it. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

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
    return segments <= SEGMENTS and pixels < MAX_PIXELS and numbered_pixels(joint, loss) < NUMBERED_PIXELS


def numbered_pixels(requests: Sequence[Request], loss: WeightedSum) -> int:
    """The number of pixels as the kernels count them: for binary losses, once for each binary label."""
    pixels = sum([request.layout.images * request.layout.pixels for request in requests])
    return pixels * requests[0].layout.channels if loss.is_binary else pixels
