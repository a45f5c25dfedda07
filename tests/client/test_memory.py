"""Memory that is used again: not before the last view is gone, not too much of it, and not for what is far smaller."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.footprint import descriptors_of

from lovasz.client.memory import KEPT, SMALL_BYTES, Memory, MemoryPool
from lovasz.client.regions import Region

FLOAT32 = np.dtype(np.float32)
SIDE = 200
"""Of arrays of 40,000 bytes."""


class Piece(Memory):
    """Knows whether it has been let go."""

    closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        super().close()


@pytest.fixture
def pool() -> MemoryPool[Piece]:
    return MemoryPool(Piece)


def address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def address_of(memory: Memory) -> int:
    return address(memory.array(0, (1,), np.dtype(np.uint8)))


def as_bytes(view: Any) -> bytes:
    return bytes(np.asarray(view).tobytes())


# --- Pieces -------------------------------------------------------------------------------------------------------


def test_an_array_is_a_part_of_its_memory() -> None:
    memory = Memory(4096)
    assert memory.nbytes == 4096
    array = memory.array(64, (2, 3), FLOAT32)
    assert (array.shape, array.dtype) == ((2, 3), FLOAT32)
    array[:] = 1
    assert bytes(memory.map[64:88]) == np.ones(6, np.float32).tobytes()
    assert not any(memory.map[:64])
    assert not any(memory.map[88:])


def test_a_piece_that_was_given_back_is_taken_again(pool: MemoryPool[Piece]) -> None:
    piece = pool.take(40_000)
    assert pool.take(40_000) is not piece
    pool.give(piece)
    assert pool.take(40_000) is piece
    assert pool.take(40_000) is not piece


@pytest.mark.parametrize(("nbytes", "again"), [(40_001, False), (40_000, True), (20_000, True), (19_999, False)])
def test_a_piece_serves_what_is_not_far_smaller(pool: MemoryPool[Piece], nbytes: int, again: bool) -> None:
    piece = pool.take(40_000)
    pool.give(piece)
    assert (pool.take(nbytes) is piece) == again


def test_the_smallest_piece_that_is_large_enough_is_taken(pool: MemoryPool[Piece]) -> None:
    pieces = {nbytes: Piece(nbytes) for nbytes in (50_000, 30_000, 40_000)}
    for piece in pieces.values():
        pool.give(piece)
    assert pool.take(35_000) is pieces[40_000]
    assert pool.take(35_000) is pieces[50_000]


@pytest.mark.parametrize("idle", range(2 * KEPT + 1))
@pytest.mark.parametrize("nbytes", [40_000, 1_000_000], ids=["one fits", "none fits"])
def test_few_idle_pieces_are_kept_and_the_others_let_go(pool: MemoryPool[Piece], idle: int, nbytes: int) -> None:
    pieces = [Piece(40_000) for _ in range(idle)]
    for piece in pieces:
        pool.give(piece)
    taken = pool.take(nbytes)
    left = [piece for piece in pieces if piece is not taken]
    assert not taken.closed
    assert sum(piece.closed for piece in left) == max(0, len(left) - KEPT)
    again = [pool.take(40_000) for _ in range(KEPT)]
    assert not any(piece.closed for piece in again)
    assert sum(piece in pieces for piece in again) == min(KEPT, len(left))


def test_of_too_many_pieces_the_largest_are_kept(pool: MemoryPool[Piece]) -> None:
    pieces = [Piece(40_000 + n) for n in range(KEPT + 2)]
    for piece in reversed(pieces):
        pool.give(piece)
    pool.take(1_000_000)
    assert [piece.closed for piece in pieces] == [True] * 2 + [False] * KEPT


def test_a_pool_that_is_closed_lets_go_of_what_is_idle(pool: MemoryPool[Piece]) -> None:
    idle, in_use = pool.take(40_000), pool.take(40_000)
    pool.give(idle)
    pool.close()
    assert idle.closed
    assert not in_use.closed
    assert pool.take(40_000) is not idle


# --- Arrays -------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[npt.NDArray[Any]], Any]] = {
    "itself": lambda array: array,
    "reshaped": lambda array: array.reshape(-1),
    "slice": lambda array: array[5:7, ::2],
    "slice of a slice": lambda array: array[5:][1:2].T,
    "one row": lambda array: array[-1],
    "of another type": lambda array: array.view(np.uint8),
    "memoryview": memoryview,
    "torch": torch.from_numpy,
    "a part in torch": lambda array: torch.from_numpy(array)[3:, :2].t(),
    "detached in torch": lambda array: torch.from_numpy(array).view(-1).detach(),
}


@pytest.mark.parametrize("see", VIEWS.values(), ids=VIEWS.keys())
def test_memory_comes_back_when_the_last_view_is_gone(
    pool: MemoryPool[Piece], see: Callable[[npt.NDArray[Any]], Any]
) -> None:
    array = pool.new((SIDE, SIDE), FLOAT32)
    place = address(array)
    array[:] = 1
    view = see(array)
    del array
    gc.collect()
    other = pool.new((SIDE, SIDE), FLOAT32)
    other[:] = 2
    assert address(other) != place
    assert as_bytes(view)[:4] == np.ones(1, np.float32).tobytes()
    del view
    gc.collect()
    assert address(pool.new((SIDE, SIDE), FLOAT32)) == place


def test_a_small_array_needs_no_block(pool: MemoryPool[Piece]) -> None:
    array = pool.new((SMALL_BYTES // 4,), FLOAT32)
    del array
    assert not pool._idle
    array = pool.new((SMALL_BYTES // 4 + 1,), FLOAT32)
    del array
    assert len(pool._idle) == 1


def test_an_array_is_writable_and_as_it_was_asked_for(pool: MemoryPool[Piece]) -> None:
    array = pool.new((2, 3, 5), np.dtype(np.float16))
    assert (array.shape, array.dtype) == ((2, 3, 5), np.float16)
    assert array.flags.writeable
    assert array.flags.c_contiguous


def test_what_is_lent_lies_where_it_was_asked_for(pool: MemoryPool[Piece]) -> None:
    piece = pool.take(40_000)
    piece.map[128:136] = np.array([3, 4], np.float32).tobytes()
    array = pool.lend(piece, 128, (2,), FLOAT32)
    assert array.tolist() == [3, 4]
    assert address(array) == address_of(piece) + 128
    assert pool.take(40_000) is not piece
    del array
    gc.collect()
    assert pool.take(40_000) is piece


def test_an_array_outlives_its_pool() -> None:
    pool: MemoryPool[Piece] = MemoryPool(Piece)
    array = pool.new((SIDE, SIDE), FLOAT32)
    array[:] = 7
    pool.close()
    del pool
    gc.collect()
    assert np.all(array == 7)


# --- Regions ------------------------------------------------------------------------------------------------------


def test_a_region_that_is_dropped_leaves_no_descriptor() -> None:
    before = descriptors_of("lovasz")
    region = Region(4096)
    assert descriptors_of("lovasz") > before
    del region
    gc.collect()
    assert descriptors_of("lovasz") == before


def test_a_region_that_is_closed_leaves_no_descriptor_and_its_arrays_their_memory() -> None:
    before = descriptors_of("lovasz")
    region = Region(4096)
    array = region.array(0, (4,), FLOAT32)
    array[:] = 5
    region.close()
    region.close()
    del region
    gc.collect()
    assert np.all(array == 5)
    del array
    gc.collect()
    assert descriptors_of("lovasz") == before


def test_regions_of_a_pool_are_closed_with_it() -> None:
    before = descriptors_of("lovasz")
    pool: MemoryPool[Region] = MemoryPool(Region)
    pool.give(pool.take(4096))
    array = pool.new((1024,), FLOAT32)
    pool.give(pool.take(40_000))
    pool.close()
    del array, pool
    gc.collect()
    assert descriptors_of("lovasz") == before


def test_a_closed_pool_keeps_nothing_that_comes_back_later() -> None:
    before = descriptors_of("lovasz")
    pool: MemoryPool[Region] = MemoryPool(Region)
    array, region = pool.new((SIDE, SIDE), FLOAT32), pool.take(40_000)
    pool.close()
    pool.give(region)
    del array, region
    gc.collect()
    assert descriptors_of("lovasz") == before
    assert pool.take(40_000).nbytes == 40_000


def test_regions_that_a_pool_keeps_can_still_be_shared() -> None:
    pool: MemoryPool[Region] = MemoryPool(Region)
    for region in [Region(40_000) for _ in range(KEPT - 1)]:
        pool.give(region)
    pool.take(4_000_000).close()
    for region in [pool.take(40_000) for _ in range(KEPT - 1)]:
        os.fstat(region.descriptor)
        region.close()


def test_a_pool_whose_blocks_need_not_be_closed_drops_them_when_they_are_given_back() -> None:
    pool: MemoryPool[Memory] = MemoryPool(Memory, most_idle=KEPT)
    arrays = [pool.new((SIDE, SIDE), FLOAT32) for _ in range(KEPT + 3)]
    del arrays
    gc.collect()
    assert len(pool._idle) == KEPT
