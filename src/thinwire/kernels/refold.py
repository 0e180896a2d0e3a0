"""The kernels in plain PyTorch: always there, and what the compiled ones must equal bit for bit.

A pass goes over chunks that stay in the cache: new states, the maximum of each block, the cleared gradient. Only
blocks whose maximum reaches the threshold are looked into, since finding the few that matter among all elements
(``nonzero``) costs more than the pass itself.
"""

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
        maxima = Maxima(work.new_residual)
        old, new_u, grads = (chunks(x) for x in (work.old_residual, work.new_momentum, work.grad))
        for grad, v, new_v, u, w in zip(
            grads, old, chunks(work.new_residual), chunks(work.old_momentum), new_u, strict=False
        ):
            accumulate(work.rule, work.scale, grad, v, new_v, u, w)
            grad.zero_()
            maxima.of(new_v)
        return within(work.new_residual, maxima.found, threshold)

    def look(self, x: Tensor, threshold: Tensor) -> Found:
        maxima = Maxima(x)
        for part in chunks(x):
            maxima.of(part)
        return within(x, maxima.found, threshold)

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        out.index_add_(0, indices, values, alpha=alpha)

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


class Maxima:
    """The largest magnitude of each whole block of ``x`` ``[n]``, chunk after chunk."""

    def __init__(self, x: Tensor) -> None:
        self.found = x.new_empty(x.numel() // BLOCK)
        self._room = x.new_empty(0)
        self._at = 0

    def of(self, part: Tensor) -> None:
        whole = part.numel() // BLOCK
        if self._room.numel() < whole * BLOCK:
            self._room = part.new_empty(whole * BLOCK)
        magnitude = torch.abs(part[: whole * BLOCK], out=self._room[: whole * BLOCK])
        torch.amax(magnitude.view(whole, BLOCK), dim=1, out=self.found[self._at : self._at + whole])
        self._at += whole


def within(x: Tensor, maxima: Tensor, threshold: Tensor) -> Found:
    """Where ``|x|`` is not below the threshold, given the maximum of each whole block; NaN is not below."""
    whole = x.numel() // BLOCK
    hot = maxima[:whole].lt(threshold).logical_not_().nonzero().view(-1)
    rows = x[: whole * BLOCK].view(whole, BLOCK).index_select(0, hot)
    row, column = rows.abs().lt(threshold).logical_not_().nonzero().unbind(1)
    indices, values = hot[row] * BLOCK + column, rows[row, column]
    if whole * BLOCK == x.numel():
        return indices, values
    end = x[whole * BLOCK :]
    rest = end.abs().lt(threshold).logical_not_().nonzero().view(-1)
    return torch.cat([indices, rest + whole * BLOCK]), torch.cat([values, end[rest]])


REFERENCE = Reference()
