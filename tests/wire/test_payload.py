"""The payload: bytes survive being cut into chunks, and a payload of another length is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lovasz import wire
from lovasz.spec import InvalidInput

untimed = settings(deadline=None)

buffers_of_bytes = st.lists(st.binary(max_size=50), max_size=5)


@untimed
@given(buffers_of_bytes, st.integers(1, 60))
def test_chunks_are_all_the_bytes_in_order_and_none_is_too_long(buffers: list[bytes], chunk_bytes: int) -> None:
    chunks = list(wire.chunks([memoryview(buffer) for buffer in buffers], chunk_bytes))
    assert b"".join(chunks) == b"".join(buffers)
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)


@untimed
@given(buffers_of_bytes, st.lists(st.integers(0, 250), max_size=8))
def test_a_payload_cut_anywhere_comes_together(buffers: list[bytes], cuts: list[int]) -> None:
    payload = b"".join(buffers)
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    places = [bytearray(len(buffer)) for buffer in buffers]
    assembly = wire.Assembly([memoryview(place) for place in places])
    assembly.add_all(payload[start:stop] for start, stop in pairwise(edges))
    assert [bytes(place) for place in places] == buffers
    assert assembly.received == assembly.expected == len(payload)


@untimed
@given(st.binary(min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 7))
def test_a_payload_that_is_too_short_is_refused(payload: bytes, length: int, chunk_bytes: int) -> None:
    short = payload[: min(length, len(payload) - 1)]
    assembly = wire.Assembly([memoryview(bytearray(len(payload)))])
    with pytest.raises(InvalidInput, match=f"payload: got {len(short)} bytes; expected {len(payload)} as declared"):
        assembly.add_all(wire.chunks([memoryview(short)], chunk_bytes))


@untimed
@given(st.binary(max_size=20), st.binary(min_size=1, max_size=20), st.integers(1, 7))
def test_a_payload_that_is_too_long_is_refused_and_nothing_written_beyond(
    payload: bytes, more: bytes, chunk_bytes: int
) -> None:
    memory = bytearray(b"\xaa" * 100)
    assembly = wire.Assembly([memoryview(memory)[: len(payload)]])
    with pytest.raises(InvalidInput, match=rf"payload: got at least \d+ bytes; expected {len(payload)} as declared"):
        assembly.add_all(wire.chunks([memoryview(payload + more)], chunk_bytes))
    assert memory[len(payload) :] == b"\xaa" * (100 - len(payload))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_bytes_of_an_array_are_its_own_memory(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    data = wire.as_bytes(array)
    assert (data.format, data.nbytes) == ("B", array.nbytes)
    data[3] = 0x3F
    assert array.reshape(-1)[0] == 0.5
