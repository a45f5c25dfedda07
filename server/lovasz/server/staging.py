"""Host memory into which the payload of one request is received, and which the device computes from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lovasz import wire
from lovasz.core.ragged import Request


class Staging:
    """The tensors of one request; pinned where they will be copied to a GPU."""

    def __init__(self, header: wire.Request, *, pinned: bool) -> None:
        self._header = header
        self._logits = torch.empty(header.logits.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._labels = torch.empty(header.labels.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def receive(self, chunks: Iterable[bytes]) -> None:
        """Copies the payload, logits and then labels, to its place.

        Raises:
            InvalidInput: there are more or fewer bytes than the header declared.
        """
        wire.Assembly([self._logits.numpy().data, self._labels.numpy().data]).add_all(chunks)

    def request(self) -> Request:
        """The tensors as the core takes them."""
        return Request(
            self._logits.view(getattr(torch, self._header.logits.dtype.name)).view(self._header.logits.shape),
            self._labels.view(getattr(torch, self._header.labels.dtype.name)).view(self._header.labels.shape),
            self._header.layout,
        )
