"""Tables on a GPU: the bin of an error, the scan that turns counts into shares of the gradient, and looking these up.

``bins`` describes the bins. A table has two words a bin, background and foreground: count x 2^REST_SUM_BITS + sum of
rests, where the rest of an error is how far it lies below its bin's upper end. The scan overwrites each word with an
*entry*, two float32 in its place: for a pixel whose error has this rest, the gradient g of the Lovász extension, times
the segment's weight, is

    g = a - s x rest,

whose mean over the pixels of the bin is exactly what the bin as a whole contributes (docs/mathematics.md). Where
single pixels weigh much, the bin's entry is -1 - its *bucket* instead, whose pixels are sorted.
"""

import triton
import triton.language as tl

from lovasz.core import tables as words
from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    GROUP_BINS,
    GROUP_BUCKETS,
    GROUP_COLUMNS,
    GROUP_FIRST_BUCKET,
    GROUP_MAP,
    GROUP_WORDS,
    HALVES_OF_TABLE,
    SCORED,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_LOSS,
    SEGMENT_STATE,
    SEGMENT_UNIT,
    SEGMENT_VALID,
    SEGMENT_WEIGHT,
)

REST_BITS = tl.constexpr(words.REST_BITS)
REST_SUM_BITS = tl.constexpr(words.REST_SUM_BITS)
ONE_PIXEL = tl.constexpr(1 << words.REST_SUM_BITS)
REST_SUM_MASK = tl.constexpr((1 << words.REST_SUM_BITS) - 1)
COUNT_MASK = tl.constexpr(words.MAX_PIXELS - 1)
STOP_BITS = tl.constexpr(bins.STOP_BITS)
LOW_BITS_MASK = tl.constexpr((1 << bins.STOP_BITS) - 1)

MANTISSA_BITS = tl.constexpr(23)
EXPONENT_BIAS = tl.constexpr(127)
NO_SIGN = tl.constexpr(0x7FFFFFFF)
ONE = tl.constexpr(1)
LOW_WORD = tl.constexpr(0xFFFFFFFF)

BUCKET_STEP = tl.constexpr(1920)
"""A bucket begins with the first bin before which there are at least a multiple of so many pixels, ..."""
CROWD = tl.constexpr(2176)
"""... and bins of more pixels than these are in none. They are more than a step: so behind such a bin another bucket
begins, and none has a gap. A bucket has at most ..."""
BUCKET_ROOM = tl.constexpr(4096)
"""... so many pixels, and mostly no more than half of them."""
BEFORE_NONE = tl.constexpr(1 << 62)
"""Less the pixels before it, packed, is what a bucket's first bin leaves, so that the greatest is the first."""


@triton.jit
def bits_of(errors):
    """Errors as integers in the same order; NaN and negative numbers are mapped to something, too."""
    return tl.maximum(errors, 0.0).to(tl.int32, bitcast=True) & NO_SIGN


@triton.jit
def load_cells(bits, cells, SHIFT: tl.constexpr, TOP: tl.constexpr, CELLS: tl.constexpr):
    """The map's entry for each error."""
    return tl.load(cells + tl.minimum(tl.maximum(TOP - (bits >> SHIFT), 0), CELLS - 1))


@triton.jit
def bins_and_rests(bits, entry, bin_count, SHIFT: tl.constexpr, TOP: tl.constexpr, CELLS: tl.constexpr):
    """The bin of each error, and how far below the bin's upper end it lies.

    Args:
        entry: of ``load_cells``.
        bin_count: with the last bin, which takes what lies in no cell.
    """
    low_bits = entry & LOW_BITS_MASK
    found = (entry >> STOP_BITS) - 1 - ((bits & ((ONE << SHIFT) - 1)) >> low_bits)
    rests = (~bits & ((1 << low_bits) - 1)) >> tl.maximum(low_bits - REST_BITS, 0)
    in_cells = TOP - (bits >> SHIFT) < CELLS
    return tl.where(in_cells, found, bin_count - 1), tl.where(in_cells, rests, 0)


