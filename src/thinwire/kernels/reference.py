"""The kernels in plain PyTorch: always available, and the compiled ones must equal them bit for bit.

A pass goes over chunks that fit the cache. For each it computes the new states, finds the elements that reach the
threshold and clears the gradient. On CPUs NumPy counts, and on one thread compares: torch does not vectorise these.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, repeat
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from thinwire.coding import elias_fano
from thinwire.core.loops import Cut, Found, Kernels, Pass
from thinwire.kernels.accumulate import accumulate

CHUNK = 2**19
BLOCK = 2**6
WORD = 8
ALONE = 2**15
"""Most elements for which torch uses one thread."""
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integer dtype of each float's size: magnitudes compare like their bits, with NaN above infinity."""


def at_least(magnitude: Tensor, threshold: Tensor, room: Any = None) -> Tensor:
    """Return the ascending indices of magnitudes ``[n]`` not below the threshold, and of NaN, so that NaN is sent.

    The threshold has the dtype of the magnitudes. ``room`` comes from ``mask_room`` and is overwritten.
    """
    bits = BITS[magnitude.dtype]
    magnitude, threshold = magnitude.view(bits), threshold.view(1).view(bits)
    if magnitude.device.type != "cpu":
        return (magnitude >= threshold).nonzero().view(-1)
    n = magnitude.numel()
    high = mask_room(n) if room is None else room[: -(-n // WORD) * WORD]
    high[n:] = False
    if n > ALONE and torch.get_num_threads() > 1:  # threads compare the data in their own caches
        torch.ge(magnitude, threshold, out=torch.from_numpy(high[:n]))
    else:
        numpy.greater_equal(magnitude.numpy(), threshold.numpy(), out=high[:n])
    words = high.view(numpy.uint64)
    some = numpy.flatnonzero(words != 0)  # test 8 at once, since few are set
    there = numpy.flatnonzero(words[some].view(numpy.bool_))
    return torch.from_numpy(some[there // WORD] * WORD + there % WORD)


def kth_largest(x: Any, k: int) -> Any:
    """Return the k-th largest element of an array ``[n]`` as an array ``[1]``; 1 <= k <= n."""
    columns = x.size // BLOCK
    if 4 * k <= columns:  # the k largest are in the k columns of largest maximum
        grid = x[: columns * BLOCK].reshape(BLOCK, columns)
        hot = numpy.argpartition(grid.max(0), columns - k)[columns - k :]
        x = numpy.concatenate([grid[:, hot].ravel(), x[columns * BLOCK :]])
    return numpy.partition(x, x.size - k)[x.size - k :][:1]


def kth_on_device(magnitude: Tensor, k: int) -> Tensor:
    """Compute ``Kernels.kth`` without the host."""
    return torch.topk(magnitude, k, sorted=False).values.nan_to_num(math.inf, math.inf).min()


def mask_room(n: int) -> Any:
    return numpy.empty(-(-n // WORD) * WORD, numpy.bool_)


class Reference:
    """Plain PyTorch, on any device."""

    name = "reference"
    encode_indices = staticmethod(elias_fano.encode)
    decode_indices = staticmethod(elias_fano.decode)

    def runs(self, work: Pass) -> bool:
        return True

    def sample(self, work: Pass, start: int, stride: int, run: int) -> Tensor:
        old = runs(work.old_residual, start, stride, run)
        u = None if work.old_momentum is None else runs(work.old_momentum, start, stride, run)
        new, new_u = torch.empty_like(old), None if u is None else torch.empty_like(u)
        accumulate(work.rule, work.scale, runs(work.grad, start, stride, run), old, new, u, new_u)
        return new.abs_()

    def accumulate(self, works: Sequence[Pass], cuts: Sequence[Cut]) -> list[Found]:
        return [
            resolved(_search(_accumulated(work), cut.threshold), cut, partial(above, work.new_residual), self)
            for work, cut in zip(works, cuts, strict=True)
        ]

    def look(self, x: Tensor, cut: Cut) -> Found:
        return resolved(above(x, cut.threshold), cut, partial(above, x), self)

    def fill(self, indices: Tensor, values: Tensor, k: int) -> Found:
        there = values != 0  # True for NaN
        if not there.all():
            indices, values = indices[there], values[there]
        if missing := k - indices.numel():
            last = indices[-1:] if indices.numel() else indices.new_zeros(1)
            indices, values = torch.cat([indices, last.expand(missing)]), torch.nn.functional.pad(values, (0, missing))
        return indices, values

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        if magnitude.device.type != "cpu":
            return kth_on_device(magnitude, k)
        x = magnitude.view(BITS[magnitude.dtype]).numpy()
        kth = torch.from_numpy(kth_largest(x & numpy.iinfo(x.dtype).max, k))  # NaN may have a sign
        return kth.view(magnitude.dtype).nan_to_num(math.inf, math.inf)[0]

    def largest(self, x: Tensor, k: int) -> Tensor:
        n, magnitude = x.numel(), x.abs()
        if k >= n:
            return torch.arange(n, device=x.device)
        if k == 0:
            return torch.empty(0, dtype=torch.int64, device=x.device)
        return self._chosen(magnitude, self.kth(magnitude, k), k)

    def _chosen(self, magnitude: Tensor, threshold: Tensor, k: int) -> Tensor:
        """Return the ascending indices of the magnitudes above the k-th largest, and of the first ones equal to it."""
        candidates = at_least(magnitude, threshold)
        if candidates.numel() == k:
            return candidates
        above = magnitude[candidates].nan_to_num(math.inf, math.inf) > threshold
        ties = candidates[~above][: k - int(above.sum())]
        return torch.cat([candidates[above], ties]).sort().values

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        out.index_add_(0, indices, values, alpha=alpha)

    def merge(self, indices: Sequence[Tensor], values: Sequence[Tensor], alpha: float) -> Found:
        every = torch.cat([*indices])
        there, places = cast("tuple[Tensor, Tensor]", torch.unique(every, return_inverse=True))
        total = values[0].new_zeros(there.numel())
        parts = cast("Sequence[Tensor]", cast(Any, places).split([one.numel() for one in indices]))
        for at, own in zip(parts, values, strict=True):
            total.index_add_(0, at, own, alpha=alpha)  # on CPU in this order
        return there, total

    def gather(self, packed: Sequence[Tensor], values: Sequence[Tensor], n: int, alpha: float) -> Found:
        indices = [self.decode_indices(one, own.numel(), n) for one, own in zip(packed, values, strict=True)]
        return self.merge(indices, list(map(self.without_repeats, indices, values)), alpha)

    def coordinates(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        where: list[Tensor] = []
        for size in shape[:0:-1]:  # as torch.unravel_index, which is slow
            rows = indices // size
            where.append(indices - rows * size)
            indices = rows
        return torch.stack([indices, *reversed(where)])

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values[:1], values[1:].masked_fill(indices[1:] == indices[:-1], 0.0)])

    def close(self) -> None:
        pass


def resolved(found: Found, cut: Cut, again: Callable[[Tensor], Found], kernels: Kernels) -> Found:
    """Return the ``k`` elements to send, from all ``found`` above the threshold; ``again`` searches below it."""
    if found[0].numel() < cut.enough:
        levels = cut.levels()
        for before, level in pairwise(levels):
            if found[0].numel() >= cut.enough or bool(before == levels[-1]):  # lowest already, or infinite
                break
            found = again(level)
    indices, values = found
    if indices.numel() < cut.k:
        return kernels.fill(indices, values, cut.k)
    if indices.numel() > cut.k:
        kept = kernels.largest(values, cut.k)
        return indices.index_select(0, kept), values.index_select(0, kept)
    return found


def above(x: Tensor, threshold: Tensor) -> Found:
    """Find the elements of ``x`` ``[n]`` with ``|x|`` not below the threshold."""
    return _search(((part, None) for part in chunks(x)), threshold)


def runs(x: Tensor, start: int, stride: int, run: int) -> Tensor:
    """Copy ``run`` elements of ``x`` ``[n]`` at every ``stride``-th from ``start`` on."""
    count = len(range(start, x.numel() - run + 1, stride))
    some = x.as_strided((count, run), (stride, 1), x.storage_offset() + start)
    return some.clone(memory_format=torch.contiguous_format).view(-1)


def chunks(x: Tensor | None) -> Iterable[Any]:
    if x is None:
        return repeat(None)
    # on other devices a kernel launch costs more than the cache saves
    return cast(Any, x).split(CHUNK if x.device.type == "cpu" else max(BLOCK, x.numel()))


def _accumulated(work: Pass) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Write the new states in chunks; yields each, and the memory of its gradient, which is in the cache, for reuse."""
    tensors = (work.grad, work.old_residual, work.new_residual, work.old_momentum, work.new_momentum)
    for grad, v, new_v, u, new_u in zip(*map(chunks, tensors), strict=False):
        accumulate(work.rule, work.scale, grad, v, new_v, u, new_u)
        yield new_v, grad if grad.dtype == new_v.dtype else None
        if work.clear:
            grad.zero_()


def _search(parts: Iterable[tuple[Tensor, Tensor | None]], threshold: Tensor) -> Found:
    """Compute ``above`` in chunks, each with memory to overwrite or None; fresh memory is slow, so it is kept."""
    mask: Any = None
    own: Tensor | None = None
    found: list[Found] = []
    taken = 0
    for part, room in parts:
        if mask is None and part.device.type == "cpu":  # the first chunk is the largest
            mask = mask_room(part.numel())
        if room is None:
            room = own = torch.empty_like(part) if own is None else own[: part.numel()]
        there = at_least(torch.abs(part, out=room), threshold, mask)
        found.append((there + taken, part[there]))
        taken += part.numel()
    if len(found) == 1:
        return found[0]
    indices, values = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(values)


REFERENCE = Reference()
