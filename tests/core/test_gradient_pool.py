"""The memory of gradients is used again once its caller has let go of it, and not before."""

from __future__ import annotations

import pytest
import torch

from lovasz.core import LovaszSoftmax, compute

scratch = pytest.importorskip("lovasz.core.backends.numba.scratch")

FLOATS = scratch.REUSED_BYTES // 4


def test_memory_comes_back_when_the_last_user_has_gone():
    pool = scratch.GradientPool()
    tensor = pool.tensor((2, FLOATS))
    address = tensor.data_ptr()
    row = tensor[1]
    array = row.numpy()
    del tensor, row
    assert pool.tensor((2, FLOATS)).data_ptr() != address  # The array is still there.
    other = pool.tensor((2, FLOATS))
    del array
    assert pool.tensor((FLOATS + 1,)).data_ptr() == address
    assert other.data_ptr() != address


def test_only_memory_of_about_the_size_is_used_and_one_piece_is_kept():
    pool = scratch.GradientPool()
    tensors = [pool.tensor((4 * FLOATS,)) for _ in range(3)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    del tensors[:]
    assert len(pool._idle) == 1
    assert pool.tensor((FLOATS,)).data_ptr() not in addresses


def test_gradients_that_are_kept_stay_as_they_are():
    labels = torch.randint(0, 4, (1, 512, 1024), generator=torch.Generator().manual_seed(0))
    logits = [torch.randn(1, 4, 512, 1024, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    results = [compute(some, labels, LovaszSoftmax()) for some in logits]
    kept = results[0].grad.clone()
    compute(logits[1], labels, LovaszSoftmax())
    assert torch.equal(results[0].grad, kept)
    del results[1]
    assert torch.equal(compute(logits[0], labels, LovaszSoftmax()).grad, kept)
