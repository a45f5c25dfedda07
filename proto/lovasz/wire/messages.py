"""Headers of requests and responses: all of a message but its tensors' bytes, checked, and its protobuf form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz import spec
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.dtypes import FLOATS, INTEGERS, DType, dtype_named, dtype_numbered
from lovasz.wire.enums import enum_text
from lovasz.wire.joint import MAX_RUN_CHARACTERS, Joint
from lovasz.wire.losses import check_lengths, loss_from_proto, loss_to_proto

MAX_HEADER_BYTES = 64 << 10
"""The longest header, beside what the options of its classes and its offsets take."""
_OPTION_BYTES = 11
"""A class of a term: its weight, and its number in a list of classes."""
_OFFSET_BYTES = 10
_KEPT_HEADER_BYTES = 4096
"""What longer headers mean is found out each time."""
_COUNT_BYTES = 10
_LOSS_BYTES = 8
_ANSWER_BYTES = 4096
"""What is in an answer's header, at most, beside the numbers of classes and images."""


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor on the wire."""

    dtype: DType
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_proto(self) -> pb.TensorInfo:
        return pb.TensorInfo(data_type=self.dtype.number, shape=self.shape)

    def is_in(self, message: pb.TensorInfo) -> bool:
        """Whether a message says the same."""
        return message.data_type == self.dtype.number and tuple(message.shape) == self.shape


class SharedTensors(NamedTuple):
    """Where the tensors of a request are in shared memory.

    Attributes:
        session: the session's name, as the server gave it.
        region: the region's number, as the client gave it.
        logits_offset: in bytes, like the other two.
        labels_offset: where the labels begin.
        grad_offset: where the server writes the gradient.
    """

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
class Request:
    """A request without its payload.

    Attributes:
        loss: the loss to compute.
        logits: element type and shape of the logits.
        labels: element type and shape of the labels.
        want_grad: whether the gradient is wanted, too.
        layout: the sizes that the loss is computed with.
        shared: where its tensors are in shared memory; None if they travel.
        joint: its rank's place in a joint step; None if it is computed alone.
        run: the training's name in the server's metrics; empty: none, or the run of ``joint``.
        payload_bytes: of logits and labels.
        grad_bytes: of the gradient; 0 if none is wanted.
        tensor_bytes: of all its tensors: what a server has to hold for it.
        max_answer_bytes: the most that the header of its answer has.
        segments: of all its Lovász terms.
    """

    loss: spec.WeightedSum
    logits: TensorSpec
    labels: TensorSpec
    want_grad: bool
    layout: spec.Layout
    shared: SharedTensors | None = None
    joint: Joint | None = None
    run: str = ""
    payload_bytes: int = field(init=False, repr=False, compare=False)
    grad_bytes: int = field(init=False, repr=False, compare=False)
    tensor_bytes: int = field(init=False, repr=False, compare=False)
    max_answer_bytes: int = field(init=False, repr=False, compare=False)
    segments: int = field(init=False, repr=False, compare=False)

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
        offsets: Any = None,
        may_be_empty: bool = False,
    ) -> Request:
        """A request whose shapes were checked against its loss.

        Raises:
            InvalidInput: an element type or a shape does not fit the loss, or the run's name is too long.
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
        layout = loss.layout(logits.shape, labels.shape, offsets, may_be_empty=may_be_empty or joint is not None)
        return cls(loss, logits, labels, want_grad, layout, shared, joint, run)

    def __post_init__(self) -> None:
        logits_bytes, labels_bytes = self.logits.nbytes, self.labels.nbytes
        sizes = {"payload_bytes": logits_bytes + labels_bytes, "grad_bytes": logits_bytes if self.want_grad else 0}
        sizes["tensor_bytes"] = sizes["payload_bytes"] + sizes["grad_bytes"]
        sizes["max_answer_bytes"] = self._max_answer_bytes()
        self.__dict__.update(sizes, segments=self.loss.segments(self.layout))

    def _max_answer_bytes(self) -> int:
        channels, images = self.layout.channels, min(self.layout.scored_images, spec.MAX_IMAGE_LOSSES)
        per_image = sum(isinstance(loss, spec.LovaszLoss) and loss.per_image for _, loss in self.loss.terms)
        losses = len(self.loss.terms) * (channels + 2) + per_image * images
        return _ANSWER_BYTES + losses * _LOSS_BYTES + 2 * channels * _COUNT_BYTES

    def to_proto(self, shared: SharedTensors | None = None) -> pb.RequestHeader:
        """Its header.

        Args:
            shared: where its tensors are in shared memory, in place of what it says itself.
        """
        shared = self.shared if shared is None else shared
        return pb.RequestHeader(
            loss=loss_to_proto(self.loss),
            logits=self.logits.to_proto(),
            labels=self.labels.to_proto(),
            want_grad=self.want_grad,
            shared_tensors=None if shared is None else shared.to_proto(),
            joint=None if self.joint is None else self.joint.to_proto(),
            run=self.run,
            offsets=self.layout.offsets or (),
        )

    @classmethod
    def from_proto(cls, header: pb.RequestHeader) -> Request:
        """The request that a protobuf header describes.

        Raises:
            InvalidInput: a field is missing, unknown, invalid or too long.
        """
        joint = header.HasField("joint")
        if header.offsets or header.ByteSize() > _KEPT_HEADER_BYTES:
            request = _request(header, may_be_empty=joint)
        else:
            request = _kept_request(
                header.loss.SerializeToString(),
                header.logits.SerializeToString(),
                header.labels.SerializeToString(),
                header.want_grad,
                header.run,
                joint,
            )
        return request.placed(
            SharedTensors.from_proto(header.shared_tensors) if header.HasField("shared_tensors") else None,
            Joint.from_proto(header.joint) if joint else None,
        )

    def placed(self, shared: SharedTensors | None, joint: Joint | None) -> Request:
        """This request at its places in shared memory and in a joint step; what is kept of its sizes goes along."""
        request = object.__new__(type(self))
        # Not by ``dataclasses.replace``, which would work the sizes out again, for each call.
        request.__dict__.update(self.__dict__, shared=shared, joint=joint)
        return request


