"""The kernels for CUDA, in Triton: one pass that reads g, u, v and writes u, v: 20 bytes per element in float32.

The host never waits for a count: the selection has a fixed shape (``fixed_shapes.py``), as the message has.

``TRITON_INTERPRET=1`` runs them on CPU tensors, slowly; tests use it on machines without a GPU.
"""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl

from thinwire.core.loops import Cut, Found, Pass
from thinwire.kernels.fixed_shapes import FixedShapes
from thinwire.kernels.reference import BLOCK

_tl: Any = tl
_jit: Any = cast(Any, triton).jit
_cdiv: Any = cast(Any, triton).cdiv
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXACT: Any = _tl.constexpr(INTERPRETED)
ROWS = 256 if INTERPRETED else 16
"""Blocks per program; the interpreter's time depends on the number of programs, not of elements."""
STATES = (torch.float32, torch.bfloat16)
GRADS = (*STATES, torch.float16)


@_jit
def _short(x: Any) -> Any:
    """Round float32 to bfloat16, ties to even, by hand: the interpreter would truncate."""
    bits = x.to(_tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return _tl.where(x != x, x, near.to(_tl.float32, bitcast=True))


@_jit
def _fused(a: Any, b: Any, c: Any) -> Any:
    """Compute ``a b + c``, rounded once. The interpreter's fma rounds twice, so there use float64, rounded to odd."""
    if not EXACT:
        return _tl.fma(a, b, c)
    product, wide = a.to(_tl.float64) * b.to(_tl.float64), c.to(_tl.float64)
    total = product + wide
    bits = total.to(_tl.int64, bitcast=True)
    there = (bits & 0x7FF0000000000000) != 0x7FF0000000000000  # finite
    sum, first, second = _tl.where(there, total, 0.0), _tl.where(there, product, 0.0), _tl.where(there, wide, 0.0)
    back = sum - first
    error = (first - (sum - back)) + (second - back)
    nearer = _tl.where((error > 0) == (sum > 0), bits + 1, bits - 1)
    inexact = (error != 0) & ((bits & 1) == 0)
    return _tl.where(inexact, nearer, bits).to(_tl.float64, bitcast=True).to(_tl.float32)


@_jit
def _accumulate(
    g: Any,
    u: Any,
    v: Any,
    new_u: Any,
    new_v: Any,
    maxima: Any,
    n: Any,
    momentum: Any,
    scale: Any,
    KIND: tl.constexpr,
    CLEAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Accumulate (kind 0: no momentum, 1: momentum, 2: Nesterov); ``maxima`` gets block maxima of ``|v'|``, as bits."""
    row = _tl.program_id(0) * ROWS + _tl.arange(0, ROWS)
    at = row.to(_tl.int64)[:, None] * BLOCK + _tl.arange(0, BLOCK)[None, :]
    there = at < n
    x = _tl.load(g + at, mask=there, other=0.0).to(_tl.float32) * scale
    y = _tl.load(v + at, mask=there, other=0.0).to(_tl.float32)
    if KIND == 0:
        y = y + x
    else:
        w = _tl.load(u + at, mask=there, other=0.0).to(_tl.float32)
        if KIND == 2:
            w = (w + x) * momentum
            y = (y + x) + w
        else:
            w = _fused(w, _tl.full([ROWS, BLOCK], momentum, _tl.float32), x)
            y = y + w
        if new_u.dtype.element_ty == _tl.bfloat16:
            w = _short(w)
        _tl.store(new_u + at, w.to(new_u.dtype.element_ty), mask=there)
    if new_v.dtype.element_ty == _tl.bfloat16:
        y = _short(y)
    _tl.store(new_v + at, y.to(new_v.dtype.element_ty), mask=there)
    if CLEAR:
        _tl.store(g + at, _tl.zeros([ROWS, BLOCK], g.dtype.element_ty), mask=there)
    # magnitudes compare like their bits, with NaN above infinity
    bits = y.to(_tl.int32, bitcast=True) & 0x7FFFFFFF
    _tl.store(maxima + row, _tl.max(_tl.where(there, bits, 0), axis=1), mask=row.to(_tl.int64) * BLOCK < n)


class Cuda(FixedShapes):
    """Kernels in Triton; small steps (the sample, the selected elements) are plain PyTorch on the device.

    Only ``merge`` makes the host wait, since its output size is a count. Sparse gradients and two-phase routes use it.
    """

    name = f"cuda (triton {cast(Any, triton).__version__}{', interpreted' if INTERPRETED else ''})"

    def runs(self, work: Pass) -> bool:
        there = work.grad.is_cuda or INTERPRETED
        return there and work.grad.dtype in GRADS and work.new_residual.dtype in STATES

    def accumulate(self, works: Sequence[Pass], cuts: Sequence[Cut]) -> list[Found]:
        return [self._pass(work, cut) for work, cut in zip(works, cuts, strict=True)]

    def _pass(self, work: Pass, cut: Cut) -> Found:
        n, new_v = work.grad.numel(), work.new_residual
        blocks = -(-n // BLOCK)
        maxima = torch.empty(blocks, dtype=torch.int32, device=work.grad.device)
        if n:
            u = new_v if work.old_momentum is None else work.old_momentum
            new_u = new_v if work.new_momentum is None else work.new_momentum
            kind = 0 if work.rule.momentum is None else 2 if work.rule.nesterov else 1
            settings = (n, work.rule.momentum or 0.0, work.scale, kind, work.clear, ROWS, BLOCK)
            grid = (_cdiv(blocks, ROWS),)
            _accumulate[grid](work.grad, u, work.old_residual, new_u, new_v, maxima, *settings, enable_fp_fusion=False)
        return self.within(new_v, maxima.view(torch.float32)[: n // BLOCK], cut)
