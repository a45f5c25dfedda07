"""A workload: which synthetic requests are sent, how, and by how many clients at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.access import Access
from lovasz.client.client import LossClient
from lovasz.client.options import ClientOptions, Transport

_FLOAT32 = wire.dtype_named("float32")
_SEED = 2018
_SHARE_RIGHT = 0.8
"""The share of pixels where the imagined network is right."""
_CONFIDENCE = 3.0
"""How far the right class's logit is raised there; the noise has standard deviation 1."""


def loss_for(kind: str, shape: tuple[int, ...]) -> spec.Loss:
    """The loss of this kind with default options; a binary loss is multilabel if the shape has several channels.

    Raises:
        InvalidInput: there is no such kind.
    """
    softmax: dict[str, spec.Loss] = {"lovasz_softmax": spec.LovaszSoftmax(), "cross_entropy": spec.CrossEntropy()}
    if kind in softmax:
        return softmax[kind]
    multilabel = len(shape) > 1 and shape[1] > 1
    if kind == "lovasz_hinge":
        return spec.LovaszHinge(multilabel=multilabel)
    if kind == "lovasz_sigmoid":
        return spec.LovaszSigmoid(multilabel=multilabel)
    if kind == "binary_cross_entropy":
        return spec.BinaryCrossEntropy(multilabel=multilabel)
    raise spec.InvalidInput("loss", f"got {kind!r}; expected one of {', '.join(spec.LOSS_KINDS)}")


@dataclass(frozen=True)
class Workload:
    """What is sent, how, and by how many clients at a time.

    Attributes:
        shape: the shape of the logits, (N, C, *spatial).
        loss: the loss that is requested.
        dtype: the dtype in which the logits travel.
        transport: how tensors travel.
        concurrency: the number of threads, each with its own client.
        want_grad: whether the gradient is requested, too.
        label_values: how many values a label can take.

    Raises:
        InvalidInput: the shape does not fit the loss.
    """

    shape: tuple[int, ...]
    loss: spec.Loss
    dtype: wire.DType = _FLOAT32
    transport: Transport = Transport.AUTO
    concurrency: int = 1
    want_grad: bool = True
    label_values: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        layout = spec.weighted_sum(self.loss).layout(self.shape, self.label_shape)
        object.__setattr__(self, "label_values", layout.label_values)

    @property
    def label_shape(self) -> tuple[int, ...]:
        multilabel = isinstance(self.loss, spec.BinaryLoss) and self.loss.multilabel
        return self.shape if multilabel else (*self.shape[:1], *self.shape[2:])

    @property
    def label_dtype(self) -> wire.DType:
        """The smallest that holds all labels: uint8 for up to 256 classes."""
        fitting = (d for d in wire.DTYPES if not d.is_float and np.iinfo(d.name).max >= self.label_values - 1)
        return next(fitting)

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes of one request in both directions: logits, labels and gradient."""
        logits = math.prod(self.shape) * self.dtype.itemsize
        labels = math.prod(self.label_shape) * self.label_dtype.itemsize
        return logits * (2 if self.want_grad else 1) + labels

    def tensors(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
        """Logits like those of a half-trained network, and labels.

        Logits are noise, plus 3 for the right class at 80 % of the pixels. They depend on shape and loss only.
        """
        random = np.random.default_rng(_SEED)
        logits = random.standard_normal(self.shape, np.float32)
        labels = random.integers(self.label_values, size=self.label_shape).astype(self.label_dtype.numpy)
        right = random.random(self.label_shape, np.float32) < _SHARE_RIGHT
        lead = np.where(right, np.float32(_CONFIDENCE), np.float32(0))
        if isinstance(self.loss, spec.BinaryLoss):
            logits += np.where(labels == 1, lead, -lead).reshape(self.shape)
        else:
            index = labels[:, None].astype(np.intp)
            led = np.take_along_axis(logits, index, axis=1) + lead[:, None]
            np.put_along_axis(logits, index, led, axis=1)
        return logits, labels

    def client(self, target: str, timeout_seconds: float, access: Access) -> LossClient:
        """A client that sends in this way.

        Raises:
            ValueError: the target or the timeout is invalid, or does not fit TLS and token.
        """
        wire_dtype = None if self.dtype == _FLOAT32 else self.dtype  # The logits are float32 already.
        return LossClient.with_options(
            target, ClientOptions(timeout_seconds, self.transport, wire_dtype, access=access)
        )
