"""Conversion of bit masks to indices and back, compiled by numba; also ``coding.elias_fano``."""

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy
from llvmlite import ir

njit: Callable[..., Any] = cast(Any, numba).njit
intrinsic: Any = cast(Any, numba).extending.intrinsic
types: Any = cast(Any, numba).types


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile once per machine: numba caches the code next to this file, or in another folder it can write to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder for the cache
        return njit(nogil=True)(function)


@intrinsic
def lowest_bit(_: Any, word: Any) -> Any:
    """Return the position of the lowest set bit of a nonzero word."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def count_bits(_: Any, word: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.ctpop(args[0])

    return types.int64(types.uint64), generate


@_compiled
def found(masks: Any, x: Any) -> Any:
    """Return the ascending indices of set bits, and the elements of ``x`` ``[n]`` at them."""
    one = numpy.uint64(1)
    count = 0
    for word in masks:
        count += count_bits(word)
    indices, values = numpy.empty(count, numpy.int64), numpy.empty(count, x.dtype)
    at = 0
    for i in range(masks.size):
        word = masks[i]
        while word:
            indices[at] = i * 64 + lowest_bit(word)
            word &= word - one
            at += 1
    for at in range(count):  # a separate loop, so that many of these loads overlap
        values[at] = x[indices[at]]
    return indices, values


@_compiled
def kth_largest(x: Any, k: int, infinity: int) -> Any:
    """Return the k-th largest of magnitudes given as bits ``[n]``, with or without a sign; NaN counts as infinity.

    Use it for k far below n / 64: no element below the k-th largest column maximum can be among the k largest.
    """
    sign, largest = x.dtype.type((1 << (8 * x.itemsize - 1)) - 1), x.dtype.type(infinity)
    magnitude = numpy.empty_like(x)
    for i in range(x.size):
        magnitude[i] = min(x[i] & sign, largest)
    columns = x.size // 64
    maxima = magnitude[:columns].copy()
    for r in range(1, 64):
        row = magnitude[r * columns : (r + 1) * columns]
        for c in range(columns):
            maxima[c] = max(maxima[c], row[c])
    some = magnitude[magnitude >= numpy.partition(maxima, columns - k)[columns - k]]
    return numpy.partition(some, some.size - k)[some.size - k]


@_compiled
def coordinates(there: Any, shape: Any, out: Any) -> None:
    """Fill ``out`` ``[dimensions, m]`` with the coordinates of flat indices ``[m]`` below 2^53."""
    if not there.size:  # a dimension may be 0
        return
    for j in range(there.size):
        out[0, j] = there[j]
    for d in range(shape.size - 1, 0, -1):
        size, share = shape[d], 1.0 / shape[d]
        for j in range(there.size):
            flat = out[0, j]
            row = int(flat * share)  # off by one at most; an integer division takes many times as long
            column = flat - row * size
            row += (column >= size) - (column < 0)
            out[0, j], out[d, j] = row, flat - row * size


@_compiled
def at_least(x: Any, least: int, infinity: int, out: Any) -> None:
    """Fill ``out`` with the ascending indices of magnitudes above ``least``, and of the first ones equal to it.

    Magnitudes are as for ``kth_largest``.
    """
    sign, most = x.dtype.type((1 << (8 * x.itemsize - 1)) - 1), x.dtype.type(infinity)
    ties = out.size
    for i in range(x.size):
        ties -= min(x[i] & sign, most) > least
    at = 0
    for i in range(x.size):
        here = min(x[i] & sign, most)
        if here > least or (here == least and ties > 0):
            ties -= here == least
            out[at] = i
            at += 1


@_compiled
def above(x: Any, least: int, masks: Any) -> None:
    """Fill ``masks``, one per 64 elements, with bits for magnitudes not below ``least``; all are given as bits."""
    sign = (1 << (8 * x.itemsize - 1)) - 1
    for i in range(masks.size):
        block = x[i * 64 : i * 64 + 64]
        hot = 0
        for j in range(block.size):
            hot |= (block[j] & sign) >= least
        word = numpy.uint64(0)
        if hot:  # rare
            for j in range(block.size):
                word |= numpy.uint64((block[j] & sign) >= least) << numpy.uint64(j)
        masks[i] = word


@_compiled
def add(out: Any, indices: Any, values: Any, alpha: float) -> None:
    """Compute ``out[indices] += alpha * values`` in order."""
    a = numpy.float32(alpha)
    for j in range(indices.size):
        i = indices[j]
        if i < 0 or i >= out.size:
            raise IndexError("an index lies outside of the tensor")
        out[i] += a * values[j]


@_compiled
def merge(every: Any, values: Any, edges: Any, alpha: float, there: Any, total: Any) -> int:
    """Merge ascending runs of indices, split at ``edges``; returns the number of distinct ones, -1 if a run descends.

    ``there`` gets the distinct indices, ascending; ``total`` the sums of ``alpha * values`` at each, in the order of
    the runs. All arrays are overwritten.
    """
    x, v, new_x, new_v = every, values, there, total
    one, step = numpy.uint64(1), 1  # with unsigned indices numba skips the check for negative ones
    while step < edges.size - 1:  # merge neighbours in pairs: equal indices stay in run order
        for r in range(0, edges.size - 1, 2 * step):
            i, middle = numpy.uint64(edges[r]), numpy.uint64(edges[min(r + step, edges.size - 1)])
            j, end, at = middle, numpy.uint64(edges[min(r + 2 * step, edges.size - 1)]), i
            while i < middle and j < end:
                later = numpy.uint64(x[j] < x[i])  # a number, since a branch would be mispredicted half of the time
                new_x[at], new_v[at] = min(x[i], x[j]), v[i + (j - i) * later]
                i, j, at = i + one - later, j + later, at + one
            rest = middle - i + end - j  # only one run has any left
            first = i if i < middle else j
            new_x[at : at + rest], new_v[at : at + rest] = x[first : first + rest], v[first : first + rest]
        x, v, new_x, new_v = new_x, new_v, x, v
        step *= 2
    a = numpy.float32(alpha)
    m = 0
    for j in range(x.size):
        here, term = x[j], a * v[j]
        if m and here == there[m - 1]:
            total[m - 1] += term
        elif m and here < there[m - 1]:
            return -1
        else:
            there[m], total[m] = here, numpy.float32(0.0) + term
            m += 1
    return m


@_compiled
def repeats(indices: Any) -> int:
    """Count the indices that equal the one before."""
    count = 0
    for j in range(1, indices.size):
        count += indices[j] == indices[j - 1]
    return count


@_compiled
def without_repeats(indices: Any, values: Any) -> None:
    for j in range(1, indices.size):
        if indices[j] == indices[j - 1]:
            values[j] = 0


@_compiled
def encode(indices: Any, width: int, low_bytes: int, out: Any) -> None:
    """Encode as ``coding.elias_fano``, byte by byte: the low bits as one stream, then a bitmap."""
    pending, filled, at = numpy.uint64(0), 0, 0
    mask = (numpy.int64(1) << width) - 1
    for j in range(indices.size):
        low = indices[j] & mask
        for part in range(0, width, 32):  # at most 32 bits at a time, so that 7 + 32 of them fit the word
            bits = min(32, width - part)
            pending |= numpy.uint64((low >> part) & ((numpy.int64(1) << bits) - 1)) << numpy.uint64(filled)
            filled += bits
            while filled >= 8:
                out[at] = pending & numpy.uint64(255)
                pending >>= numpy.uint64(8)
                filled -= 8
                at += 1
        bit = (indices[j] >> width) + j
        out[low_bytes + (bit >> 3)] |= numpy.uint8(1 << (bit & 7))
    if filled:
        out[at] = pending & numpy.uint64(255)


@njit(nogil=True)
def _words(packed: Any) -> Any:
    """Copy bytes to 64-bit words, with one more word of zeros."""
    words = numpy.zeros(packed.size // 8 + 2, numpy.uint64)
    words.view(numpy.uint8)[: packed.size] = packed
    return words


@_compiled
def decode(packed: Any, width: int, low_bytes: int, out: Any) -> None:
    low, high = _words(packed[:low_bytes]), _words(packed[low_bytes:])
    one = numpy.uint64(1)
    mask = (numpy.int64(1) << width) - 1
    count = 0
    for i in range(high.size):
        word = high[i]
        while word and count < out.size:
            out[count] = (i * 64 + lowest_bit(word) - count) << width
            word &= word - one
            count += 1
    for j in range(count if width else 0):
        i, shift = (j * width) >> 6, numpy.uint64((j * width) & 63)
        rest = (low[i + 1] << one) << (numpy.uint64(63) - shift)  # 0 if the field lies in one word
        out[j] |= numpy.int64(low[i] >> shift | rest) & mask
    out[count:] = 0  # damaged bytes can have fewer indices


@_compiled
def gather(
    packed: Any, width: int, low_bytes: int, every: Any, values: Any, alpha: float, there: Any, total: Any
) -> int:
    """Decode ``packed`` ``[senders, bytes]`` to ``every``, zero the repeats and ``merge``; returns as ``merge``."""
    senders = packed.shape[0]
    k = every.size // senders
    for r in range(senders):
        own = every[r * k : r * k + k]
        decode(packed[r], width, low_bytes, own)
        without_repeats(own, values[r * k : r * k + k])
    return merge(every, values, numpy.arange(senders + 1) * k, alpha, there, total)
