"""How functions are compiled; operations that Numba lacks: fused multiply-add, atomics, floats as bits, pointers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lovasz.core import word
from lovasz.core.backends.numba.disk_cache import DiskCache

F = TypeVar("F", bound=Callable[..., Any])


def _digest() -> str:
    """A digest of all source files that compiled functions are made of."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), Path(word.__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


_DIGEST = _digest()


def compiled(function: F) -> F:
    """Compiles a function when it is first called, to run without the GIL. Caches it on disk, if the disk is writable.

    Numba considers cached code stale only if the function's own file has changed, so it would run old code that was
    inlined from another file. Here a change of any source file makes it stale. The digest is also added to Numba's
    version in the cache: Numba unpickles the cache's index, which names classes that may have moved, only if the
    version matches.
    """
    try:
        dispatcher = numba.njit(function, nogil=True, cache=True, error_model="numpy")
        cache_file = dispatcher._cache._cache_file
        if not (hasattr(cache_file, "_source_stamp") and hasattr(cache_file, "_version")):
            raise RuntimeError("this Numba keeps its stamp elsewhere")
        cache_file._source_stamp, cache_file._version = _DIGEST, (cache_file._version, _DIGEST)
        dispatcher._cache = DiskCache(dispatcher._cache, dispatcher._cache._impl.filename_base)
    except (AttributeError, RuntimeError):  # RuntimeError: also if no folder is writable.
        dispatcher = numba.njit(function, nogil=True, error_model="numpy")
    return cast(F, dispatcher)


def inlined(function: F) -> F:
    """Marks a function that Numba inlines into compiled functions."""
    return cast(F, numba.njit(function, inline="always", error_model="numpy"))


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a x b + c in float32, rounded once: the same bits in vector and in scalar code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def bits_float(typing: Any, bits: Any) -> Any:
    """The float32 that has these bits (int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


MASK_BITS = 64
"""The floats that ``bits_between`` takes."""


@intrinsic
def _mask_between(typing: Any, floats: Any, first: Any, floor: Any, ceiling: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        vector = ir.VectorType(ir.IntType(32), MASK_BITS)
        values = builder.load(builder.bitcast(builder.gep(base, [arguments[1]]), vector.as_pointer()), align=4)

        def all_lanes(number: Any) -> Any:
            first_lane = builder.insert_element(
                ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0)
            )
            return builder.shuffle_vector(first_lane, first_lane, ir.Constant(vector, None))

        is_above = builder.icmp_signed(">", values, all_lanes(arguments[2]))
        is_below = builder.icmp_signed("<=", values, all_lanes(arguments[3]))
        return builder.bitcast(builder.and_(is_above, is_below), ir.IntType(MASK_BITS))

    return types.uint64(types.Array(types.float32, 1, "C"), types.int64, types.int32, types.int32), generate


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set in a mask, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def bits_set(typing: Any, mask: Any) -> Any:
    """How many bits of a mask are set, as a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


LISTED = 8
"""The bits of a mask of ``list_places``."""


@intrinsic
def list_places(typing: Any, places: Any, at: Any, mask: Any, first: Any) -> Any:
    """Writes ``first`` + i for each bit i that is set in a mask (uint64, ``LISTED`` bits) to ``places[at:]`` (uint16).

    It has no branch to mispredict: it writes ``LISTED`` elements in any case, those behind the places being undefined.
    """
    vector = ir.VectorType(ir.IntType(16), LISTED)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, place, which, offset = arguments
        rows = cgutils.global_constant(builder.module, "places_of_masks", _places_of_masks(vector))
        row = builder.load(builder.gep(rows, [ir.Constant(ir.IntType(64), 0), which]))
        lanes = builder.insert_element(ir.Constant(vector, ir.Undefined), offset, ir.Constant(ir.IntType(32), 0))
        lanes = builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(ir.IntType(32), LISTED), None))
        base = context.make_array(signature.args[0])(context, builder, out).data
        target = builder.bitcast(builder.gep(base, [place]), vector.as_pointer())
        builder.store(builder.add(row, lanes), target, align=2)
        return context.get_dummy_value()

    return types.void(types.Array(types.uint16, 1, "C"), types.uint64, types.uint64, types.uint16), generate