def _request(header: pb.RequestHeader, *, may_be_empty: bool) -> Request:
    """The request without its places in shared memory and in a joint step."""
    _check_size(header)
    return Request.checked(
        loss_from_proto(header.loss),
        _tensor_from_proto("logits", header.logits, FLOATS),
        _tensor_from_proto("labels", header.labels, INTEGERS),
        header.want_grad,
        run=header.run,
        offsets=tuple(header.offsets) or None,
        may_be_empty=may_be_empty,
    )


@lru_cache(maxsize=256)
def _kept_request(loss: bytes, logits: bytes, labels: bytes, want_grad: bool, run: str, may_be_empty: bool) -> Request:
    """A training sends the same header for each of its steps: what it means is found out once."""
    header = pb.RequestHeader(
        loss=pb.Loss.FromString(loss),
        logits=pb.TensorInfo.FromString(logits),
        labels=pb.TensorInfo.FromString(labels),
        want_grad=want_grad,
        run=run,
    )
    return _request(header, may_be_empty=may_be_empty)


def _check_size(header: pb.RequestHeader) -> None:
    """Checks lengths before elements: a header of a few megabytes would take seconds to read."""
    shape = header.logits.shape
    if len(shape) > spec.MAX_AXES:
        raise spec.InvalidInput("logits", f"got {len(shape)} axes; expected at most {spec.MAX_AXES}")
    images, channels = max(0, *shape[:1], 0), min(max(0, *shape[1:2], 1), spec.MAX_CLASSES)
    check_lengths(header.loss, channels)
    if len(header.offsets) > images:
        raise spec.InvalidInput("offsets", f"got {len(header.offsets)}; expected at most {images}, one per image")
    options = min(len(header.loss.terms), spec.MAX_TERMS) * channels * _OPTION_BYTES
    most = MAX_HEADER_BYTES + options + len(header.offsets) * _OFFSET_BYTES
    if header.ByteSize() > most:
        raise spec.InvalidInput("header", f"got {header.ByteSize()} bytes; expected at most {most}")


def _tensor_from_proto(name: str, message: pb.TensorInfo, expected: Sequence[str]) -> TensorSpec:
    dtype = dtype_numbered(message.data_type)
    if dtype is None:
        types = ", ".join(enum_text(pb.DataType, dtype_named(one).number) for one in expected)
        raise spec.InvalidInput(
            f"{name}.data_type", f"got {enum_text(pb.DataType, message.data_type)}; expected one of {types}"
        )
    if len(message.shape) > spec.MAX_AXES:
        raise spec.InvalidInput(name, f"got {len(message.shape)} axes; expected at most {spec.MAX_AXES}")
    return TensorSpec(dtype, tuple(message.shape))


