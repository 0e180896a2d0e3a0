"""Warm-up: the density falls in stages before it reaches its final value.

Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 3.3.
"""

from dataclasses import dataclass

from thinwire.tensors import ThinwireError

PAPER = (0.25, 0.0625, 0.015625, 0.004)


@dataclass(frozen=True)
class Warmup:
    """Densities of the first steps, each for an equal part of them.

    Args:
        steps: length of the warm-up in optimizer steps, or in epochs where ``steps_per_epoch`` is given.
        stages: densities in (0, 1], by default the paper's 25 %, 6.25 %, 1.5625 %, 0.4 %. A stage that would
            send more bytes than a dense exchange is sent dense, and the ledger says so.
        steps_per_epoch: makes ``steps`` count epochs, e.g. ``Warmup(4, steps_per_epoch=len(loader))``. The paper warms
            up for 4 of 90 or 164 epochs, or 1 of 40; a single epoch is split in equal parts.

    Raises:
        ThinwireError: fewer steps than stages, or a density outside (0, 1].

    Example:
        >>> Warmup(steps=400).density(0), Warmup(steps=400).density(399), Warmup(steps=400).density(400)
        (0.25, 0.004, None)
    """

    steps: int
    stages: tuple[float, ...] = PAPER
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for density in self.stages:
            if not 0.0 < density <= 1.0:
                raise ThinwireError(f"warm-up stage {density} is not a density; each must be in (0, 1]")
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ThinwireError(f"steps_per_epoch is {self.steps_per_epoch}; it must be at least 1")
        if not self.stages or self.length < len(self.stages):
            raise ThinwireError(
                f"a warm-up of {self.length} steps can't hold {len(self.stages)} stages; "
                "give more steps, fewer stages, or no warm-up"
            )

    @property
    def length(self) -> int:
        """The warm-up's length in steps."""
        return self.steps * (self.steps_per_epoch or 1)

    def density(self, step: int) -> float | None:
        """The density of that step, None once the warm-up is over."""
        return self.stages[step * len(self.stages) // self.length] if step < self.length else None
