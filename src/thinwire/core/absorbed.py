"""Settings that a memory takes over from an SGD optimizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Absorbed:
    """SGD settings of one parameter that a memory applies instead of the optimizer."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """The settings that are on; a memory's state tensors depend on that, not on the values."""
        return bool(self.momentum), self.nesterov, bool(self.weight_decay)
