"""A rank's place in a joint step, checked, and what a rank says that does not come: its protobuf forms."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

from lovasz import spec
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.unknown import check_known

MAX_RUN_CHARACTERS = 200
MAX_WORLD_SIZE = 65_536
MAX_CALL_BYTES = 64
"""The longest name of a call, and of a process."""
MAX_REASON_CHARACTERS = 1000
MAX_ROUND = (1 << 31) - 1
MIN_SECRET_BYTES = 8
MAX_SECRET_BYTES = 64


@dataclass(frozen=True)
class Joint:
    """One rank's place in a joint step.

    Attributes:
        run: names the training.
        step: the number of the step, from 0.
        rank: in [0, world_size).
        world_size: the number of ranks.
        call: names the call; the same when the call is retried.
        round: how many times this rank has left the run.
        blocking: whether the rank makes no other call of the run until this one has ended.
        process: names the rank's process; empty: unknown.
        secret: known to the ranks of the training alone; empty: none. In no text that is made of this.

    Raises:
        InvalidInput: a value is invalid.
    """

    run: str
    step: int
    rank: int
    world_size: int
    call: bytes = b""
    round: int = 0
    blocking: bool = False
    process: bytes = b""
    secret: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not 1 <= len(self.run) <= MAX_RUN_CHARACTERS:
            raise spec.InvalidInput(
                "joint.run", f"got {reprlib.repr(self.run)}; expected 1 to {MAX_RUN_CHARACTERS} characters"
            )
        values = (("step", self.step), ("rank", self.rank), ("world_size", self.world_size), ("round", self.round))
        for name, value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise spec.InvalidInput(f"joint.{name}", f"got {value!r}; expected an integer")
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise spec.InvalidInput("joint.world_size", f"got {self.world_size}; expected 1 to {MAX_WORLD_SIZE}")
        if not 0 <= self.rank < self.world_size:
            raise spec.InvalidInput("joint.rank", f"got {self.rank}; expected a rank in [0, {self.world_size})")
        if not 0 <= self.step < 1 << 63:
            raise spec.InvalidInput("joint.step", f"got {self.step}; expected a 64-bit number >= 0")
        if not 0 <= self.round <= MAX_ROUND:
            raise spec.InvalidInput("joint.round", f"got {self.round}; expected a 32-bit number >= 0")
        for name, data in (("call", self.call), ("process", self.process)):
            if len(data) > MAX_CALL_BYTES:
                raise spec.InvalidInput(f"joint.{name}", f"got {len(data)} bytes; expected at most {MAX_CALL_BYTES}")
        if self.secret and not MIN_SECRET_BYTES <= len(self.secret) <= MAX_SECRET_BYTES:
            raise spec.InvalidInput(
                "joint.secret",
                f"got {len(self.secret)} bytes; expected none, or {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}",
            )

    def to_proto(self) -> pb.Joint:
        return pb.Joint(
            run=self.run,
            step=self.step,
            rank=self.rank,
            world_size=self.world_size,
            call=self.call,
            round=self.round,
            blocking=self.blocking,
            process=self.process,
            secret=self.secret,
        )

    @classmethod
    def from_proto(cls, message: pb.Joint) -> Joint:
        """The place that a protobuf message describes.

        Raises:
            InvalidInput: a value is invalid, or a field is unknown to this version.
        """
        check_known("joint", message)
        return cls(
            message.run,
            message.step,
            message.rank,
            message.world_size,
            message.call,
            message.round,
            message.blocking,
            message.process,
            message.secret,
        )


@dataclass(frozen=True)
class Abort:
    """A rank that cannot take part in a step.

    Attributes:
        joint: the step, and the rank.
        want_grad: whether it is a step with a gradient.
        reason: why, for the other ranks.
    """

    joint: Joint
    want_grad: bool
    reason: str

    def to_proto(self) -> pb.AbortStepRequest:
        return pb.AbortStepRequest(joint=self.joint.to_proto(), want_grad=self.want_grad, reason=self.reason)

    @classmethod
    def from_proto(cls, message: pb.AbortStepRequest) -> Abort:
        """What a protobuf message says; a long reason is cut, and control characters in it become spaces.

        Raises:
            InvalidInput: a value is invalid.
        """
        reason = "".join(c if c.isprintable() else " " for c in message.reason[:MAX_REASON_CHARACTERS])
        return cls(Joint.from_proto(message.joint), message.want_grad, reason)


@dataclass(frozen=True)
class Leave:
    """A rank that takes no part in further steps of a run.

    Attributes:
        joint: the rank; its step is the first one with a gradient that it takes no part in.
        evaluation_step: the first step without a gradient that it takes no part in.

    Raises:
        InvalidInput: a value is invalid.
    """

    joint: Joint
    evaluation_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.evaluation_step < 1 << 63:
            raise spec.InvalidInput("evaluation_step", f"got {self.evaluation_step}; expected a 64-bit number >= 0")

    def to_proto(self) -> pb.LeaveRunRequest:
        return pb.LeaveRunRequest(joint=self.joint.to_proto(), evaluation_step=self.evaluation_step)

    @classmethod
    def from_proto(cls, message: pb.LeaveRunRequest) -> Leave:
        """What a protobuf message says.

        Raises:
            InvalidInput: a value is invalid.
        """
        return cls(Joint.from_proto(message.joint), message.evaluation_step)