@triton.jit
def count_errors(table, found, rests, bin_count, is_foreground, mask):
    """Counts errors in a table.

    The last bin is left alone: it has what the others leave of the segment's pixels. So pixels that are right beyond
    doubt, which may be most, do not queue for the same word.
    """
    places = table + (tl.where(is_foreground, bin_count, 0) + found)
    tl.atomic_add(places, rests.to(tl.int64) + ONE_PIXEL, mask=mask & (found < bin_count - 1), sem="relaxed")


@triton.jit
def load_entries(table, found, bin_count, is_foreground, mask):
    """Entries of a table that was scanned; 0 where the mask is false."""
    return tl.load(table + (tl.where(is_foreground, bin_count, 0) + found), mask=mask, other=0)


@triton.jit
def is_bucket(entries):
    """Whether an entry names a bucket: its upper word is no number, with a sign that no computed one has."""
    return (entries >> 32) == -1


@triton.jit
def gradient_of(entries, rests):
    """Weight x g of each error; without meaning for buckets."""
    levels = (entries & LOW_WORD).to(tl.int32).to(tl.float32, bitcast=True)
    slopes = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return levels - slopes * rests.to(tl.float32)


@triton.jit
def largest_error_key(bits, pixel, mask):
    """A number that orders pixels by error, and those of equal error backwards; -1 where the mask is false."""
    return tl.where(mask, (bits.to(tl.int64) << 32) | (LOW_WORD - pixel.to(tl.int64)), -1)


@triton.jit
def is_largest(key, pixel):
    """Whether a pixel is the one that the greatest key names."""
    return (key > 0) & (LOW_WORD - (key & LOW_WORD) == pixel)


@triton.jit
def counts_of(words):
    return ((words >> REST_SUM_BITS) & COUNT_MASK).to(tl.int32)


@triton.jit
def pack_counts(background_words, foreground_words):
    """Background + foreground x 2^32, to be added up at once."""
    return counts_of(background_words).to(tl.int64) + (counts_of(foreground_words).to(tl.int64) << 32)


@triton.jit
def power_of_two(exponents):
    return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def in_units(values, unit):
    """float64 >= 0 as integers, in units of 2^unit: sums of these depend on no order."""
    return (values * power_of_two(-unit) + 0.5).to(tl.int64)


@triton.jit
def locate_chunk(groups, words, segments, chunk_segments, chunk_firsts, channels):
    """(the segment's number, its row, its group's row, its table, the chunk's number)."""
    program = tl.program_id(0)
    number = tl.load(chunk_segments + program)
    row = number // channels
    group = groups + row * GROUP_COLUMNS
    table = (
        words + tl.load(group + GROUP_WORDS) + (number - row * channels) * HALVES_OF_TABLE * tl.load(group + GROUP_BINS)
    )
    return number, segments + number * SEGMENT_COLUMNS, group, table, program - tl.load(chunk_firsts + program)


@triton.jit(do_not_specialize=["channels"])
def sum_chunks(groups, words, segments, chunk_segments, chunk_firsts, totals, channels, CHUNK: tl.constexpr):
    """Counts the pixels of each chunk of bins, packed. One program a segment and chunk."""
    number, segment, group, table, chunk = locate_chunk(groups, words, segments, chunk_segments, chunk_firsts, channels)
    if tl.load(segment + SEGMENT_STATE) == SCORED:
        bin_count = tl.load(group + GROUP_BINS).to(tl.int32)
        places = chunk.to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
        background = tl.load(table + places, mask=places < bin_count, other=0)
        foreground = tl.load(table + bin_count + places, mask=places < bin_count, other=0)
        tl.store(totals + tl.program_id(0), tl.sum(pack_counts(background, foreground)))


