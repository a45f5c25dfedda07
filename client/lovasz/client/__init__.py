"""The client of the loss service. Only ``lovasz.client.torch`` and the in-process target need torch."""

from lovasz.client.access import TLS
from lovasz.client.client import LossClient
from lovasz.client.errors import (
    AuthenticationError,
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
    TLSError,
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
    "AuthenticationError",
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
    "TLS",
    "TLSError",
    "TermResult",
    "Timing",
]

__version__ = VERSION
