"""A look at the inner learning rate: a scheduler that steps once a round is mostly a mistake."""

from collections.abc import Iterable

ENOUGH = 3
"""Ends of rounds at which the rate must have changed, and never between them."""


class ScheduleWatch:
    """The changes of the inner learning rates over the first rounds."""

    def __init__(self) -> None:
        self._before: list[float] = []
        self._at_ends = 0
        self.done = False
        """True if there is nothing to find any more."""

    def look(self, rates: Iterable[float], first_of_round: bool) -> str | None:
        """Look at the rates of an inner step that was just made; returns a warning for the user, or None."""
        before, self._before = self._before, [float(rate) for rate in rates]
        if not before:
            return None
        if (self._before != before) != first_of_round:
            self.done = True
        self._at_ends += first_of_round
        if self.done or self._at_ends < ENOUGH:
            return None
        self.done = True
        return (
            f"the learning rate has changed at the end of each of {ENOUGH} rounds, and in no inner step: is its "
            "scheduler stepped once a round? Call scheduler.step() after every optimizer.step(), and count its length "
            "in inner steps"
        )
