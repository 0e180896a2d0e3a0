"""The kernels for CPUs, compiled by numba (``pip install thinwire[cpu]``): one pass over memory, on several threads.

A pass leaves a word of 64 bits for each block of 64 elements, whose bits are what reaches the threshold. So nothing
is allocated for a number of elements that nobody knows, and a second walk over 1/32 of the memory finds them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numba
import numpy
import torch
from torch import Tensor

from thinwire.core import Pass
from thinwire.kernels import blocks
from thinwire.wire import elias_fano

_njit: Callable[..., Any] = cast(Any, numba).njit
BLOCK = blocks.BLOCK
MIN_BLOCKS = 2**12
"""Fewer blocks than this are not worth another thread."""
STATES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
GRADS = STATES | {torch.float16: "float16"}


def _kind(work: Pass) -> str:
    return "plain" if work.rule.momentum is None else "nesterov" if work.rule.nesterov else "momentum"


class Cpu:
    """Kernels by numba, on as many threads as torch may use."""

    def __init__(self) -> None:
        self.name = f"cpu (numba {numba.__version__})"
        self._masks = numpy.empty(0, numpy.uint64)
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1

    def runs(self, work: Pass) -> bool:
        return work.grad.device.type == "cpu" and work.grad.dtype in GRADS and work.new_residual.dtype in STATES

    def sample(self, work: Pass, start: int, stride: int) -> Tensor:
        n = work.grad.numel()
        out = numpy.empty(len(range(start, n, stride)), numpy.float32)
        pick = _sample(_kind(work), GRADS[work.grad.dtype], STATES[work.new_residual.dtype])
        u = work.new_residual if work.old_momentum is None else work.old_momentum
        addresses = (work.grad.data_ptr(), u.data_ptr(), work.old_residual.data_ptr())
        pick(*addresses, start, stride, work.rule.momentum or 0.0, work.scale, out)
        return torch.from_numpy(out)

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Tensor]:
        counts = [-(-work.grad.numel() // BLOCK) for work in works]
        firsts = [sum(counts[:i]) for i in range(len(works))]
        if self._masks.size < sum(counts):
            self._masks = numpy.empty(sum(counts), numpy.uint64)
        threads = max(1, min(torch.get_num_threads(), sum(counts) // MIN_BLOCKS))
        cuts = [sum(counts) * t // threads for t in range(threads + 1)]
        shares = [
            [
                self._part(work, threshold, first, max(low - first, 0), min(high - first, count))
                for work, threshold, first, count in zip(works, thresholds, firsts, counts, strict=True)
                if low < first + count and first < high
            ]
            for low, high in pairwise(cuts)
        ]
        if threads > 1 and (self._pool is None or self._threads < threads):
            self.close()
            self._pool, self._threads = ThreadPoolExecutor(threads - 1, "thinwire-kernels"), threads
        others = [cast(ThreadPoolExecutor, self._pool).submit(_run, share) for share in shares[1:]]
        _run(shares[0])
        for other in others:
            other.result()
        return [
            torch.from_numpy(_positions(self._masks[first : first + count]))
            for first, count in zip(firsts, counts, strict=True)
        ]

    def _part(self, work: Pass, threshold: Tensor, first: int, low: int, high: int) -> Callable[[], None]:
        """Blocks ``low`` to ``high`` of a pass, whose first block has word ``first``."""
        n = work.grad.numel()
        v, new_v = work.old_residual, work.new_residual
        u = v if work.old_momentum is None else work.old_momentum
        new_u = new_v if work.new_momentum is None else work.new_momentum
        tensors = (work.grad, u, v, new_u, new_v)
        addresses = [t.data_ptr() + low * BLOCK * t.itemsize for t in tensors]
        aligned = all(address % (blocks.LANES * new_v.itemsize) == 0 for address in addresses[3:])
        run = _pass(_kind(work), GRADS[work.grad.dtype], STATES[new_v.dtype], aligned)
        count = min(n, high * BLOCK) - low * BLOCK
        masks = self._masks[first + low : first + high]
        least = float(threshold)
        return lambda: run(*addresses, count, work.rule.momentum or 0.0, work.scale, least, masks)

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        k = indices.numel()
        low, high = elias_fano.sizes(k, n)
        out = numpy.zeros(low + high, numpy.uint8)
        _encode(indices.numpy(), elias_fano.low_width(k, n), low, out)
        return torch.from_numpy(out)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        out = numpy.empty(k, numpy.int64)
        _decode(packed.numpy(), elias_fano.low_width(k, n), elias_fano.sizes(k, n)[0], out)
        return torch.from_numpy(out)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _run(parts: Sequence[Callable[[], None]]) -> None:
    for part in parts:
        part()


@cache
def _pass(kind: str, grad: str, state: str, past_cache: bool) -> Any:
    """``f(g, u, v, new_u, new_v, n, momentum, scale, threshold, masks)``: addresses of ``n`` elements each."""
    block = blocks.accumulate(kind, grad, state, past_cache)
    edge = blocks.accumulate(kind, grad, state, False)
    wide_g, wide = BLOCK * blocks.ITEMSIZE[grad], BLOCK * blocks.ITEMSIZE[state]
    copy = blocks.copy

    @_njit(nogil=True)
    def run(
        g: int,
        u: int,
        v: int,
        new_u: int,
        new_v: int,
        n: int,
        momentum: float,
        scale: float,
        threshold: float,
        masks: Any,
    ) -> None:
        m, s, t = numpy.float32(momentum), numpy.float32(scale), numpy.float32(threshold)
        whole = n // 64
        for i in range(whole):
            a, b = i * wide_g, i * wide
            masks[i] = block(g + a, u + b, v + b, new_u + b, new_v + b, m, s, t)
        rest = n - whole * 64
        if rest:  # the last elements go through a block of their own
            room = numpy.zeros((5, 64), numpy.float32)
            r, step = room.ctypes.data, 256
            a, b = whole * wide_g, whole * wide
            rest_g, rest_s = rest * wide_g // 64, rest * wide // 64
            copy(r, g + a, rest_g)
            copy(r + step, u + b, rest_s)
            copy(r + 2 * step, v + b, rest_s)
            word = edge(r, r + step, r + 2 * step, r + 3 * step, r + 4 * step, m, s, t)
            copy(g + a, r, rest_g)
            if new_u != new_v:
                copy(new_u + b, r + 3 * step, rest_s)
            copy(new_v + b, r + 4 * step, rest_s)
            masks[whole] = word & ((numpy.uint64(1) << numpy.uint64(rest)) - numpy.uint64(1))

    return run


@cache
def _sample(kind: str, grad: str, state: str) -> Any:
    """``f(g, u, v, start, stride, momentum, scale, out)``: magnitudes of what a pass would leave there."""
    load_g, load = blocks.load(grad), blocks.load(state)
    size_g, size = blocks.ITEMSIZE[grad], blocks.ITEMSIZE[state]
    plain, nesterov, short = kind == "plain", kind == "nesterov", state == "bfloat16"

    @_njit(nogil=True)
    def pick(g: int, u: int, v: int, start: int, stride: int, momentum: float, scale: float, out: Any) -> None:
        m, s = numpy.float32(momentum), numpy.float32(scale)
        for i in range(out.size):
            at = start + i * stride
            x, y = load_g(g + at * size_g) * s, load(v + at * size)
            if plain:
                z = y + x
            elif nesterov:
                z = (y + x) + (load(u + at * size) + x) * m
            else:
                z = y + (load(u + at * size) * m + x)
            out[i] = abs(blocks.as_bfloat16(z)) if short else abs(z)

    return pick


@_njit(nogil=True)
def _positions(masks: Any) -> Any:
    """Where bits are set, ascending."""
    one = numpy.uint64(1)
    count = 0
    for word in masks:
        while word:
            word &= word - one
            count += 1
    out = numpy.empty(count, numpy.int64)
    at = 0
    for i in range(masks.size):
        word = masks[i]
        while word:
            out[at] = i * 64 + blocks.lowest_bit(word)
            word &= word - one
            at += 1
    return out


@_njit(nogil=True)
def _encode(indices: Any, width: int, low_bytes: int, out: Any) -> None:
    """``wire.elias_fano`` by bytes: low bits as one stream, and a bitmap."""
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


@_njit(nogil=True)
def _decode(packed: Any, width: int, low_bytes: int, out: Any) -> None:
    pending, filled, at, j = numpy.uint64(0), 0, 0, 0
    for i in range(low_bytes, packed.size):
        byte = packed[i]
        while byte and j < out.size:
            position = blocks.lowest_bit(numpy.uint64(byte))
            byte &= byte - numpy.uint8(1)
            low = numpy.int64(0)
            for part in range(0, width, 32):
                bits = min(32, width - part)
                while filled < bits:
                    pending |= numpy.uint64(packed[at]) << numpy.uint64(filled)
                    filled += 8
                    at += 1
                low |= numpy.int64(pending & ((numpy.uint64(1) << numpy.uint64(bits)) - numpy.uint64(1))) << part
                pending >>= numpy.uint64(bits)
                filled -= bits
            out[j] = ((((i - low_bytes) * 8 + position) - j) << width) | low
            j += 1
