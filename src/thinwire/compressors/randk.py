"""Rand-k: send the elements at random positions, which every receiver draws from the same seed."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from thinwire.coding.header import is_nonfinite
from thinwire.core import Compressor, Context, Decompressed, Payload, Sparse, State, Traits, flat, register
from thinwire.core.capabilities import Adjustable
from thinwire.core.checks import check_fields, flag, share


def distinct(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k different integers below n, int64 ascending; every set is equally likely.

    It draws until k are distinct. For k above n/2 with a mask, it draws the integers to leave out.
    """
    if k <= n / 64:  # above, a mask of all elements is faster than sorting the drawn positions
        chosen = torch.empty(0, dtype=torch.int64, device="cpu")
        while missing := k - chosen.numel():
            drawn = torch.randint(n, (missing,), generator=generator, device="cpu")
            chosen = cast(Tensor, torch.unique(torch.cat([chosen, drawn])))
        return chosen
    fewer = min(k, n - k)
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    while missing := fewer - int(mask.count_nonzero()):
        mask[torch.randint(n, (missing,), generator=generator, device="cpu")] = True
    return (mask if fewer == k else ~mask).nonzero().view(-1)


@register("randk")
@dataclass(frozen=True)
class RandK(Compressor, Adjustable):
    """Sends ``k = ceil(density * n)`` elements at positions that are drawn by seed, without replacement.

    ``scaled``: values times n/k, unbiased with ``omega = n/k - 1``. Otherwise, for error feedback, plain values:
    ``E||x - C(x)||^2 = (1 - k/n) ||x||^2``. With a shared seed all workers send the same positions, so an all-reduce
    can sum the values.

    Args:
        density: kept / total, in (0, 1].
        shared: True if all workers draw the same positions.
        scaled: True to multiply the values by n/k, which makes the mean unbiased.

    Raises:
        ThinwireError: ``density`` is outside its range.

    **Wire**: k values and no indices, summed by an all-reduce (``shared``), or gathered.

    Example:
        >>> RandK(0.01).compress(torch.empty(10_000, device="meta"), {}, NOWHERE)[0].shape
        torch.Size([100])

    Source: S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599, definition 2.1;
    scaled: J. Wangni, J. Wang, J. Liu, T. Zhang, "Gradient Sparsification for Communication-Efficient Distributed
    Optimization", 2018, arXiv:1710.09854.

    Departures: none. If ``x`` has a nonfinite element the first value is NaN, since the positions may miss the element.
    """

    density: float
    shared: bool = True
    scaled: bool = True

    def __post_init__(self) -> None:
        check_fields(self, density=share("0.01"), shared=flag, scaled=flag)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            summable=self.shared,
            needs_feedback=not self.scaled and self.density < 1.0,
            keeps_values=True,
            contraction=self._contraction,
            variance=self._variance,
        )

    def k(self, n: int) -> int:
        """Return the number of elements sent of n."""
        return min(n, math.ceil(self.density * n))

    def _contraction(self, n: int) -> float:
        kept = self.k(n) / max(n, 1)
        return kept if not self.scaled else max(0.0, 2.0 - max(n, 1) / max(self.k(n), 1))

    def _variance(self, n: int) -> float | None:
        return max(n, 1) / max(self.k(n), 1) - 1.0 if self.scaled or self.density == 1.0 else None

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n, k = x.numel(), self.k(x.numel())
        if x.is_meta:
            return (x.new_empty(k),)
        values = flat(x)[self._positions(n, ctx).to(x.device)]
        if self.scaled and k < n:
            limit = torch.finfo(x.dtype).max
            values = values.mul_(n / k).clamp_(-limit, limit)
        if n:
            values[:1].masked_fill_(is_nonfinite(x), torch.nan)
        return (values,)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        n = like.numel()
        return Sparse(self._positions(n, ctx).to(payload[0].device), payload[0], self.k(n) / max(n, 1))

    def _positions(self, n: int, ctx: Context) -> Tensor:
        return distinct(n, self.k(n), ctx.generator(shared=self.shared))
