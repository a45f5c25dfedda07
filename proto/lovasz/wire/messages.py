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
from lovasz.wire.block import Places, SharedTensors
from lovasz.wire.dtypes import FLOATS, INTEGERS, DType, dtype_named, dtype_numbered
from lovasz.wire.enums import enum_text
from lovasz.wire.joint import MAX_RUN_CHARACTERS, Joint
from lovasz.wire.losses import check_lengths, loss_from_proto, loss_to_proto
from lovasz.wire.unknown import check_known

MAX_HEADER_BYTES = 64 << 10
"""The longest header, beside what the options of its classes and its offsets take."""
_OPTION_BYTES = 11
"""A class of a term: its weight, and its number in a list of classes."""
_OFFSET_BYTES = 10
_KEPT_HEADER_BYTES = 4096
_KEPT_HEADERS = 64
"""What so many headers mean is kept; what longer ones mean is found out each time. Callers choose what is kept: at most
about 80 KB for each."""
IMAGE_SEGMENTS = 128
IMAGE_BYTES = 3072
"""What an image of several items costs the server beside its tensors: each becomes a request of its own in the core,
which takes about as long as so many segments."""
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
        tensor_bytes: what a server has to hold for it: all its tensors, and what images of several items take beside.
        max_answer_bytes: the most that the header of its answer has.
        segments: of all its Lovász terms; each image of several items (``Layout.offsets``) counts as
            ``IMAGE_SEGMENTS`` more.
        places: where its tensors are in one block of memory.
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
    places: Places = field(init=False, repr=False, compare=False)

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
        images = len(self.layout.offsets or ())
        sizes["tensor_bytes"] = sizes["payload_bytes"] + sizes["grad_bytes"] + images * IMAGE_BYTES
        sizes["segments"] = self.loss.segments(self.layout) + images * IMAGE_SEGMENTS
        sizes["max_answer_bytes"] = self._max_answer_bytes()
        places = Places.of(logits_bytes, labels_bytes, sizes["grad_bytes"])
        self.__dict__.update(sizes, places=places)

    def _max_answer_bytes(self) -> int:
        channels, images = self.layout.channels, min(self.layout.scored_images, spec.MAX_IMAGE_LOSSES)
        per_image = sum(isinstance(loss, spec.LovaszLoss) and loss.per_image for _, loss in self.loss.terms)
        losses = len(self.loss.terms) * (channels + 2) + per_image * images
        return _ANSWER_BYTES + losses * _LOSS_BYTES + 2 * channels * _COUNT_BYTES

    def to_proto(self) -> pb.RequestHeader:
        """Its header."""
        header = pb.RequestHeader()
        self.write(header, self.shared, self.joint)
        return header

    def write(self, header: pb.RequestHeader, shared: SharedTensors | None, joint: Joint | None) -> None:
        """Fills in an empty header, with these places in shared memory and in a joint step instead of its own."""
        # Copies in place: protobuf takes several times as long for a message that is given to a constructor.
        header.CopyFrom(self._common_header)
        if shared is not None:
            header.shared_tensors.CopyFrom(shared.to_proto())
        if joint is not None:
            header.joint.CopyFrom(joint.to_proto())

    @cached_property
    def _common_header(self) -> pb.RequestHeader:
        """The header without places; it is kept for the next call and must not be changed."""
        return pb.RequestHeader(
            loss=loss_to_proto(self.loss),
            logits=self.logits.to_proto(),
            labels=self.labels.to_proto(),
            want_grad=self.want_grad,
            run=self.run,
            offsets=self.layout.offsets or (),
        )

    @cached_property
    def _losses_of_terms(self) -> tuple[tuple[str, int, int], ...]:
        """For each term its kind, and how many losses of classes and of images its result has."""
        layout = self.layout
        images = layout.scored_images if layout.scored_images <= spec.MAX_IMAGE_LOSSES else 0
        return tuple(
            (loss.kind, layout.channels, images if loss.per_image else 0)
            if isinstance(loss, spec.LovaszLoss)
            else (loss.kind, 0, 0)
            for _, loss in self.loss.terms
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
            check_known("header", header)
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
    check_known("header", header)
    return Request.checked(
        loss_from_proto(header.loss),
        _tensor_from_proto("logits", header.logits, FLOATS),
        _tensor_from_proto("labels", header.labels, INTEGERS),
        header.want_grad,
        run=header.run,
        offsets=tuple(header.offsets) or None,
        may_be_empty=may_be_empty,
    )


@lru_cache(maxsize=_KEPT_HEADERS)
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
    check_known(name, message)
    dtype = dtype_numbered(message.data_type)
    if dtype is None:
        types = ", ".join(enum_text(pb.DataType, dtype_named(one).number) for one in expected)
        raise spec.InvalidInput(
            f"{name}.data_type", f"got {enum_text(pb.DataType, message.data_type)}; expected one of {types}"
        )
    if len(message.shape) > spec.MAX_AXES:
        raise spec.InvalidInput(name, f"got {len(message.shape)} axes; expected at most {spec.MAX_AXES}")
    return TensorSpec(dtype, tuple(message.shape))


def _term_result(message: pb.TermResult, expected: tuple[str, int, int]) -> spec.TermResult:
    """The result of one term; ``expected`` is an element of ``Request._losses_of_terms``."""
    kind, classes, images = expected
    per_class, per_image = message.per_class_loss, message.per_image_loss
    if len(per_class) != classes:
        raise spec.InvalidInput("response.per_class_loss", f"got {len(per_class)} for {kind}; expected {classes}")
    if len(per_image) != images:
        raise spec.InvalidInput("response.per_image_loss", f"got {len(per_image)} for {kind}; expected {images}")
    # np.asarray takes many times as long for a repeated field.
    return spec.TermResult(
        kind, message.loss, np.fromiter(per_class, np.float64, classes), np.fromiter(per_image, np.float64, images)
    )


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
        expected, channels = request._losses_of_terms, request.layout.channels
        if len(message.terms) != len(expected):
            raise spec.InvalidInput("response.terms", f"got {len(message.terms)}; expected {len(expected)}")
        terms = tuple(map(_term_result, message.terms, expected))
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
            terms=terms,
            intersection=np.fromiter(message.intersection, np.int64, channels),
            union=np.fromiter(message.union, np.int64, channels),
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
