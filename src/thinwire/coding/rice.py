"""Golomb-Rice code: the gaps between ascending indices, close to the entropy, for files and uploads.

``gap_0 = index_0``, ``gap_j = index_j - index_(j-1) - 1``; each is written as ``gap >> b`` ones, a zero, and the low
``b`` bits of the gap, highest first. This takes ``k (b + 1) + sum(gap >> b)`` bits: 11.50 per index at density 0.1 %;
the entropy is 11.41. The length depends on the indices, so collectives, which need a fixed size, can't use it.

Format: the bits in that order, the first in the highest bit of the first byte; zeros fill the last byte.

Source: S. Golomb, "Run-length encodings", 1966; R. Rice, J. Plaunt, "Adaptive variable-length coding", 1971.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.core.errors import ThinwireError

WINDOW = 2**20
"""Bits that are decoded at once; each takes about 40 bytes of memory."""


def parameter(k: int, n: int) -> int:
    """Return the ``b`` that needs the fewest bits for k indices spread evenly over n."""
    if k == 0:
        return 0
    p = min(k / n, 1.0 - 1e-12)
    near = max(0, round(math.log2(math.log(2) / p)))
    return min(range(max(0, near - 1), near + 2), key=lambda b: b - 1.0 / math.expm1(2.0**b * math.log1p(-p)))


def encode(indices: Tensor, b: int) -> bytes:
    """Encode int64 indices ``[k]``, strictly ascending from 0 on."""
    gaps = np.diff(indices.cpu().numpy(), prepend=np.int64(-1)) - 1
    if (gaps < 0).any():
        raise ThinwireError("indices that do not strictly ascend have no gaps to write; sort them, and drop doubles")
    quotients = gaps >> b
    stops = np.cumsum(quotients + (b + 1)) - (b + 1)
    bits = np.ones(len(gaps) * (b + 1) + int(quotients.sum()), np.uint8)
    bits[stops] = 0
    for j in range(b):
        bits[stops + (j + 1)] = (gaps >> (b - 1 - j)) & 1
    return np.packbits(bits).tobytes()


def decode_checked(data: bytes | memoryview, k: int, n: int, b: int, step: int | None = None) -> Tensor:
    """Decode int64 indices ``[k]`` below n from untrusted bytes; other bits than ``encode`` writes are an error.

    ``step``: bits decoded at once, at least 64 and at most ``WINDOW``.
    """
    if not 0 <= b < 63 or not 0 <= n < 2**62 or not k * (b + 1) <= 8 * len(data) <= k * (b + 1) + (n >> b) + 7:
        raise ThinwireError(f"{len(data)} bytes are not those of {k} indices below {n} with b = {b}")
    packed = np.frombuffer(data, np.uint8)
    indices = np.empty(k, np.int64)
    window = WINDOW if step is None else min(step, WINDOW)
    done, at, previous, ones = 0, 0, -1, 0
    while done < k:
        bits = np.unpackbits(packed[at // 8 : (at + max(window, 64 + b)) // 8 + 1])[at % 8 :]
        starts, stops = _codewords(bits, b, k - done)
        if not len(starts):  # a codeword longer than the window: count its ones and go on in the next window
            begun = len(bits) if bits.all() else int(bits.argmin())
            at, ones = at + begun, ones + begun
            if not begun or at >= 8 * len(data):
                raise ThinwireError(f"the bits end after {done} of {k} indices")
            continue
        gaps = stops - starts
        gaps[0] += ones
        if int(gaps.max()) > n >> b:
            raise ThinwireError(f"indices reach beyond {n} elements")
        for j in range(b):
            gaps = gaps << 1 | bits[stops + (j + 1)]
        found = previous + np.cumsum(gaps + 1)
        if int(found.min()) < 0 or int(found[-1]) >= n:  # an overflowing sum turns negative first: no gap reaches 2^63
            raise ThinwireError(f"indices reach beyond {n} elements")
        indices[done : done + len(found)] = found
        done, at, previous, ones = done + len(found), at + int(stops[-1]) + b + 1, int(found[-1]), 0
    if len(data) != -(-at // 8) or (at % 8 and data[-1] << at % 8 & 0xFF):
        raise ThinwireError(f"{8 * len(data)} bits where {at} are needed, or what fills the last byte is not zero")
    return torch.from_numpy(indices)


def _codewords(bits: NDArray[np.uint8], b: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts of up to ``most`` whole codewords, and the position of the zero of each.

    A codeword tells only where the next one starts, so a plain scan is sequential. So the bits are cut into blocks.
    From the back, in all blocks at once, compute for every bit where a chain of codewords from it leaves its block.
    One sequential step per block then finds its first codeword, and a parallel pass follows those within all blocks.
    """
    zeros = np.flatnonzero(bits == 0)
    zeros = zeros[zeros < len(bits) - b]
    if not len(zeros):
        return zeros, zeros
    stop = np.repeat(zeros, np.diff(zeros, prepend=-1))  # the zero of a codeword that starts here
    side = math.isqrt(len(stop) - 1) + 1
    end = side * side
    after = np.full(end, end)
    after[: len(stop)] = np.minimum(stop + (b + 1), end)
    leads = after.copy()
    borders = np.arange(1, side + 1) * side
    for j in range(2, side + 1):
        column = after[borders - j]
        leads[borders - j] = np.where(column < borders, leads[np.minimum(column, end - 1)], column)
    entries: list[int] = []
    position = 0
    while position < end:
        entries.append(position)
        position = int(leads[position])
    current = np.array(entries)
    border = (current // side + 1) * side
    found: list[NDArray[np.int64]] = []
    while len(current):
        found.append(current)
        current = after[current]
        within = current < border
        current, border = current[within], border[within]
    starts = np.sort(np.concatenate(found))
    starts = starts[starts < len(stop)][:most]
    return starts, stop[starts]
