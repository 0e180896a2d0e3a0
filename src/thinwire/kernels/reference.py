"""The kernels in plain PyTorch: always there, and what the compiled ones must equal bit for bit.

A pass goes over chunks that stay in the cache: new states, the maximum of each block, the cleared gradient. Only
blocks whose maximum reaches the threshold are looked into, since finding the few that matter among all elements
(``nonzero``) costs more than the pass itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.core import Pass
from thinwire.memory import accumulate
from thinwire.wire import elias_fano

CHUNK = 2**18
BLOCK = 128


class Reference:
    """Plain PyTorch, on any device."""

    name = "reference"

    def runs(self, work: Pass) -> bool:
        return True

    def sample(self, work: Pass, start: int, stride: int) -> Tensor:
        every = slice(start, None, stride)
        old, grad = work.old_residual[every], work.grad[every]
        new = torch.empty_like(old)
        u = None if work.old_momentum is None else work.old_momentum[every]
        accumulate(work.rule, work.scale, grad, old, new, u, None if u is None else torch.empty_like(u))
        return new.abs_()

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Tensor]:
        return [self._one(work, threshold) for work, threshold in zip(works, thresholds, strict=True)]

    def _one(self, work: Pass, threshold: Tensor) -> Tensor:
        n = work.grad.numel()
        # elsewhere a launch costs more than the cache gives
        chunk = CHUNK if work.grad.device.type == "cpu" else max(BLOCK, n)
        maxima = work.grad.new_empty(-(-n // BLOCK), dtype=work.new_residual.dtype)
        magnitude = torch.empty(min(n, chunk), dtype=work.new_residual.dtype, device=work.grad.device)
        for a in range(0, n, chunk):
            b = min(n, a + chunk)
            u = None if work.old_momentum is None else work.old_momentum[a:b]
            new_u = None if work.new_momentum is None else work.new_momentum[a:b]
            accumulate(work.rule, work.scale, work.grad[a:b], work.old_residual[a:b], work.new_residual[a:b], u, new_u)
            work.grad[a:b] = 0.0
            seen = torch.abs(work.new_residual[a:b], out=magnitude[: b - a])
            whole = (b - a) // BLOCK
            first = a // BLOCK
            torch.amax(seen[: whole * BLOCK].view(whole, BLOCK), dim=1, out=maxima[first : first + whole])
            if (b - a) % BLOCK:
                maxima[first + whole] = seen[whole * BLOCK :].amax()
        return within(work.new_residual, maxima, threshold)

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        return elias_fano.encode(indices, n)

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        return elias_fano.decode(packed, k, n)

    def close(self) -> None:
        pass


def within(x: Tensor, maxima: Tensor, threshold: Tensor) -> Tensor:
    """Ascending indices of ``|x|`` not below the threshold, given the maximum of each block; NaN is not below."""
    hot = maxima.lt(threshold).logical_not_().nonzero()
    where = (hot * BLOCK + torch.arange(BLOCK, device=hot.device)).view(-1)
    where = where[where < x.numel()]
    return where[x[where].abs().lt(threshold).logical_not_()]


REFERENCE = Reference()
