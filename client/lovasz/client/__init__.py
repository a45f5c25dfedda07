"""The client of the loss service: thin, and free of torch but in ``lovasz.client.torch`` and for in-process use."""

from lovasz.client.client import Device, LossClient, ServerInfo
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
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, Result, TermResult, Timing

__all__ = [
    "CallAbortedError",
    "CallCancelledError",
    "CrossEntropy",
    "DeadlineExceededError",
    "Device",
    "IncompatibleServerError",
    "InvalidInputError",
    "Joint",
    "JointMismatchError",
    "LossClient",
    "LossError",
    "LovaszHinge",
    "LovaszSoftmax",
    "Result",
    "ServerFaultError",
    "ServerInfo",
    "ServerOverloadedError",
    "ServerUnavailableError",
    "TermResult",
    "Timing",
]
