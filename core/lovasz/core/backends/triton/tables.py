"""Tables on a GPU: finds the bin of an error, counts errors, scans tables, and looks gradients up.

``bins`` defines the bins. A table has two words per bin, one for background and one for foreground
(:mod:`lovasz.core.word`). The scan overwrites each word with an *entry*, two float32 (a, s): the gradient g of a
pixel, times the segment's weight, is

    a - s x rest,

so its mean over the pixels of the bin is exactly the mean g of the bin (docs/mathematics.md, section 11). Where single
pixels weigh much, bins belong to *buckets*, whose pixels are sorted; the entry is then -1 - the bucket's number.
"""

import triton
import triton.language as tl

from lovasz.core import word
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

REST_BITS = tl.constexpr(word.REST_BITS)
REST_SUM_BITS = tl.constexpr(word.REST_SUM_BITS)
ONE_PIXEL = tl.constexpr(1 << word.REST_SUM_BITS)
REST_SUM_MASK = tl.constexpr((1 << word.REST_SUM_BITS) - 1)
COUNT_MASK = tl.constexpr(word.MAX_PIXELS - 1)
STOP_BITS = tl.constexpr(bins.STOP_BITS)
LOW_BITS_MASK = tl.constexpr((1 << bins.STOP_BITS) - 1)

MANTISSA_BITS = tl.constexpr(23)
EXPONENT_BIAS = tl.constexpr(127)
NO_SIGN = tl.constexpr(0x7FFFFFFF)
ONE = tl.constexpr(1)
LOW_WORD = tl.constexpr(0xFFFFFFFF)

BUCKET_STEP = tl.constexpr(1920)
"""A bin belongs to the bucket with the number (pixels in bins before it) // BUCKET_STEP, unless it is a crowd."""
CROWD = tl.constexpr(2176)
"""A bin with more pixels than this is a crowd and belongs to no bucket. The next bin is then in a later bucket, as a
crowd exceeds BUCKET_STEP; so the pixels of a bucket are consecutive ranks."""
BUCKET_ROOM = tl.constexpr(4096)
"""The most pixels of a bucket: fewer than BUCKET_STEP before its last bin, and at most CROWD in that. Most buckets have
no more than half as many."""
BEFORE_NONE = tl.constexpr(1 << 62)
"""A bucket stores the maximum over its bins of BEFORE_NONE - (pixels before the bin, packed): that of its first bin."""


@triton.jit
def bits_of(errors):
    """Errors as integers in the same order; NaN and negative numbers become some valid number, too."""
    return tl.maximum(errors, 0.0).to(tl.int32, bitcast=True) & NO_SIGN


@triton.jit
def load_cells(bits, cells, SHIFT: tl.constexpr, TOP: tl.constexpr, CELLS: tl.constexpr):
    """The map's integer for the cell of each error; for errors outside all cells, that of the nearest cell."""
    return tl.load(cells + tl.minimum(tl.maximum(TOP - (bits >> SHIFT), 0), CELLS - 1))


@triton.jit
def bins_and_rests(bits, cell, bin_count, SHIFT: tl.constexpr, TOP: tl.constexpr, CELLS: tl.constexpr):
    """The bin and the rest of each error.

    Args:
        cell: the result of ``load_cells``.
        bin_count: the number of bins, including the last one, for errors outside all cells.
    """
    low_bits = cell & LOW_BITS_MASK
    found = (cell >> STOP_BITS) - 1 - ((bits & ((ONE << SHIFT) - 1)) >> low_bits)
    rests = (~bits & ((1 << low_bits) - 1)) >> tl.maximum(low_bits - REST_BITS, 0)
    in_cells = TOP - (bits >> SHIFT) < CELLS
    return tl.where(in_cells, found, bin_count - 1), tl.where(in_cells, rests, 0)


@triton.jit
def count_errors(table, found, rests, bin_count, is_foreground, mask):
    """Counts errors in a table, except those in the last bin.

    The scan finds the pixels of the last bin by subtraction. So confidently correct pixels, which may be most, do not
    all wait for atomic additions to the same word.
    """
    places = table + (tl.where(is_foreground, bin_count, 0) + found)
    tl.atomic_add(places, rests.to(tl.int64) + ONE_PIXEL, mask=mask & (found < bin_count - 1), sem="relaxed")


@triton.jit
def load_entries(table, found, bin_count, is_foreground, mask):
    """The entries of a scanned table for each error; 0 where the mask is false."""
    return tl.load(table + (tl.where(is_foreground, bin_count, 0) + found), mask=mask, other=0)


@triton.jit
def is_bucket(entries):
    """Whether an entry names a bucket: its upper 32 bits are -1, a NaN whose bits no computed slope has."""
    return (entries >> 32) == -1


@triton.jit
def gradient_of(entries, rests):
    """Weight x g of each error, from its entry; undefined where the entry names a bucket."""
    levels = (entries & LOW_WORD).to(tl.int32).to(tl.float32, bitcast=True)
    slopes = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return levels - slopes * rests.to(tl.float32)


@triton.jit
def largest_error_key(bits, pixel, mask):
    """A key whose maximum names the first pixel with the largest error; -1 where the mask is false."""
    return tl.where(mask, (bits.to(tl.int64) << 32) | (LOW_WORD - pixel.to(tl.int64)), -1)


@triton.jit
def is_largest(key, pixel):
    """Whether each pixel is the one that ``key`` names, the maximum of ``largest_error_key``."""
    return (key > 0) & (LOW_WORD - (key & LOW_WORD) == pixel)


