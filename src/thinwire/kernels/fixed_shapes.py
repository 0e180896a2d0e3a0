"""Selection in fixed shapes: no size depends on a value, so on CUDA the host never waits for a size.

The k largest elements of a tensor are in the k blocks of largest maximum. So two exact selections of known size find
them: one among the maxima, one among the elements of those blocks. The elements that a threshold lets pass are among
these k; the others become padding, as in the message. The result has the same bits as with the other kernels.
"""

import math

import torch
from torch import Tensor

from thinwire.core.loops import Cut, Found
from thinwire.kernels.reference import BLOCK, Reference, kth_on_device


def exactly(magnitude: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Return a mask of k elements per row of ``[rows, n]``: those above its threshold and the first equal to it."""
    above, ties = magnitude > threshold, magnitude == threshold
    place = ties.cumsum(1, dtype=torch.int32 if magnitude.shape[1] < 2**31 else torch.int64)
    return above | (ties & (place <= k - above.sum(1, keepdim=True)))


class FixedShapes(Reference):
    """Kernels that select in fixed shapes, in plain PyTorch."""

    def look(self, x: Tensor, cut: Cut) -> Found:
        whole = x[: x.numel() // BLOCK * BLOCK]
        return self.within(x, whole.view(-1, BLOCK).abs().amax(1), cut)

    def within(self, x: Tensor, maxima: Tensor, cut: Cut) -> Found:
        """Compute ``look`` from known ``maxima`` of the magnitudes in all whole blocks."""
        indices, values = self._largest_of(x, maxima, cut.k)
        magnitude, levels = _finite(values.abs()), cut.levels()
        passed = (magnitude >= levels.unsqueeze(1)).sum(1)  # if below k, also the count over all of x
        which = (passed < cut.enough).sum().clamp_(max=cut.attempts)
        return self.fill(indices, values.masked_fill(magnitude < levels.gather(0, which.view(1)), 0.0), cut.k)

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        return kth_on_device(magnitude, k)

    def _chosen(self, magnitude: Tensor, threshold: Tensor, k: int) -> Tensor:
        chosen = exactly(_finite(magnitude).view(1, -1), threshold, k)
        return torch.nonzero_static(chosen.view(-1), size=k).view(-1)

    def _largest_of(self, x: Tensor, maxima: Tensor, k: int) -> Found:
        """Return the k elements of largest magnitude; the elements after the last whole block are always candidates."""
        whole = maxima.numel() * BLOCK
        if k >= maxima.numel():
            chosen = self.largest(x, k)
            return chosen, x[chosen]
        hot = self.largest(maxima, k)
        some = torch.cat([x[:whole].view(-1, BLOCK).index_select(0, hot).view(-1), x[whole:]])
        chosen = self.largest(some, k)
        in_blocks = hot[(chosen // BLOCK).clamp_(max=k - 1)] * BLOCK + chosen % BLOCK
        return torch.where(chosen < k * BLOCK, in_blocks, chosen + (whole - k * BLOCK)), some[chosen]

    def fill(self, indices: Tensor, values: Tensor, k: int) -> Found:
        missing = k - indices.numel()
        indices, values = (torch.nn.functional.pad(t, (0, missing)) for t in (indices, values))
        if not k:
            return indices, values
        there = values != 0  # True for NaN
        order = there.logical_not().to(torch.uint8).sort(stable=True).indices
        return torch.where(there, indices, indices.where(there, 0).amax())[order], values[order]


def _finite(magnitude: Tensor) -> Tensor:
    """Replace NaN by infinity, in place."""
    return magnitude.nan_to_num_(math.inf, math.inf)
