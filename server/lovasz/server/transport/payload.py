"""The tensors of a unary call: received from the message or from shared memory, and the gradient sent back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lovasz import wire
from lovasz.server.errors import SessionLostError
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.server.memory.device_staging import DeviceBytes, DeviceStaging
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.region_staging import RegionStaging
from lovasz.server.memory.staging import Staging
from lovasz.server.schedule.job import Answer
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.tensor_bytes import TensorBytes
from lovasz.spec import InvalidInput
from lovasz.wire import framing
from lovasz.wire.framing import Bytes


class UnaryPayload:
    """Where the tensors of one unary call come from, and where its gradient goes."""

    def __init__(
        self,
        header: wire.Request,
        message: framing.UnaryRequest,
        shared_memory: Sequence[SharedMemory],
        pool: StagingPool,
    ) -> None:
        self._header, self._message, self._shared_memory, self._pool = header, message, shared_memory, pool
        self._tensors: TensorBytes | None = None
        self._written: torch.Tensor | None = None
        """The gradient that is written to its place in shared memory itself; None: it has to be copied."""

    @property
    def staging(self) -> type[AnyStaging]:
        """What receives the tensors."""
        shared = self._header.shared
        if shared is None:
            return Staging
        if any(memory.is_on_device(self._header) for memory in self._shared_memory):
            return DeviceStaging
        offsets = shared.logits_offset | shared.labels_offset | shared.grad_offset
        is_aligned = offsets % wire.ALIGNMENT == 0  # All three are, as it is a power of 2.
        return RegionStaging if is_aligned and self._pool.device.type == "cpu" else Staging

    def receive(self, staging: AnyStaging) -> None:
        """Lets a staging have the tensors.

        Raises:
            InvalidInput: a tensor has more or fewer bytes than the header declared, or is not inside its region.
            SessionLostError: the shared memory has no such session.
        """
        header, message = self._header, self._message
        fields: Sequence[tuple[str, Bytes, int]] = (
            ("logits", message.logits, header.logits.nbytes),
            ("labels", message.labels, header.labels.nbytes),
        )
        if header.shared is not None:
            for name, data, _ in fields:
                if len(data):
                    raise InvalidInput(name, f"got {len(data)} bytes beside shared_tensors; expected none")
            self._tensors = self._found()
            _receive_shared(staging, self._tensors)
            self._written = staging.grad if isinstance(staging, RegionStaging) else None
            return
        assert isinstance(staging, Staging)
        for name, data, expected in fields:
            if len(data) != expected:
                raise InvalidInput(name, f"got {len(data)} bytes; expected {expected} for the declared type and shape")
        staging.receive([data for _, data, _ in fields])

    def send_back(self, answer: Answer) -> memoryview:
        """The gradient's bytes that the answer has in it; none if the gradient is in shared memory, complete.

        Raises:
            InvalidInput, SessionLostError: as for :meth:`receive`; only for an answer that was kept.
        """
        if self._header.shared is None:
            return grad_bytes(answer)
        if answer.result.grad is not self._written or self._written is None:
            _write((self._tensors or self._found()).grad, answer, self._pool)
        return memoryview(b"")

    def _found(self) -> TensorBytes:
        """Where the tensors are in shared memory."""
        for memory in self._shared_memory:
            try:
                return memory.tensors(self._header)
            except SessionLostError as error:
                lost = error
        if not self._shared_memory:
            raise InvalidInput("shared_tensors", "came, but this server shares no memory (--shared-memory)")
        raise lost


def _receive_shared(staging: AnyStaging, tensors: TensorBytes) -> None:
    sources: list[Any] = [tensors.logits, tensors.labels]
    if isinstance(staging, DeviceStaging) is not isinstance(tensors.logits, DeviceBytes):
        raise InvalidInput("shared_tensors.region", "became memory of another kind during the call")
    if isinstance(staging, RegionStaging):
        sources.append(tensors.grad)
    staging.receive(sources)


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


def _write(place: memoryview | DeviceBytes, answer: Answer, pool: StagingPool) -> None:
    """Copies the gradient to its place in shared memory."""
    if isinstance(place, memoryview):
        np.copyto(np.frombuffer(place, np.uint8), _grad_array(answer))
    elif answer.result.grad is not None:
        # A rank that asks again for an answer may have asked by another way before: then it is on the host.
        place.write(answer.result.grad.to(pool.device), pool.copy_stream)
