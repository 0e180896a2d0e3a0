"""Rare features: the tensors that stay dense, and a lower bound for frozen variances.

With one bit per element, every element of a block moves by the block's scale over the root of its own variance. For a
rare feature (a row of an embedding, a column of a bag of words) that root may be close to 0.

* A tensor is **sparse** if more than a quarter of its elements have no gradient in the last dense step, not counting
  elements that never had one. It continues as in dense training: its exchange is dense and its variance is updated.
* In other tensors, small variances are **raised** so that their root is at least a tenth of the mean root in their run
  of 4,096 elements. So no element moves by more than 10 times what is right for the run.
"""

import torch
from torch import Tensor

from thinwire.core import flat
from thinwire.core.sharding import own

QUIET = 1e-6
"""A squared gradient up to this share of its variance counts as 0; rounding errors are smaller."""
SPARSE = 0.25
LEAST = 0.1
"""Smallest root of a nonzero variance, as a share of the mean root in its run."""
RUN = 4096


def quiet(g: Tensor, v: Tensor) -> Tensor:
    """Count, of the elements that ever had a gradient, those without one now and all: int64 ``[2]``."""
    live = v > 0
    return torch.stack([(live & (g.square() <= v * QUIET)).sum(), live.sum()])


def is_sparse(counts: Tensor | None) -> bool:
    """Return True if the ``counts`` of ``quiet`` mean a sparse tensor; on CUDA the host waits."""
    return counts is not None and float(counts[0]) > SPARSE * float(counts[1])


def lifted(v: Tensor) -> tuple[Tensor, int]:
    """Raise small nonzero variances to the lower bound; returns them and the number raised. On CUDA the host waits."""
    part = flat(own(v))
    pieces = [part[: len(part) // RUN * RUN].view(-1, RUN), part[len(part) // RUN * RUN :].view(1, -1)]
    out = torch.empty_like(part)
    count, at = 0, 0
    for piece in pieces:
        roots = piece.sqrt()
        mean = roots.sum(1, keepdim=True) / (piece > 0).sum(1, keepdim=True).clamp(min=1)
        low = (roots < LEAST * mean) & (piece > 0)
        found = torch.where(low, (LEAST * mean).square(), piece)
        out[at : at + found.numel()] = found.view(-1)
        count, at = count + int(low.sum()), at + found.numel()
    return out, count
