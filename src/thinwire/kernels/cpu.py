"""The kernels for CPUs, compiled by numba (``pip install thinwire[cpu]``): one pass over memory, on several threads.

A pass goes over blocks of 64 elements. It copies the elements that reach the threshold while the block is in the
cache, since reading them later would be a cache miss per element. A pass has room for 4 k elements; if more reach
the threshold, a second pass finds them.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, cast

import numba
import numpy
import torch
from torch import Tensor

from thinwire.coding import elias_fano
from thinwire.core.loops import Cut, Found, Pass
from thinwire.kernels import cpu_bits, cpu_blocks
from thinwire.kernels.reference import BITS, Reference, above, kth_largest, resolved

BLOCK = cpu_blocks.BLOCK
MIN_BLOCKS = 2**12
"""Fewest blocks per thread: with fewer, another thread does not pay."""
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80}
"""The bits of infinity; those of NaN are larger."""
BITS_OF = {torch.float32: numpy.int32, torch.bfloat16: numpy.int16}
ROOM = 4
"""Elements a pass can keep, as a multiple of k; a sampled threshold lets 1 to 2 k pass."""
STATES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
GRADS = STATES | {torch.float16: "float16"}
Kept: TypeAlias = tuple[Any, Any]
"""Indices, and the bits of the values at them."""
Part: TypeAlias = Callable[[], Kept | None]
"""A part of a pass; returns what it found, None if that did not fit."""


def _kind(work: Pass) -> str:
    return "plain" if work.rule.momentum is None else "nesterov" if work.rule.nesterov else "momentum"


class Cpu(Reference):
    """Kernels in numba, on at most as many threads as torch uses."""

    def __init__(self) -> None:
        self.name = f"cpu (numba {numba.__version__})"
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1

    def runs(self, work: Pass) -> bool:
        return work.grad.device.type == "cpu" and work.grad.dtype in GRADS and work.new_residual.dtype in STATES

    def sample(self, work: Pass, start: int, stride: int, run: int) -> Tensor:
        n = work.grad.numel()
        out = numpy.empty(run * len(range(start, n - run + 1, stride)), numpy.float32)
        pick = cpu_blocks.compiled_sample(_kind(work), GRADS[work.grad.dtype], STATES[work.new_residual.dtype])
        u = work.new_residual if work.old_momentum is None else work.old_momentum
        addresses = (work.grad.data_ptr(), u.data_ptr(), work.old_residual.data_ptr())
        pick(*addresses, start, stride, run, work.rule.momentum or 0.0, work.scale, out)
        if work.new_residual.dtype == torch.bfloat16:  # the magnitudes are already rounded to it
            return torch.from_numpy((out.view(numpy.uint32) >> 16).astype(numpy.int16)).view(torch.bfloat16)
        return torch.from_numpy(out)

    def accumulate(self, works: Sequence[Pass], cuts: Sequence[Cut]) -> list[Found]:
        counts = [-(-work.grad.numel() // BLOCK) for work in works]
        *firsts, total = accumulate(counts, initial=0)
        threads = max(1, min(torch.get_num_threads(), total // MIN_BLOCKS))
        edges = [total * t // threads for t in range(threads + 1)]
        shares: list[dict[int, Part]] = [
            {
                i: _part(work, cut, max(low - first, 0), min(high - first, count))
                for i, (work, cut, first, count) in enumerate(zip(works, cuts, firsts, counts, strict=True))
                if low < first + count and first < high
            }
            for low, high in pairwise(edges)
        ]
        done = self._run_all([partial(_run, share) for share in shares])
        answers: list[Found] = []
        for i, (work, cut) in enumerate(zip(works, cuts, strict=True)):
            parts, again = [found[i] for found in done if i in found], partial(self.above, work.new_residual)
            found = again(cut.threshold) if None in parts else joined(parts, work.new_residual.dtype)
            answers.append(resolved(found, cut, again, self))
        return answers

    def look(self, x: Tensor, cut: Cut) -> Found:
        return resolved(self.above(x, cut.threshold), cut, partial(self.above, x), self)

    def above(self, x: Tensor, threshold: Tensor) -> Found:
        """Find the elements of ``x`` ``[n]`` with ``|x|`` not below the threshold."""
        if x.dtype not in STATES:
            return above(x, threshold)
        masks = numpy.empty(-(-x.numel() // BLOCK), numpy.uint64)
        as_bits = x.view(BITS[x.dtype]).numpy()
        cpu_bits.above(as_bits, int(threshold.view(BITS[x.dtype])), masks)
        return joined([cpu_bits.found(masks, as_bits)], x.dtype)

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        if magnitude.dtype not in STATES:
            return super().kth(magnitude, k)
        kth = _kth_largest(magnitude.view(BITS[magnitude.dtype]).numpy(), k, INFINITY[magnitude.dtype])
        return torch.from_numpy(numpy.array(kth, BITS_OF[magnitude.dtype])).view(magnitude.dtype)

    def largest(self, x: Tensor, k: int) -> Tensor:
        if x.dtype != torch.float32 or not 0 < k < x.numel():
            return super().largest(x, k)
        as_bits, infinity, out = x.view(torch.int32).numpy(), INFINITY[x.dtype], numpy.empty(k, numpy.int64)
        cpu_bits.at_least(as_bits, _kth_largest(as_bits, k, infinity), infinity, out)
        return torch.from_numpy(out)

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        if out.dtype == torch.float32:
            cpu_bits.add(out.numpy(), indices.numpy(), values.numpy(), alpha)
        else:
            super().add(out, indices, values, alpha)

    def _run_all(self, shares: Sequence[Callable[[], dict[int, Any]]]) -> list[dict[int, Any]]:
        """Run the first share on this thread and the others on the pool."""
        if len(shares) > 1 and (self._pool is None or self._threads < len(shares)):
            self.close()
            self._pool, self._threads = ThreadPoolExecutor(len(shares) - 1, "thinwire-kernels"), len(shares)
        others = [cast(ThreadPoolExecutor, self._pool).submit(share) for share in shares[1:]]
        return [shares[0](), *(other.result() for other in others)]

    def merge(self, indices: Sequence[Tensor], values: Sequence[Tensor], alpha: float) -> Found:
        if values[0].dtype != torch.float32:
            return super().merge(indices, values, alpha)
        every, summed = torch.cat([*indices]), torch.cat([*values])
        there, total = torch.empty_like(every), torch.empty_like(summed)
        edges = numpy.array([*accumulate((one.numel() for one in indices), initial=0)], numpy.int64)
        count = cpu_bits.merge(every.numpy(), summed.numpy(), edges, alpha, there.numpy(), total.numpy())
        return (there[:count], total[:count]) if count >= 0 else super().merge(indices, values, alpha)

    def gather(self, packed: Sequence[Tensor], values: Sequence[Tensor], n: int, alpha: float) -> Found:
        if values[0].dtype != torch.float32:
            return super().gather(packed, values, n, alpha)
        senders, k = len(packed), values[0].numel()
        coded, summed = torch.cat([*packed]).view(senders, -1).numpy(), torch.cat([*values]).numpy()
        every, there, total = (numpy.empty(senders * k, dtype) for dtype in (numpy.int64, numpy.int64, numpy.float32))
        width, low = elias_fano.low_width(k, n), elias_fano.sizes(k, n)[0]
        count = cpu_bits.gather(coded, width, low, every, summed, alpha, there, total)
        if count < 0:  # the bytes are damaged
            return super().gather(packed, values, n, alpha)
        return torch.from_numpy(there[:count]), torch.from_numpy(total[:count])

    def coordinates(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        out = numpy.empty((len(shape), indices.numel()), numpy.int64)
        cpu_bits.coordinates(indices.numpy(), numpy.array(shape, numpy.int64), out)
        return torch.from_numpy(out)

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        if values.dtype != torch.float32:
            return super().without_repeats(indices, values)
        if not cpu_bits.repeats(indices.numpy()):
            return values
        values = values.clone()
        cpu_bits.without_repeats(indices.numpy(), values.numpy())
        return values

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        k = indices.numel()
        low, high = elias_fano.sizes(k, n)
        out = numpy.zeros(low + high, numpy.uint8)
        cpu_bits.encode(indices.numpy(), elias_fano.low_width(k, n), low, out)
        return torch.from_numpy(out)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        out = numpy.empty(k, numpy.int64)
        cpu_bits.decode(packed.numpy(), elias_fano.low_width(k, n), elias_fano.sizes(k, n)[0], out)
        return torch.from_numpy(out)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _kth_largest(as_bits: Any, k: int, infinity: int) -> int:
    """Find the k-th largest magnitude, as bits: for small k by the compiled kernel, else by NumPy."""
    if 4 * k <= as_bits.size // BLOCK:
        return int(cpu_bits.kth_largest(as_bits, k, infinity))
    return min(int(kth_largest(as_bits & numpy.iinfo(as_bits.dtype).max, k)[0]), infinity)


def _part(work: Pass, cut: Cut, low: int, high: int) -> Part:
    """Prepare blocks ``low`` to ``high`` of a pass."""
    n = work.grad.numel()
    v, new_v = work.old_residual, work.new_residual
    u = v if work.old_momentum is None else work.old_momentum
    new_u = new_v if work.new_momentum is None else work.new_momentum
    addresses = [t.data_ptr() + low * BLOCK * t.itemsize for t in (work.grad, u, v, new_u, new_v)]
    aligned = all(address % (cpu_blocks.LANES * new_v.itemsize) == 0 for address in addresses[3:])
    run = cpu_blocks.compiled_pass(_kind(work), GRADS[work.grad.dtype], STATES[new_v.dtype], aligned, work.clear)
    count = min(n, high * BLOCK) - low * BLOCK
    settings = (count, work.rule.momentum or 0.0, work.scale, float(cut.threshold))

    def part() -> Kept | None:
        indices = numpy.empty(min(count, ROOM * cut.k + BLOCK), numpy.int64)
        values = numpy.empty(indices.size, BITS_OF[new_v.dtype])
        found = run(*addresses, *settings, low * BLOCK, indices, values)
        return (indices[:found], values[:found]) if found <= indices.size else None

    return part


def _run(parts: Mapping[int, Part]) -> dict[int, Any]:
    return {i: part() for i, part in parts.items()}


def joined(parts: Sequence[Kept], dtype: torch.dtype) -> Found:
    """Concatenate what the parts of a pass found."""
    each = [torch.from_numpy(indices) for indices, _ in parts], [torch.from_numpy(as_bits) for _, as_bits in parts]
    indices, values = (
        some[0] if len(some) == 1 else torch.cat(some or [torch.empty(0, dtype=torch.float32, device="cpu")])
        for some in each
    )
    return indices.long(), values.view(dtype)