def _array(numbers: Sequence[float], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A repeated field as an array; ``np.asarray`` of it takes many times as long."""
    return np.fromiter(numbers, dtype, len(numbers))


def _term_result(loss: spec.Loss, message: pb.TermResult, channels: int, images: int) -> spec.TermResult:
    """The result of one term, with one loss per class and, for a term with ``per_image``, one per image."""
    is_lovasz = isinstance(loss, spec.LovaszLoss)
    per_class, per_image = message.per_class_loss, message.per_image_loss
    for name, losses, expected in (
        ("per_class_loss", per_class, channels if is_lovasz else 0),
        ("per_image_loss", per_image, images if isinstance(loss, spec.LovaszLoss) and loss.per_image else 0),
    ):
        if len(losses) != expected:
            raise spec.InvalidInput(f"response.{name}", f"got {len(losses)} for {loss.kind}; expected {expected}")
    return spec.TermResult(loss.kind, message.loss, _array(per_class, np.float64), _array(per_image, np.float64))


class Response(NamedTuple):
    """A response without the gradient's bytes.

    Attributes:
        loss: the weighted sum of the terms.
        terms: the result of each term.
        intersection: int64, shape (C,): see :class:`lovasz.spec.Result`.
        union: int64, shape (C,).
        grad: element type and shape of the gradient; None if none was wanted.
        grad_scale: a power of two: the gradient is sent multiplied by it.
        timing: where the server spent the time.
        ranks: the number of ranks of the joint step; 1 without one.
        warning: what people should know of their run; empty: nothing.
    """

    loss: float
    terms: tuple[spec.TermResult, ...]
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    grad: TensorSpec | None
    grad_scale: float
    timing: spec.Timing
    ranks: int = 1
    warning: str = ""

    def to_proto(self) -> pb.ResponseHeader:
        timing = self.timing
        return pb.ResponseHeader(
            loss=self.loss,
            terms=[
                pb.TermResult(
                    loss=term.loss,
                    per_class_loss=term.per_class_loss.tolist(),
                    per_image_loss=term.per_image_loss.tolist(),
                )
                for term in self.terms
            ],
            intersection=self.intersection.tolist(),  # Protobuf reads numbers of NumPy far more slowly.
            union=self.union.tolist(),
            grad=None if self.grad is None else self.grad.to_proto(),
            grad_scale=self.grad_scale,
            ranks=self.ranks,
            warning=self.warning,
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
    def from_proto(cls, message: pb.ResponseHeader, request: Request, transport: str = "") -> Response:
        """The response that a protobuf header describes.

        Args:
            message: the header.
            request: what it answers.
            transport: for ``Timing.transport``.

        Raises:
            InvalidInput: it does not fit the request, so the server does not keep this contract.
        """
        terms = request.loss.terms
        if len(message.terms) != len(terms):
            raise spec.InvalidInput("response.terms", f"got {len(message.terms)}; expected {len(terms)}")
        channels = request.layout.channels
        images = request.layout.scored_images if request.layout.scored_images <= spec.MAX_IMAGE_LOSSES else 0
        results = tuple(
            _term_result(loss, term, channels, images) for (_, loss), term in zip(terms, message.terms, strict=True)
        )
        for name, counts in (("intersection", message.intersection), ("union", message.union)):
            if len(counts) != channels:
                raise spec.InvalidInput(f"response.{name}", f"got {len(counts)} counts; expected {channels}")
        grad = request.logits if request.want_grad else None
        if message.HasField("grad") is not request.want_grad or (grad is not None and not grad.is_in(message.grad)):
            sent = _tensor_from_proto("response.grad", message.grad, FLOATS) if message.HasField("grad") else None
            raise spec.InvalidInput(
                "response.grad", f"got {sent}; expected type and shape of the logits if it was wanted, else None"
            )
        if grad is not None and math.frexp(message.grad_scale)[0] != 0.5:
            raise spec.InvalidInput("response.grad_scale", f"got {message.grad_scale}; expected a power of two")
        timing = message.timing
        return cls(
            loss=message.loss,
            terms=results,
            intersection=_array(message.intersection, np.int64),
            union=_array(message.union, np.int64),
            grad=grad,
            grad_scale=message.grad_scale,
            timing=spec.Timing(
                timing.receive_seconds,
                timing.queue_seconds,
                timing.compute_seconds,
                timing.batch_requests,
                timing.joint_wait_seconds,
                timing.copy_seconds,
                transport,
            ),
            ranks=message.ranks,
            warning=message.warning,
        )
