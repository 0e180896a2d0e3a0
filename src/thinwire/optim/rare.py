"""Rare features: which tensors are not compressed, and how small a frozen variance may be.

With one bit an element, every element of a block moves by the block's scale over the root of its own variance. Where a
feature is rare, the row of an embedding or the column of a bag of words, that root may be next to nothing.

* A tensor is **sparse** where more than a quarter of its elements, those left out that never had a gradient, have none
  in the last dense step. It goes on as in dense training: its exchange is dense, its variance follows.
* Of the others, a variance is **lifted** to a hundredth of its run of 4,096 elements, in the mean of roots, so that no
  element moves by more than 10 times what is right for the run.
"""

import torch
from torch import Tensor

from thinwire.core.sharding import own
from thinwire.core.tensors import flat

QUIET = 1e-6
"""A squared gradient below this share of its variance is none: what rounding leaves is smaller."""
SPARSE = 0.25
LEAST = 0.1
"""Of the mean root of variances in a run."""
RUN = 4096


def quiet(g: Tensor, v: Tensor) -> Tensor:
    """How many elements have no gradient now, and how many ever had one: int64 ``[2]``."""
    live = v > 0
    return torch.stack([(live & (g.square() <= v * QUIET)).sum(), live.sum()])


def is_sparse(counts: Tensor | None) -> bool:
    """What follows from ``quiet``; waits."""
    return counts is not None and float(counts[0]) > SPARSE * float(counts[1])


def lifted(v: Tensor) -> tuple[Tensor, int]:
    """The variances, none but those of 0 below the least; and how many were. Waits."""
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
