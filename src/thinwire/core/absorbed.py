"""Settings that a memory takes over from an SGD optimizer."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


class Absorbing:
    """The part of a memory's interface about settings taken over; the defaults are for a memory that takes none."""

    @property
    def absorbed(self) -> Absorbed | None:
        """The SGD settings that this memory applies; None if it takes none over."""
        return None

    @property
    def rests(self) -> Set[str]:
        """The names of states that no step changes under the present settings."""
        return frozenset()

    def take_over(self, old: Any, local: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Convert the states of the same memory with other settings; what ``shared`` loses goes into ``local``."""
