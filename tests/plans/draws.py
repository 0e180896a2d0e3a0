"""Random choices, all of which follow from one seed."""

import random
from collections.abc import Sequence
from typing import Any


class Draw:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"plan {seed}")

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def weighted(self, **options: float) -> str:
        return self.random.choices(list(options), list(options.values()))[0]

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def some(self, of: Sequence[Any], most: int) -> list[Any]:
        return self.random.sample(list(of), self.between(1, min(most, len(of))))

    def maybe(self, p: float, **options: Sequence[Any]) -> dict[str, Any]:
        """Each option with probability p, and one of its values."""
        return {key: self.one(*values) for key, values in options.items() if self.chance(p)}
