"""Normal random numbers on CUDA, in Triton: the bits of ``normal.py``."""

import os
from typing import Any, cast

import triton
import triton.language as tl
from torch import Tensor

from thinwire.kernels import normal

_tl: Any = tl
_jit: Any = cast(Any, triton).jit
_cdiv: Any = cast(Any, triton).cdiv
_constant: Any = cast(Any, tl).constexpr
BLOCK = 65536 if os.environ.get("TRITON_INTERPRET") == "1" else 512
"""Counters per program; the interpreter's time depends on the number of programs."""
M0, M1 = _constant(normal.MULTIPLIERS[0]), _constant(normal.MULTIPLIERS[1])
W0, W1 = _constant(normal.WEYL[0]), _constant(normal.WEYL[1])
ROOT_HALF, ANGLE = _constant(normal.ROOT_HALF), _constant(normal.ANGLE)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = map(_constant, normal.LOG)
LOW, HIGH = _constant(normal.LOG2_LOW), _constant(normal.LOG2_HIGH)
S0, S1, S2 = map(_constant, normal.SINE)
C0, C1, C2 = map(_constant, normal.COSINE)


@_jit
def _pair(first: Any, second: Any) -> Any:
    f32, i32 = _tl.float32, _tl.int32
    bits = (first.to(_tl.int64) + 1).to(f32).to(i32, bitcast=True)
    exponent = (bits - ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).to(f32, bitcast=True) - 1.0
    e = exponent.to(f32) - 32.0
    square = f * f
    y = f * L0 + L1
    y = y * f + L2
    y = y * f + L3
    y = y * f + L4
    y = y * f + L5
    y = y * f + L6
    y = y * f + L7
    y = y * f + L8
    log = y * f * square + e * LOW - square * 0.5 + f + e * HIGH
    radius = _tl.sqrt_rn(log * -2.0)
    radius = _tl.where((second >> 31) != 0, -radius, radius)
    angle = ((second & 0x3FFFFFFF).to(i32) - 0x20000000).to(f32) * ANGLE
    square = angle * angle
    sine = ((square * S0 + S1) * square + S2) * square * angle + angle
    cosine = ((square * C0 + C1) * square + C2) * square * square - square * 0.5 + 1.0
    swap = ((second >> 30) & 1) != 0
    return radius * _tl.where(swap, sine, cosine), radius * _tl.where(swap, cosine, sine)


@_jit
def _fill(out: Any, n: Any, start: Any, low: Any, high: Any, tensor: Any, direction: Any, BLOCK: tl.constexpr) -> None:
    at = _tl.program_id(0).to(_tl.int64) * BLOCK + _tl.arange(0, BLOCK)
    counter = at + start
    u32 = _tl.uint32
    c0, c1 = (counter & 0xFFFFFFFF).to(u32), (counter >> 32).to(u32)
    c2, c3 = _tl.full([BLOCK], tensor, _tl.int64).to(u32), _tl.full([BLOCK], direction, _tl.int64).to(u32)
    k0, k1 = _tl.full([BLOCK], low, _tl.int64).to(u32), _tl.full([BLOCK], high, _tl.int64).to(u32)
    m0, m1 = _tl.full([BLOCK], M0, u32), _tl.full([BLOCK], M1, u32)
    w0, w1 = _tl.full([BLOCK], W0, u32), _tl.full([BLOCK], W1, u32)
    for _ in _tl.static_range(10):
        h0, h1 = _tl.umulhi(m0, c0), _tl.umulhi(m1, c2)
        l0, l1 = m0 * c0, m1 * c2
        c0, c1 = h1 ^ c1 ^ k0, l1
        c2, c3 = h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + w0, k1 + w1
    x0, x1 = _pair(c0, c1)
    x2, x3 = _pair(c2, c3)
    to = out + at * 4
    _tl.store(to, x0, mask=at * 4 < n)
    _tl.store(to + 1, x1, mask=at * 4 + 1 < n)
    _tl.store(to + 2, x2, mask=at * 4 + 2 < n)
    _tl.store(to + 3, x3, mask=at * 4 + 3 < n)


class CudaNormals:
    """Normal numbers in Triton; ``TRITON_INTERPRET=1`` makes them on CPU tensors, slowly."""

    name = f"triton {cast(Any, triton).__version__}"

    def fill(self, out: Tensor, seed: int, direction: int, tensor: int, start: int) -> None:
        n = out.numel()
        if n:
            numbers = (n, start // normal.LANES, seed & normal.WORD, seed >> 32, tensor, direction)
            _fill[(_cdiv(-(-n // normal.LANES), BLOCK),)](out, *numbers, BLOCK, enable_fp_fusion=False)
