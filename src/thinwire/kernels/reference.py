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

from thinwire.core import Pass
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

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Tensor]:
        return [self._one(work, threshold) for work, threshold in zip(works, thresholds, strict=True)]

    def _one(self, work: Pass, threshold: Tensor) -> Tensor:
        n = work.grad.numel()
        # elsewhere a launch costs more than the cache gives
        chunk = CHUNK if work.grad.device.type == "cpu" else max(BLOCK, n)
        maxima = work.grad.new_empty(-(-n // BLOCK), dtype=work.new_residual.dtype)
        magnitude = torch.empty(min(n, chunk), dtype=work.new_residual.dtype, device=work.grad.device)
        states = (work.old_residual, work.new_residual, work.old_momentum, work.new_momentum)

        def chunks(x: Tensor | None, size: int = chunk) -> Iterable[Any]:
            return repeat(None) if x is None else cast(Any, x).split(size)

        for grad, largest, v, new_v, u, new_u in zip(
            chunks(work.grad), chunks(maxima, chunk // BLOCK), *map(chunks, states), strict=False
        ):
            accumulate(work.rule, work.scale, grad, v, new_v, u, new_u)
            grad.zero_()
            whole = grad.numel() // BLOCK
            seen = torch.abs(new_v, out=magnitude[: grad.numel()])[: whole * BLOCK]
            torch.amax(seen.view(whole, BLOCK), dim=1, out=largest[:whole])
        return within(work.new_residual, maxima, threshold)

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        return elias_fano.encode(indices, n)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        return elias_fano.decode(packed, k, n)

    def close(self) -> None:
        pass


def runs(x: Tensor, start: int, stride: int, run: int) -> Tensor:
    """``run`` elements of ``x`` ``[n]`` at every ``stride``-th from ``start`` on, all first ones first."""
    last = x.numel() - run
    return torch.cat([x[start + i : last + i + 1 : stride] for i in range(run)])


def within(x: Tensor, maxima: Tensor, threshold: Tensor) -> Tensor:
    """Ascending indices of ``|x|`` not below the threshold, given the maximum of each block; NaN is not below."""
    whole = x.numel() // BLOCK
    hot = maxima[:whole].lt(threshold).logical_not_().nonzero().view(-1)
    rows = x[: whole * BLOCK].view(whole, BLOCK).index_select(0, hot)
    row, column = rows.abs_().lt(threshold).logical_not_().nonzero().unbind(1)
    found = hot[row] * BLOCK + column
    if whole == maxima.numel():
        return found
    rest = x[whole * BLOCK :].abs().lt(threshold).logical_not_().nonzero().view(-1)
    return torch.cat([found, rest + whole * BLOCK])


REFERENCE = Reference()
