"""The client of the loss service. Only ``lovasz.client.torch`` and the in-process target need torch."""

from lovasz.client.client import LossClient
from lovasz.client.errors import (
    CallAbortedError,
    CallCancelledError,
    DeadlineExceededError,
    IncompatibleServerError,
    InvalidInputError,
    JointMismatchError,
    LossError,
    ServerFaultError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from lovasz.client.joint import Joint
from lovasz.client.target import Device, ServerInfo
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    DatasetIoU,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Result,
    TermResult,
    Timing,
)
from lovasz.version import VERSION

__all__ = [
    "BinaryCrossEntropy",
    "CallAbortedError",
    "CallCancelledError",
    "CrossEntropy",
    "DatasetIoU",
    "DeadlineExceededError",
    "Device",
    "IncompatibleServerError",
    "InvalidInputError",
    "Joint",
    "JointMismatchError",
    "LossClient",
    "LossError",
    "LovaszHinge",
    "LovaszSigmoid",
    "LovaszSoftmax",
    "Result",
    "ServerFaultError",
    "ServerInfo",
    "ServerOverloadedError",
    "ServerUnavailableError",
    "TermResult",
    "Timing",
]

__version__ = VERSION
