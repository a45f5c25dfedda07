"""A process group of ``torch.distributed``, and the exchanges that the joint loss makes in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from lovasz.spec import InvalidInput

WORLD = "world"
"""Stands for the default group, which need not exist yet where a loss is made."""


class Group:
    """The ranks of a process group; every method is a collective call, which all ranks have to make.

    Attributes:
        process_group: of ``torch.distributed``.
        rank: this process, in [0, size).
        size: the number of ranks.
        device: where what is sent has to be: the CPU, or with NCCL alone the current CUDA device.
    """

    def __init__(self, given: Any) -> None:
        """Finds the ranks of a group.

        Args:
            given: a process group, or ``"world"`` for the default group.

        Raises:
            InvalidInput: it is something else, it is not initialized, or this process is not in it.
        """
        self.process_group = _found(given)
        self.rank = distributed.get_rank(self.process_group)
        self.size = distributed.get_world_size(self.process_group)
        if self.rank < 0:
            raise InvalidInput("group", "got a process group without this process; expected one that contains it")
        if "cpu:" in self._backends:
            self.device = torch.device("cpu")
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def _backends(self) -> str:
        """As ``"cpu:gloo,cuda:nccl"``."""
        return str(distributed.get_backend_config(self.process_group))

    @property
    def is_default(self) -> bool:
        """Whether it is the default group."""
        return self.process_group is distributed.group.WORLD

    @property
    def is_gloo(self) -> bool:
        """Whether it sends by gloo alone, whatever the device."""
        return all(backend.endswith(":gloo") for backend in self._backends.split(","))

    @property
    def collectives(self) -> int | None:
        """The number of collective calls in this group so far, whoever made them; None if the backend counts none."""
        try:
            return int(self.process_group._get_sequence_number_for_group())
        except RuntimeError:
            return None

    def device_for(self, logits: Tensor) -> torch.device:
        """Where to send pixels from: the logits' own device if the group has NCCL for it."""
        return logits.device if logits.is_cuda and "nccl" in self._backends else self.device

    def numbers(self, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The numbers of all ranks: int64, shape (size, n).

        Args:
            own: int64, shape (n,), with the same n on all ranks.
        """
        sent = torch.from_numpy(own).to(self.device)
        received = torch.empty(self.size, len(own), dtype=torch.int64, device=self.device)
        self._all_gather(list(received), sent)
        return received.cpu().numpy()

    def add(self, numbers: Sequence[Tensor]) -> None:
        """Replaces tensors on the CPU by their sums over the ranks; each has the same size on all ranks."""
        works = [distributed.all_reduce(part, group=self.process_group, async_op=True) for part in numbers]
        for work in works:
            work.wait()

    def objects(self, own: Any) -> list[Any]:
        """The objects of all ranks, which are pickled; only for what is rare and small."""
        received: list[Any] = [None] * self.size
        distributed.all_gather_object(received, own, group=self.process_group)
        return received

    def bytes(self, own: Tensor) -> list[Tensor]:
        """The bytes of all ranks.

        Args:
            own: uint8, shape (n,), with the same n on all ranks.
        """
        received = list(own.new_empty(self.size, len(own)))
        self._all_gather(received, own)
        return received

    def _all_gather(self, received: list[Tensor], own: Tensor) -> None:
        distributed.all_gather(received, own, group=self.process_group)


class Parts:
    """The ranks of a group to a backend, each with its part of the joint (:class:`lovasz.core.ranks.Ranks`)."""

    def __init__(self, group: Group, images: Sequence[int], pixels: Sequence[int]) -> None:
        self._group, self.rank = group, group.rank
        self.images, self.pixels = tuple(images), tuple(pixels)

    def add(self, arrays: Sequence[npt.NDArray[np.integer[Any]]]) -> None:
        self._group.add([torch.from_numpy(array) for array in arrays if array.size])

    def reduce(self, sums: Sequence[npt.NDArray[np.int64]], maxima: Sequence[npt.NDArray[np.int64]]) -> None:
        arrays = [*sums, *maxima]
        numbers = self._group.numbers(np.concatenate([array.ravel() for array in arrays]))
        first = 0
        for place, array in enumerate(arrays):
            of_ranks = numbers[:, first : first + array.size]
            first += array.size
            array[...] = (of_ranks.sum(0) if place < len(sums) else of_ranks.max(0)).reshape(array.shape)

    def gather(self, own: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        counts = self._group.numbers(np.array([own.nbytes]))[:, 0].tolist()
        sent = np.zeros(max(1, *counts), np.uint8)
        sent[: own.nbytes] = own.view(np.uint8)
        received = self._group.bytes(torch.from_numpy(sent))
        return [data.numpy()[:count].view(own.dtype) for data, count in zip(received, counts, strict=True)]


def check_group(given: Any) -> None:
    """Checks that an argument can be a group; whether this process is in it, the first call finds out.

    Raises:
        InvalidInput: it is neither a process group nor ``"world"``.
    """
    is_group = distributed.is_available() and (
        isinstance(given, distributed.ProcessGroup) or given is distributed.GroupMember.NON_GROUP_MEMBER
    )
    if not is_group and not (isinstance(given, str) and given == WORLD):
        expected = "a process group of torch.distributed, or 'world' for the default group"
        raise InvalidInput("group", f"got {given!r}; expected {expected}")


def _found(given: Any) -> Any:
    check_group(given)
    if isinstance(given, str):
        if not distributed.is_available() or not distributed.is_initialized():
            raise InvalidInput("group", "got 'world', and there is no default group; expected init_process_group first")
        return distributed.group.WORLD
    if given is distributed.GroupMember.NON_GROUP_MEMBER:
        raise InvalidInput("group", "got a process group without this process; expected one that contains it")
    return given
