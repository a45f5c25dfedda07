"""The client of the loss service: thin, and free of torch but in ``lovasz.client.torch`` and for in-process use."""

from lovasz.client.client import Device, LossClient, ServerInfo
from lovasz.client.errors import (
    CallCancelledError,
    DeadlineExceededError,
    IncompatibleServerError,
    InvalidInputError,
    LossError,
    ServerFaultError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, Result, TermResult, Timing

__all__ = [
    "CallCancelledError",
    "CrossEntropy",
    "DeadlineExceededError",
    "Device",
    "IncompatibleServerError",
    "InvalidInputError",
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
