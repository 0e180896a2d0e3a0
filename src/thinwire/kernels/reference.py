"""The kernels in plain PyTorch: always there, and what the compiled ones must equal bit for bit.

A pass goes over chunks that stay in the cache: new states, the maximum of each block, the cleared gradient. Only
blocks whose maximum reaches the threshold are looked into, since finding the few that matter among all elements
(``nonzero``) costs more than the pass itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, repeat
from typing import Any, cast

import torch
from torch import Tensor

from thinwire.loops import Cut, Found, Kernels, Pass
from thinwire.memories.feedback import accumulate
from thinwire.wire import elias_fano

CHUNK = 2**18
SPAN = 2**21
"""Elements that are searched at once: fewer cost calls, more cost memory that is not in the cache."""
BLOCK = 2**6
LOG = 6
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""Integers of the size of a float."""


def at_least(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Ascending indices of what is not below the threshold; NaN is not, so that it is sent and seen."""
    return _not_below(magnitude, threshold).nonzero().view(-1)


def _not_below(magnitude: Tensor, threshold: Tensor) -> Tensor:
    if (bits := BITS.get(magnitude.dtype)) is not None:  # magnitudes compare like their bits, NaN above infinity
        return magnitude.view(bits) >= threshold.view(1).view(bits)
    return torch.lt(magnitude, threshold).logical_not_()


class Reference:
    """Plain PyTorch, on any device."""

    name = "reference"

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
            settled(self._one(work, cut), cut, partial(above, work.new_residual), self)
            for work, cut in zip(works, cuts, strict=True)
        ]

    def _one(self, work: Pass, cut: Cut) -> Found:
        search = Search(work.new_residual, cut.threshold)
        old, new_u, grads = (chunks(x) for x in (work.old_residual, work.new_momentum, work.grad))
        for grad, v, new_v, u, w in zip(
            grads, old, chunks(work.new_residual), chunks(work.old_momentum), new_u, strict=False
        ):
            accumulate(work.rule, work.scale, grad, v, new_v, u, w)
            search.take(
                new_v, grad if grad.dtype == new_v.dtype else None
            )  # it is in the cache, and read for the last time
            if work.clear:
                grad.zero_()
        return search.found()

    def look(self, x: Tensor, cut: Cut) -> Found:
        return settled(above(x, cut.threshold), cut, partial(above, x), self)

    def fill(self, indices: Tensor, values: Tensor, k: int) -> Found:
        there = values != 0  # NaN is
        if not there.all():
            indices, values = indices[there], values[there]
        if missing := k - indices.numel():
            last = indices[-1:] if indices.numel() else indices.new_zeros(1)
            indices, values = torch.cat([indices, last.expand(missing)]), torch.nn.functional.pad(values, (0, missing))
        return indices, values

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        whole = magnitude.numel() // BLOCK * BLOCK
        if 4 * k * BLOCK <= whole:  # they stand in the k blocks of largest maximum
            rows = magnitude[:whole].view(-1, BLOCK)
            hot = torch.topk(rows.amax(1), k, sorted=False).indices
            magnitude = torch.cat([rows[hot].view(-1), magnitude[whole:]])
        return torch.topk(magnitude, k, sorted=False).values.nan_to_num(math.inf, math.inf).min()

    def largest(self, x: Tensor, k: int) -> Tensor:
        n, magnitude = x.numel(), x.abs()
        if k >= n:
            return torch.arange(n, device=x.device)
        if k == 0:
            return torch.empty(0, dtype=torch.int64, device=x.device)
        threshold = self.kth(magnitude, k)
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

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values[:1], values[1:].masked_fill(indices[1:] == indices[:-1], 0.0)])

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        return elias_fano.encode(indices, n)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        return elias_fano.decode(packed, k, n)

    def close(self) -> None:
        pass


def settled(found: Found, cut: Cut, again: Callable[[Tensor], Found], kernels: Kernels) -> Found:
    """What is sent, where ``found`` is all that is not below the threshold; ``again`` finds it for a lower one."""
    if found[0].numel() < cut.enough:
        levels = cut.levels()
        for before, level in pairwise(levels):
            if found[0].numel() >= cut.enough or bool(before == levels[-1]):  # as low as can be, or infinite
                break
            found = again(level)
    indices, values = found
    if indices.numel() < cut.k:
        return kernels.fill(indices, values, cut.k)
    if indices.numel() > cut.k:
        kept = kernels.largest(values, cut.k)
        return indices[kept], values[kept]
    return found


def above(x: Tensor, threshold: Tensor) -> Found:
    """Where ``|x|`` of ``[n]`` is not below the threshold."""
    search = Search(x, threshold)
    for part in chunks(x):
        search.take(part)
    return search.found()


def runs(x: Tensor, start: int, stride: int, run: int) -> Tensor:
    """A copy of ``run`` elements of ``x`` ``[n]`` at every ``stride``-th from ``start`` on."""
    count = len(range(start, x.numel() - run + 1, stride))
    some = x.as_strided((count, run), (stride, 1), x.storage_offset() + start)
    return some.clone(memory_format=torch.contiguous_format).view(-1)


def chunks(x: Tensor | None) -> Iterable[Any]:
    if x is None:
        return repeat(None)
    # elsewhere a launch costs more than the cache gives
    return cast(Any, x).split(CHUNK if x.device.type == "cpu" else max(BLOCK, x.numel()))


class Search:
    """Where ``|x|`` of ``[n]`` is not below the threshold.

    Each chunk leaves the maxima of its blocks while it is in the cache; after some chunks these tell where to look.
    """

    def __init__(self, x: Tensor, threshold: Tensor) -> None:
        self._x, self._threshold = x, threshold
        self.maxima = x.new_empty(x.numel() // BLOCK)
        self._rows, self._magnitudes = x.new_empty(0), x.new_empty(0)
        self._room: Tensor | None = None
        self._found: list[Found] = []
        self._searched = self._taken = 0

    def take(self, part: Tensor, room: Tensor | None = None) -> None:
        """The next chunk; ``room`` may be overwritten."""
        if room is None:
            room = self._room = torch.empty_like(part) if self._room is None else self._room
        whole, block = part.numel() // BLOCK, self._taken // BLOCK
        magnitudes = torch.abs(part, out=room[: part.numel()])[: whole * BLOCK]
        maxima = self.maxima[block : block + whole]
        if (bits := BITS.get(part.dtype)) is not None:  # compared as integers, in half the time
            magnitudes, maxima = magnitudes.view(bits), maxima.view(bits)
        torch.amax(magnitudes.view(-1, BLOCK), dim=1, out=maxima)
        self._taken += part.numel()
        if self._taken - self._searched >= SPAN or self._taken == self._x.numel():
            self._found.append(self.within(self._searched, self._taken))
            self._searched = self._taken

    def within(self, start: int, stop: int) -> Found:
        """What there is from ``start``, of a block, to ``stop``; maxima are known and spent.

        Little is allocated, since fresh memory is slow.
        """
        blocks, end = slice(start // BLOCK, stop // BLOCK), stop // BLOCK * BLOCK
        hot = at_least(self.maxima[blocks], self._threshold)
        of_blocks = (hot.numel(), BLOCK)
        rows, magnitudes = self._rows.resize_(of_blocks), self._magnitudes.resize_(of_blocks)
        torch.index_select(self._x[start:end].view(-1, BLOCK), 0, hot, out=rows)
        mask = _not_below(torch.abs(rows, out=magnitudes), self._threshold)
        words = mask.view(-1).view(torch.int64)  # 8 at once, since few are there
        some = words.nonzero().view(-1)
        there = words.index_select(0, some).view(torch.bool).nonzero().view(-1)
        there = some.index_select(0, there >> 3).mul_(8).add_(there & 7)
        indices = hot.index_select(0, there >> LOG).mul_(BLOCK).add_(there & (BLOCK - 1)).add_(start)
        values = rows.view(-1).index_select(0, there)
        if end == stop:
            return indices, values
        rest = at_least(self._x[end:stop].abs(), self._threshold).add_(end)
        return torch.cat([indices, rest]), torch.cat([values, self._x[rest]])

    def found(self) -> Found:
        if len(self._found) == 1:
            return self._found[0]
        indices, values = zip(*self._found, strict=True)
        return torch.cat(indices), torch.cat(values)


REFERENCE = Reference()
