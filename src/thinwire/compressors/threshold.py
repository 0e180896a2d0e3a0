"""Selection by a threshold: a given one, or one from a distribution fitted to the magnitudes (SIDCo)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from thinwire.compressors.sparsifier import VALUES, Sparsifier
from thinwire.core import Context, register
from thinwire.core.checks import check_fields, one_of, optional, real, share, whole
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

    @property
    def _needs_feedback(self) -> bool:
        return True

    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        return bounded(x.abs(), self.threshold, k)


FIRST = 0.25
"""Share of the elements that pass the first of several stages."""


def exponential(a: Tensor, q: float) -> float:
    """Return the magnitude that a share q of ``a`` exceeds, by an exponential fit."""
    return -float(a.mean(dtype=torch.float64)) * math.log(q)


def pareto(a: Tensor, q: float) -> float:
    """Return the same by a generalised Pareto distribution, fitted to mean and variance."""
    mean = float(a.mean(dtype=torch.float64))
    variance = float(torch.square(a.double() - mean).mean())
    ratio = mean * mean / variance if variance > 0.0 else 1.0
    shape, scale = (ratio - 1.0) / 2.0, mean * (ratio + 1.0) / 2.0
    return -scale * math.log(q) if abs(shape) < 1e-6 else scale * -math.expm1(shape * math.log(q)) / shape


def gamma(a: Tensor, q: float) -> float:
    """Return the same by a gamma distribution, fitted to mean and mean logarithm."""
    some = a[a > 0].double()
    mean, share = float(a.mean(dtype=torch.float64)), some.numel() / max(a.numel(), 1)
    z = math.log(float(some.mean())) - float(some.log().mean()) if some.numel() else 0.0
    if not 1e-9 < z < math.inf or q >= share:
        return exponential(a, q)
    shape = (3.0 - z + math.sqrt((z - 3.0) ** 2 + 24.0 * z)) / (12.0 * z)
    low, high = 0.0, 1.0
    alpha = torch.tensor(shape, dtype=torch.float64, device="cpu")

    def tail(t: float) -> float:
        return float(cast(Tensor, torch.special.gammaincc(alpha, torch.full_like(alpha, t))))

    while tail(high) > q / share:
        high *= 2.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if tail(middle) > q / share else (low, middle)
    return mean / share / shape * high


FITS: dict[str, tuple[Callable[[Tensor, float], float], Callable[[Tensor, float], float]]] = {
    "exponential": (exponential, exponential),
    "gamma": (gamma, pareto),
    "pareto": (pareto, pareto),
}
"""The fit of the first stage and of the later stages, by name."""


def peeled(head: Tensor, floor: float, q: float, stages: int, fit: Callable[[Tensor, float], float]) -> float:
    """Return the threshold that a share ``q^stages`` of ``head`` exceeds, by a fit to each tail in turn."""
    for _ in range(stages):
        if head.numel() < 2:
            break
        floor = float(head.min())
        floor += fit(head - floor, q)
        head = head[head > floor]
    return floor


@register("sidco")
@dataclass(frozen=True)
class SIDCo(Sparsifier):
    """About the ``k = ceil(density * n)`` largest magnitudes, by a threshold that is fitted to them, in O(n).

    Exponential: ``tau = -mean ln p``. For small p the fit is repeated on the tail: a first stage at 1/4, then
    M - 1 stages of ``q = (4 p)^(1/(M-1))`` on the elements above the last threshold ("peaks over threshold").

    Args:
        density: kept / total, in (0, 1].
        stages: M, at least 1; None for the fewest that come within 20 % of k, up to ``ceil(log2(1 / density))``.
        fit: ``"exponential"``, ``"gamma"`` (then Pareto) or ``"pareto"``.
        values: see ``thinwire.compressors.TopK``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: that of ``TopK(density)``. At least one and at most k elements are sent; if more pass, the k largest.

    Example:
        >>> payload = SIDCo(0.01).compress(torch.randn(20_000), {}, NOWHERE)
        >>> 160 < payload[0].count_nonzero() <= 200
        tensor(True)

    Source: A. Abdelmoniem, A. Elzanaty, M. Alouini, M. Canini, "An Efficient Statistical-based Gradient Compression
    Technique for Distributed Training Systems", 2021, arXiv:2101.10761, algorithm 1.

    Departures: every call finds the number of stages from the counts, so there is no state; the reference adapts it
    every five calls. Logarithms skip zeros. At most k elements are sent.
    """

    density: float
    stages: int | None = None
    fit: Literal["exponential", "gamma", "pareto"] = "exponential"
    values: str | None = None

    def __post_init__(self) -> None:
        stages = optional(whole(1, hint=", or None to adapt it"))
        check_fields(self, density=share("0.01"), stages=stages, fit=one_of(*FITS), values=VALUES)

    def threshold(self, magnitude: Tensor, p: float) -> float:
        """Return the threshold that about a share ``p`` of ``magnitude`` reaches."""
        if p >= 1.0:
            return 0.0
        first, later = FITS[self.fit]
        most = max(1, math.ceil(-math.log2(p))) if self.stages is None else self.stages
        fewest = 1 if self.stages is None or p >= FIRST else self.stages
        best, miss = math.inf, math.inf
        head, floor = magnitude, 0.0
        for stages in range(fewest, most + 1):
            if stages == 1 or p >= FIRST:
                tau = first(magnitude, p)
            else:
                if head is magnitude:
                    floor = first(magnitude, FIRST)
                    head = magnitude[magnitude > floor]
                tau = peeled(head, floor, (p / FIRST) ** (1.0 / (stages - 1)), stages - 1, later)
            count = int((magnitude >= tau).count_nonzero()) / magnitude.numel()
            off = abs(math.log(max(count, 1e-300) / p))
            best, miss = (tau, off) if off < miss else (best, miss)
            if miss <= math.log1p(0.2):  # the count is within 20 % of k
                break
        return best

    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        magnitude, m = x.abs(), x.numel()
        if m == 0:
            return magnitude.new_empty(0, dtype=torch.int64)
        tau = self.threshold(magnitude, min(1.0, k / m)) if magnitude.isfinite().all() else 0.0  # NaN goes first
        return bounded(magnitude, tau, k)
