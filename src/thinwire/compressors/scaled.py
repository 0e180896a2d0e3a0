"""Scaled: an unbiased compressor, scaled down so that error feedback is stable."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from thinwire.core import Compressor, Context, Decompressed, Payload, State, ThinwireError, Traits, register
from thinwire.core.capabilities import Wrapper, title
from thinwire.core.checks import check_fields, of_type


@dataclass(frozen=True)
class Times(Decompressed):
    """Another decompressed payload, times a factor."""

    other: Decompressed
    factor: float
    density: float

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self.other.write_to(out, alpha * self.factor)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self.other.add_to(out, alpha * self.factor)

    def clear(self, out: Tensor) -> None:
        self.other.clear(out)

    def entries(self) -> tuple[Tensor, Tensor]:
        indices, values = self.other.entries()
        return indices, values * self.factor


@register("scaled")
@dataclass(frozen=True)
class Scaled(Wrapper):
    """An unbiased compressor for error feedback: ``C / (1 + omega)`` contracts where C alone may not.

    ``E||x - C(x) / (1 + omega)||^2 <= (1 - 1 / (1 + omega)) ||x||^2``.

    Args:
        compressor: an unbiased one, e.g. ``QSGD(2)``, ``RandK(0.01)``.

    Raises:
        ThinwireError: the compressor is biased.

    **Wire**: that of the compressor; all ranks know the factor.

    Example:
        >>> Scaled(RandK(0.25)).traits.contraction(1000)
        0.25

    Source: P. Richtarik, I. Sokolov, I. Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster
    Error Feedback", 2021, arXiv:2106.05203, section 2.

    Departures: none.
    """

    compressor: Compressor

    adjusts: ClassVar[str] = "compressor"

    def __post_init__(self) -> None:
        check_fields(
            self, compressor=of_type(Compressor, "Scaled takes an unbiased compressor, such as QSGD(2) or RandK(0.01)")
        )
        if self.compressor.traits.variance(2**20) is None:
            raise ThinwireError(
                f"{type(self.compressor).__name__} is biased, and so has no variance to scale by; "
                "Scaled takes an unbiased compressor, such as QSGD or RandK"
            )

    @cached_property
    def traits(self) -> Traits:
        inner = self.compressor.traits
        return Traits(
            summable=inner.summable, splittable=inner.splittable, min_ndim=inner.min_ndim, period=inner.period,
            keeps_values=inner.keeps_values, declines=inner.declines, warm_started=inner.warm_started,
            needs_feedback=True, contraction=self._factor, title=f"Scaled({title(self.compressor)})",
        )  # fmt: skip

    def _factor(self, n: int) -> float:
        return 1.0 / (1.0 + (self.compressor.traits.variance(n) or 0.0))

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        return self.compressor.compress(x, state, ctx)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        decoded = self.compressor.decompress(payload, like, state, ctx)
        return Times(decoded, self._factor(like.numel()), decoded.density)
