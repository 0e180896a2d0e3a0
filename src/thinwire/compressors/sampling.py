"""Which elements are sent: the k largest magnitudes, exactly, or by a threshold read off a sample.

Two rules hold everywhere: indices come out ascending, and among equal magnitudes the lower index wins, so the
result depends on no sort algorithm. Nothing is ever cut off by position.

Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 5 (hierarchical sampling).

Departures: the sample holds at least 43 elements above the threshold, where the reference code is content with
10; it starts at another element in each step; the threshold is one that a third more than k elements should pass,
so that k of them mostly do; and of those that do the largest are kept, where the reference code keeps the first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.core.context import Context
from thinwire.core.loops import Cut, Found, Kernels, smallest
from thinwire.kernels.fixed_shapes import exactly
from thinwire.kernels.reference import runs

SAMPLED_AMONG = 32
"""A sample must hold this many of the k largest."""
MARGIN = 1.35
"""How many elements should pass, in k. Their number spreads by 0.2 k, and more where neighbours are alike; fewer than
``lower`` k cost another look at all of them."""
RUN = 32
"""Elements of a sample that stand side by side: they come from memory together, and a page costs more than a line."""
EXACT_BELOW = 100_000
"""Elements below which an exact selection is as cheap."""


def largest_of_each(magnitude: Tensor, k: int) -> Tensor:
    """Ascending flat indices, int64 ``[rows * k]``, of the k largest of each row of ``magnitude`` ``[rows, n]``."""
    rows, n = magnitude.shape
    if k >= n or not rows:
        return torch.arange(rows * min(k, n), device=magnitude.device)
    magnitude = magnitude.nan_to_num(math.inf, math.inf)
    threshold = torch.topk(magnitude, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = magnitude >= threshold
    if int(chosen.count_nonzero()) > rows * k:
        chosen = exactly(magnitude, threshold, k)
    return chosen.view(-1).nonzero().view(-1)


def sample_size(n: int, density: float, ratio: float) -> int:
    return max(math.ceil(ratio * n), math.ceil(SAMPLED_AMONG / density))


@dataclass(frozen=True)
class Sampling:
    """About the ``k`` largest magnitudes, by a threshold that is read off ``run`` elements in ``stride``.

    The threshold is the ``rank``-th largest of the sample. Of those that pass it the k largest stay;
    where fewer than ``lower * k`` do, it is multiplied by ``lower`` and tried again, at most ``attempts`` times.
    """

    k: int
    start: int
    stride: int
    run: int
    rank: int
    lower: float
    attempts: int

    @staticmethod
    def plan(n: int, k: int, row: int, ctx: Context, *, ratio: float, lower: float, attempts: int) -> "Sampling":
        """The sample of one tensor of ``n`` elements at one step.

        Args:
            row: elements in the tensor's last dimension; the stride, in runs, shares no factor with it.
            ratio: smallest share of the elements to sample.
        """
        density = k / n
        size = sample_size(n, density, ratio)
        run = RUN if n // size >= RUN else 1
        stride = max(1, n // size)  # in runs, which thus stand at multiples of their own length
        while math.gcd(stride, row) > 1:
            stride -= 1
        start = ctx.draw(stride) * run
        stride *= run
        sampled = run * len(range(start, n - run + 1, stride))
        return Sampling(k, start, stride, run, min(sampled, math.ceil(MARGIN * density * sampled)), lower, attempts)

    def cut(self, sampled: Tensor, kernels: Kernels) -> Cut:
        threshold = kernels.kth(sampled, self.rank).clamp_(min=smallest(sampled.dtype))
        return Cut(threshold, self.k, self.lower, self.attempts)

    def select(self, x: Tensor, kernels: Kernels) -> Found:
        """About the k largest of ``x`` ``[n]``, and never more; see ``Kernels.look``."""
        return kernels.look(x, self.cut(runs(x, self.start, self.stride, self.run).abs_(), kernels))
