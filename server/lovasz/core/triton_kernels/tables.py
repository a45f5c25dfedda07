"""Tables on a GPU: the bin of an error, the scan that turns counts into shares of the gradient, and looking these up.

``bins`` describes the table's layout. A scan overwrites each word with an *entry*, two float32 in its place: for a
pixel whose error has this rest, the gradient g of the Lovász extension, times the segment's weight, is

    g = a - s x rest,

whose mean over the pixels of the bin is exactly what the bin as a whole contributes (docs/mathematics.md).
"""

import triton
import triton.language as tl

from lovasz.core import bins

BINS = tl.constexpr(bins.BINS)
LAST_BIN = tl.constexpr(bins.BINS - 1)
OCTAVES = tl.constexpr(bins.OCTAVES)
OCTAVES_PER_BIT = tl.constexpr(bins.OCTAVES_PER_BIT)
MAX_BITS = tl.constexpr(bins.MAX_BITS)
FINEST = tl.constexpr(1 << bins.MAX_BITS)
"""Bins of the first octave."""
MIN_BITS = tl.constexpr(bins.MIN_BITS)
REST_BITS = tl.constexpr(bins.REST_BITS)
REST_SUM_BITS = tl.constexpr(bins.REST_SUM_BITS)
ONE_PIXEL = tl.constexpr(1 << bins.REST_SUM_BITS)
REST_SUM_MASK = tl.constexpr((1 << bins.REST_SUM_BITS) - 1)
COUNT_MASK = tl.constexpr(bins.MAX_PIXELS - 1)

MANTISSA_BITS = tl.constexpr(23)
MANTISSA_MASK = tl.constexpr((1 << 23) - 1)
EXPONENT_BIAS = tl.constexpr(127)
LOW_WORD = tl.constexpr(0xFFFFFFFF)

PASSED_OVER = tl.constexpr(0)
"""The state of a segment that is not scored."""
COUNTED = tl.constexpr(1)
"""... of one that has a table."""
ABSENT = tl.constexpr(2)
"""... of one that is scored without foreground: its largest error is all that counts."""

CHUNK = 1 << 9
"""Bins that one program scans ..."""
INTERPRETED_CHUNK = 1 << 17
"""... and under the interpreter, which takes milliseconds for each program, whatever its size."""
SCAN_WARPS = 8


