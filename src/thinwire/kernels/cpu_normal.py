"""Normal random numbers on CPUs, compiled by numba: the bits of ``normal.py``, in a tenth of the time."""

from typing import Any

import numba
import numpy as np
from torch import Tensor

from thinwire.kernels import normal
from thinwire.kernels.cpu_bits import _compiled  # pyright: ignore[reportPrivateUsage]

U64, U32, I64, I32, F32 = np.uint64, np.uint32, np.int64, np.int32, np.float32
M0, M1 = map(U64, normal.MULTIPLIERS)
W0, W1 = map(U32, normal.WEYL)
WORD, HALF_WORD = U64(normal.WORD), U64(32)
ROOT_HALF = I32(normal.ROOT_HALF)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = map(F32, normal.LOG)
LOW, HIGH, ANGLE = F32(normal.LOG2_LOW), F32(normal.LOG2_HIGH), F32(normal.ANGLE)
S0, S1, S2 = map(F32, normal.SINE)
C0, C1, C2 = map(F32, normal.COSINE)
ONE, HALF, TWO, TOP = F32(1.0), F32(0.5), F32(-2.0), F32(32.0)
BLOCKS = 1024
"""Counters that are made at once: their words and radii stay in the first-level cache."""


@_compiled
def _words(first: Any, blocks: Any, low: Any, high: Any, tensor: Any, direction: Any, words: Any) -> None:
    for i in range(blocks):
        counter = first + U64(i)
        c0, c1, c2, c3 = U32(counter & WORD), U32(counter >> HALF_WORD), U32(tensor), U32(direction)
        k0, k1 = U32(low), U32(high)
        for _ in range(10):
            p0, p1 = U64(c0) * M0, U64(c2) * M1
            c0, c2 = U32(U32(p1 >> HALF_WORD) ^ c1 ^ k0), U32(U32(p0 >> HALF_WORD) ^ c3 ^ k1)
            c1, c3 = U32(p1 & WORD), U32(p0 & WORD)
            k0, k1 = U32(k0 + W0), U32(k1 + W1)
        words[0, i], words[1, i], words[2, i], words[3, i] = c0, c1, c2, c3


@_compiled
def _pairs(first: Any, second: Any, near: Any, bits: Any, x: Any, y: Any) -> None:
    """Transform words into pairs; ``bits`` are those of ``near``, a scratch of float32."""
    for i in range(first.size):
        near[i] = F32(I64(first[i]) + I64(1))
    for i in range(first.size):
        exponent = I32(I32(bits[i] - ROOT_HALF) >> I32(23))
        x[i] = F32(exponent) - TOP
        bits[i] = I32(bits[i] - I32(exponent << I32(23)))
    for i in range(first.size):
        f, e = near[i] - ONE, x[i]
        square = f * f
        p = f * L0 + L1
        p = p * f + L2
        p = p * f + L3
        p = p * f + L4
        p = p * f + L5
        p = p * f + L6
        p = p * f + L7
        p = p * f + L8
        log = p * f * square + e * LOW - square * HALF + f + e * HIGH
        radius = np.sqrt(F32(log * TWO))
        word = second[i]
        radius = -radius if word >> U32(31) else radius
        angle = F32(I32(word & U32(0x3FFFFFFF)) - I32(0x20000000)) * ANGLE
        square = angle * angle
        sine = ((square * S0 + S1) * square + S2) * square * angle + angle
        cosine = ((square * C0 + C1) * square + C2) * square * square - square * HALF + ONE
        swap = (word >> U32(30)) & U32(1)
        x[i] = radius * (sine if swap else cosine)
        y[i] = radius * (cosine if swap else sine)


@_compiled
def _fill(out: Any, first: Any, low: Any, high: Any, tensor: Any, direction: Any) -> None:
    words, made = np.empty((4, BLOCKS), np.uint32), np.empty((4, BLOCKS), np.float32)
    near = np.empty(BLOCKS, np.float32)
    bits = near.view(np.int32)
    for at in range(0, (out.size + 3) // 4, BLOCKS):
        blocks = min(BLOCKS, (out.size + 3) // 4 - at)
        _words(first + U64(at), blocks, low, high, tensor, direction, words)
        for i in (0, 2):
            _pairs(words[i, :blocks], words[i + 1, :blocks], near, bits, made[i, :blocks], made[i + 1, :blocks])
        whole = min(blocks, (out.size - 4 * at) // 4)
        for i in range(whole):
            for j in range(4):
                out[4 * (at + i) + j] = made[j, i]
        for j in range(out.size - 4 * (at + whole) if whole < blocks else 0):
            out[4 * (at + whole) + j] = made[j, whole]


class CpuNormals:
    """Normal numbers in numba, on the thread that asks."""

    name = f"numba {numba.__version__}"

    def fill(self, out: Tensor, seed: int, direction: int, tensor: int, start: int) -> None:
        numbers = (start // normal.LANES, seed & normal.WORD, seed >> 32, tensor, direction)
        _fill(out.numpy(), *map(U64, numbers))
