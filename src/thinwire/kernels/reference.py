"""The kernels in plain PyTorch: always there, and what the compiled ones must equal bit for bit.

A pass goes over chunks that stay in the cache: new states, the maximum of each block, the cleared gradient. Only
blocks whose maximum reaches the threshold are looked into, since finding the few that matter among all elements
(``nonzero``) costs more than the pass itself.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor

from thinwire.loops import Found, Pass
from thinwire.memories.feedback import accumulate
from thinwire.wire import elias_fano

CHUNK = 2**18
BLOCK = 64


def at_least(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Ascending indices of what is not below the threshold; NaN is not, so that it is sent and seen."""
    return magnitude.lt(threshold).logical_not_().nonzero().view(-1)


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

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Found]:
        return [self._one(work, threshold) for work, threshold in zip(works, thresholds, strict=True)]

    def _one(self, work: Pass, threshold: Tensor) -> Found:
        search = Search(work.new_residual, threshold)
        old, new_u, grads = (chunks(x) for x in (work.old_residual, work.new_momentum, work.grad))
        for grad, v, new_v, u, w in zip(
            grads, old, chunks(work.new_residual), chunks(work.old_momentum), new_u, strict=False
        ):
            accumulate(work.rule, work.scale, grad, v, new_v, u, w)
            if work.clear:
                grad.zero_()
            search.within(new_v)
        return search.found()

    def look(self, x: Tensor, threshold: Tensor) -> Found:
        search = Search(x, threshold)
        for part in chunks(x):
            search.within(part)
        return search.found()

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
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

    def union(self, indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", torch.unique(torch.cat([*indices]), return_inverse=True))

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        return elias_fano.encode(indices, n)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        return elias_fano.decode(packed, k, n)

    def close(self) -> None:
        pass


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
    """Where ``|x|`` of ``[n]`` is not below the threshold; chunk after chunk, while each is in the cache."""

    def __init__(self, x: Tensor, threshold: Tensor) -> None:
        self._threshold = threshold
        self._room = torch.empty_like(x[:CHUNK] if x.device.type == "cpu" else x)
        self._found: list[Found] = []
        self._at = 0

    def within(self, part: Tensor) -> None:
        whole = part.numel() // BLOCK * BLOCK
        magnitudes = torch.abs(part[:whole], out=self._room[:whole])
        indices, values = within(part, magnitudes.view(-1, BLOCK).amax(dim=1), self._threshold)
        self._found.append((indices.add_(self._at), values))
        self._at += part.numel()

    def found(self) -> Found:
        indices, values = zip(*self._found, strict=True)
        return torch.cat(indices), torch.cat(values)


def within(x: Tensor, maxima: Tensor, threshold: Tensor) -> Found:
    """Where ``|x|`` is not below the threshold, given the maximum of each whole block; NaN is not below."""
    whole = x.numel() // BLOCK
    hot = at_least(maxima[:whole], threshold)
    rows = x[: whole * BLOCK].view(whole, BLOCK).index_select(0, hot).view(-1)
    there = at_least(rows.abs(), threshold)
    indices = hot.index_select(0, there // BLOCK).mul_(BLOCK).add_(there % BLOCK)
    values = rows.index_select(0, there)
    if whole * BLOCK == x.numel():
        return indices, values
    end = x[whole * BLOCK :]
    rest = at_least(end.abs(), threshold)
    return torch.cat([indices, rest + whole * BLOCK]), torch.cat([values, end[rest]])


REFERENCE = Reference()
