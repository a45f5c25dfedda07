"""Memory for payloads: used again, in bounds, with every tensor at its place; and copied on while it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lovasz import wire
from lovasz.server.memory.pool import StagingPool, _size_class
from lovasz.server.memory.staging import Staging
from lovasz.server.memory.upload import Upload
from lovasz.spec import CrossEntropy, InvalidInput, LovaszSoftmax, weighted_sum

CPU = torch.device("cpu")
SOFTMAX = weighted_sum(LovaszSoftmax())
LARGE = 1 << 20

untimed = settings(deadline=None)


@pytest.fixture
def pool() -> StagingPool:
    return StagingPool(CPU)


# --- Buffers ------------------------------------------------------------------------------------------------------


@untimed
@given(st.integers(0, 1 << 21))
def test_a_buffer_is_large_enough_and_at_most_an_eighth_larger(nbytes: int) -> None:
    buffer = StagingPool(CPU).take(nbytes)
    assert (buffer.dtype, buffer.dim()) == (torch.uint8, 1)
    assert nbytes <= buffer.nbytes <= max(nbytes + 64, nbytes * 9 / 8)
    assert buffer.nbytes % 64 == 0


@untimed
@given(st.integers(1, 1 << 46))
def test_sizes_of_buffers_are_few_and_grow(nbytes: int) -> None:
    size = _size_class(nbytes)
    assert size % 64 == 0
    assert nbytes <= size <= max(nbytes + 63, nbytes * 9 // 8)
    assert _size_class(size) == size
    assert _size_class(nbytes + 1) >= size


def test_memory_comes_back_for_requests_of_similar_size(pool: StagingPool) -> None:
    buffer = pool.take(LARGE)
    place = buffer.data_ptr()
    pool.give(buffer)
    assert pool.idle_bytes == buffer.nbytes
    del buffer
    again = pool.take(LARGE - 1)
    assert again.data_ptr() == place
    assert pool.idle_bytes == 0


def test_memory_is_not_used_for_another_size_nor_twice(pool: StagingPool) -> None:
    buffer = pool.take(LARGE)
    pool.give(buffer)
    assert pool.take(LARGE // 2).data_ptr() != buffer.data_ptr()
    assert pool.take(LARGE).data_ptr() == buffer.data_ptr()
    assert pool.take(LARGE).data_ptr() != buffer.data_ptr()


def test_small_buffers_are_not_kept(pool: StagingPool) -> None:
    pool.give(pool.take(1000))
    assert pool.idle_bytes == 0


def test_what_is_too_large_is_not_kept(pool: StagingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.memory.pool.KEPT_BYTES", LARGE)
    kept = pool.take(LARGE)
    pool.give(kept)
    pool.give(pool.take(LARGE + 1))
    assert pool.idle_bytes == LARGE
    assert pool.take(LARGE).data_ptr() == kept.data_ptr()


def test_of_too_much_what_is_idle_longest_goes(pool: StagingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.memory.pool.KEPT_BYTES", 2 * LARGE)
    first, second, third = (pool.take(LARGE) for _ in range(3))
    for buffer in (first, second, third):
        pool.give(buffer)
    assert pool.idle_bytes == 2 * LARGE
    again = {pool.take(LARGE).data_ptr() for _ in range(2)}
    assert again == {second.data_ptr(), third.data_ptr()}


def test_what_is_idle_for_long_is_given_back(pool: StagingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.give(pool.take(LARGE))
    pool.trim()
    assert pool.idle_bytes == LARGE
    monkeypatch.setattr("lovasz.server.memory.pool.KEPT_SECONDS", 0.01)
    time.sleep(0.02)
    pool.trim()
    assert pool.idle_bytes == 0


# --- The tensors of a request -------------------------------------------------------------------------------------

FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("uint8", "int16", "int64")


def header(
    logits: str = "float32", labels: str = "uint8", shape: tuple[int, ...] = (2, 3, 5, 7), *, want_grad: bool = True
) -> wire.Request:
    return wire.Request.checked(
        weighted_sum(CrossEntropy()),
        wire.TensorSpec(wire.dtype_named(logits), shape),
        wire.TensorSpec(wire.dtype_named(labels), (shape[0], *shape[2:])),
        want_grad,
    )


def tensors(of: wire.Request) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(of.logits.shape).to(getattr(torch, of.logits.dtype.name))
    return logits, torch.randint(0, 3, of.labels.shape).to(getattr(torch, of.labels.dtype.name))


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def cut(payload: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    return [payload[start:stop] for start, stop in pairwise(edges)]


@pytest.mark.parametrize("labels_dtype", INTEGERS)
@pytest.mark.parametrize("logits_dtype", FLOATS)
@pytest.mark.parametrize("want_grad", [True, False])
def test_tensors_are_found_as_they_were_sent(
    pool: StagingPool, logits_dtype: str, labels_dtype: str, want_grad: bool
) -> None:
    sent = header(logits_dtype, labels_dtype, want_grad=want_grad)
    logits, labels = tensors(sent)
    held = Staging(sent, pool)
    held.receive(cut(as_bytes(logits) + as_bytes(labels), [1, 1, 50, 1000]))
    request = held.request()
    for found, expected in ((request.logits, logits), (request.labels, labels)):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.is_contiguous()
        assert found.data_ptr() % 8 == 0
        assert torch.equal(found, expected)
    assert request.layout == sent.layout
    assert held.upload is None
    held.release()


@pytest.mark.parametrize("logits_dtype", FLOATS)
def test_room_for_a_gradient_is_beside_the_tensors(pool: StagingPool, logits_dtype: str) -> None:
    sent = header(logits_dtype)
    logits, labels = tensors(sent)
    held = Staging(sent, pool)
    held.receive([as_bytes(logits), as_bytes(labels)])
    assert held.grad is not None
    assert (held.grad.dtype, held.grad.shape) == (logits.dtype, logits.shape)
    assert held.grad.is_contiguous()
    held.grad.fill_(1)
    request = held.request()
    assert torch.equal(request.logits, logits)
    assert torch.equal(request.labels, labels)


def test_the_core_writes_a_gradient_of_32_bits_to_its_place(pool: StagingPool) -> None:
    held = Staging(header("float32"), pool)
    grad = held.request().grad
    assert grad is not None
    assert held.grad is not None
    grad.fill_(3)
    assert torch.equal(held.grad, torch.full_like(grad, 3))


@pytest.mark.parametrize("logits_dtype", ["float16", "bfloat16"])
def test_the_core_makes_its_own_gradient_where_16_bits_are_sent(pool: StagingPool, logits_dtype: str) -> None:
    held = Staging(header(logits_dtype), pool)
    assert held.request().grad is None


def test_no_gradient_no_room_for_one(pool: StagingPool) -> None:
    large = (1, 2, 100, 1000)
    held, with_room = Staging(header(shape=large, want_grad=False), pool), Staging(header(shape=large), pool)
    assert held.grad is None
    assert held.request().grad is None
    held.release()
    without = pool.idle_bytes
    with_room.release()
    assert without < 1.2 * 900_000
    assert pool.idle_bytes - without >= 1_700_000


def test_what_is_released_serves_the_next_request(pool: StagingPool) -> None:
    sent = header(shape=(1, 2, 100, 1000))
    first = Staging(sent, pool)
    place = first.request().logits.data_ptr()
    first.release()
    second = Staging(sent, pool)
    assert second.request().logits.data_ptr() == place
    logits, labels = tensors(sent)
    second.receive([as_bytes(logits) + as_bytes(labels)])
    assert torch.equal(second.request().logits, logits)
    assert torch.equal(second.request().labels, labels)


@pytest.mark.parametrize("missing", [1, 70, 910])
def test_a_payload_that_is_too_short_is_refused(pool: StagingPool, missing: int) -> None:
    sent = header()
    payload = bytes(sent.payload_bytes - missing)
    with pytest.raises(InvalidInput, match=rf"payload: got {len(payload)} bytes; expected 910 as declared"):
        Staging(sent, pool).receive(cut(payload, [100, 500]))


def test_a_payload_that_is_too_long_is_refused_and_leaves_the_gradient_alone(pool: StagingPool) -> None:
    sent = header()
    held = Staging(sent, pool)
    assert held.grad is not None
    held.grad.fill_(7)
    with pytest.raises(InvalidInput, match=r"payload: got at least 911 bytes; expected 910 as declared"):
        held.receive([bytes(sent.payload_bytes), b"\xff"])
    assert torch.equal(held.grad, torch.full_like(held.grad, 7))


# --- Copies to a device -------------------------------------------------------------------------------------------


def sources(*sizes: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.arange(1, size + 1).astype(np.uint8)) for size in sizes)


def upload_of(*sizes: int) -> tuple[tuple[torch.Tensor, ...], Upload]:
    given = sources(*sizes)
    upload = Upload(given, CPU)
    for target in upload.targets:
        target.zero_()
    return given, upload


def test_small_pieces_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.memory.upload.UPLOAD_BYTES", 10)
    given, upload = upload_of(15, 20)
    logits, labels = upload.targets
    upload.advance(9)
    assert not logits.any()
    upload.advance(10)
    assert torch.equal(logits[:10], given[0][:10])
    assert not logits[10:].any()
    upload.advance(19)
    assert not logits[10:].any()
    upload.advance(20)
    assert torch.equal(logits, given[0])
    assert torch.equal(labels[:5], given[1][:5])
    assert not labels[5:].any()
    upload.finish()
    assert torch.equal(labels, given[1])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 80), max_size=10), st.integers(1, 20))
def test_targets_are_their_sources_however_these_come(
    logits_bytes: int, labels_bytes: int, received: list[int], upload_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lovasz.server.memory.upload.UPLOAD_BYTES", upload_bytes)
        given, upload = upload_of(logits_bytes, labels_bytes)
        for count in sorted(min(count, logits_bytes + labels_bytes) for count in received):
            upload.advance(count)
            copied = torch.cat(upload.targets)
            due = max(0, count - upload_bytes + 1)
            assert torch.equal(copied[:due], torch.cat(given)[:due])
            assert not copied[count:].any()
        upload.finish()
        for target, source in zip(upload.targets, given, strict=True):
            assert torch.equal(target, source)
        upload.hand_over(None)


def test_a_request_is_computed_where_it_was_copied_to(pool: StagingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.memory.upload.UPLOAD_BYTES", 64)
    sent = header("float16", "int16")
    logits, labels = tensors(sent)
    held = Staging(sent, pool)
    host = held.request().logits
    held.upload = Upload((torch.from_numpy(held._logits), torch.from_numpy(held._labels)), CPU)
    held.receive(cut(as_bytes(logits) + as_bytes(labels), [3, 60, 100, 300]))
    request = held.request()
    assert request.logits.data_ptr() != host.data_ptr()
    assert torch.equal(request.logits, logits)
    assert torch.equal(request.labels, labels)


@pytest.mark.gpu
def test_a_payload_is_on_the_gpu_when_it_has_come(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.memory.upload.UPLOAD_BYTES", 1000)
    sent = header("bfloat16", "int64", (2, 3, 50, 70))
    logits, labels = tensors(sent)
    held = Staging(sent, StagingPool(cuda))
    assert held.upload is not None
    held.receive(cut(as_bytes(logits) + as_bytes(labels), [10, 999, 5000, 60_000]))
    stream = torch.cuda.current_stream(cuda)
    held.upload.hand_over(stream)
    request = held.request()
    assert (request.logits.device.type, request.labels.device.type) == ("cuda", "cuda")
    assert torch.equal(request.logits.cpu(), logits)
    assert torch.equal(request.labels.cpu(), labels)
