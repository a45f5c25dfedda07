"""The payload of a request or an answer: tensors as bytes, cut into chunks and reassembled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lovasz import spec
from lovasz.wire.framing import Bytes

CHUNK_BYTES = 1 << 20
"""Payload bytes in one message of a stream."""
MAX_FRAME_BYTES = CHUNK_BYTES + (1 << 10)
"""The largest HTTP/2 frame: it holds a chunk. With gRPC's default of 16 KiB a transfer takes a fifth longer."""
MAX_MESSAGE_BYTES = 4 << 20
"""The largest message that a server receives (gRPC's own default)."""


def as_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def chunks(buffers: Sequence[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Cuts the buffers, in order, into chunks of at most ``chunk_bytes``, without a copy."""
    for buffer in buffers:
        for start in range(0, len(buffer), chunk_bytes):
            yield buffer[start : start + chunk_bytes]


_NOTHING = np.empty(0, np.uint8)


class Assembly:
    """Copies the chunks of a payload into buffers as they arrive: the inverse of :func:`chunks`.

    Attributes:
        received: bytes so far.
        expected: bytes of the whole payload.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """Starts with the first byte of the first buffer.

        Args:
            buffers: writable memory, in the order of the payload.
        """
        # numpy releases the interpreter lock while it copies.
        self._buffers = [np.frombuffer(buffer, np.uint8) for buffer in buffers if len(buffer)]
        self._index = 0
        self._offset = 0
        self.received = 0
        self.expected = sum(map(len, buffers))

    def add(self, chunk: Bytes) -> None:
        """Copies one chunk.

        Raises:
            InvalidInput: the payload is longer than its header declared.
        """
        if self.received + len(chunk) > self.expected:
            raise spec.InvalidInput(
                "payload", f"got at least {self.received + len(chunk)} bytes; expected {self.expected} as declared"
            )
        rest = np.frombuffer(chunk, np.uint8) if len(chunk) else _NOTHING
        while len(rest):
            buffer = self._buffers[self._index]
            taken = min(len(rest), len(buffer) - self._offset)
            buffer[self._offset : self._offset + taken] = rest[:taken]
            rest = rest[taken:]
            self._offset += taken
            self.received += taken
            if self._offset == len(buffer):
                self._index, self._offset = self._index + 1, 0

    def add_all(self, stream: Iterable[Bytes]) -> None:
        """Copies all chunks of a stream, and checks that the payload is complete.

        Raises:
            InvalidInput: the payload is longer or shorter than its header declared.
        """
        for chunk in stream:
            self.add(chunk)
        self.finish()

    def finish(self) -> None:
        """Checks that the payload is complete.

        Raises:
            InvalidInput: it is shorter than its header declared.
        """
        if self.received != self.expected:
            raise spec.InvalidInput("payload", f"got {self.received} bytes; expected {self.expected} as declared")
