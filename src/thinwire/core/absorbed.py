"""What moves out of an SGD optimizer, and what a memory that takes it over says of itself."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Absorbed:
    """What an SGD optimizer did for one parameter, and a memory does now."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """Which of them there are: what a memory keeps depends on that, and not on how large they are."""
        return bool(self.momentum), self.nesterov, bool(self.weight_decay)


class Absorbing:
    """What a memory says of the settings that it has taken over; here, for one that takes none."""

    @property
    def absorbed(self) -> Absorbed | None:
        """What it does for an SGD optimizer; None for a memory that does nothing of it."""
        return None

    @property
    def rests(self) -> Set[str]:
        """What of its states no step changes, under the present settings."""
        return frozenset()

    def take_over(self, old: Any, local: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Go on from states of the same memory with other settings; what ``shared`` loses goes into ``local``."""
