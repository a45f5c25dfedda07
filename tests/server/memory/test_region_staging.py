"""Tensors in memory that a caller shares: used where they are, but for the labels."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from lovasz import wire
from lovasz.core import compute
from lovasz.core.dispatch import submit
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.region_staging import RegionStaging
from lovasz.spec import LovaszSoftmax, Result, weighted_sum

CPU = torch.device("cpu")
LOSS = weighted_sum(LovaszSoftmax())
SHAPE = (2, 3, 20, 30)


class Region:
    """Memory in which a caller has put a request."""

    def __init__(self, dtype: str, *, want_grad: bool = True) -> None:
        specs = (
            wire.TensorSpec(wire.dtype_named(dtype), SHAPE),
            wire.TensorSpec(wire.dtype_named("uint8"), (2, 20, 30)),
        )
        self.header = wire.Request.checked(LOSS, *specs, want_grad)
        self.logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
        self.labels = torch.randint(0, 3, (2, 20, 30), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        place = self.header.places
        self.memory = np.frombuffer(mmap.mmap(-1, place.nbytes), np.uint8)
        sizes = (self.header.logits.nbytes, self.header.labels.nbytes, self.header.grad_bytes)
        self.parts = [self.memory[first : first + size] for first, size in zip(place[:3], sizes, strict=True)]
        self.parts[0][:] = self.logits.view(-1).view(torch.uint8).numpy()
        self.parts[1][:] = self.labels.view(-1).numpy()

    def received(self) -> RegionStaging:
        staging = RegionStaging(self.header, StagingPool(CPU))
        staging.receive([part.data for part in self.parts])
        return staging


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_and_gradient_stay_where_they_are_and_labels_do_not(dtype: str) -> None:
    region = Region(dtype)
    staging = region.received()
    request = staging.request()
    logits, labels, grad = (part.__array_interface__["data"][0] for part in region.parts)
    assert request.logits.data_ptr() == logits
    assert request.labels.data_ptr() != labels
    assert staging.grad is not None
    assert staging.grad.data_ptr() == grad
    assert (request.logits.dtype, staging.grad.dtype) == (region.logits.dtype, region.logits.dtype)
    assert request.logits.shape == staging.grad.shape == SHAPE
    assert torch.equal(request.logits, region.logits)
    assert torch.equal(request.labels, region.labels)
    region.parts[1][:] = 255
    assert torch.equal(request.labels, region.labels), "a label that changes is not seen"


def test_the_gradient_is_written_to_its_place() -> None:
    region = Region("float32")
    (answer,) = submit([region.received().request()], LOSS, CPU).collect()
    elsewhere = compute(region.logits, region.labels, LOSS)
    assert elsewhere.grad is not None
    assert isinstance(answer, Result)
    assert answer.loss == elsewhere.loss
    assert region.parts[2].tobytes() == elsewhere.grad.numpy().tobytes()


def test_no_gradient_has_no_place() -> None:
    staging = Region("float32", want_grad=False).received()
    assert staging.grad is None
    assert staging.request().grad is None


def test_memory_that_is_dropped_lives_as_long_as_its_tensors() -> None:
    region = Region("float32")
    request = region.received().request()
    expected = region.logits
    del region
    assert torch.equal(request.logits, expected)
