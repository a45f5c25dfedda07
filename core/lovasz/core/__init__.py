"""The Lovász losses in this process: tensors in, loss and gradient out. Imports neither gRPC nor the server."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("lovasz.core needs torch: pip install 'lovasz[torch]'", name="torch")

from lovasz.core.functional import compute, lovasz_hinge, lovasz_sigmoid, lovasz_softmax
from lovasz.core.modules import LocalLoss, LovaszHingeLoss, LovaszSigmoidLoss, LovaszSoftmaxLoss
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    DatasetIoU,
    InvalidInput,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Result,
    TermResult,
)
from lovasz.version import VERSION

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "DatasetIoU",
    "InvalidInput",
    "LocalLoss",
    "LovaszHinge",
    "LovaszHingeLoss",
    "LovaszSigmoid",
    "LovaszSigmoidLoss",
    "LovaszSoftmax",
    "LovaszSoftmaxLoss",
    "Result",
    "TermResult",
    "compute",
    "lovasz_hinge",
    "lovasz_sigmoid",
    "lovasz_softmax",
]

__version__ = VERSION
