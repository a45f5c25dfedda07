"""Request and answer headers: what a message says about its tensors, checked, and its protobuf form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lovasz import spec
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.dtypes import FLOATS, INTEGERS, DType, dtype_numbered
from lovasz.wire.enums import enum_text
from lovasz.wire.losses import loss_from_proto, loss_to_proto

MAX_RUN_CHARACTERS = 200
MAX_WORLD_SIZE = 65_536
MAX_CALL_BYTES = 64
MEMORY_SUFFIX = ".memory"
"""The socket on which memory is shared has the path of gRPC's Unix socket and this suffix."""


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor on the wire."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_proto(self) -> pb.TensorInfo:
        return pb.TensorInfo(data_type=self.dtype.number, shape=self.shape)


@dataclass(frozen=True)
class SharedTensors:
    """Where the tensors of a request lie in shared memory; offsets in bytes."""

    session: bytes
    region: int
    logits_offset: int
    labels_offset: int
    grad_offset: int

    def to_proto(self) -> pb.SharedTensors:
        return pb.SharedTensors(
            session=self.session,
            region=self.region,
            logits_offset=self.logits_offset,
            labels_offset=self.labels_offset,
            grad_offset=self.grad_offset,
        )

    @classmethod
    def from_proto(cls, message: pb.SharedTensors) -> SharedTensors:
        return cls(message.session, message.region, message.logits_offset, message.labels_offset, message.grad_offset)


