"""The tensors of a unary call: copied to staging from the message or from shared memory, and the gradient back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lovasz import wire
from lovasz.server.errors import SessionLostError
from lovasz.server.memory.device_staging import DeviceBytes, DeviceStaging
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.staging import Staging
from lovasz.server.schedule.job import Answer
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.tensor_bytes import TensorBytes
from lovasz.spec import InvalidInput
from lovasz.wire import framing
from lovasz.wire.framing import Bytes


def receive(
    staging: Staging | DeviceStaging,
    header: wire.Request,
    message: framing.UnaryRequest,
    shared_memory: Sequence[SharedMemory],
) -> None:
    """Copies the payload of a message, or of shared memory, to its place.

    Raises:
        InvalidInput: a tensor has more or fewer bytes than the header declared.
        SessionLostError: the shared memory has no such session.
    """
    fields: Sequence[tuple[str, Bytes, int]] = (
        ("logits", message.logits, header.logits.nbytes),
        ("labels", message.labels, header.labels.nbytes),
    )
    if header.shared is not None:
        for name, data, _ in fields:
            if len(data):
                raise InvalidInput(name, f"got {len(data)} bytes beside shared_tensors; expected none")
        _receive_shared(staging, shared_tensors(header, shared_memory))
        return
    assert isinstance(staging, Staging)
    for name, data, expected in fields:
        if len(data) != expected:
            raise InvalidInput(name, f"got {len(data)} bytes; expected {expected} for the declared type and shape")
    staging.receive([data for _, data, _ in fields])


def _receive_shared(staging: Staging | DeviceStaging, shared: TensorBytes) -> None:
    sources: list[Any] = [shared.logits, shared.labels]
    if isinstance(staging, DeviceStaging) is not isinstance(shared.logits, DeviceBytes):
        raise InvalidInput("shared_tensors.region", "became memory of another kind during the call")
    staging.receive(sources)


def is_on_device(header: wire.Request, shared_memory: Sequence[SharedMemory]) -> bool:
    """Whether the request's tensors are in device memory."""
    return header.shared is not None and any(memory.is_on_device(header) for memory in shared_memory)


def shared_tensors(header: wire.Request, shared_memory: Sequence[SharedMemory]) -> TensorBytes:
    """Where the request's tensors are in shared memory.

    Raises:
        SessionLostError: there is no such session.
        InvalidInput: they are not inside a region of the session, or this server shares no memory.
    """
    for memory in shared_memory:
        try:
            return memory.tensors(header)
        except SessionLostError as error:
            lost = error
    if not shared_memory:
        raise InvalidInput("shared_tensors", "came, but this server shares no memory (--shared-memory)")
    raise lost


def grad_bytes(answer: Answer) -> memoryview:
    """The gradient as it is sent; valid until the call ends."""
    return _grad_array(answer).data


def _grad_array(answer: Answer) -> npt.NDArray[np.uint8]:
    """The gradient's bytes on the host; none if there is none."""
    grad = answer.result.grad
    if grad is None:
        return np.empty(0, np.uint8)
    if grad.dtype is torch.bfloat16:  # NumPy has none.
        grad = grad.view(torch.int16)
    return grad.cpu().numpy().reshape(-1).view(np.uint8)


def write(place: memoryview | DeviceBytes, answer: Answer, pool: StagingPool) -> None:
    """Copies the gradient to its place in shared memory; it is complete then."""
    if isinstance(place, memoryview):
        np.copyto(np.frombuffer(place, np.uint8), _grad_array(answer))
    elif answer.result.grad is not None:
        # A rank that asks again for an answer may have asked by another way before: then it is on the host.
        place.write(answer.result.grad.to(pool.device), pool.copy_stream)
