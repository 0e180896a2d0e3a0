"""Hard thresholds, with a capacity that fixes the size of a message."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compressors.sparsifier import VALUES, Sparsifier
from thinwire.core.checks import check_fields, real, share
from thinwire.core.context import Context
from thinwire.core.interfaces import Traits
from thinwire.core.registry import register
from thinwire.kernels.reference import REFERENCE, at_least


def bounded(magnitude: Tensor, threshold: float, k: int) -> Tensor:
    """Return ascending indices of ``magnitude`` ``[n]`` not below ``threshold``: at least 1, at most the k largest."""
    chosen = at_least(magnitude, torch.tensor(threshold, dtype=torch.float64, device="cpu").to(magnitude))
    if chosen.numel() > k:
        return chosen[REFERENCE.largest(magnitude[chosen], k)]
    return chosen if chosen.numel() else REFERENCE.largest(magnitude, min(k, 1))


@register("threshold")
@dataclass(frozen=True)
class Threshold(Sparsifier):
    """Sends the elements whose magnitude is not below a threshold: at least one, and at most a capacity.

    ``decompress(compress(x))_j = x_j`` where ``|x_j| >= threshold``, 0 elsewhere; so
    ``max_j |x_j - C(x)_j| < threshold`` if at most ``k = ceil(capacity * n)`` elements reach it. If more do, the k
    largest are sent.

    Args:
        threshold: above 0, in the units of the gradient, without a loss scale.
        capacity: largest share of the elements to send, in (0, 1]; it fixes the size of the message.
        values: see ``thinwire.compressors.TopK``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: that of ``TopK(capacity)``, however many reach the threshold.

    Example:
        >>> x = torch.tensor([0.5, -3.0, 1.0, 2.0])
        >>> Threshold(2.5, capacity=0.5).decompress(
        ...     Threshold(2.5, capacity=0.5).compress(x, {}, NOWHERE), x, {}, NOWHERE).write_to(out := torch.empty(4))
        >>> out
        tensor([ 0., -3.,  0.,  0.])

    Source: A. Aji, K. Heafield, "Sparse Communication for Distributed Gradient Descent", 2017, arXiv:1704.05021;
    N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", 2015.

    Departures: the capacity, since a collective needs one size on all ranks.
    """

    threshold: float
    capacity: float
    values: str | None = None

    adjusts: ClassVar[str] = "capacity"

    def __post_init__(self) -> None:
        threshold = real(0.0, above=True, hint="; TopK(density) needs none")
        check_fields(self, threshold=threshold, capacity=share("0.01", "the most kept/total"), values=VALUES)

    @cached_property
    def traits(self) -> Traits:
        return replace(super().traits, needs_feedback=True)

    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        return bounded(x.abs(), self.threshold, k)
