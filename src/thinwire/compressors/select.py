"""Which elements are sent: the k largest magnitudes, exactly, or by a threshold read off a sample.

Two rules hold everywhere: indices come out ascending, and among equal magnitudes the lower index wins, so the
result depends on no sort algorithm. Nothing is ever cut off by position.

Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 5 (hierarchical sampling).

Departures: the sample holds at least 100 elements above the threshold, where the reference code is content with
10; it starts at another element in each step; and when the threshold lets too many through, the largest of them
are kept, where the reference code keeps the first.
"""

import math

import torch
from torch import Tensor

from thinwire.core import Context

SAMPLED_ABOVE = 100
"""A sample must hold this many elements above the threshold: the selected count then spreads by 10 %."""
EXACT_BELOW = 100_000
"""Elements below which an exact selection is as cheap."""


def smallest_of(magnitude: Tensor, k: int) -> Tensor:
    """The k-th largest magnitude, with NaN as large as infinity."""
    return torch.topk(magnitude, k, sorted=False).values.nan_to_num(math.inf, math.inf).min()


def at_least(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Ascending indices of what is not below the threshold; NaN is not, so that it is sent and seen."""
    return magnitude.lt(threshold).logical_not_().nonzero().view(-1)


def largest(magnitude: Tensor, k: int) -> Tensor:
    """Ascending indices, int64 ``[min(k, n)]``, of the k largest of ``magnitude`` ``[n]``."""
    n = magnitude.numel()
    if k >= n:
        return torch.arange(n, device=magnitude.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=magnitude.device)
    threshold = smallest_of(magnitude, k)
    candidates = at_least(magnitude, threshold)
    if candidates.numel() == k:
        return candidates
    above = magnitude[candidates].nan_to_num(math.inf, math.inf) > threshold
    ties = candidates[~above][: k - int(above.sum())]
    return torch.cat([candidates[above], ties]).sort().values


def sample_size(n: int, density: float, ratio: float) -> int:
    return max(math.ceil(ratio * n), math.ceil(SAMPLED_ABOVE / density))


def sample(magnitude: Tensor, size: int, row: int, ctx: Context) -> Tensor:
    """Every s-th element, from a phase that changes with each step; ``s`` shares no factor with the row length."""
    stride = max(1, magnitude.numel() // size)
    while math.gcd(stride, row) > 1:
        stride -= 1
    return magnitude[ctx.draw(stride) :: stride]


def by_threshold(
    magnitude: Tensor, k: int, row: int, ctx: Context, *, ratio: float, lower: float, attempts: int
) -> Tensor:
    """Ascending indices, int64 ``[at most k]``, of about the k largest of ``magnitude`` ``[n]``.

    The threshold comes from a sample. Where more than k pass, the k largest of them stay; where fewer than
    ``lower * k`` do, the threshold is multiplied by ``lower`` and tried again, at most ``attempts`` times.

    Args:
        row: elements in the tensor's last dimension, which the sample's stride must not follow.
        ratio: smallest share of the elements to sample.
    """
    density = k / magnitude.numel()
    sampled = sample(magnitude, sample_size(magnitude.numel(), density, ratio), row, ctx)
    threshold = smallest_of(sampled, max(1, math.ceil(density * sampled.numel())))
    chosen = at_least(magnitude, threshold)
    for _ in range(attempts):
        if chosen.numel() >= lower * k:
            break
        threshold = threshold * lower
        chosen = at_least(magnitude, threshold)
    return chosen if chosen.numel() <= k else chosen[largest(magnitude[chosen], k)]
