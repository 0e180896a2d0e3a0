"""Selection of the k largest magnitudes, exactly or by a threshold from a sample.

Two rules hold everywhere: indices are ascending, and among equal magnitudes the lower index wins, so the result does
not depend on the sort algorithm. Elements are never dropped because of their position.

Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 5 (hierarchical sampling).

Departures: the sample has at least 43 elements above the threshold; the reference code accepts 10. It starts at a
different element in each step. The threshold is set so that about a third more than k elements should pass, so
at least k usually do. Of those that pass, the largest are kept; the reference code keeps the first.
"""

import math

import torch
from torch import Tensor

from thinwire.core import Context
from thinwire.core.loops import Found, Kernels, Selection
from thinwire.kernels.fixed_shapes import exactly
from thinwire.kernels.reference import runs

SAMPLED_AMONG = 32
"""Expected number of the k largest in a sample, at least."""
MARGIN = 1.35
"""Number of elements that should pass, as a multiple of k. The actual number varies by 0.2 k, and more if neighbours
are similar; if fewer than ``lower`` k pass, another pass over all elements is needed."""
RUN = 32
"""Adjacent elements per run of a sample: they load together, and a new memory page costs more than a cache line."""
EXACT_BELOW = 100_000
"""Number of elements below which an exact selection is as cheap."""


def largest_of_each(magnitude: Tensor, k: int) -> Tensor:
    """Return ascending flat indices, int64 ``[rows * k]``, of the k largest per row of ``magnitude`` ``[rows, n]``."""
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


def plan_sample(n: int, k: int, row: int, ctx: Context, *, ratio: float, lower: float, attempts: int) -> Selection:
    """Plan the sample of at least ``ratio n`` of ``n`` elements, of which the last dimension has ``row``."""
    density = k / n
    size = sample_size(n, density, ratio)
    run = RUN if n // size >= RUN else 1
    stride = max(1, n // size)  # in runs, so runs start at multiples of their length
    while math.gcd(stride, row) > 1:  # else the sample would see few columns
        stride -= 1
    start = ctx.draw(stride) * run
    stride *= run
    sampled = run * len(range(start, n - run + 1, stride))
    return Selection(k, start, stride, run, min(sampled, math.ceil(MARGIN * density * sampled)), lower, attempts)


def select_by_sample(x: Tensor, selection: Selection, kernels: Kernels) -> Found:
    """Select about the k largest of ``x`` ``[n]``, never more; see ``Kernels.look``."""
    return kernels.look(x, selection.cut(runs(x, selection.start, selection.stride, selection.run).abs_(), kernels))