@triton.jit
def counts_of(words):
    return ((words >> REST_SUM_BITS) & COUNT_MASK).to(tl.int32)


@triton.jit
def pack_counts(background_words, foreground_words):
    """The pixel counts of words as background + foreground x 2^32, so that one addition adds both."""
    return counts_of(background_words).to(tl.int64) + (counts_of(foreground_words).to(tl.int64) << 32)


@triton.jit
def power_of_two(exponents):
    return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def in_units(values, unit):
    """Rounds float64 >= 0 to integers in units of 2^unit, whose sum does not depend on the order."""
    return (values * power_of_two(-unit) + 0.5).to(tl.int64)


@triton.jit
def locate_chunk(groups, words, segments, chunk_segments, chunk_firsts, channels):
    """(the segment's number, its row, its group's row, its table, the chunk's number in the table)."""
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
    """Counts the pixels of each chunk of bins, packed. One instance per segment and chunk."""
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
    """Adds each chunk's part of the loss to its segment, and writes entries over its words. One instance per chunk.

    Means are computed in float64, in which counts are exact; slopes, which move gradient only inside a bin, in float32.
    A chunk without pixels is skipped, as its entries are never looked up.

    Args:
        ranked: int32, one per segment: the number of its buckets that are sorted.
        totals: int64, one per chunk: the result of ``sum_chunks``.
        bucket_befores: int64, one per bucket, 0 before: see ``BEFORE_NONE``.
        CHUNKS_PADDED: a power of two, at least the number of chunks of any segment.
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
        # The words of the last bin are empty: it has the pixels that no other bin has. Its errors are taken as 0.
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
            cells += (number % channels) * CELLS  # Each segment has its own map.
        upper_ends, ulps, rest_bits, dropped_bits = bin_geometry(cells, places, SHIFT, TOP, CELLS, CELLS_LOG2)
        losses = background_mean * sum_of_errors(background_words, upper_ends, ulps, dropped_bits)
        losses += foreground_mean * sum_of_errors(foreground_words, upper_ends, ulps, dropped_bits)

        ranked_buckets = tl.load(ranked + number)
        buckets = (foreground_before + background_before) // BUCKET_STEP
        # Background in the last bin may be below the smallest foreground error; if the bin has no foreground, all is.
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
            # The drop of g from the first to the last background pixel of the bin, with foreground spread over the bin.
            first = left.to(tl.float32) * reciprocal_x.to(tl.float32) / (x + 1).to(tl.float32)
            left_below = (left - j.to(tl.float64)).to(tl.float32)
            last = left_below * reciprocal_y.to(tl.float32) / (x + some_k - 1).to(tl.float32)
            background_drop = first - last
            foreground_drop = tl.where((j > 0) & (k > 0), (reciprocal_x - reciprocal_y).to(tl.float32), 0.0)
            # In the last bin all rests are 0, so its slopes must be 0, too.
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
    """(largest float of each bin, distance of its floats, bits of its rests, low bits that its rests drop)."""
    # Binary search for the first cell whose bins end after this bin.
    low = tl.zeros_like(places)
    high = tl.full(places.shape, CELLS - 1, tl.int32)
    for _ in tl.static_range(CELLS_LOG2):
        middle = (low + high) // 2
        ends_after = (tl.load(cells + middle) >> STOP_BITS) > places
        high = tl.where(ends_after, middle, high)
        low = tl.where(ends_after, low, tl.minimum(middle + 1, high))
    cell = tl.load(cells + low)
    low_bits = cell & LOW_BITS_MASK
    from_end = tl.maximum((cell >> STOP_BITS) - 1 - places, 0)
    bits = ((TOP - low) << SHIFT) | ((from_end << low_bits) & ((ONE << SHIFT) - 1)) | ((1 << low_bits) - 1)
    ulps = power_of_two((bits >> MANTISSA_BITS) - (EXPONENT_BIAS + MANTISSA_BITS))
    rest_bits = tl.minimum(low_bits, REST_BITS)
    return bits.to(tl.float32, bitcast=True).to(tl.float64), ulps, rest_bits, low_bits - rest_bits


@triton.jit
def sum_of_errors(words, upper_ends, ulps, dropped_bits):
    """The sum of the errors counted in each bin; exact, except for the low bits that the rests drop."""
    count = counts_of(words).to(tl.float64)
    # Rests were rounded down, on average by half of the largest number that fits in the dropped bits.
    unit = (1 << dropped_bits).to(tl.float64)
    below = (words & REST_SUM_MASK).to(tl.float64) * unit + count * (0.5 * (unit - 1.0))
    return tl.maximum(count * upper_ends - below * ulps, 0.0)


@triton.jit
def entries_of(means, drops, words, rest_bits, weight):
    """Entries whose gradient is ``means`` at the mean rest of the bin and falls by ``drops`` over its width.

    It falls by less where it would be negative at the lower end of the bin.
    """
    count = counts_of(words).to(tl.float32)
    width = (1 << rest_bits).to(tl.float32)
    mean_rests = tl.where(count > 0, (words & REST_SUM_MASK).to(tl.float32) / tl.maximum(count, 1.0), 0.5 * width)
    slopes = tl.minimum(drops / width, means.to(tl.float32) / (width - mean_rests))
    levels = means + (slopes * mean_rests).to(tl.float64)
    level_bits = (levels * weight).to(tl.float32).to(tl.int32, bitcast=True)
    slope_bits = (slopes.to(tl.float64) * weight).to(tl.float32).to(tl.int32, bitcast=True)
    return (slope_bits.to(tl.int64) << 32) | (level_bits.to(tl.int64) & LOW_WORD)