@triton.jit
def bins_and_rests(errors, top):
    """The bin of each error, and how far below the bin's upper end it lies.

    Whatever comes gets a bin of the table: NaN and negative numbers get the last one.
    """
    bits = tl.maximum(errors, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    octave = tl.maximum(top + EXPONENT_BIAS - (bits >> MANTISSA_BITS), 0)
    coarser = tl.minimum(octave // OCTAVES_PER_BIT, MAX_BITS - MIN_BITS)
    low_bits = coarser + (MANTISSA_BITS - MAX_BITS)
    width = FINEST >> coarser
    # The octaves before those of this width, the octaves of this width up to the end of this one, and back inside it.
    ends = OCTAVES_PER_BIT * (2 * FINEST - 2 * width) + (octave - OCTAVES_PER_BIT * coarser + 1) * width
    bins = ends - 1 - ((bits & MANTISSA_MASK) >> low_bits)
    rests = (~bits & ((1 << low_bits) - 1)) >> tl.maximum(low_bits - REST_BITS, 0)
    in_octaves = octave < OCTAVES
    return tl.where(in_octaves, bins, LAST_BIN), tl.where(in_octaves, rests, 0)


@triton.jit
def count_errors(tables, errors, top, is_foreground, mask):
    """Counts errors in the tables at the pointers ``tables``, which broadcast against them.

    Errors below the last octave are not counted: what the other bins leave of the segment's pixels is in the last bin.
    So pixels that are right beyond doubt, which may be most, do not queue for the same word.
    """
    bins, rests = bins_and_rests(errors, top)
    words = rests.to(tl.int64) + ONE_PIXEL
    places = tables + (tl.where(is_foreground, BINS, 0) + bins)
    tl.atomic_add(places, words, mask=mask & (bins < LAST_BIN), sem="relaxed")


@triton.jit
def look_up(tables, errors, top, is_foreground, mask):
    """Weight x g of each error, 0 where the mask is false; of tables that were scanned."""
    bins, rests = bins_and_rests(errors, top)
    entries = tl.load(tables + (tl.where(is_foreground, BINS, 0) + bins), mask=mask, other=0)
    levels = (entries & LOW_WORD).to(tl.int32).to(tl.float32, bitcast=True)
    slopes = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return levels - slopes * rests.to(tl.float32)


@triton.jit
def largest_error_key(errors, index, mask):
    """A number that orders pixels by error, and those of equal error backwards by index; -1 where the mask is false."""
    bits = tl.maximum(errors, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(mask, (bits.to(tl.int64) << 32) | (LOW_WORD - index), -1)


@triton.jit
def is_largest(winners, index):
    """Whether a pixel is the one that a segment's greatest key names."""
    return (winners >= 0) & (LOW_WORD - (winners & LOW_WORD) == index)


@triton.jit
def counts_of(words):
    return ((words >> REST_SUM_BITS) & COUNT_MASK).to(tl.int32)


@triton.jit
def pack_counts(background_words, foreground_words):
    """Background + foreground x 2^32, to be added up at once."""
    return counts_of(background_words).to(tl.int64) + (counts_of(foreground_words).to(tl.int64) << 32)


@triton.jit
def sum_chunks(tables, states, totals, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Counts the pixels of each chunk of bins, packed. One program a segment and chunk."""
    program = tl.program_id(0)
    segment = program // CHUNKS
    if tl.load(states + segment) == COUNTED:
        bins = (program % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
        table = tables + segment.to(tl.int64) * (2 * BINS)
        background = tl.load(table + bins, mask=bins < BINS, other=0)
        foreground = tl.load(table + BINS + bins, mask=bins < BINS, other=0)
        tl.store(totals + program, tl.sum(pack_counts(background, foreground)))


@triton.jit
def scan(
    tables,
    states,
    foreground_counts,
    valid_counts,
    tops,
    weights,
    totals,
    losses,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    """Adds up each chunk's part of its segment's loss, and writes entries over its words if a gradient is wanted.

    Per segment come ``states``, ``foreground_counts`` and ``valid_counts`` (all pixels, foreground or not), ``tops``
    and ``weights``; per chunk ``totals`` (of ``sum_chunks``) and, as a result, ``losses`` (float64). Counts are exact
    in float64, in which the means are computed; the slopes, which shift gradient only inside a bin, are float32.
    """
    program = tl.program_id(0)
    segment = program // CHUNKS
    if tl.load(states + segment) == COUNTED:
        chunk = program % CHUNKS
        bins = chunk * CHUNK + tl.arange(0, CHUNK)
        table = tables + segment.to(tl.int64) * (2 * BINS)
        background_words = tl.load(table + bins, mask=bins < BINS, other=0)
        foreground_words = tl.load(table + BINS + bins, mask=bins < BINS, other=0)

        earlier = tl.arange(0, CHUNKS_PADDED)
        before_chunk = tl.sum(tl.load(totals + segment.to(tl.int64) * CHUNKS + earlier, mask=earlier < chunk, other=0))
        counted = pack_counts(background_words, foreground_words)
        before = before_chunk + tl.cumsum(counted, 0) - counted
        background_before = (before & LOW_WORD).to(tl.int32)
        foreground_before = (before >> 32).to(tl.int32)
        foreground_count = tl.load(foreground_counts + segment).to(tl.int32)
        background_count = tl.load(valid_counts + segment).to(tl.int32) - foreground_count
        # Of the last bin the words are empty: it has what is left. Its errors are taken for 0.
        is_last = bins == LAST_BIN
        k = tl.where(is_last, background_count - background_before, counts_of(background_words))
        j = tl.where(is_last, foreground_count - foreground_before, counts_of(foreground_words))

        # A bin without background gets the g of a single pixel, in case that an error lands there by its last bit.
        some_k = tl.maximum(k, 1)
        left = (foreground_count - foreground_before).to(tl.float64)
        x = tl.maximum(foreground_count + background_before, 1)
        reciprocal_x = 1.0 / x.to(tl.float64)
        reciprocal_y = 1.0 / (x + some_k).to(tl.float64)
        background_mean = (left - 0.5 * j.to(tl.float64)) * reciprocal_x * reciprocal_y
        foreground_mean = tl.where(k > 0, 0.5 * (reciprocal_x + reciprocal_y), reciprocal_x)

        top = tl.load(tops + segment)
        upper_ends, ulps, rest_bits, dropped_bits = bin_geometry(bins, top)
        background_errors = sum_of_errors(background_words, upper_ends, ulps, dropped_bits)
        foreground_errors = sum_of_errors(foreground_words, upper_ends, ulps, dropped_bits)
        tl.store(losses + program, tl.sum(background_mean * background_errors + foreground_mean * foreground_errors))

        if WANT_GRAD:
            weight = tl.load(weights + segment)
            # Between the bin's ends: g of its first and its last background pixel, with foreground spread over the bin.
            first = left.to(tl.float32) * reciprocal_x.to(tl.float32) / (x + 1).to(tl.float32)
            left_below = (left - j.to(tl.float64)).to(tl.float32)
            last = left_below * reciprocal_y.to(tl.float32) / (x + some_k - 1).to(tl.float32)
            background_drop = tl.minimum(first - last, 2.0 * background_mean.to(tl.float32))
            foreground_drop = tl.where((j > 0) & (k > 0), (reciprocal_x - reciprocal_y).to(tl.float32), 0.0)
            # The last bin's rests are all 0, and so must be its slopes.
            background_drop = tl.where(is_last, 0.0, background_drop)
            foreground_drop = tl.where(is_last, 0.0, foreground_drop)
            background_entries = entries_of(background_mean, background_drop, background_words, rest_bits, weight)
            foreground_entries = entries_of(foreground_mean, foreground_drop, foreground_words, rest_bits, weight)
            tl.store(table + bins, background_entries, mask=bins < BINS)
            tl.store(table + BINS + bins, foreground_entries, mask=bins < BINS)


@triton.jit
def bin_geometry(bins, top):
    """Of each bin the largest float, the distance of its floats, the bits of its rests and how many these left out."""
    # Counted from behind, the bins of the octaves of one width lie between two powers of 2, times OCTAVES_PER_BIT.
    from_behind = (OCTAVES_PER_BIT * 2 * FINEST - 1 - bins) // OCTAVES_PER_BIT
    exponents = tl.maximum(from_behind, 1).to(tl.float32).to(tl.int32, bitcast=True) >> MANTISSA_BITS
    bits = tl.maximum(exponents - EXPONENT_BIAS, MIN_BITS)
    width = 1 << bits
    within = bins - OCTAVES_PER_BIT * (2 * FINEST - 2 * width)
    octave = tl.minimum(OCTAVES_PER_BIT * (MAX_BITS - bits) + (within >> bits), OCTAVES - 1)
    low_bits = MANTISSA_BITS - bits
    significands = ((2 * width - (within & (width - 1))) << low_bits) - 1
    ulps = power_of_two(top - octave - MANTISSA_BITS)
    rest_bits = tl.minimum(low_bits, REST_BITS)
    return significands.to(tl.float64) * ulps, ulps, rest_bits, low_bits - rest_bits


@triton.jit
def power_of_two(exponents):
    return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def sum_of_errors(words, upper_ends, ulps, dropped_bits):
    """The sum of the errors that were counted in each bin: exact, but for the bits that the rests left out."""
    count = counts_of(words).to(tl.float64)
    # Rests were rounded down: on average by half of the largest number that the bits left out can hold.
    unit = (1 << dropped_bits).to(tl.float64)
    below = (words & REST_SUM_MASK).to(tl.float64) * unit + count * (0.5 * (unit - 1.0))
    return count * upper_ends - below * ulps


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