@triton.jit(do_not_specialize=["channels"])
def scan(
    groups,
    words,
    maps,
    segments,
    ranked,
    chunk_segments,
    chunk_firsts,
    totals,
    bucket_befores,
    channels,
    CHUNK: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    SHIFT: tl.constexpr,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
    CELLS_LOG2: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    """Adds each chunk's part of its segment's loss, and writes entries over its words.

    Args:
        ranked: int32, one a segment: how many of its buckets are sorted.
        totals: int64, one a chunk: of ``sum_chunks``.
        bucket_befores: int64, one a bucket, 0 before: ``BEFORE_NONE`` less the pixels before it, packed.
        CHUNKS_PADDED: a power of two from the chunks of any segment up.

    Counts are exact in float64, in which the means are computed; the slopes, which shift gradient only inside a bin,
    are float32. A chunk without pixels is passed over: its entries are never looked up.
    """
    number, segment, group, table, chunk = locate_chunk(groups, words, segments, chunk_segments, chunk_firsts, channels)
    bin_count = tl.load(group + GROUP_BINS).to(tl.int32)
    places = chunk.to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    is_last = places == bin_count - 1
    state = tl.load(segment + SEGMENT_STATE)
    pixels_here = 0
    if state == SCORED:
        pixels_here = (tl.load(totals + tl.program_id(0)) > 0).to(tl.int32)
        pixels_here += (chunk * CHUNK + CHUNK >= bin_count).to(tl.int32)
    if pixels_here > 0:
        background_words = tl.load(table + places, mask=places < bin_count, other=0)
        foreground_words = tl.load(table + bin_count + places, mask=places < bin_count, other=0)
        earlier = tl.arange(0, CHUNKS_PADDED)
        of_segment = totals + (tl.program_id(0) - chunk)
        before_chunk = tl.sum(tl.load(of_segment + earlier, mask=earlier < chunk, other=0))
        counted = pack_counts(background_words, foreground_words)
        before = before_chunk + tl.cumsum(counted, 0) - counted
        background_before = (before & LOW_WORD).to(tl.int32)
        foreground_before = (before >> 32).to(tl.int32)
        foreground_count = tl.load(segment + SEGMENT_FOREGROUND).to(tl.int32)
        background_count = tl.load(segment + SEGMENT_VALID).to(tl.int32) - foreground_count
        # Of the last bin the words are empty: it has what is left. Its errors are taken for 0.
        k = tl.where(is_last, background_count - background_before, counts_of(background_words))
        j = tl.where(is_last, foreground_count - foreground_before, counts_of(foreground_words))

        some_k = tl.maximum(k, 1)
        left = (foreground_count - foreground_before).to(tl.float64)
        x = tl.maximum(foreground_count + background_before, 1)
        reciprocal_x = 1.0 / x.to(tl.float64)
        reciprocal_y = 1.0 / (x + some_k).to(tl.float64)
        background_mean = (left - 0.5 * j.to(tl.float64)) * reciprocal_x * reciprocal_y
        foreground_mean = tl.where(k > 0, 0.5 * (reciprocal_x + reciprocal_y), reciprocal_x)

        cells = maps + tl.load(group + GROUP_MAP)
        if SHIFT != MANTISSA_BITS:
            cells += (number % channels) * CELLS  # each segment has its own
        upper_ends, ulps, rest_bits, dropped_bits = bin_geometry(cells, places, SHIFT, TOP, CELLS, CELLS_LOG2)
        losses = background_mean * sum_of_errors(background_words, upper_ends, ulps, dropped_bits)
        losses += foreground_mean * sum_of_errors(foreground_words, upper_ends, ulps, dropped_bits)

        ranked_buckets = tl.load(ranked + number)
        buckets = (foreground_before + background_before) // BUCKET_STEP
        # Of the last bin some background may be below the least error, if there is no foreground: all.
        any_here = tl.where(is_last, j, j + k) > 0
        is_ranked = (buckets < ranked_buckets) & any_here & (j + k <= CROWD) & (places < bin_count)
        if ranked_buckets > 0:
            bucket = tl.load(group + GROUP_FIRST_BUCKET) + (number % channels) * tl.load(group + GROUP_BUCKETS)
            tl.atomic_max(bucket_befores + bucket + buckets, -before + BEFORE_NONE, mask=is_ranked, sem="relaxed")
        unit = tl.load(segment + SEGMENT_UNIT)
        losses = tl.where(is_ranked, 0, in_units(losses, unit))
        tl.atomic_add(segment + SEGMENT_LOSS, tl.sum(losses), sem="relaxed")

        if WANT_GRAD or ranked_buckets > 0:
            weight = tl.load(segment + SEGMENT_WEIGHT).to(tl.float64, bitcast=True)
            # Between the bin's ends: g of its first and its last background pixel, with foreground spread over the bin.
            first = left.to(tl.float32) * reciprocal_x.to(tl.float32) / (x + 1).to(tl.float32)
            left_below = (left - j.to(tl.float64)).to(tl.float32)
            last = left_below * reciprocal_y.to(tl.float32) / (x + some_k - 1).to(tl.float32)
            background_drop = tl.minimum(first - last, 2.0 * background_mean.to(tl.float32))
            foreground_drop = tl.where((j > 0) & (k > 0), (reciprocal_x - reciprocal_y).to(tl.float32), 0.0)
            # The last bin's rests are all 0, and so must be its slopes.
            background_drop = tl.where(is_last, 0.0, background_drop)
            foreground_drop = tl.where(is_last, 0.0, foreground_drop)
            background = entries_of(background_mean, background_drop, background_words, rest_bits, weight)
            foreground = entries_of(foreground_mean, foreground_drop, foreground_words, rest_bits, weight)
            bucket_entries = -1 - buckets.to(tl.int64)
            tl.store(table + places, tl.where(is_ranked, bucket_entries, background), mask=places < bin_count)
            places += bin_count
            tl.store(table + places, tl.where(is_ranked, bucket_entries, foreground), mask=places < 2 * bin_count)


@triton.jit
def bin_geometry(cells, places, SHIFT: tl.constexpr, TOP: tl.constexpr, CELLS: tl.constexpr, CELLS_LOG2: tl.constexpr):
    """Of each bin the largest float, the distance of its floats, the bits of its rests and how many these left out."""
    # The first cell whose bins end behind this one.
    low = tl.zeros_like(places)
    high = tl.full(places.shape, CELLS - 1, tl.int32)
    for _ in tl.static_range(CELLS_LOG2):
        middle = (low + high) // 2
        ends_behind = (tl.load(cells + middle) >> STOP_BITS) > places
        high = tl.where(ends_behind, middle, high)
        low = tl.where(ends_behind, low, tl.minimum(middle + 1, high))
    entry = tl.load(cells + low)
    low_bits = entry & LOW_BITS_MASK
    from_end = tl.maximum((entry >> STOP_BITS) - 1 - places, 0)
    bits = ((TOP - low) << SHIFT) | ((from_end << low_bits) & ((ONE << SHIFT) - 1)) | ((1 << low_bits) - 1)
    ulps = power_of_two((bits >> MANTISSA_BITS) - (EXPONENT_BIAS + MANTISSA_BITS))
    rest_bits = tl.minimum(low_bits, REST_BITS)
    return bits.to(tl.float32, bitcast=True).to(tl.float64), ulps, rest_bits, low_bits - rest_bits


@triton.jit
def sum_of_errors(words, upper_ends, ulps, dropped_bits):
    """The sum of the errors that were counted in each bin: exact, but for the bits that the rests left out."""
    count = counts_of(words).to(tl.float64)
    # Rests were rounded down: on average by half of the largest number that the bits left out can hold.
    unit = (1 << dropped_bits).to(tl.float64)
    below = (words & REST_SUM_MASK).to(tl.float64) * unit + count * (0.5 * (unit - 1.0))
    return tl.maximum(count * upper_ends - below * ulps, 0.0)


@triton.jit
def entries_of(means, drops, words, rest_bits, weight):
    """Entries that have ``means`` at the mean rest of their bin and fall by ``drops`` over its width."""
    count = counts_of(words).to(tl.float32)
    width = (1 << rest_bits).to(tl.float32)
    mean_rests = tl.where(count > 0, (words & REST_SUM_MASK).to(tl.float32) / tl.maximum(count, 1.0), 0.5 * width)
    slopes = drops / width
    levels = means + (slopes * mean_rests).to(tl.float64)
    level_bits = (levels * weight).to(tl.float32).to(tl.int32, bitcast=True)
    slope_bits = (slopes.to(tl.float64) * weight).to(tl.float32).to(tl.int32, bitcast=True)
    return (slope_bits.to(tl.int64) << 32) | (level_bits.to(tl.int64) & LOW_WORD)
