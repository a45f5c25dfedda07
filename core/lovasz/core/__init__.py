"""The Lovász losses in this process: tensors in, loss and gradient out. Imports neither gRPC nor the server."""

from lovasz.core.functional import compute, lovasz_hinge, lovasz_softmax
from lovasz.core.modules import LocalLoss, LovaszHingeLoss, LovaszSoftmaxLoss
from lovasz.spec import CrossEntropy, InvalidInput, LovaszHinge, LovaszSoftmax, Result, TermResult

__all__ = [
    "CrossEntropy",
    "InvalidInput",
    "LocalLoss",
    "LovaszHinge",
    "LovaszHingeLoss",
    "LovaszSoftmax",
    "LovaszSoftmaxLoss",
    "Result",
    "TermResult",
    "compute",
    "lovasz_hinge",
    "lovasz_softmax",
]
