"""A rank's place in a data-parallel training whose loss is that of the global batch."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from lovasz import wire
from lovasz.client.errors import InvalidInputError, from_invalid_input
from lovasz.spec import InvalidInput
from lovasz.spec.checks import integer

_PROCESS = os.urandom(8)
_SECRET_BYTES = 16
_SECRETS: WeakKeyDictionary[Any, dict[str, bytes]] = WeakKeyDictionary()
"""Those that the processes of a group share, by the group's store and by run: each is read once."""


@dataclass(frozen=True)
class Joint:
    """Joins the requests of all ranks of a step: each rank gets the loss of all pixels and its part of the gradient.

    The ranks of a step must call one server with the same loss, number of classes, element type and world_size, in any
    order. The number and size of their images may differ, and a rank may have none (N = 0). If a rank is missing, the
    server waits for it (``--joint-timeout``, 45 s by default); then all ranks that called get CallAbortedError, which
    names the missing ones.

    Args:
        run: names the training, 1 to 200 characters; trainings that run at the same time need different names.
        rank: this process, in [0, world_size). None, with world_size: those of ``torch.distributed``'s default group,
            which must be initialized at the first call.
        world_size: the number of processes.
        step: the number of the step, from 0. Steps without a gradient (evaluation) are numbered separately. None:
            ``RemoteLoss`` counts.
        round: how many times this rank has left the run (``RemoteLoss.leave`` counts). Ranks meet in steps of the same
            round.
        secret: random, 8 to 64 bytes (a text counts as UTF-8), the same for all ranks of this training: a caller that
            does not know it never meets them. None: with rank and world size of ``torch.distributed``, the ranks share
            a secret automatically; otherwise there is none, and every caller that knows run, step and rank can take a
            rank's place.

    Raises:
        InvalidInputError: a value is invalid.
    """

    run: str
    rank: int | None = None
    world_size: int | None = None
    step: int | None = None
    round: int = 0
    secret: bytes | str | None = field(default=None, repr=False)
    _given: Joint | None = field(default=None, repr=False, compare=False, kw_only=True)
    """What this place was before :meth:`resolved`; None: it was given as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy asks for rank, world size and secret again, if they are those of ``torch.distributed``.

        It may be made in another process; and a checkpoint holds no secret that was shared automatically.
        """
        given = self._given or self
        return Joint, (self.run, given.rank, given.world_size, self.step, self.round, given.secret)

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.world_size is None):
            text = f"got rank {self.rank} and world_size {self.world_size}; expected both, or none of them"
            raise InvalidInputError("joint.world_size" if self.world_size is None else "joint.rank", text)
        for name in ("rank", "world_size", "step", "round"):
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, integer(f"joint.{name}", value))
                except InvalidInput as error:
                    raise from_invalid_input(error) from None
        if not isinstance(self.secret, str | bytes | None):
            raise InvalidInputError("joint.secret", f"got {type(self.secret).__name__}; expected bytes or a text")
        rank, world_size = (0, 1) if self.rank is None or self.world_size is None else (self.rank, self.world_size)
        self._place(0 if self.step is None else self.step, rank, world_size)

    @classmethod
    def from_distributed(cls, run: str) -> Joint:
        """Takes rank and world size from ``torch.distributed``'s default group: now, or else at the first call.

        Shares a secret among the ranks in the group's store. Makes no collective call.
        """
        joint = cls(run)
        return joint if _place_in_default_group() is None else joint.resolved()

    def resolved(self) -> Joint:
        """The same place, with rank and world size, and the secret that comes with them.

        Raises:
            InvalidInputError: they are not given, and ``torch.distributed``'s default group is not initialized.
        """
        if self.rank is not None:
            return self
        place = _place_in_default_group()
        if place is None:
            raise InvalidInputError(
                "joint.rank",
                "got None, and torch.distributed's default group is not initialized; expected rank and world_size, or "
                "a call after init_process_group",
            )
        secret = _shared_secret(self.run) if self.secret is None else self.secret
        return replace(self, rank=place[0], world_size=place[1], secret=secret, _given=self)

    def at(self, step: int | None, *, blocking: bool | None = None) -> wire.Joint:
        """This rank's place in a step, for one call.

        Args:
            blocking: whether this thread waits for the call's end; None: it is no call for a loss.

        Raises:
            InvalidInputError: a value is invalid.
        """
        if step is None:
            raise InvalidInputError("joint.step", "got None; expected a number (only RemoteLoss counts steps itself)")
        joint = self.resolved()
        assert joint.rank is not None
        assert joint.world_size is not None
        if blocking is not None:
            blocking = _CALLING.is_only_one(self.run, joint.rank, threading.get_ident() if blocking else None)
        return joint._place(step, joint.rank, joint.world_size, os.urandom(16), bool(blocking))

    def _place(self, step: int, rank: int, world_size: int, call: bytes = b"", blocking: bool = False) -> wire.Joint:
        # A forked process has the same random bytes.
        process = _PROCESS + os.getpid().to_bytes(8, "little")
        secret = self.secret.encode() if isinstance(self.secret, str) else self.secret or b""
        try:
            return wire.Joint(self.run, step, rank, world_size, call, self.round, blocking, process, secret)
        except InvalidInput as error:
            raise from_invalid_input(error) from None


def checked_joint(value: object) -> Joint:
    """The value, if it is a place.

    Raises:
        InvalidInputError: it is none.
    """
    if isinstance(value, Joint):
        return value
    raise InvalidInputError(
        "joint", f"got {value!r}; expected a lovasz.client.Joint (or, for RemoteLoss, the run's name)"
    )


def _place_in_default_group() -> tuple[int, int] | None:
    """Rank and world size in ``torch.distributed``'s default group; None if it is not initialized."""
    try:
        import torch.distributed
    except ModuleNotFoundError:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _shared_secret(run: str) -> bytes | None:
    """A secret that the processes of ``torch.distributed``'s default group share; None if the group has no store.

    The first that asks makes it, so that no process waits for another.
    """
    from torch.distributed import distributed_c10d

    store = getattr(distributed_c10d, "_get_default_store", lambda: None)()
    if store is None:
        return None
    known = _SECRETS.setdefault(store, {})
    if run not in known:
        secret = store.compare_set(f"lovasz/secret/{run}", "", os.urandom(_SECRET_BYTES).hex())
        known[run] = bytes.fromhex(secret.decode())
    return known[run]


class CallingThreads:
    """Knows of each rank in this process whether all its calls came from one thread, one after the other.

    Only such a rank makes no other call while it waits.
    """

    MAX_RANKS = 1000
    """Ranks that are remembered, those that called last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: OrderedDict[tuple[str, int], int | None] = OrderedDict()

    def is_only_one(self, run: str, rank: int, thread: int | None) -> bool:
        """Whether a rank has called from this thread alone; None stands for a call that no thread waits for."""
        with self._lock:
            known = self._threads.setdefault((run, rank), thread)
            self._threads.move_to_end((run, rank))
            if known != thread:
                self._threads[run, rank] = None
            while len(self._threads) > self.MAX_RANKS:
                self._threads.popitem(last=False)
            return thread is not None and known == thread


_CALLING = CallingThreads()
