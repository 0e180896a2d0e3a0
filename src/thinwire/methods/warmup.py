"""Warm-up: the density falls in stages to its final value.

Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 3.3.
"""

from dataclasses import dataclass
from typing import Any, cast

from thinwire.core import ThinwireError
from thinwire.core.checks import check_fields, optional, share, shown, whole

PAPER = (0.25, 0.0625, 0.015625, 0.004)


def _densities(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ThinwireError(f"{name} is {shown(value)}; it must be a list of densities, e.g. (0.25, 0.0625)")
    stages: list[float] = []
    for density in cast("list[Any]", value):
        try:
            stages.append(share("0.25")("it", density))
        except ThinwireError as error:
            raise ThinwireError(f"warm-up stage {shown(density)} is not a density; {error}") from None
    return tuple(stages)


@dataclass(frozen=True)
class Warmup:
    """Densities of the first steps, each for an equal number of steps.

    Args:
        steps: length of the warm-up in optimizer steps, or in epochs if ``steps_per_epoch`` is given.
        stages: densities in (0, 1], by default the paper's 25 %, 6.25 %, 1.5625 %, 0.4 %. A stage that would
            send more bytes than a dense exchange is sent dense, and the ledger notes it.
        steps_per_epoch: makes ``steps`` count epochs, e.g. ``Warmup(4, steps_per_epoch=len(loader))``. The paper warms
            up for 4 of 90 or 164 epochs, or 1 of 40; a single epoch is split into equal parts.

    Raises:
        ThinwireError: there are fewer steps than stages, or a density is outside (0, 1].

    Example:
        >>> Warmup(steps=400).density(0), Warmup(steps=400).density(399), Warmup(steps=400).density(400)
        (0.25, 0.004, None)
    """

    steps: int
    stages: tuple[float, ...] = PAPER
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps=whole(0, hint=", of optimizer steps, or of epochs with steps_per_epoch="),
            stages=_densities,
            steps_per_epoch=optional(whole(1, hint=", e.g. len(loader)")),
        )
        if not self.stages or self.length < len(self.stages):
            raise ThinwireError(
                f"a warm-up of {self.length} steps can't hold {len(self.stages)} stages; "
                f"give more steps, no warm-up, or fewer stages: thinwire.Warmup({self.steps}, (0.25,))"
            )

    @staticmethod
    def read(name: str, given: Any, stages: tuple[float, ...] = PAPER) -> "Warmup | None":
        """Read a ``warmup`` argument: a ``Warmup``, a number of steps (with ``stages``), or 0 or None for none."""
        if given is None or isinstance(given, Warmup):
            return given
        example = "give a number of steps, e.g. 400, or thinwire.Warmup(400, stages)"
        steps = whole(0, says=example)(name, given)
        return Warmup(steps, stages) if steps else None

    @property
    def length(self) -> int:
        """Length of the warm-up in steps."""
        return self.steps * (self.steps_per_epoch or 1)

    def density(self, step: int) -> float | None:
        """Return the density of that step, None after the warm-up."""
        return self.stages[step * len(self.stages) // self.length] if step < self.length else None
