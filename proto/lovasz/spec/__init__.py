"""What a loss is: frozen descriptions that client, server and core share, the rules on shapes, and the result.

Needs numpy only: no torch, no protobuf.
"""

from lovasz.spec.errors import InvalidInput
from lovasz.spec.iou import DatasetIoU
from lovasz.spec.layout import MAX_AXES, MAX_CLASSES, Layout
from lovasz.spec.losses import (
    LOSS_KINDS,
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
)
from lovasz.spec.losses import BinaryLoss as BinaryLoss  # For annotations and checks; not in __all__.
from lovasz.spec.losses import Classes as Classes
from lovasz.spec.losses import GradientReduction as GradientReduction
from lovasz.spec.losses import Input as Input
from lovasz.spec.losses import LovaszLoss as LovaszLoss
from lovasz.spec.losses import Reduction as Reduction
from lovasz.spec.results import MAX_IMAGE_LOSSES, Result, TermResult, Timing
from lovasz.spec.terms import MAX_TERMS, LossLike, WeightedSum, weighted_sum

__all__ = [
    "LOSS_KINDS",
    "MAX_AXES",
    "MAX_CLASSES",
    "MAX_IMAGE_LOSSES",
    "MAX_TERMS",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "DatasetIoU",
    "InvalidInput",
    "Layout",
    "Loss",
    "LossLike",
    "LovaszHinge",
    "LovaszSigmoid",
    "LovaszSoftmax",
    "Result",
    "TermResult",
    "Timing",
    "WeightedSum",
    "weighted_sum",
]