@dataclass(frozen=True)
class Joint:
    """One rank's place in a step whose ranks are computed as one; ``call`` names the call, also when it is retried.

    Raises:
        InvalidInput: a value that cannot be.
    """

    run: str
    step: int
    rank: int
    world_size: int
    call: bytes = b""

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not 1 <= len(self.run) <= MAX_RUN_CHARACTERS:
            raise spec.InvalidInput("joint.run", f"got {self.run!r}; expected 1 to {MAX_RUN_CHARACTERS} characters")
        for name, value in (("step", self.step), ("rank", self.rank), ("world_size", self.world_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise spec.InvalidInput(f"joint.{name}", f"got {value!r}; expected an integer")
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise spec.InvalidInput("joint.world_size", f"got {self.world_size}; expected 1 to {MAX_WORLD_SIZE}")
        if not 0 <= self.rank < self.world_size:
            raise spec.InvalidInput("joint.rank", f"got {self.rank}; expected a rank in [0, {self.world_size})")
        if not 0 <= self.step < 1 << 63:
            raise spec.InvalidInput("joint.step", f"got {self.step}; expected a 64-bit number >= 0")
        if len(self.call) > MAX_CALL_BYTES:
            raise spec.InvalidInput("joint.call", f"got {len(self.call)} bytes; expected at most {MAX_CALL_BYTES}")

    def to_proto(self) -> pb.Joint:
        return pb.Joint(run=self.run, step=self.step, rank=self.rank, world_size=self.world_size, call=self.call)

    @classmethod
    def from_proto(cls, message: pb.Joint) -> Joint:
        """Raises:
        InvalidInput: a value that cannot be.
        """
        return cls(message.run, message.step, message.rank, message.world_size, message.call)


@dataclass(frozen=True)
class Request:
    """A request without its payload.

    Attributes:
        joint: its place among the ranks that it is computed with; None if it is computed alone.
        run: names the training for the server's metrics; empty: none, or that of ``joint``.
        shared: where its tensors lie; None if they travel.
        layout: the sizes that the shapes come to; computing it has checked them.
    """

    loss: spec.WeightedSum
    logits: TensorSpec
    labels: TensorSpec
    want_grad: bool
    layout: spec.Layout
    shared: SharedTensors | None = None
    joint: Joint | None = None
    run: str = ""

    @classmethod
    def checked(
        cls,
        loss: spec.WeightedSum,
        logits: TensorSpec,
        labels: TensorSpec,
        want_grad: bool,
        shared: SharedTensors | None = None,
        joint: Joint | None = None,
        run: str = "",
    ) -> Request:
        """Raises:
        InvalidInput: an element type or a shape that does not fit the loss, or a name that is too long.
        """
        if len(run) > MAX_RUN_CHARACTERS:
            raise spec.InvalidInput("run", f"got {len(run)} characters; expected at most {MAX_RUN_CHARACTERS}")
        if not logits.dtype.is_float:
            raise spec.InvalidInput(
                "logits", f"got element type {logits.dtype.name}; expected one of {', '.join(FLOATS)}"
            )
        if labels.dtype.is_float:
            raise spec.InvalidInput(
                "labels", f"got element type {labels.dtype.name}; expected one of {', '.join(INTEGERS)}"
            )
        return cls(loss, logits, labels, want_grad, loss.layout(logits.shape, labels.shape), shared, joint, run)

    @property
    def grad_bytes(self) -> int:
        """Bytes of the gradient that is wanted."""
        return self.logits.nbytes if self.want_grad else 0

    @property
    def payload_bytes(self) -> int:
        return self.logits.nbytes + self.labels.nbytes

    def to_proto(self) -> pb.RequestHeader:
        return pb.RequestHeader(
            loss=loss_to_proto(self.loss),
            logits=self.logits.to_proto(),
            labels=self.labels.to_proto(),
            want_grad=self.want_grad,
            shared_tensors=None if self.shared is None else self.shared.to_proto(),
            joint=None if self.joint is None else self.joint.to_proto(),
            run=self.run,
        )

    @classmethod
    def from_proto(cls, header: pb.RequestHeader) -> Request:
        """Raises:
        InvalidInput: a field is missing, unknown or wrong.
        """
        return cls.checked(
            loss_from_proto(header.loss),
            _tensor_from_proto("logits", header.logits),
            _tensor_from_proto("labels", header.labels),
            header.want_grad,
            SharedTensors.from_proto(header.shared_tensors) if header.HasField("shared_tensors") else None,
            Joint.from_proto(header.joint) if header.HasField("joint") else None,
            header.run,
        )


def _tensor_from_proto(name: str, message: pb.TensorInfo) -> TensorSpec:
    dtype = dtype_numbered(message.data_type)
    if dtype is None:
        raise spec.InvalidInput(
            f"{name}.data_type", f"got {enum_text(pb.DataType, message.data_type)}; expected a type of this server"
        )
    return TensorSpec(dtype, tuple(message.shape))


@dataclass(frozen=True)
class Response:
    """An answer without the gradient's bytes; ``grad`` is None if no gradient was wanted.

    The gradient that is sent is the true one times ``grad_scale``, a power of two.
    """

    loss: float
    terms: tuple[spec.TermResult, ...]
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    grad: TensorSpec | None
    grad_scale: float
    timing: spec.Timing

    def to_proto(self) -> pb.ResponseHeader:
        timing = self.timing
        return pb.ResponseHeader(
            loss=self.loss,
            terms=[pb.TermResult(loss=term.loss, per_class_loss=term.per_class_loss) for term in self.terms],
            intersection=self.intersection,
            union=self.union,
            grad=None if self.grad is None else self.grad.to_proto(),
            grad_scale=self.grad_scale,
            timing=pb.ServerTiming(
                receive_seconds=timing.receive_seconds,
                queue_seconds=timing.queue_seconds,
                compute_seconds=timing.compute_seconds,
                batch_requests=timing.batch_requests,
                joint_wait_seconds=timing.joint_wait_seconds,
                copy_seconds=timing.copy_seconds,
            ),
        )

    @classmethod
    def from_proto(cls, message: pb.ResponseHeader, request: Request) -> Response:
        """Raises:
        InvalidInput: the answer does not fit the request (the other side is no server of this contract).
        """
        kinds = [loss.kind for _, loss in request.loss.terms]
        if len(message.terms) != len(kinds):
            raise spec.InvalidInput("response.terms", f"got {len(message.terms)}; expected {len(kinds)}")
        channels = request.layout.channels
        for kind, term in zip(kinds, message.terms, strict=True):
            expected = 0 if kind == "cross_entropy" else channels
            if len(term.per_class_loss) != expected:
                raise spec.InvalidInput(
                    "response.per_class_loss", f"got {len(term.per_class_loss)} for {kind}; expected {expected}"
                )
        for name, counts in (("intersection", message.intersection), ("union", message.union)):
            if len(counts) != channels:
                raise spec.InvalidInput(f"response.{name}", f"got {len(counts)} counts; expected {channels}")
        grad = _tensor_from_proto("response.grad", message.grad) if message.HasField("grad") else None
        if grad != (request.logits if request.want_grad else None):
            raise spec.InvalidInput("response.grad", f"got {grad}; expected type and shape of the logits iff wanted")
        if grad is not None and math.frexp(message.grad_scale)[0] != 0.5:
            raise spec.InvalidInput("response.grad_scale", f"got {message.grad_scale}; expected a power of two")
        timing = message.timing
        return cls(
            loss=message.loss,
            terms=tuple(
                spec.TermResult(kind, term.loss, np.asarray(term.per_class_loss, np.float64))
                for kind, term in zip(kinds, message.terms, strict=True)
            ),
            intersection=np.asarray(message.intersection, np.int64),
            union=np.asarray(message.union, np.int64),
            grad=grad,
            grad_scale=message.grad_scale,
            timing=spec.Timing(
                timing.receive_seconds,
                timing.queue_seconds,
                timing.compute_seconds,
                timing.batch_requests,
                timing.joint_wait_seconds,
                timing.copy_seconds,
            ),
        )
