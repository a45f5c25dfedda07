"""What travels: tensors as bytes and chunks, the table of element types, and the protobuf form of a loss.

numpy and protobuf only. Both sides of the wire are here, so that each rule stands once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lovasz import spec
from lovasz.framing import Bytes
from lovasz.v1 import loss_pb2 as pb

CHUNK_BYTES = 1 << 20
"""Payload bytes of one message of a stream."""
MAX_FRAME_BYTES = CHUNK_BYTES + (1 << 10)
"""The largest HTTP/2 frame: a chunk is one. By default gRPC cuts it into 16 KiB, which takes a fifth longer."""
MEMORY_SUFFIX = ".memory"
"""What stands behind the path of a Unix socket of gRPC in that of the socket on which memory is shared."""
MAX_MESSAGE_BYTES = 4 << 20
"""The largest message that a server receives (gRPC's own default)."""


@dataclass(frozen=True)
class DType:
    """An element type: its name (torch's and numpy's), its number on the wire, and how numpy holds it."""

    name: str
    number: pb.DataType
    numpy: np.dtype[np.generic]
    is_float: bool

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize


DTYPES: tuple[DType, ...] = (
    DType("float32", pb.DATA_TYPE_FLOAT32, np.dtype("<f4"), is_float=True),
    DType("float16", pb.DATA_TYPE_FLOAT16, np.dtype("<f2"), is_float=True),
    # numpy has no bfloat16: its bits are held as 16-bit words.
    DType("bfloat16", pb.DATA_TYPE_BFLOAT16, np.dtype("<u2"), is_float=True),
    DType("uint8", pb.DATA_TYPE_UINT8, np.dtype("u1"), is_float=False),
    DType("int16", pb.DATA_TYPE_INT16, np.dtype("<i2"), is_float=False),
    DType("int32", pb.DATA_TYPE_INT32, np.dtype("<i4"), is_float=False),
    DType("int64", pb.DATA_TYPE_INT64, np.dtype("<i8"), is_float=False),
)
_BY_NUMBER = {dtype.number: dtype for dtype in DTYPES}
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
FLOATS = tuple(dtype.name for dtype in DTYPES if dtype.is_float)
INTEGERS = tuple(dtype.name for dtype in DTYPES if not dtype.is_float)


def dtype_named(name: str) -> DType:
    """The element type with this name; KeyError if the wire has none."""
    return _BY_NAME[name]


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


MAX_RUN_CHARACTERS = 200
MAX_WORLD_SIZE = 65_536
MAX_CALL_BYTES = 64


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
    dtype = _BY_NUMBER.get(message.data_type)
    if dtype is None:
        raise spec.InvalidInput(
            f"{name}.data_type", f"got {_enum_text(pb.DataType, message.data_type)}; expected a type of this server"
        )
    return TensorSpec(dtype, tuple(message.shape))


def _enum_text(enum: type[pb.DataType] | type[pb.ClassSelection] | type[pb.InputKind], number: int) -> str:
    return enum.Name(number) if number in enum.values() else str(number)


_INPUT_TO_PROTO: dict[str, pb.InputKind] = {
    "logits": pb.INPUT_KIND_LOGITS,
    "probabilities": pb.INPUT_KIND_PROBABILITIES,
}
_INPUT_FROM_PROTO: dict[int, spec.Input] = {
    pb.INPUT_KIND_LOGITS: "logits",
    pb.INPUT_KIND_PROBABILITIES: "probabilities",
}


def loss_to_proto(loss: spec.WeightedSum) -> pb.Loss:
    return pb.Loss(terms=[_term_to_proto(weight, term) for weight, term in loss.terms])


def _term_to_proto(weight: float, loss: spec.Loss) -> pb.Term:
    if isinstance(loss, spec.LovaszSoftmax):
        listed: tuple[int, ...] = ()
        if loss.classes == "present":
            selection = pb.CLASS_SELECTION_PRESENT
        elif loss.classes == "all":
            selection = pb.CLASS_SELECTION_ALL
        else:
            selection, listed = pb.CLASS_SELECTION_LISTED, tuple(int(c) for c in loss.classes)
        softmax = pb.LovaszSoftmax(
            class_selection=selection,
            listed_classes=listed,
            class_weights=loss.class_weights or (),
            per_image=loss.per_image,
            ignore_index=loss.ignore_index,
            input=_INPUT_TO_PROTO[loss.input],
        )
        return pb.Term(weight=weight, lovasz_softmax=softmax)
    if isinstance(loss, spec.LovaszHinge):
        hinge = pb.LovaszHinge(per_image=loss.per_image, ignore_index=loss.ignore_index, multilabel=loss.multilabel)
        return pb.Term(weight=weight, lovasz_hinge=hinge)
    cross_entropy = pb.CrossEntropy(
        class_weights=loss.class_weights or (), ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing
    )
    return pb.Term(weight=weight, cross_entropy=cross_entropy)


def loss_from_proto(message: pb.Loss) -> spec.WeightedSum:
    """Raises:
    InvalidInput: an option that it cannot have, an enum value that this version does not know.
    """
    if not 1 <= len(message.terms) <= spec.MAX_TERMS:
        raise spec.InvalidInput("loss.terms", f"got {len(message.terms)} terms; expected 1 to {spec.MAX_TERMS}")
    return spec.weighted_sum([(term.weight, _term_from_proto(i, term)) for i, term in enumerate(message.terms)])


def _term_from_proto(i: int, term: pb.Term) -> spec.Loss:
    kind = term.WhichOneof("loss")
    if kind == "lovasz_softmax":
        return _softmax_from_proto(term.lovasz_softmax)
    if kind == "lovasz_hinge":
        hinge = term.lovasz_hinge
        return spec.LovaszHinge(
            per_image=hinge.per_image, ignore_index=_optional_ignore_index(hinge), multilabel=hinge.multilabel
        )
    if kind == "cross_entropy":
        return spec.CrossEntropy(
            class_weights=tuple(term.cross_entropy.class_weights) or None,
            ignore_index=_optional_ignore_index(term.cross_entropy),
            label_smoothing=term.cross_entropy.label_smoothing,
        )
    raise spec.InvalidInput(
        f"loss.terms[{i}].loss",
        "is not set, or is of a kind that this server does not know; expected one of "
        "lovasz_softmax, lovasz_hinge, cross_entropy",
    )


def _softmax_from_proto(message: pb.LovaszSoftmax) -> spec.LovaszSoftmax:
    selections: dict[int, spec.Classes] = {
        pb.CLASS_SELECTION_PRESENT: "present",
        pb.CLASS_SELECTION_ALL: "all",
        pb.CLASS_SELECTION_LISTED: tuple(message.listed_classes),
    }
    classes = selections.get(message.class_selection)
    if classes is None:
        raise spec.InvalidInput(
            "lovasz_softmax.class_selection",
            f"got {_enum_text(pb.ClassSelection, message.class_selection)}; expected CLASS_SELECTION_PRESENT, "
            "CLASS_SELECTION_ALL or CLASS_SELECTION_LISTED",
        )
    if isinstance(classes, str) and message.listed_classes:
        raise spec.InvalidInput(
            "lovasz_softmax.listed_classes",
            f"got {list(message.listed_classes)} beside {_enum_text(pb.ClassSelection, message.class_selection)}; "
            "expected none (they belong to CLASS_SELECTION_LISTED)",
        )
    input_kind = _INPUT_FROM_PROTO.get(message.input)
    if input_kind is None:
        raise spec.InvalidInput(
            "lovasz_softmax.input",
            f"got {_enum_text(pb.InputKind, message.input)}; expected INPUT_KIND_LOGITS or INPUT_KIND_PROBABILITIES",
        )
    return spec.LovaszSoftmax(
        classes=classes,
        class_weights=tuple(message.class_weights) or None,
        per_image=message.per_image,
        ignore_index=_optional_ignore_index(message),
        input=input_kind,
    )


def _optional_ignore_index(message: pb.LovaszSoftmax | pb.LovaszHinge | pb.CrossEntropy) -> int | None:
    return message.ignore_index if message.HasField("ignore_index") else None


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


def as_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def chunks(buffers: Sequence[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Cuts the buffers, one after the other, into pieces of at most ``chunk_bytes``, without a copy."""
    for buffer in buffers:
        for start in range(0, len(buffer), chunk_bytes):
            yield buffer[start : start + chunk_bytes]


_NOTHING = np.empty(0, np.uint8)


class Assembly:
    """Puts the chunks of a payload into their places as they come; the opposite of :func:`chunks`."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """
        Args:
            buffers: writable, in the order of the payload.
        """
        # As arrays of NumPy, which lets other threads run while it copies.
        self._buffers = [np.frombuffer(buffer, np.uint8) for buffer in buffers if len(buffer)]
        self._index = 0
        self._offset = 0
        self.received = 0
        self.expected = sum(len(buffer) for buffer in buffers)

    def add(self, chunk: Bytes) -> None:
        """Raises:
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
        """Takes chunks to the end of the stream.

        Raises:
            InvalidInput: the payload is longer or shorter than its header declared.
        """
        for chunk in stream:
            self.add(chunk)
        self.finish()

    def finish(self) -> None:
        """Raises:
        InvalidInput: the payload is shorter than its header declared.
        """
        if self.received != self.expected:
            raise spec.InvalidInput("payload", f"got {self.received} bytes; expected {self.expected} as declared")