def _places_of_masks(vector: ir.VectorType) -> ir.Constant:
    """The places of the bits that are set in each mask, and zeros: an array of vectors."""
    places = [[i for i in range(LISTED) if mask >> i & 1] for mask in range(1 << LISTED)]
    rows = [ir.Constant(vector, own + [0] * (LISTED - len(own))) for own in places]
    return ir.Constant(ir.ArrayType(vector, len(rows)), rows)


@inlined
def bits_between(floats: npt.NDArray[np.float32], first: int, floor: np.int32, ceiling: np.int32) -> np.uint64:
    """A mask (uint64): bit i tells whether the bits of ``floats[first + i]``, as an int32, are in (floor, ceiling].

    At the end of the array there may be fewer than ``MASK_BITS`` floats.
    """
    if first + MASK_BITS <= len(floats):
        return _mask_between(floats, first, floor, ceiling)
    mask = np.uint64(0)
    for i in range(first, len(floats)):
        if floor < float_bits(floats[i]) <= ceiling:
            mask |= np.uint64(1) << np.uint64(i - first)
    return mask


@intrinsic
def bits_double(typing: Any, bits: Any) -> Any:
    """The float64 that has these bits (int64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def double_bits(typing: Any, value: Any) -> Any:
    """The bits of a float64 as an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address (uint64) as a pointer for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Asks for the cache line at an address (voidptr)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], _PREFETCH_TYPE)
        for_writing, most_local, data = (ir.Constant(ir.IntType(32), number) for number in (0, 3, 1))
        builder.call(prefetch, [arguments[0], for_writing, most_local, data])
        return context.get_dummy_value()

    return types.void(types.voidptr), generate


_PREFETCH_TYPE = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[ir.IntType(32)] * 3])
_CACHE_LINE_BYTES = 64


@inlined
def prefetch(floats: npt.NDArray[np.float32]) -> None:
    """Asks for an array that is needed soon; it is contiguous."""
    address = np.uint64(floats.ctypes.data)
    for offset in range(0, 4 * len(floats), _CACHE_LINE_BYTES):
        _prefetch(pointer(address + np.uint64(offset)))


LANES = 8
"""The rows and columns of what ``transpose`` takes."""


@intrinsic
def transpose(typing: Any, source: Any, place: Any, pitch: Any, out: Any, out_place: Any, out_pitch: Any) -> Any:
    """Copies a square of LANES x LANES float32 so that its rows become columns.

    Row i of the square begins at ``source[place + i * pitch]``, of the result at ``out[out_place + i * out_pitch]``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bases = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3)]
        vector = ir.VectorType(ir.FloatType(), LANES)

        def row(base: Any, first: Any, pitch: Any, i: int) -> Any:
            offset = builder.mul(pitch, ir.Constant(ir.IntType(64), i))
            return builder.bitcast(builder.gep(base, [builder.add(first, offset)]), vector.as_pointer())

        rows = [builder.load(row(bases[0], *arguments[1:3], i), align=4) for i in range(LANES)]
        step = LANES // 2
        while step:  # Swaps the two off-diagonal squares of each square of 2 x step rows.
            upper, lower = _swapped(step)
            for i in (i for i in range(LANES) if not i & step):
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = builder.shuffle_vector(*pair, upper), builder.shuffle_vector(*pair, lower)
            step //= 2
        for i, values in enumerate(rows):
            builder.store(values, row(bases[1], *arguments[4:], i), align=4)
        return context.get_dummy_value()

    array, integer = types.Array(types.float32, 1, "C"), types.int64
    return types.void(array, integer, integer, array, integer, integer), generate


def _swapped(step: int) -> tuple[ir.Constant, ir.Constant]:
    """The lanes of two rows, with those of the second counted from LANES on, that ``transpose`` makes two rows of."""
    upper = [lane + LANES - step if lane & step else lane for lane in range(LANES)]
    lower = [lane + LANES if lane & step else lane + step for lane in range(LANES)]
    return tuple(ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes) for lanes in (upper, lower))


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(typing: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            place = builder.gep(base, [arguments[1]])
            return builder.atomic_rmw(operation, place, arguments[2], "monotonic")

        return types.int64(types.Array(types.int64, 1, "C"), types.int64, types.int64), generate

    return atomic


atomic_add = _atomic("add")
"""atomic_add(array, i, value) adds value to array[i] (int64, one axis) atomically and returns its previous value."""
atomic_max = _atomic("max")
"""atomic_max(array, i, value) raises array[i] (int64, one axis) to at least value and returns its previous value."""
